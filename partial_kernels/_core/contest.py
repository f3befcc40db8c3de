"""What a benchmark compares: a step of ours with the best one a user would write instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["FLOOR", "Bars", "Contest", "Step", "backward"]

Step = Callable[[], object]

Bars = Mapping[str, float]
"""By baseline, the share of its time that ours may take."""

FLOOR = "floor"
"""In ``Bars``, what the device needs at least for the FLOPs and bytes."""


@dataclass(frozen=True)
class Contest:
    """Our step, other ways to the same end, and what ours must cost.

    Args:
        ours: one call, all of whose work counts.
        baselines: by name; the fastest of them on the machine is what counts.
        flops: that ours cannot do without, 2 per multiply-add.
        bytes: that ours cannot do without, every operand moved once.
        bar: the time it may take, as a share of the best baseline's; None where
            nothing is promised.
    """

    ours: Step
    baselines: Mapping[str, Step]
    flops: int
    bytes: int
    bar: float | None = None


def backward(costs: Mapping[str, int]) -> int:
    """Of the costs of each pass, those of a backward."""
    return sum(cost for name, cost in costs.items() if name != "forward")
