"""Dropout as partial SGD: every step trains a part of the network that is drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from maskedtrain.layers import MaskedConv2d, MaskedLinear
from maskedtrain.methods._draws import scaled, seeded
from maskedtrain.methods._neurons import neurons_of
from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.patterns import matching_names
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.widths import active_count
from partial_kernels import Element

__all__ = ["Config", "Count", "Drop", "ElementDropout", "NeuronDropout"]

Count = Literal["exact", "bernoulli"]
Drop = Literal["neurons", "weights"]


class _Dropout(Method):
    """Step t runs and updates the part of the network drawn from ``(seed, t)``, called "dropout".

    Args:
        typical: a network that costs what a drawn one does.
        seed: of the draws.
        scales: factors of the inputs of layers.
    """

    def __init__(self, typical: SubNetwork, seed: int, scales: Mapping[nn.Module, float]) -> None:
        self.model, self.seed = typical.model, seed
        super().__init__([SubNetwork.full(self.model)])
        self._typical = typical
        factors = {layer: (scale, 1.0) for layer, scale in scales.items() if scale != 1}
        # Where nothing is scaled, what measures dx reads it off the mask.
        self._perturbed = partial(scaled, factors) if factors else nullcontext

    @property
    def networks(self) -> Mapping[str, SubNetwork]:
        return {**self.subnets, self._typical.name: self._typical}

    def plan(self, step: int) -> Plan:
        drawn = self.draw(step)
        return Plan((Pass(drawn, perturbed=self._perturbed),), update=drawn)

    def draw(self, step: int) -> SubNetwork:
        """The network that a step runs."""
        raise NotImplementedError


class NeuronDropout(_Dropout):
    """Train, at each step, the network of hidden neurons that are drawn anew; compute no other.

    p_t keeps the neurons' rows in the layers that make them (weights, biases, norms) and their
    columns in the layers that take them, and dx = -(1 - p) x: the same for every example of the
    batch. The compact step costs the drawn network's forward and backward, between two widths of
    which ``keep`` stays about ``keep^2`` of the whole one's. What was dropped is not touched:
    no decay, no momentum. Losses are those of the drawn network and are called "dropout"; evaluate
    the whole one, ``method.subnets["full"]``. Batch norms keep the running statistics of the
    channels that were drawn.

    Of what the mask keeps of the gradient g, over the parameters that rows or columns of one width
    hold: ``E|p g|^2 = keep |g|^2``, and by Jensen's inequality ``E[c_norm^2] >= 1 / keep``
    (the paper has an equality, which is that of neurons whose gradients have one norm). Between two
    widths an element stays with probability ``keep^2``; the output layer's bias always stays.

    Widths of neurons are those of the model's ``width_masks`` that some layer takes as its columns.
    The dimensions of attention's queries and keys are none and stay whole. Channels along the skip
    connections of a ``ResNet`` are: ``widths=["*.conv*"]`` leaves them whole and drops within the
    blocks alone.

    AdamW's bias correction uses each parameter's own count of updates, whichever of its elements
    they touched.

    Args:
        model: one with ``width_masks(kept)``, such as the models of ``maskedtrain.models``.
        keep: share of the neurons of each width that a step keeps, in (0, 1].
        widths: patterns (``fnmatch``) of the names of the widths to draw from.
        seed: of the draws, which depend on it and on the step alone.
        count: "exact" draws the same number at each step, all sets of so many equally likely:
            shapes, and with them the cost, do not change. "bernoulli" draws each neuron by itself,
            and one of a width where that leaves none; its steps are charged for ``keep`` of each
            width.
        round_to: an exact number becomes a multiple of it where the width allows (see
            ``maskedtrain.widths.active_count``).
        rescale: multiply the inputs of the layers that take the neurons by ``total / kept`` (by
            ``1 / keep`` where it is not exact), as ``nn.Dropout`` does, so that what they compute
            is right on average (of "bernoulli", but for draws that would have left none) and the
            whole network can be evaluated as it is. Gradients are those of the network with these
            factors, which are no part of the dx that ``maskedtrain.theory.criteria`` measures.
            Without, it is the paper's partial SGD.

    Raises:
        ValueError: an option is out of range, or a pattern matches no width of neurons.
        TypeError: the model has no ``width_masks(kept)``.

    Source: dropout as partial SGD, section 3 of "Masked Training of Neural Networks with Partial
    Gradients" (AISTATS 2022); Srivastava et al., "Dropout" (JMLR 2014).

    Example:
        >>> method = NeuronDropout(MLP(784, (4096, 4096), 10), keep=0.5)
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.5,
        *,
        widths: Sequence[str] = ("*",),
        seed: int = 0,
        count: Count = "exact",
        round_to: int = 16,
        rescale: bool = True,
    ) -> None:
        _check(keep, count, round_to)
        neurons = neurons_of(model)
        chosen = matching_names("widths", widths, neurons, "width of neurons")
        self.keep, self.exact = keep, count == "exact"
        self._totals = {width: neurons[width].total for width in chosen}
        multiple = round_to if self.exact else 1
        self._counts = {w: active_count(n, keep, multiple) for w, n in self._totals.items()}
        first = {width: torch.arange(kept) for width, kept in self._counts.items()}
        scales = {
            layer: self._totals[width] / self._counts[width] if self.exact else 1 / keep
            for width in chosen
            for layer in neurons[width].consumers
        }
        typical = SubNetwork.neurons(model, first, name="dropout")
        super().__init__(typical, seed, scales if rescale else {})

    def draw(self, step: int) -> SubNetwork:
        generator = seeded("cpu", self.seed, step)
        kept = {width: self._positions(width, generator) for width in self._totals}
        return SubNetwork.neurons(self.model, kept, name="dropout")

    def _positions(self, width: str, generator: torch.Generator) -> Tensor:
        """Which neurons stay, in their order."""
        total = self._totals[width]
        if self.exact:
            order = torch.randperm(total, generator=generator)
            return order[: self._counts[width]].sort().values
        numbers = torch.rand(total, generator=generator)
        kept = (numbers < self.keep).nonzero().flatten()
        return kept if len(kept) else numbers.argmin()[None]


class ElementDropout(_Dropout):
    """Train, at each step, with elements of the weights that are drawn anew; the others are zero.

    p_t keeps each element of the chosen weights with probability ``keep``, and dx = -(1 - p) x, the
    same for every example of the batch. Biases, norms and embeddings stay. What was dropped is not
    touched: no decay, no momentum. Losses are called "dropout", as of ``NeuronDropout``. No compute
    is saved: scattered elements are multiplied as zeros, and a draw costs a random number for every
    weight, made on its device (the draws of two kinds of devices differ).

    Of the gradient g of these weights ``E|p g|^2 = keep |g|^2``: c_norm is near ``1 / sqrt(keep)``,
    the closer the more elements there are.

    Args:
        model: any, with linear or convolutional layers.
        keep: probability of an element to stay, in (0, 1].
        weights: patterns (``fnmatch``) of the names of the weights to draw from, of linear and
            convolutional layers.
        seed: of the draws, which depend on it and on the step alone.
        rescale: multiply the inputs of the layers by ``1 / keep``, which is to scale their weights:
            what they compute is then right on average, and the whole network can be evaluated as it
            is.

    Raises:
        ValueError: an option is out of range, a pattern matches no such weight, or a weight is tied
            to a parameter that no pattern matches.

    Source: Wan et al., "Regularization of Neural Networks using DropConnect" (ICML 2013); as
    partial SGD, section 3 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS
    2022).

    Example:
        >>> method = ElementDropout(model, keep=0.8, weights=["*.fc1.*", "*.fc2.*"])
    """

    def __init__(
        self,
        model: nn.Module,
        keep: float = 0.5,
        *,
        weights: Sequence[str] = ("*",),
        seed: int = 0,
        rescale: bool = True,
    ) -> None:
        _check(keep)
        # Of these kinds the inputs can be scaled in the place of the weight.
        layers = {
            f"{name}.weight" if name else "weight": module
            for name, module in model.named_modules(remove_duplicate=False)
            if type(module) in _LAYERS and "weight" in module._parameters
        }
        names = matching_names(
            "weights", weights, layers, "weight of a linear or convolutional layer"
        )
        self.keep = keep
        self._weights = {name: model.get_parameter(name) for name in names}
        drawn = set(self._weights.values())
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter in drawn and name not in self._weights:
                raise ValueError(
                    f"weights must match both or neither of tied parameters, got {name} out and "
                    f"{next(n for n, w in self._weights.items() if w is parameter)} in"
                )
        scales = {layers[name]: 1 / keep for name in names}
        # Zeros are multiplied, too.
        super().__init__(SubNetwork.full(model, name="dropout"), seed, scales if rescale else {})

    def draw(self, step: int) -> SubNetwork:
        drawn: dict[nn.Parameter, Element] = {}
        for name, weight in self._weights.items():
            # A tied weight once.
            if weight not in drawn:
                generator = seeded(weight.device, self.seed, step, name)
                numbers = torch.rand(weight.shape, generator=generator, device=weight.device)
                drawn[weight] = Element(numbers < self.keep)
        masks = {name: drawn[weight] for name, weight in self._weights.items()}
        return SubNetwork(self.model, masks, name="dropout")


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, MaskedLinear, MaskedConv2d)


def _check(keep: float, count: str = "exact", round_to: int = 1) -> None:
    """Raise ValueError if an option is out of range."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    if count not in ("exact", "bernoulli"):
        raise ValueError(f'count must be "exact" or "bernoulli", got {count!r}')
    if round_to < 1:
        raise ValueError(f"round_to must be >= 1, got {round_to}")


@dataclass(frozen=True)
class Config(MethodConfig):
    """Dropout that trains a drawn part of the network, at the cost of that part."""

    name = "dropout"

    keep: float = 0.5
    """Share of the neurons (or of the weights) that a step keeps."""
    drop: Drop = "neurons"
    """neurons saves their cost; weights (DropConnect) saves none."""
    only: tuple[str, ...] = ("*",)
    """Patterns of the widths (neurons) or of the parameters (weights) to drop from."""
    draw_seed: int = 0
    """Seed of the draws."""
    count: Count = "exact"
    """Draw the same number of neurons at each step, or each neuron by itself."""
    round_to: int = 16
    """An exact number becomes a multiple of this where the width allows."""
    rescale: bool = True
    """Scale what is kept, so that the whole network can be evaluated as it is."""

    def __post_init__(self) -> None:
        _check(self.keep, self.count, self.round_to)
        if self.drop not in ("neurons", "weights"):
            raise ValueError(f'drop must be "neurons" or "weights", got {self.drop!r}')
        if self.drop == "weights" and (self.count, self.round_to) != ("exact", 16):
            raise ValueError(
                "count and round_to are of neurons, and weights are drawn each by itself; "
                f"got count {self.count} and round_to {self.round_to}"
            )

    def build(self, model: nn.Module) -> Method:
        if self.drop == "weights":
            return ElementDropout(
                model, self.keep, weights=self.only, seed=self.draw_seed, rescale=self.rescale
            )
        return NeuronDropout(
            model,
            self.keep,
            widths=self.only,
            seed=self.draw_seed,
            count=self.count,
            round_to=self.round_to,
            rescale=self.rescale,
        )
