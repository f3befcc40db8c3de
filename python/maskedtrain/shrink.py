"""Neurons taken out of a model in place: parameters get smaller, and what knew their shapes
follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from maskedtrain.layers import MaskedLinear, TopKLinear
from maskedtrain.optim.regions import RegionCounts
from maskedtrain.patterns import kind_of
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Element, Full, Index, Mask, Prefix

__all__ = ["check_widths", "take_neurons"]


def take_neurons(
    model: nn.Module, kept: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> None:
    """Reduce widths of a model to some of their neurons, in place.

    The layer that makes the neurons loses rows of its weight and elements of its bias, the layers
    that take them lose columns: outputs are those of the model with the lost columns zero.

    Parameters stay the same objects, with their hooks and their places in the optimizer; those that
    change have no gradient afterwards. What the optimizer knows of the elements that are left is
    what it was, bit for bit. Every sub-network follows: it has what is left of its part.

    Not reached are modules extracted with ``share=True``, CUDA graphs and
    ``DistributedDataParallel`` wrappers that were made before: they hold the former memory. A
    compiled model is compiled again.

    Args:
        model: one with ``width_masks(kept)``, as for ``SubNetwork.width``.
        kept: by name of the width, int64 positions of the neurons that stay, in increasing order.
            A -1 among them is a new neuron, all of whose weights are 0: the structure for weights
            that are loaded next.
        optimizer: its state follows; any whose state has the parameters' shapes.

    Raises:
        ValueError: there is no such width or neuron; a parameter is tied to one that would keep its
            shape; the optimizer's state has other shapes than its parameters; or neurons would be
            new where there is an optimizer or a sub-network has a part of the layer.
        TypeError: neurons of a width cannot be taken out; see ``check_widths``.
        RuntimeError: a sub-network is active.
            Whatever is raised, nothing has changed.

    Example:
        >>> take_neurons(mlp, {"hidden.0": torch.arange(0, 500, 2)}, optimizer)
    """
    layers = _layers(model, kept)
    for layer, width in layers.rows.items():
        _check_positions(width, kept[width], layer.out_features, grow=optimizer is None)
    parts = layers.parts(kept)
    masks = _masks_left(parts)
    state = {} if optimizer is None else _state_left(optimizer, parts)
    with torch.no_grad():
        for parameter, part in parts.items():
            parameter.grad = None
            # Unlike an assignment to .data, autograd notices it.
            parameter.set_(part.of(parameter.detach()))  # pyright: ignore[reportArgumentType, reportCallIssue]
    for layer in (*layers.rows, *layers.cols):
        layer.out_features, layer.in_features = layer.weight.shape
    for subnet, given in masks.items():
        subnet.change(given)
    if optimizer is not None:
        # As after unpickling: nothing that was made of the former state is left.
        optimizer.__setstate__({"state": state})


def check_widths(model: nn.Module, widths: Iterable[str]) -> dict[str, nn.Linear]:
    """The layer that makes each of these widths, all of whose neurons ``take_neurons`` can take.

    Raises:
        ValueError: there is no such width.
        TypeError: the model has no ``width_masks(kept)``, or a neuron is not one row of one plain
            linear layer and one column of others, as channels of convolutions, dimensions of
            attention heads, neurons along skip connections and normalised ones are not.
    """
    return {width: layer for layer, width in _layers(model, widths).rows.items()}


@dataclass(frozen=True)
class _Part:
    """Positions of the rows and columns that are left: None is all, -1 a new one."""

    rows: Tensor | None
    cols: Tensor | None = None

    def of(self, tensor: Tensor) -> Tensor:
        for axis, positions in enumerate((self.rows, self.cols)):
            if positions is not None:
                index = positions.to(tensor.device)
                tensor = tensor.index_select(axis, index.clamp(min=0))
                tensor.index_fill_(axis, (index < 0).nonzero().flatten(), 0)
        return tensor

    def of_mask(self, mask: Mask, shape: Sequence[int]) -> Mask:
        """The mask of what is left of a parameter of this shape."""
        if isinstance(mask, Full):
            return mask
        if any(index is not None and bool((index < 0).any()) for index in (self.rows, self.cols)):
            raise ValueError(f"new neurons would be neither inside nor outside the mask {mask}")
        if isinstance(mask, Prefix):
            return Prefix(_below(self.rows, mask.rows), _below(self.cols, mask.cols))
        if isinstance(mask, Index):
            return Index(_among(self.rows, mask.rows), _among(self.cols, mask.cols))
        return Element(Index(self.rows, self.cols).restrict(mask.dense(shape)))


def _below(positions: Tensor | None, count: int | None) -> int | None:
    """How many of the positions are among the first so many."""
    if positions is None or count is None:
        return count
    return int((positions < count).sum())


def _among(positions: Tensor | None, index: Tensor | None) -> Tensor | None:
    """Where those of the positions are that the index holds."""
    if positions is None or index is None:
        return index
    return torch.isin(positions, index.to(positions.device)).nonzero().flatten()


@dataclass(frozen=True)
class _Layers:
    """The layers that have neurons of some widths: which width their rows are, and their
    columns.
    """

    rows: dict[nn.Linear, str]
    cols: dict[nn.Linear, str]

    def parts(self, kept: Mapping[str, Tensor]) -> dict[Tensor, _Part]:
        """What is left of their parameters."""
        found: dict[Tensor, _Part] = {}
        for layer in (*self.rows, *self.cols):
            rows = kept[self.rows[layer]] if layer in self.rows else None
            cols = kept[self.cols[layer]] if layer in self.cols else None
            found[layer.weight] = _Part(rows, cols)
            if layer.bias is not None and rows is not None:
                found[layer.bias] = _Part(rows)
        return found


def _layers(model: nn.Module, widths: Iterable[str]) -> _Layers:
    found = _Layers({}, {})
    for width in widths:
        # Refuses ties to what would keep its shape.
        first = SubNetwork.neurons(model, {width: torch.arange(1)}, name=width)
        makers: list[str] = []
        takers: list[str] = []
        for name, mask in first.masks.items():
            shape = model.get_parameter(name).shape
            if mask is None or (not isinstance(mask, Index) and mask.numel(shape) == shape.numel()):
                continue
            owner, _, own = name.rpartition(".")
            layer = _plain(width, owner, model.get_submodule(owner))
            if not isinstance(mask, Index) or not (_one(mask.rows) and _one(mask.cols)):
                raise TypeError(f"a neuron of {width} is more than a row or column of {name}")
            # A bias follows its weight.
            if mask.rows is not None and own == "weight":
                makers.append(owner)
                found.rows[layer] = width
            if mask.cols is not None:
                takers.append(owner)
                found.cols[layer] = width
        if len(makers) != 1 or not takers:
            raise TypeError(
                f"neurons of {width} must be rows of one linear layer and columns of others, got "
                f"rows of {', '.join(makers) or 'none'}, columns of {', '.join(takers) or 'none'}"
            )
    return found


def _one(index: Tensor | None) -> bool:
    return index is None or index.tolist() == [0]


def _plain(width: str, name: str, layer: nn.Module) -> nn.Linear:
    if type(layer) not in (nn.Linear, MaskedLinear, TopKLinear) or "forward" in vars(layer):
        raise TypeError(
            f"neurons of {width} must be those of plain linear layers, got {name}, a "
            f"{kind_of(layer)}"
        )
    assert isinstance(layer, nn.Linear)
    if isinstance(layer, MaskedLinear) and layer.active is not None:
        raise RuntimeError(f"{name} has an active sub-network; leave its activate() first")
    return layer


def _check_positions(width: str, positions: Tensor, total: int, *, grow: bool) -> None:
    if not len(positions):
        raise ValueError(f"{width} must keep at least one neuron")
    inside = positions[positions >= 0] if grow else positions
    try:
        Index(inside).check((total,))
    except ValueError as error:
        raise ValueError(f"{width} has {total} neurons: {error}") from None


def _masks_left(
    parts: Mapping[Tensor, _Part],
) -> dict[SubNetwork, dict[str, Mask | None]]:
    """The masks that give each sub-network what is left of its part, where it has one."""
    found: dict[SubNetwork, dict[str, Mask | None]] = {}
    for subnet in list(SubNetwork._alive):
        masks = dict(subnet._given)
        for name, parameter in subnet.model.named_parameters(remove_duplicate=False):
            mask = masks.get(name)
            if mask is not None and parameter in parts:
                masks[name] = parts[parameter].of_mask(mask, parameter.shape)
                found[subnet] = masks
    return found


def _state_left(optimizer: Optimizer, parts: Mapping[Tensor, _Part]) -> Any:
    """The optimizer's state, by parameter, with what is left of these."""
    # What is pickled says all: counts on a device are in it.
    state = optimizer.__getstate__()["state"].copy()
    for parameter, part in parts.items():
        if parameter in state:
            entry = state[parameter].items()
            state[parameter] = {n: _entry_left(n, value, parameter, part) for n, value in entry}
    return state


def _entry_left(name: str, value: Any, parameter: Tensor, part: _Part) -> Any:
    if isinstance(value, RegionCounts):
        left, masks = Index(part.rows, part.cols), value.masks
        state = value.state()
        if masks is not None:
            state["masks"] = [part.of_mask(mask, parameter.shape).state() for mask in masks]
        return RegionCounts.from_state(state, left.restricted_shape(parameter.shape))
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return part.of(value)
    if value is None or isinstance(value, int | float) or getattr(value, "ndim", 1) == 0:
        return value
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"the optimizer's {name} must have its parameter's shape, {list(parameter.shape)}, or be a "
        f"number, to follow, got {shape}"
    )
