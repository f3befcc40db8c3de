"""Passes of sketched gradients, and plans that correct these at other points than x."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from maskedtrain.methods._sketching import Draw
from maskedtrain.methods.base import Pass, Plan

__all__ = ["CorrectedPlan", "sketched_passes"]


@dataclass(frozen=True)
class CorrectedPlan(Plan):
    """A plan with passes beside those at x, which the criteria are measured of: ``minus`` are part
    of the gradient, ``anchor`` is gathered beside it.
    """

    minus: tuple[Pass, ...] = ()
    anchor: tuple[Pass, ...] = ()
    gathered: dict[nn.Parameter, Tensor] = field(default_factory=dict, repr=False, compare=False)
    """The gradient of ``anchor``, summed over the calls of ``backward``."""

    @property
    def every_pass(self) -> tuple[Pass, ...]:
        return (*self.passes, *self.minus, *self.anchor)

    def backward(
        self, *losses: Callable[[], Tensor], scale: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        found = super().backward(*losses, scale=scale)
        found |= Plan(self.minus, self.update).backward(*losses, scale=scale)
        if self.anchor:
            with self._gathering():
                found |= Plan(self.anchor, self.update).backward(*losses, scale=scale)
        return found

    @contextmanager
    def _gathering(self) -> Generator[None]:
        """Within it gradients go to ``gathered``."""
        before = [(p, p.grad) for p in self.update.model.parameters()]
        for parameter, _ in before:
            parameter.grad = None
        try:
            yield
            for parameter, _ in before:
                if (found := parameter.grad) is not None:
                    earlier = self.gathered.get(parameter)
                    self.gathered[parameter] = found if earlier is None else earlier.add_(found)
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient


def sketched_passes(
    draws: Sequence[Draw],
    weight: float,
    name: str = "mast",
    point: Mapping[nn.Parameter, Tensor] | None = None,
) -> tuple[Pass, ...]:
    """The mean of the sketched gradients at a point, times the weight."""
    return tuple(
        Pass(
            draw.network(name),
            loss_weight=weight / len(draws),
            perturbed=partial(draw.at, point),
            batch=i,
        )
        for i, draw in enumerate(draws)
    )
