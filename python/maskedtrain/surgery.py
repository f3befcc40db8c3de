"""Sub-networks of any model: some of its ``nn.Linear`` layers learn of masks, in place."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maskedtrain.layers import LFCLinear, MaskedLinear, MaskedModule, Sum
from maskedtrain.layers.base import row_mask
from maskedtrain.layers.lfc import LFCInit
from maskedtrain.patterns import kind_of, linears_of, matching_linears
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.widths import Ratios
from partial_kernels import Block, Element, Mask, Prefix

__all__ = ["Heads", "check_layer", "layerwise_sum", "leave_fast_path", "lowrank", "width"]

# Blocks below a tensor core's tile cost more than they save.
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class Heads:
    """A group of ``width``: the first dimensions of every attention head, in query and key alike.

    Attention modules reshape what their projections give, so these keep their full width and its
    cost: weights and biases of the other dimensions count as zero. Attention scores sum over the
    dimensions left and are scaled as ever, by the module's own ``head_dim``. Rotary positions may
    pair a dimension that is left with one that is not.

    Args:
        query: pattern of the query projections' names, ``[query heads * head_dim, I]``.
        key: pattern of the key projections' names, ``[key heads * head_dim, I]``; there may be
            fewer key heads (grouped queries).
        head_dim: dimensions of one head.
    """

    query: str
    key: str
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim < 1:
            raise ValueError(f"head_dim must be >= 1, got {self.head_dim}")


def width(
    model: nn.Module,
    groups: Sequence[Sequence[str] | Heads],
    ratio: float | Mapping[str, float],
    *,
    name: str = "core",
    round_to: int = 16,
) -> SubNetwork:
    """The narrow network of the first ``ratio`` of some hidden widths; smaller ratios are nested.

    A group such as ``("*.fc1", "*.fc2")`` names producers and, last, their consumer: the
    sub-network keeps the first rows of the producers' weights and biases, and the consumer's
    columns of the same number. A gated MLP has two producers: ``("*.gate_proj", "*.up_proj",
    "*.down_proj")``. Layers belong together where the patterns' wildcards stand for the same text;
    what only the consumer's pattern matches stays as it is.
    Between producers and consumer only what works element by element may stand (activations,
    dropout, products of two producers); anything else meets a narrower tensor and raises, or, like
    a normalisation over the features, computes with fewer of them.

    The layers become ``MaskedLinear`` in place (an ``LFCLinear`` stays one): the same module
    objects with the same parameters, hooks, mode and ``state_dict`` keys. What reads their weights
    instead of calling them sees the whole weights; the inference fast path of
    ``nn.TransformerEncoder`` does, and is switched off.

    Args:
        model: any module.
        groups: patterns of module names, as in ``fnmatch``, or ``Heads`` for attention.
        ratio: in (0, 1], for all widths; or by pattern of the first producers' (or queries')
            names, where the first that matches counts and widths that none matches stay whole.
        name: what the sub-network is called.
        round_to: widths become multiples of it where the layers allow (see ``active_count``).

    Raises:
        ValueError: a pattern matches no ``nn.Linear``, layers of a group do not fit together, a
            layer is in two groups or tied to one outside. Nothing has changed then.
        TypeError: a layer that is more than an ``nn.Linear`` (a subclass, a parametrization).

    Example:
        >>> core = width(llama, [("*.gate_proj", "*.up_proj", "*.down_proj")], ratio=1/4)
    """
    if not groups:
        raise ValueError("groups must name the layers of at least one width, got none")
    kept = Ratios(ratio if isinstance(ratio, Mapping) else {"*": ratio}, round_to)
    cuts = _Cuts(model, kept)
    for group in groups:
        if isinstance(group, Heads):
            cuts.add_heads(group)
        else:
            cuts.add_width(group)
    kept.check_used()
    masks = cuts.masks()
    # Ties to what is outside the groups are found while nothing has changed.
    SubNetwork(model, masks, name=name)
    layers = cuts.layers()
    # The objects stay: parents, hooks and earlier sub-networks hold them.
    for layer in layers:
        if type(layer) is nn.Linear:
            layer.__class__ = MaskedLinear
    leave_fast_path(model, layers)
    SubNetwork.layers_changed(layers)
    return SubNetwork(model, masks, name=name)


def lowrank(
    model: nn.Module,
    targets: Sequence[str],
    ratio: float,
    *,
    name: str = "core",
    init: LFCInit = "variance_split",
) -> SubNetwork:
    """The network whose target layers are the low-rank part of what they are in the super-network.

    The layers become ``LFCLinear`` in place: ``y = x (W + V U)^T + b`` with new parameters u ``[K,
    I]`` and v ``[O, K]``, K = max(1, round(ratio * min(I, O))), beside the weight W ``[O, I]``. The
    sub-network is all of the model but the targets' W. As with ``width`` they stay the same module
    objects, with the same weight, bias and hooks, and torch's inference fast path is switched off.

    Layers that are ``LFCLinear`` already stay as they are: the sub-network has the first K rows of
    their u and columns of their v, nested in that of a larger ratio. Earlier sub-networks that have
    a target's weight have its u and v, too, from then on. Make the optimizer afterwards.

    Args:
        model: any module.
        targets: patterns of module names, as in ``fnmatch``; what they match beside ``nn.Linear``
            stays as it is.
        ratio: K as a share of the full rank, in (0, 1].
        name: what the sub-network is called.
        init: how new layers start, see ``LFCLinear.from_linear``.

    Raises:
        ValueError: a target matches no ``nn.Linear``, a weight is tied, or a layer has less than
            this rank. Nothing has changed then.
        TypeError: a layer that is more than an ``nn.Linear`` (a subclass, a parametrization).

    Source: "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022), LFC layers.

    Example:
        >>> core = lowrank(model, ["*.fc1", "*.q_proj"], ratio=1/32)
        >>> method = ATS([SubNetwork.full(model), core])
    """
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets must be a list of patterns, got {targets!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    layers = _targets(model, targets)
    masks: dict[str, Mask | None] = {}
    for layer_name, layer in layers.items():
        masks[f"{layer_name}.weight"] = None
        if isinstance(layer, LFCLinear):
            rank = _smaller_rank(layer_name, layer, ratio)
            masks[f"{layer_name}.u"] = Prefix(rank)
            masks[f"{layer_name}.v"] = Prefix(None, rank)
    # Ties to what is no target are found while nothing has changed.
    SubNetwork(model, masks, name=name)
    plain = dict.fromkeys(x for x in layers.values() if not isinstance(x, LFCLinear))
    for layer in plain:
        _become(layer, LFCLinear.from_linear(layer, ratio, init=init))
    leave_fast_path(model, plain)
    SubNetwork.layers_changed(plain)
    return SubNetwork(model, masks, name=name)


def layerwise_sum(
    model: nn.Module, extensions: Mapping[str, nn.Module], *, name: str = "core"
) -> SubNetwork:
    """The network there was, in one whose chosen layers add another's output to their own.

    Each chosen layer is replaced by ``Sum(core=layer, extension=other)``: ``y = layer(x) +
    other(x)``, in every place that the layer has in the model. The sub-network leaves the
    extensions out. Parameters get longer names (``fc.weight`` becomes ``fc.core.weight``): make
    other sub-networks, and the optimizer, afterwards. What reads a chosen layer's weight instead of
    calling it fails; torch's inference fast path of ``nn.TransformerEncoder`` is switched off.

    For low-rank cores there is ``lowrank``, whose layers compute the sum as one product.

    Args:
        model: any module.
        extensions: by the name of a module below the model, the module to add to it, with
            parameters that are not the model's.
        name: what the sub-network is called.

    Raises:
        ValueError: the model has no module of such a name, or an extension has no parameters or
            shares them with the model. Nothing has changed then.

    Source: section 3.4 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS
    2022).

    Example:
        >>> core = layerwise_sum(mlp, {"hidden.0": nn.Linear(784, 500)})
        >>> method = ATS([SubNetwork.full(mlp), core])
    """
    if not extensions:
        raise ValueError("extensions must name at least one layer, got none")
    layers = {n: module for n, module in model.named_modules(remove_duplicate=False) if n}
    owned = set(model.parameters())
    added: set[nn.Parameter] = set()
    sums: dict[nn.Module, Sum] = {}
    for layer_name, extension in extensions.items():
        layer = layers.get(layer_name)
        if layer is None or layer in sums:
            problem = "has no module" if layer is None else "has another extension for"
            raise ValueError(f"the model {problem} {layer_name!r}")
        parameters = set(extension.parameters())
        if not parameters or parameters & owned:
            raise ValueError(
                f"the extension of {layer_name} must have parameters, none of them the model's"
            )
        added |= parameters
        sums[layer] = Sum(core=layer, extension=extension)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module in sums:
                parent._modules[child] = sums[module]
    leave_fast_path(model, sums.values())
    named = model.named_parameters(remove_duplicate=False)
    return SubNetwork(model, {n: None for n, p in named if p in added}, name=name)


def _targets(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear]:
    """The layers that one of the patterns matches, by each of their names."""
    linears = linears_of(model)
    names = dict.fromkeys(
        n for pattern in patterns for n in matching_linears(model, pattern).values()
    )
    owners: dict[Tensor, nn.Linear] = {}
    for name in names:
        layer = linears[name]
        check_layer(name, layer, LFCLinear)
        if owners.setdefault(layer.weight, layer) is not layer:
            raise ValueError(f"{name}.weight is tied to another layer's; leave one of them out")
    return {name: linears[name] for name in names}


def _smaller_rank(name: str, layer: LFCLinear, ratio: float) -> int:
    rank = max(1, round(ratio * min(layer.weight.shape)))
    if rank > layer.rank:
        raise ValueError(
            f"{name} has rank {layer.rank} already; ratio must be <= "
            f"{layer.rank / min(layer.weight.shape):g}, got {ratio}"
        )
    return rank


def _become(layer: nn.Linear, other: nn.Linear) -> None:
    """Make a layer another one over the same parameters, as the object it is."""
    added = {name: value for name, value in vars(other).items() if name not in vars(layer)}
    vars(layer).update(added)
    layer._parameters.update(other._parameters)
    layer.__class__ = type(other)


class _Cuts:
    """How many rows and columns of which layers a narrow network keeps."""

    def __init__(self, model: nn.Module, kept: Ratios) -> None:
        self.model = model
        self.kept = kept
        self.linears = linears_of(model)
        self.rows: dict[str, int] = {}
        self.cols: dict[str, int] = {}
        # (head_dim, kept dimensions) of layers that keep their shape.
        self.heads: dict[str, tuple[int, int]] = {}

    def add_width(self, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str) or len(patterns) < 2:
            raise ValueError(f"a group must be producers and their consumer, got {patterns!r}")
        for *producers, consumer in self._aligned(patterns, spare=True):
            size = self.linears[consumer].in_features
            count = self.kept(producers[0], size)
            for producer in producers:
                if (features := self.linears[producer].out_features) != size:
                    raise ValueError(
                        f"{producer} must give the {size} features that {consumer} takes, "
                        f"got {features}"
                    )
                check_layer(producer, self.linears[producer], LFCLinear)
                self._claim(producer, self.rows)
                self.rows[producer] = count
            check_layer(consumer, self.linears[consumer], LFCLinear)
            self._claim(consumer, self.cols)
            self.cols[consumer] = count

    def add_heads(self, group: Heads) -> None:
        for pair in self._aligned((group.query, group.key), spare=False):
            dims = self.kept(pair[0], group.head_dim)
            for projection in pair:
                if (features := self.linears[projection].out_features) % group.head_dim:
                    raise ValueError(
                        f"{projection} must give a multiple of head_dim = {group.head_dim} "
                        f"features, got {features}"
                    )
                check_layer(projection, self.linears[projection])
                self._claim(projection, self.rows, self.cols)
                self.heads[projection] = group.head_dim, dims

    def _aligned(self, patterns: Sequence[str], *, spare: bool) -> list[tuple[str, ...]]:
        """Names of the layers that belong together, in the patterns' order; with ``spare`` the last
        pattern may match others, too.
        """
        first, *others = (matching_linears(self.model, pattern) for pattern in patterns)
        for i, names in enumerate(others, start=1):
            lone = first.keys() - names.keys()
            if not spare or i < len(others):
                lone |= names.keys() - first.keys()
            for text in sorted(lone):
                has, lacks = (0, i) if text in first else (i, 0)
                raise ValueError(
                    f"{(first | names)[text]} matches {patterns[has]!r}, but no nn.Linear matches "
                    f"{patterns[lacks]!r} likewise"
                )
        return [(name, *(names[text] for names in others)) for text, name in first.items()]

    def _claim(self, layer: str, *taken: Mapping[str, object]) -> None:
        if any(layer in axis for axis in (*taken, self.heads)):
            raise ValueError(f"{layer} must be in one group once")

    def layers(self) -> list[nn.Linear]:
        return [self.linears[name] for name in {**self.rows, **self.cols, **self.heads}]

    def masks(self) -> dict[str, Mask | None]:
        weights: dict[str, Mask] = {
            name: Prefix(self.rows.get(name), self.cols.get(name))
            for name in {**self.rows, **self.cols}
        }
        masks: dict[str, Mask | None] = {}
        for name, mask in weights.items():
            masks[f"{name}.weight"] = mask
            if self.linears[name].bias is not None:
                masks[f"{name}.bias"] = row_mask(mask)
        for name, (head_dim, dims) in self.heads.items():
            layer = self.linears[name]
            masks[f"{name}.weight"] = _head_mask(layer, head_dim, dims)
            if layer.bias is not None:
                masks[f"{name}.bias"] = Element(torch.arange(layer.out_features) % head_dim < dims)
        return masks


def _head_mask(layer: nn.Linear, head_dim: int, dims: int) -> Mask:
    """The first ``dims`` of every ``head_dim`` rows of the layer's weight, zeros elsewhere."""
    size = math.gcd(head_dim, dims)
    if size < _SMALLEST_BLOCK:
        size = 1
    kept = torch.arange(0, layer.out_features, size) % head_dim < dims
    tiles = kept[:, None].expand(-1, -(-layer.in_features // size))
    return Element(tiles) if size == 1 else Block(tiles, size)


def check_layer(name: str, layer: nn.Linear, *also: type[nn.Linear]) -> None:
    """Raise unless all that the layer does is what its class and parameters say."""
    if type(layer) not in (nn.Linear, MaskedLinear, *also):
        raise TypeError(
            f"{name} is a {kind_of(layer)}, whose behaviour would be lost; leave it out"
        )
    if "forward" in vars(layer):
        raise TypeError(f"{name} has a forward of its own, which would be lost; leave it out")
    if not {"weight", "bias"} <= layer._parameters.keys():
        raise TypeError(
            f"{name} computes its weight or bias from {', '.join(layer._parameters)} (a weight "
            "norm, pruning); make it a plain parameter first"
        )
    if isinstance(layer, MaskedModule) and layer.active is not None:
        raise RuntimeError(f"{name} has an active sub-network; leave its activate() first")


def leave_fast_path(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Have torch's Transformer encoders call these layers instead of reading their weights."""
    changed = set(layers)
    for module in model.modules():
        # In both classes an attribute that serves to choose the fast path alone.
        if isinstance(module, nn.TransformerEncoderLayer) and changed & set(module.modules()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and changed & set(module.modules()):
            module.use_nested_tensor = False
