"""What a call costs beside its work: a 4 x 4 product, against ``torch.nn.functional.linear``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import partial_kernels as pk
from maskedtrain.benchmark.timing import figures
from partial_kernels.submatrix.reference import OPS

SIZE = 4


def steps(case: str, device: str = "cpu") -> tuple[Callable[[], object], Callable[[], object]]:
    """Ours, with half of a weight in each direction, and torch's, with that half alone."""
    x, small = (torch.randn(SIZE, SIZE, device=device, requires_grad=True) for _ in range(2))
    weight = torch.randn(2 * SIZE, 2 * SIZE, device=device, requires_grad=True)
    dy, mask = torch.ones(SIZE, SIZE, device=device), pk.Prefix(SIZE, SIZE)

    def masked() -> torch.Tensor:
        return pk.masked_linear(x, weight, mask=mask)

    def plain() -> torch.Tensor:
        return F.linear(x, small)

    if case == "op":
        return lambda: OPS.forward(x, weight, None, SIZE, None, None, "auto"), plain
    if case == "forward":
        return masked, plain
    return (
        lambda: torch.autograd.grad(masked(), [x, weight], dy),
        lambda: torch.autograd.grad(plain(), [x, small], dy),
    )


BARS = {"op": 1.0, "forward": 3.0, "forward+backward": 1.5}


@pytest.mark.parametrize("case", BARS)
def test_call(benchmark, note, case):
    """``masked_linear`` with a Prefix mask: its op alone, with autograd, with a backward."""
    ours, baseline = steps(case)
    benchmark.group = "overhead"
    with torch.no_grad() if case == "op" else nullcontext():
        benchmark(ours)
        note(us=1e6 * benchmark.stats["median"], baseline="F.linear")
        note(**figures("ratio", baseline, ours, rounds=31, warmup=100))
    note(bar=BARS[case])
