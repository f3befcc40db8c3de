"""How far n workers' parts of a network have moved apart: Assumption 3 in a round of theirs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from maskedtrain.methods._replicas import Replicas
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Mask

__all__ = ["Drift"]


class Drift:
    """The left side of Assumption 3 for each worker i of a round::

        |dx_i| / max(|p_i g(x)|, |p_i g(x~)|),    |dx_i|^2 = sum_{j != i} |Delta_j|^2

    Delta_j is what worker j has moved since the round began, its copy of what is shared included;
    the gradients are those of the round's first step and of the present one. Holds a copy of the
    weights.

    Args:
        parts: the workers' networks.
        dealt: the parameters of which each has its own elements.
        replicas: those of which each has a copy.
    """

    def __init__(
        self, parts: Sequence[SubNetwork], dealt: Sequence[nn.Parameter], replicas: Replicas
    ) -> None:
        self._parts, self._dealt, self._replicas = parts, list(dealt), replicas
        self._start: dict[nn.Parameter, Tensor] = {}
        self._first: list[float] = []
        self._present: Tensor | None = None

    @torch.no_grad()
    def note_gradients(self) -> None:
        """To be called in every step, before its update."""
        if not self._start:
            parameters = [*self._dealt, *self._replicas.parameters]
            self._start = {parameter: parameter.detach().clone() for parameter in parameters}
        self._present = torch.stack([_square(self._gradients(i)) for i in self._workers])

    @torch.no_grad()
    def measured(self) -> tuple[float, ...]:
        """By worker, after the update of the step; 0 where no other worker has moved."""
        moved = torch.stack([_square(self._moves(i)) for i in self._workers])
        # One transfer for all.
        both = torch.stack([moved, cast("Tensor", self._present)])
        moves, present = cast("list[list[float]]", both.tolist())
        self._first = self._first or present
        return tuple(
            _ratio(math.sqrt(sum(moves[:i] + moves[i + 1 :])), math.sqrt(max(first, now)))
            for i, (first, now) in enumerate(zip(self._first, present, strict=True))
        )

    @property
    def _workers(self) -> range:
        return range(len(self._parts))

    def _gradients(self, worker: int) -> Iterator[Tensor]:
        """The parts of a worker's gradient."""
        yield from self._replicas.gradients(worker).values()
        for parameter, mask in self._held(worker):
            if parameter.grad is not None:
                yield mask.restrict(parameter.grad)

    def _moves(self, worker: int) -> Iterator[Tensor]:
        """The parts of Delta."""
        for parameter, value in self._replicas.values(worker).items():
            yield value - self._start[parameter]
        for parameter, mask in self._held(worker):
            yield mask.restrict(parameter) - mask.restrict(self._start[parameter])

    def _held(self, worker: int) -> Iterator[tuple[nn.Parameter, Mask]]:
        for parameter in self._dealt:
            mask = self._parts[worker].mask_of(parameter)
            if mask is not None:
                yield parameter, mask

    def state_dict(self) -> dict[str, Any]:
        """The weights and the gradients' squared norms of the round's first step."""
        names = {parameter: name for name, parameter in self._replicas.model.named_parameters()}
        return {"start": {names[p]: x for p, x in self._start.items()}, "first": list(self._first)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; ValueError, and nothing has changed, if it does not fit."""
        named = dict(self._replicas.model.named_parameters())
        for name, x in state["start"].items():
            if name not in named or x.shape != named[name].shape:
                raise ValueError(f"the start of {name!r} fits no parameter of the model")
        self._start = {
            named[name]: x.to(named[name].device, copy=True) for name, x in state["start"].items()
        }
        self._first = list(state["first"])


def _square(tensors: Iterable[Tensor]) -> Tensor:
    """The squared norm of all together, in fp64."""
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum()


def _ratio(a: float, b: float) -> float:
    if a == 0:
        return 0.0
    return math.inf if b == 0 else a / b
