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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Disturbed", "Paired", "figures", "paired", "seconds", "timed_on"]

CONTROL = 0.05
# Seconds that a step must take to be timed alone; shorter ones are repeated.
SHORTEST = 0.01
# Rounds that quartiles need.
LEAST_ROUNDS = 3


class Disturbed(RuntimeError):
    """The machine was too busy for a ratio that means anything; ``found`` is of all rounds."""

    def __init__(self, message: str, found: Paired) -> None:
        super().__init__(message)
        self.found = found


# Seconds of A, B and A.
Round = tuple[float, float, float]


@dataclass(frozen=True)
class Paired:
    """Median of B / A with its quartiles, the A / A control, the median of its distance from 1
    (``noise``), and how many rounds were kept.
    """

    ratio: float
    low: float
    high: float
    control: float
    noise: float
    waited: float
    """Share of the time that this process's threads waited for a processor while others had it,
    where the system says so (Linux)."""
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


def timed_on(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What times one call on the device, until its work is done."""
    if device.type != "cuda":
        return seconds

    def waited(step: Callable[[], object]) -> float:
        def run() -> None:
            step()
            torch.cuda.synchronize(device)

        torch.cuda.synchronize(device)
        return seconds(run)

    return waited


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
    budget_s: float = math.inf,
) -> Paired:
    """Time ``b`` against ``a`` until ``rounds`` undisturbed rounds are had.

    Short steps are repeated within a round, both as often. ``timed`` is what a step's seconds are
    taken with: where it returns before its work is done, it needs the device's clock. After
    ``budget_s`` seconds fewer rounds do, but three at least.

    Raises:
        Disturbed: after three times as many rounds, or all that the budget has room for, there are
        still too few: the machine is too busy.
    """

    deadline = time.perf_counter() + budget_s
    for _ in range(warmup):
        a()
        b()
    shorter = min(timed(step) for step in (a, b))
    before, began = _waited_s(), time.perf_counter()

    def summary(rounds: Sequence[Round]) -> Paired:
        passed = max(time.perf_counter() - began, 1e-9)
        waited = max(_waited_s() - before, 0) / passed / torch.get_num_threads()
        return _summary(rounds, len(taken) - len(kept), repeats, waited)

    repeats = max(math.ceil(SHORTEST / max(shorter, 1e-6)), 1)
    least = min(rounds, LEAST_ROUNDS)
    taken: list[Round] = []
    kept: list[Round] = []
    while len(kept) < rounds:
        late = time.perf_counter() > deadline
        if late and len(kept) >= least:
            break
        rejected = len(taken) - len(kept)
        if rejected > 2 * rounds or (late and len(taken) >= least):
            found = summary(taken)
            raise Disturbed(
                f"too noisy: the control was off by more than {CONTROL:.0%} in {rejected} of "
                f"{len(taken)} rounds (load {found.load:.1f})",
                found,
            )
        first, other, second = (timed(repeated(step, repeats)) for step in (a, b, a))
        taken.append((first, other, second))
        if abs(second / first - 1) <= CONTROL:
            kept.append(taken[-1])
    return summary(kept)


def _waited_s() -> float:
    """Seconds that the threads of this process have been ready to run and did not (proc(5))."""
    waited = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        # A thread may end meanwhile.
        with suppress(OSError):
            waited += int(thread.read_text().split()[1])
    return waited / 1e9


def _summary(rounds: Sequence[Round], rejected: int, repeats: int, waited: float) -> Paired:
    ratios = [other / ((first + second) / 2) for first, other, second in rounds]
    controls = [second / first for first, _, second in rounds]
    low, ratio, high = statistics.quantiles(ratios, n=4) if len(rounds) > 1 else ratios * 3
    return Paired(
        ratio=ratio,
        low=low,
        high=high,
        control=statistics.median(controls),
        noise=statistics.median(abs(control - 1) for control in controls),
        waited=waited,
        rounds=len(rounds),
        rejected=rejected,
        a_ms=1e3 * statistics.median(first for first, _, _ in rounds) / repeats,
        b_ms=1e3 * statistics.median(other for _, other, _ in rounds) / repeats,
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
