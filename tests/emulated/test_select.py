"""The CUDA selection: any sizes, exact, with every number of warps that a row takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import partial_kernels as pk
from partial_kernels.select.cases import NUMBERS, Case, check

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@st.composite
def cases(draw: Any) -> Case:
    columns = draw(st.integers(1, 400))
    return Case(
        "",
        (draw(st.integers(1, 4)), columns),
        draw(st.integers(0, columns)),
        draw(st.sampled_from(["row", "batch"])),
        numbers=draw(st.sampled_from(sorted(NUMBERS))),
        dtype=draw(st.sampled_from(DTYPES)),
    )


@settings(max_examples=60)
@given(cases())
def test_any_row(case: Case) -> None:
    check(case, impl="cuda")


@pytest.mark.parametrize("numbers", ["normal", "ties", "constant", "special"])
@pytest.mark.parametrize("columns", [256, 896, 897, 3000, 28672])
def test_rows_of_several_warps(columns: int, numbers: str) -> None:
    check(Case("", (2, columns), columns // 7, numbers=numbers), impl="cuda")


def test_longer_rows_are_refused() -> None:
    x = torch.ones(1, 28673)
    with pytest.raises(RuntimeError, match="it takes up to 28672 columns, got 28673"):
        pk.topk_select(x, 3, impl="cuda")
    with pytest.raises(RuntimeError, match="it takes up to 14336 columns, got 28673"):
        pk.topk_select(x, 3, per="batch", impl="cuda")
    assert pk.topk_select(x, 3).tolist() == [[0, 1, 2]]
