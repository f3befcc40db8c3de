"""The CUDA row-sparse products: sizes that 16 bytes divide and others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partial_kernels.topk.cases import Case, check


@st.composite
def cases(draw: Any) -> Case:
    outputs = draw(st.integers(2, 60))
    return Case(
        "",
        (draw(st.integers(0, 70)),),
        outputs,
        draw(st.integers(1, 40) | st.sampled_from([64, 1024 + 8])),
        draw(st.integers(1, outputs - 1)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])),
        x_layout=draw(st.sampled_from(["contiguous", "permuted", "sliced"])),
    )


@settings(max_examples=40)
@given(cases())
def test_any_product(case: Case) -> None:
    check(case, impl="cuda")


@pytest.mark.parametrize(
    ("k", "dtype", "why"),
    [
        (1, torch.bfloat16, None),
        (2, torch.bfloat16, "a dense product is faster for k > outputs / 142, got 2 of 200"),
        (11, torch.float32, None),
        (12, torch.float32, "a dense product is faster for k > outputs / 18, got 12 of 200"),
    ],
)
def test_auto_leaves_many_to_dense_products(k: int, dtype: torch.dtype, why: str | None) -> None:
    from partial_kernels.topk.reference import ROW_DX

    dy, weight = torch.zeros(4, 200, dtype=dtype), torch.zeros(200, 8, dtype=dtype)
    index = torch.zeros(4, k, dtype=torch.int64)
    _, choice = ROW_DX.choose(dy, index, weight, "auto")
    assert choice.reasons.get("cuda") == why
