"""Paired timing: A, B and A again alternate in one process; what counts is the median of B / A.

Single times on a shared machine drift by tens of per cent within minutes; the ratio of two calls
made one right after the other does not. The second A is the control: a round in which A / A is off
by more than 5 % was disturbed and is thrown away.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Disturbed", "Paired", "figures", "paired", "seconds"]

CONTROL = 0.05
# Seconds that a step must take to be timed alone; shorter ones are repeated.
SHORTEST = 0.01


class Disturbed(RuntimeError):
    """The machine was too busy for a ratio that means anything."""


@dataclass(frozen=True)
class Paired:
    """Median of B / A with its quartiles, the A / A control, and how many rounds were kept."""

    ratio: float
    low: float
    high: float
    control: float
    rounds: int
    rejected: int
    a_ms: float
    b_ms: float
    load: float


def seconds(step: Callable[[], object]) -> float:
    """The time of one call."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def repeated(step: Callable[[], object], repeats: int) -> Callable[[], object]:
    """So many calls as one."""

    def run() -> None:
        for _ in range(repeats):
            step()

    return step if repeats == 1 else run


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    rounds: int = 11,
    warmup: int = 2,
    timed: Callable[[Callable[[], object]], float] = seconds,
) -> Paired:
    """Time ``b`` against ``a`` until ``rounds`` undisturbed rounds are had.

    Short steps are repeated within a round, both as often. ``timed`` is what a step's seconds are
    taken with: where it returns before its work is done, it needs the device's clock.

    Raises:
        Disturbed: after three times as many rounds there are still too few: the machine is too
        busy.
    """

    for _ in range(warmup):
        a()
        b()
    shorter = min(timed(step) for step in (a, b))
    repeats = math.ceil(SHORTEST / max(shorter, 1e-6))
    kept: list[tuple[float, float, float]] = []
    rejected = 0
    while len(kept) < rounds:
        first, other, second = (timed(repeated(step, repeats)) for step in (a, b, a))
        if abs(second / first - 1) <= CONTROL:
            kept.append((first, other, second))
        elif (rejected := rejected + 1) > 2 * rounds:
            raise Disturbed(
                f"too noisy: the control was off by more than {CONTROL:.0%} in {rejected} of "
                f"{rejected + len(kept)} rounds (load {os.getloadavg()[0]:.1f})"
            )
    ratios = [other / ((first + second) / 2) for first, other, second in kept]
    low, ratio, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return Paired(
        ratio=ratio,
        low=low,
        high=high,
        control=statistics.median(second / first for first, _, second in kept),
        rounds=rounds,
        rejected=rejected,
        a_ms=1e3 * statistics.median(first for first, _, _ in kept) / repeats,
        b_ms=1e3 * statistics.median(other for _, other, _ in kept) / repeats,
        load=os.getloadavg()[0],
    )


def figures(
    name: str, a: Callable[[], object], b: Callable[[], object], **options: Any
) -> dict[str, float | str]:
    """The ratio of ``paired(a, b, **options)`` by this name, its quartiles and the control's; or
    why there is none.
    """
    try:
        found = paired(a, b, **options)
    except Disturbed as disturbed:
        return {name: str(disturbed)}
    return {name: found.ratio, "low": found.low, "high": found.high, "control": found.control}
