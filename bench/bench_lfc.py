"""``lfc_linear`` against plain layers, paired: the super layer against ``F.linear``, whose step it
may exceed by K / T, and the core against two thin ones. W' is formed in every step, as in training:
a layer whose weights do not change would keep it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import partial_kernels as pk
from bench.paired import Disturbed, paired
from partial_kernels.lfc.cases import BENCH_CASES, Case, flops

# What timing itself adds, and what a core step may take of two plain layers' time.
MARGIN, CORE_BAR = 0.04, 1.07


def steps(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """The plain step, forward and backward, and ours, on the same numbers."""
    made = case.make(requires_grad=True)
    x, weight, u, v, bias = (made[name] for name in ("x", "weight", "u", "v", "bias"))
    dy = torch.randn(case.tokens, case.outputs)

    def plain() -> Tensor:
        if case.core:
            return F.linear(F.linear(x, u), v, bias)
        return F.linear(x, weight, bias)

    def step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    factors = [u, v, bias]
    if case.core:
        ours = step(lambda: pk.lfc_linear(x, None, u, v, bias), [x, *factors])
        return step(plain, [x, *factors]), ours
    ours = step(lambda: pk.lfc_linear(x, weight, u, v, bias), [x, weight, *factors])
    return step(plain, [x, weight, bias]), ours


@pytest.mark.parametrize("case", BENCH_CASES, ids=lambda case: case.name)
def test_lfc(benchmark, note, case):
    """A step of ours, and its ratio to the plain one's."""
    plain, ours = steps(case)
    benchmark.group = "lfc core" if case.core else "lfc super"
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    total = sum(flops(case).values())
    note(gflops_per_s=total / benchmark.stats["median"] / 1e9)
    share = 1.0 if case.core else 1 + case.rank / case.tokens
    note(flops_of_plain=share, bar=CORE_BAR if case.core else share + MARGIN)
    try:
        found = paired(plain, ours, rounds=15)
    except Disturbed as disturbed:
        note(time_of_plain=str(disturbed))
    else:
        note(time_of_plain=found.ratio, low=found.low, high=found.high, control=found.control)
