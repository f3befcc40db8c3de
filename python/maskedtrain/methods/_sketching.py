"""Random sketches of a network's parameters: what a draw keeps, how that is scaled, and the network
at ``v + S (x - v)``.

``maskedtrain.theory.sketches`` has the same distributions over the coordinates of a vector, with
their constants.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor, nn

from maskedtrain.layers import MaskedConv2d, MaskedLinear, SwitchNorm, TopKLinear
from maskedtrain.layers.topk import kept_count
from maskedtrain.methods._draws import scaled, seeded
from maskedtrain.methods._neurons import neurons_of
from maskedtrain.methods.largest import only as only_these
from maskedtrain.patterns import matching_names
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Element, Full, Index, Mask

__all__ = ["BernoulliSketch", "Draw", "NetworkSketch", "RandKSketch", "Sketcher", "Unit"]

Unit = Literal["element", "neuron"]

Point = Mapping[nn.Parameter, Tensor]
"""Values for every parameter of the network."""


@dataclass(frozen=True)
class NetworkSketch:
    """A distribution of random diagonal matrices S over a network's parameters, E[S] = I.

    Units are kept or dropped. The entry of S for an element of a parameter is

        s_e = 1 / P(e is kept)      where every unit that e belongs to is kept,  0 elsewhere.

    With ``unit="element"`` each element is a unit, weights, biases and norms alike. With "neuron"
    the units are the neurons of the model's widths, drawn for every width by itself: an element
    belongs to the neuron of its row and to that of its column. So the bias of a neuron that is kept
    with probability p has 1/p; a weight between inputs, or outputs of the network, and such a
    neuron 1/p; a weight between neurons of two widths 1/(p p'), since both must be kept; and what
    belongs to no neuron is always kept, with 1.

    Args:
        unit: what is kept or dropped.
        only: patterns (``fnmatch``) of the names of the parameters ("element") or of the widths
            ("neuron") that are sketched; elsewhere S = 1.

    Raises:
        ValueError: an option is out of range.
    """

    unit: Unit = field(default="element", kw_only=True)
    only: Sequence[str] = field(default=("*",), kw_only=True)

    def __post_init__(self) -> None:
        if self.unit not in ("element", "neuron"):
            raise ValueError(f'unit must be "element" or "neuron", got {self.unit!r}')
        if isinstance(self.only, str) or not self.only:
            raise ValueError(f"only must be a list of patterns, got {self.only!r}")

    def keep(self, total: int, generator: torch.Generator) -> Tensor:
        """Which of ``total`` units a draw keeps: bool [total], on the generator's device."""
        raise NotImplementedError

    def chance(self, total: int) -> float:
        """The probability of each of ``total`` units to be kept."""
        raise NotImplementedError

    def typical(self, total: int) -> int:
        """How many of ``total`` units a draw keeps, about."""
        return max(1, round(self.chance(total) * total))


@dataclass(frozen=True)
class BernoulliSketch(NetworkSketch):
    """Every unit is kept with probability p, independently of the others.

    Args:
        p: in (0, 1].
        unit, only: as of ``NetworkSketch``.
    """

    p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        # Written so that NaN is refused, too.
        if not 0 < self.p <= 1:
            raise ValueError(f"p must be in (0, 1], got {self.p}")

    def keep(self, total: int, generator: torch.Generator) -> Tensor:
        kept = torch.empty(total, dtype=torch.bool, device=generator.device)
        return kept.bernoulli_(self.p, generator=generator)

    def chance(self, total: int) -> float:
        return float(self.p)


@dataclass(frozen=True)
class RandKSketch(NetworkSketch):
    """K units are kept, every set of K equally likely: of all elements together, of the neurons of
    each width.

    Args:
        k: an int is how many, a float in (0, 1] their share (at least one).
        unit, only: as of ``NetworkSketch``.
    """

    k: int | float

    def __post_init__(self) -> None:
        super().__post_init__()
        kept_count(self.k, 1)

    def keep(self, total: int, generator: torch.Generator) -> Tensor:
        # A random permutation of 0..total-1 puts the numbers below K in a uniformly random set of
        # places.
        order = torch.randperm(total, generator=generator, device=generator.device)
        return order < kept_count(self.k, total)

    def chance(self, total: int) -> float:
        return kept_count(self.k, total) / total


@dataclass(frozen=True, eq=False)
class Draw:
    """One S of a network: ``scales[parameter]`` where ``support`` keeps an element, 0 elsewhere; 1
    all over a parameter without a scale.
    """

    support: SubNetwork
    """The elements where S is not 0."""
    scales: Mapping[nn.Parameter, float]
    shift: Point | None
    """v; None is 0."""
    factors: Mapping[nn.Module, tuple[float, float]] | None
    """What the layers' inputs and outputs are multiplied by where the kept neurons alone are
    computed; None where the whole network is."""

    def diagonal(self, parameter: nn.Parameter) -> Tensor:
        """S on one parameter, in its shape and dtype."""
        mask = self.support.mask_of(parameter)
        if mask is None or parameter not in self.scales:
            return torch.full_like(parameter, 0.0 if mask is None else 1.0, requires_grad=False)
        inside = mask.dense(parameter.shape, parameter.device)
        return inside.to(parameter.dtype) * self.scales[parameter]

    def network(self, name: str) -> SubNetwork:
        """What runs within ``at()``: the kept neurons alone, or the whole network."""
        model = self.support.model
        return SubNetwork(model, self.support.masks if self.factors is not None else {}, name=name)

    @contextmanager
    def at(self, point: Point | None = None) -> Generator[None]:
        """Within it ``network`` computes ``f(v + S (y - v))``, and gradients of the parameters are
        multiplied by S. The parameters come back from it bit for bit.

        Args:
            point: y; x, the parameters as they are, where not given.
        """
        parameters = list(self.scales if point is None else point)
        if self.factors is not None:
            # Autograd multiplies the gradients.
            with scaled(self.factors), _moved([] if point is None else parameters, point):
                yield
            return
        trained = [parameter for parameter in self.scales if parameter.requires_grad]
        # Before autograd adds a pass to what others left in parameter.grad.
        hooks = [p.register_hook(partial(self._on_support, p)) for p in trained]
        try:
            with _moved(parameters, point, self._sketched):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _on_support(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """S times these values of a parameter."""
        mask = cast("Mask", self.support.mask_of(parameter))
        inside = mask.laid_out(parameter.shape, parameter.device)
        return torch.where(inside, values * self.scales[parameter], 0.0)

    def _sketched(self, parameter: nn.Parameter, y: Tensor) -> Tensor:
        """v + S (y - v)."""
        if parameter not in self.scales:
            return y
        if self.shift is None:
            return self._on_support(parameter, y)
        v = self.shift[parameter].to(y.device)
        return v + self._on_support(parameter, y - v)


class Sketcher:
    """Draws sketches of one model from one distribution.

    Neuron sketches around v = 0 give draws that compute the kept neurons alone: where S drops a
    neuron, its row and its column are 0. Layers then scale their inputs and outputs, which costs
    less than to scale weights; they must be linear, convolutions or norms. Of a draw that keeps
    nothing of a width, and around any other v, the whole network is computed.

    Args:
        model: the network.
        sketch: the distribution.
        shift: v; None is 0.
        name: of the supports.

    Raises:
        ValueError: a pattern matches nothing, or a layer's rows or columns are not neurons of one
            width each.
        TypeError: the model has no widths, or a layer is none of those above.
    """

    def __init__(
        self, model: nn.Module, sketch: NetworkSketch, shift: Point | None, *, name: str
    ) -> None:
        self.model, self.sketch, self.shift, self.name = model, sketch, shift, name
        full = SubNetwork.full(model)
        self._parameters = [p for p in model.parameters() if full.mask_of(p) is not None]
        self._totals: dict[str, int] = {}
        self._elements: list[nn.Parameter] = []
        if sketch.unit == "neuron":
            neurons = neurons_of(model)
            self._totals = {
                width: neurons[width].total
                for width in matching_names("only", sketch.only, neurons, "width of neurons")
            }
            self.scales = self._neuron_scales()
        else:
            own = set(self._parameters)
            names = model.named_parameters(remove_duplicate=False)
            named = {n: parameter for n, parameter in names if parameter in own}
            chosen = {named[n] for n in matching_names("only", sketch.only, named, "parameter")}
            self._elements = [p for p in self._parameters if p in chosen]
            self._size = sum(parameter.numel() for parameter in self._elements)
            self.scales = dict.fromkeys(self._elements, 1 / sketch.chance(self._size))
        compact = sketch.unit == "neuron" and shift is None
        self._factors = _factors(model, self.scales) if compact else None

    def _neuron_scales(self) -> dict[nn.Parameter, float]:
        """1 / P(kept) of a parameter's elements: the product over the widths that cut it."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        scales: dict[nn.Parameter, float] = {}
        for width, total in self._totals.items():
            first = SubNetwork.neurons(self.model, {width: torch.arange(1)}, name=width)
            cut = {named[n]: (n, m) for n, m in first.masks.items() if isinstance(m, Index)}
            for parameter, (name, mask) in cut.items():
                if mask.numel(parameter.shape) * total != parameter.numel():
                    raise ValueError(
                        f"neuron sketches need layers whose rows, or columns, are the {total} "
                        f"neurons of {width!r}; of {name} {list(parameter.shape)} one neuron "
                        f"keeps {list(mask.restricted_shape(parameter.shape))}"
                    )
                scales[parameter] = scales.get(parameter, 1.0) / self.sketch.chance(total)
        return scales

    def draw(self, *key: int | str) -> Draw:
        """The S of a key, such as a seed and a step: the same at each call."""
        if self.sketch.unit == "neuron":
            generator = seeded("cpu", *key)
            kept = {
                width: self.sketch.keep(total, generator).nonzero().flatten()
                for width, total in self._totals.items()
            }
            return self._of(kept)
        # Of two kinds of devices the draws differ.
        generator = seeded(self._elements[0].device, *key)
        parts = self.sketch.keep(self._size, generator).split([p.numel() for p in self._elements])
        masks: dict[nn.Parameter, Mask | None] = dict.fromkeys(self._parameters, Full())
        for parameter, part in zip(self._elements, parts, strict=True):
            masks[parameter] = Element(part.view(parameter.shape).to(parameter.device))
        support = only_these(self.model, masks, self.name)
        return Draw(support, self.scales, self.shift, None)

    def typical(self) -> SubNetwork:
        """What a draw computes, about, to count on what it costs."""
        if self._factors is None:
            return SubNetwork.full(self.model, name=self.name)
        kept = {width: torch.arange(self.sketch.typical(n)) for width, n in self._totals.items()}
        return self._of(kept).support

    def _of(self, kept: Mapping[str, Tensor]) -> Draw:
        support = SubNetwork.neurons(self.model, kept, name=self.name)
        # Layers do not compute with nothing.
        some = all(len(neurons) for neurons in kept.values())
        return Draw(support, self.scales, self.shift, self._factors if some else None)


_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, MaskedLinear, MaskedConv2d, TopKLinear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, SwitchNorm)


def _factors(
    model: nn.Module, scales: Mapping[nn.Parameter, float]
) -> dict[nn.Module, tuple[float, float]]:
    """What to multiply a layer's inputs and outputs by in the place of its parameters.

    ``c W x + k b = k (W (x c / k) + b)``, and a norm's output is linear in its weight and bias.
    """
    factors: dict[nn.Module, tuple[float, float]] = {}
    for name, module in model.named_modules():
        own = {n: scales.get(p, 1.0) for n, p in module.named_parameters(recurse=False)}
        if all(scale == 1 for scale in own.values()):
            continue
        weight = own.get("weight", 1.0)
        bias = own.get("bias", weight)
        if type(module) in _PRODUCTS and own.keys() <= {"weight", "bias"}:
            factors[module] = weight / bias, bias
        elif type(module) in _NORMS and weight == bias:
            factors[module] = 1.0, bias
        else:
            raise TypeError(
                f"neuron sketches around 0 scale linear layers, convolutions and norms; {name} is "
                f"a {type(module).__name__}: give the shift as tensors to compute it whole"
            )
    return factors


@contextmanager
def _moved(
    parameters: Iterable[nn.Parameter],
    point: Point | None,
    value: Callable[[nn.Parameter, Tensor], Tensor] = lambda _, y: y,
) -> Generator[None]:
    """Within it the parameters hold ``value(parameter, y)``, y of the point or their own."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        with torch.no_grad():
            for parameter in parameters:
                before.append((parameter, parameter.detach().clone()))
                y = parameter.detach() if point is None else point[parameter]
                parameter.copy_(value(parameter, y))
        yield
    finally:
        with torch.no_grad():
            for parameter, held in before:
                parameter.copy_(held)
