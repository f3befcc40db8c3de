"""Every kernel family against the best that a user would write, paired: time, its bar, its floor.

Cases, baselines and bars are the families' own (``cases.py``). A family whose results are wrong has
no times.
"""

from __future__ import annotations

import statistics
from functools import cache

import pytest

from maskedtrain.benchmark.machine import rates
from maskedtrain.benchmark.timing import figures, seconds
from partial_kernels._core import discovery

# That the rounds of one case may take, if none is disturbed.
SECONDS = 6

FAMILIES = dict(discovery.cases())
CASES = {
    f"{family}-{case.name}": (family, case)
    for family, module in FAMILIES.items()
    if hasattr(module, "contest")
    for case in module.BENCH_CASES
}


@cache
def failure(family: str) -> str | None:
    """How the family's results are wrong, if they are."""
    module = FAMILIES[family]
    try:
        for case in module.CASES:
            module.check(case)
    except AssertionError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark, note, name):
    """One step of ours, and its time as a share of the best baseline's."""
    family, case = CASES[name]
    if (why := failure(family)) is not None:
        pytest.fail(why)
    contest = FAMILIES[family].contest(case)
    benchmark.group = family
    benchmark.pedantic(contest.ours, rounds=5, warmup_rounds=1)
    ours = benchmark.stats["median"]
    times = {
        label: statistics.median(seconds(step) for _ in range(4))
        for label, step in contest.baselines.items()
    }
    best = min(times, key=times.__getitem__)
    floor = rates().floor_s(contest.flops, contest.bytes)
    note(ms=1e3 * ours, baseline=best)
    rounds = min(max(int(SECONDS / (2 * times[best] + ours)), 5), 31)
    note(**figures("ratio", contest.baselines[best], contest.ours, rounds=rounds))
    note(bar=contest.bar, floor_ms=1e3 * floor, share_of_floor=floor / ours)
    benchmark.extra_info |= {
        "flops": contest.flops,
        "bytes": contest.bytes,
        "gflops_per_s": contest.flops / ours / 1e9,
        "gb_per_s": contest.bytes / ours / 1e9,
    }
