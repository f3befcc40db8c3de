"""What benchmarks compare can be run: on the families' small cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partial_kernels._core import discovery

SMALL = {
    f"{family}-{case.name}": (module, case)
    for family, module in discovery.cases()
    if hasattr(module, "contest")
    for case in (*module.CASES[:1], *module.CASES[-1:])
}


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_give_results_of_their_own(name: str):
    module, case = SMALL[name]
    contest = module.contest(case)
    ours: Any = contest.ours()
    assert all(result.isfinite().all() for result in ours)
    for baseline in contest.baselines.values():
        theirs: Any = baseline()
        assert ours[0].shape == theirs[0].shape, "dx, or parameters"
        assert all(isinstance(result, torch.Tensor) for result in theirs)
    assert contest.flops >= 0 and contest.bytes > 0
    assert contest.bar is None or contest.bar > 0
