"""meSimp: neurons that meProp seldom updates are taken out of the network while it trains."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskedtrain.layers import TopKLinear
from maskedtrain.layers.topk import BiasGrad, Per, WeightGrad, kept_count
from maskedtrain.methods._neurons import neurons_of
from maskedtrain.methods.base import Plan
from maskedtrain.methods.meprop import MeProp, TopKConfig, chosen_layers
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.shrink import check_widths, take_neurons
from partial_kernels import Index, topk_select

__all__ = ["Config", "MeSimp"]


class MeSimp(MeProp):
    """meProp that counts how often each hidden neuron is among the k, and every ``cycle`` steps
    takes out of the network those that seldom are::

        a_i = (selections of the cycle that kept neuron i) / (selections of the cycle)
        neuron i goes if a_i < share, unless it is one of the layer's k with the largest a

    There is a selection for each row of a layer's output gradient (an example, or a token) with
    per="row", for each mini-batch with per="batch"; a is k / O on average, or less. What is kept
    with a gradient of 0 updates nothing and does not count, nor does a selection of zeros alone.

    The neurons are removed, not masked (``maskedtrain.shrink.take_neurons``): parameters,
    the optimizer's state and every later step's FLOPs shrink. Parameters stay the same objects.
    k is a number from the start, so that a grows as layers shrink and removal comes to an end; a
    layer keeps k neurons at least, with which it back-propagates everything.

    The neurons are those of the model's widths (``width_masks``) that one of the layers makes and
    linear layers take: hidden layers of an ``MLP``, feed-forward layers of a ``Transformer``.
    Other layers that the patterns match are trained by meProp and keep their size.

    In a stock loop, ``method.after_step(step, plan, optimizer)`` after the optimizer's step takes
    neurons out. Counting costs a second selection of the k in each backward.

    Args:
        model: one with ``width_masks(kept)``, such as the models of ``maskedtrain.models``.
        k: an int is how many of a layer's outputs are kept, a float in (0, 1] their share in the
            layer as it is at first.
        share: the least activity a, in [0, 1], that a neuron stays with; below k / O.
        cycle: steps from one removal to the next, >= 1.
        until: how many steps may end with a removal, >= 0; None is all of them.
        per: as of ``MeProp``, like all that follow.

    Raises:
        ValueError: an option is out of range, a pattern matches no linear layer, or no width is
            made by one of the layers. Nothing has changed then.
        TypeError: neurons of a width that a layer makes cannot be taken out (``check_widths`` of
            ``maskedtrain.shrink``), or as ``MeProp``.

    Source: Sun et al., "Training Simplification and Model Simplification for Deep Learning: A
    Minimal Effort Back Propagation Method" (arXiv 1711.06528). The authors' code masks neurons in
    place of removing them, restarts the optimizer and lets epochs with removals alternate with
    epochs without, and has no least number of neurons.

    Example:
        >>> method = MeSimp(MLP(784, (500, 500), 10), k=25, share=0.02, cycle=100)
    """

    def __init__(
        self,
        model: nn.Module,
        k: int | float = 0.05,
        *,
        share: float = 0.02,
        cycle: int = 100,
        until: int | None = None,
        per: Per = "row",
        layers: Sequence[str] = ("*",),
        exclude: Sequence[str] | None = None,
        weight_grad: WeightGrad = "full",
        bias_grad: BiasGrad = "full",
    ) -> None:
        _check(share, cycle, until)
        chosen = chosen_layers(model, layers, exclude)
        made = check_widths(model, _widths(model, chosen))
        if not made:
            raise ValueError(f"layers {list(layers)} make no width of the model's neurons")
        options: dict[str, Any] = {"weight_grad": weight_grad, "bias_grad": bias_grad}
        super().__init__(model, k, per=per, layers=layers, exclude=exclude, **options)
        self.model, self.share, self.cycle, self.until = model, share, cycle, until
        for layer in cast("list[TopKLinear]", chosen):
            layer.k = kept_count(layer.k, layer.out_features)
        self._layers = cast("dict[str, TopKLinear]", made)
        self._first = {width: layer.out_features for width, layer in self._layers.items()}
        self._kept = {width: torch.arange(count) for width, count in self._first.items()}
        self._hooks = {width: partial(self._count, width) for width in self._layers}
        self._start_cycle()
        plan = self._plan
        self._plan = _CountingPlan(plan.passes, update=plan.update, counting=self._counting)

    @property
    def kept(self) -> Mapping[str, Tensor]:
        """By width, which of its first neurons are left: int64 positions, on the CPU."""
        return self._kept

    def _start_cycle(self) -> None:
        self._counts = {w: torch.zeros(len(kept)).long() for w, kept in self._kept.items()}
        self._selections = {width: torch.zeros(()).long() for width in self._kept}

    @contextmanager
    def _counting(self) -> Generator[None]:
        """Within it, backward passes count what they keep."""
        for width, layer in self._layers.items():
            layer.on_gradient = self._hooks[width]
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.on_gradient = None

    def _count(self, width: str, dy: Tensor) -> None:
        """The selection that the layer's backward makes of this gradient."""
        layer = self._layers[width]
        dy_TO = dy.detach().reshape(-1, dy.shape[-1])
        index = topk_select(dy_TO, kept_count(layer.k, dy_TO.shape[1]), per=layer.per)
        if layer.per == "row":
            updated = dy_TO.gather(1, index) != 0
        else:
            updated = (dy_TO.index_select(1, index) != 0).any(0)
        counts, selections = self._counts[width].to(dy.device), self._selections[width]
        self._counts[width] = counts.index_add_(0, index.flatten(), updated.flatten().long())
        self._selections[width] = selections.to(dy.device) + updated.any(-1).sum()

    def activity(self) -> dict[str, Tensor]:
        """By width, a of each of its neurons in this cycle so far, fp64; 0 before any selection."""
        return {
            width: counts.double() / self._selections[width].clamp(min=1)
            for width, counts in self._counts.items()
        }

    def after_step(self, step: int, plan: Plan, optimizer: MaskedOptimizer) -> None:
        done = step + 1
        if done % self.cycle or (self.until is not None and done > self.until):
            return
        stay = {width: self._staying(width) for width in self._layers}
        fewer = {w: index for w, index in stay.items() if len(index) < len(self._kept[w])}
        if fewer:
            take_neurons(self.model, fewer, optimizer)
        self._kept.update({width: self._kept[width][index] for width, index in fewer.items()})
        self._start_cycle()

    def _staying(self, width: str) -> Tensor:
        """Positions of the neurons that stay, on the CPU."""
        counts, selections = self._counts[width].cpu(), int(self._selections[width])
        stay = counts.double() >= self.share * selections
        # Of equal ones the first.
        most = counts.argsort(descending=True, stable=True)
        stay[most[: kept_count(self._layers[width].k, len(counts))]] = True
        return stay.nonzero().flatten()

    def state_dict(self) -> dict[str, Any]:
        return {
            width: {
                "kept": self._kept[width],
                "counts": self._counts[width].cpu(),
                "selections": int(self._selections[width]),
            }
            for width in self._layers
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``: the model gets the widths it had then. Neurons that it has not
        are made anew, with weights of 0; load the weights afterwards.
        """
        if set(state) != set(self._layers):
            raise ValueError(
                f"the state must be of the widths {sorted(self._layers)}, got {sorted(state)}"
            )
        kept = {width: entry["kept"].cpu() for width, entry in state.items()}
        for width, count in self._first.items():
            Index(kept[width]).check((count,))
        other = {w: index for w, index in kept.items() if not torch.equal(index, self._kept[w])}
        take_neurons(self.model, {w: _positions(self._kept[w], i) for w, i in other.items()})
        self._kept = kept
        self._counts = {width: entry["counts"].clone() for width, entry in state.items()}
        self._selections = {
            width: torch.tensor(entry["selections"]) for width, entry in state.items()
        }


@dataclass(frozen=True)
class _CountingPlan(Plan):
    """A plan whose backward runs within ``counting()``; a measurement of its passes does not."""

    counting: Callable[[], AbstractContextManager[None]] = nullcontext

    def backward(
        self, *losses: Callable[[], Tensor], scale: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        with self.counting():
            return super().backward(*losses, scale=scale)


def _widths(model: nn.Module, layers: Sequence[nn.Linear]) -> list[str]:
    """The widths of neurons that some of these layers make."""
    return [
        width
        for width, neurons in neurons_of(model).items()
        if not set(layers).isdisjoint(neurons.producers)
    ]


def _positions(have: Tensor, want: Tensor) -> Tensor:
    """Where each of ``want`` is in ``have``, both increasing; -1 where it is not."""
    at = torch.searchsorted(have, want).clamp(max=len(have) - 1)
    return at.where(have[at] == want, -1)


def _check(share: float, cycle: int, until: int | None) -> None:
    """Raise ValueError if an option is out of range."""
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if cycle < 1:
        raise ValueError(f"cycle must be >= 1, got {cycle}")
    if until is not None and until < 0:
        raise ValueError(f"until must be >= 0, got {until}")


@dataclass(frozen=True)
class Config(TopKConfig):
    """meSimp: meProp that takes neurons out of the network that are seldom updated."""

    name = "mesimp"

    share: float = 0.02
    """Neurons that are kept in a smaller share of a cycle's selections go."""
    cycle: int = 100
    """Steps from one removal to the next."""
    until: int | None = None
    """Steps after which nothing is removed any more; there is no such end where not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.share, self.cycle, self.until)

    def build(self, model: nn.Module) -> MeSimp:
        return MeSimp(
            model,
            self.count,
            share=self.share,
            cycle=self.cycle,
            until=self.until,
            **self.options,
        )
