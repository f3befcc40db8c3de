"""Where the dense computation becomes faster than a kernel that skips: measured at the user's wish
and kept for "auto".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from maskedtrain.benchmark.rows import measured
from partial_kernels._core import discovery
from partial_kernels._core.contest import Step
from partial_kernels._core.crossovers import TABLES, Crossing
from partial_kernels._core.tables import device_name

__all__ = ["Speedup", "crossing", "crossings", "tune"]

Speedup = Callable[[Step, Step], float]
"""Of our step and the dense one, how many times as fast ours is."""

# Rounds and seconds of one density.
_ROUNDS, _SECONDS = 7, 2.0


def crossings(families: Sequence[str], device: str) -> list[Crossing]:
    """Those that have a backend here, of these families."""
    missing = discovery.unavailable()
    return [
        crossing
        for family, module in discovery.cases()
        if family in families and hasattr(module, "crossings")
        for crossing in module.crossings(device)
        if crossing.key.split()[1] not in missing
    ]


def tune(
    wanted: Sequence[Crossing], device: torch.device, speedup: Speedup | None = None
) -> Iterator[tuple[str, float, dict[float, float]]]:
    """Measure each crossover and write it to the user's table of the device at once, so that a run
    that is stopped keeps what it had; gives its key, the density and the speed-ups that it is from.

    ``speedup`` measures; by default the median of paired rounds.
    """
    measure = speedup or (lambda ours, dense: _speedup(ours, dense, device))
    for item in wanted:
        speedups = {density: measure(*item.steps(density)) for density in item.densities}
        found = crossing(speedups)
        TABLES.write(TABLES.user_file(device_name(device)), {item.key: found})
        yield item.key, found, speedups


def crossing(speedups: dict[float, float]) -> float:
    """The density up to which ours is faster, from speed-ups by density.

    Between the last density that is won before one is lost and that one, the logarithm of the
    speed-up is taken to be a straight line. 1 where none is lost, 0 where none is won first.
    """
    points = sorted(speedups.items())
    won: tuple[float, float] | None = None
    for density, speedup in points:
        if speedup <= 1:
            if won is None:
                return 0.0
            before, gain = won[0], math.log(won[1])
            return before + (density - before) * gain / (gain - math.log(speedup))
        won = density, speedup
    return 1.0


def _speedup(ours: Step, dense: Step, device: torch.device) -> float:
    return 1 / measured(dense, ours, device, budget_s=_SECONDS, rounds=_ROUNDS).ratio
