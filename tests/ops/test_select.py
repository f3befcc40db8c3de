"""``topk_select``: exact, whatever the numbers; ties, NaN; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import partial_kernels as pk
from partial_kernels.select.cases import CASES, NUMBERS, Case, check
from partial_kernels.select.reference import SELECT


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_positions(case: Case, impl: str):
    check(case, impl=impl)


@given(
    st.integers(0, 6),
    st.integers(1, 70),
    st.floats(0, 1),
    st.sampled_from(["row", "batch"]),
    st.sampled_from(sorted(NUMBERS)),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(
    rows: int, columns: int, share: float, per: Any, numbers: str, dtype: torch.dtype
):
    case = Case("", (rows, columns), round(share * columns), per, numbers, dtype)
    check(case)
    check(case, impl="reference")


def test_ties_go_to_the_first():
    assert pk.topk_select(torch.tensor([1.0, -2.0, 2.0, 2.0]), 2).tolist() == [1, 2]
    columns = torch.tensor([[1.0, 0.0, -3.0], [-2.0, 3.0, 0.0]])
    assert pk.topk_select(columns, 2, per="batch").tolist() == [0, 1]


def test_nan_counts_as_largest():
    row = torch.tensor([float("inf"), float("nan"), -1.0, float("-inf")])
    assert pk.topk_select(row, 1).tolist() == [1]
    assert pk.topk_select(row, 2).tolist() == [0, 1]
    assert pk.topk_select(row[:, None].mT.repeat(2, 1), 1, per="batch").tolist() == [1]


def test_sums_of_columns_are_taken_in_fp64():
    # In fp32, 1 is lost in 2^25.
    column = torch.tensor([[2.0**25, 2.0**25], [1.0, 0.0]]).flip(1)
    assert pk.topk_select(column, 1, per="batch").tolist() == [1]


def test_no_gradient_is_recorded():
    x = torch.randn(3, 5, requires_grad=True)
    assert not pk.topk_select(x, 2).requires_grad


def test_compiles_and_passes_opcheck():
    x = torch.randn(6, 40)
    compiled = torch.compile(pk.topk_select, backend="aot_eager", fullgraph=True)
    for per in ("row", "batch"):
        assert torch.equal(compiled(x, 7, per=per), pk.topk_select(x, 7, per=per))
        torch.library.opcheck(SELECT._call, (x, 7, per == "batch", "auto"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"k": 6}, "k must be an int from 0 to the number of columns, 5, got 6"),
    "negative k": ({"k": -1}, "got -1"),
    "bool": ({"k": True}, "got True"),
    "share": ({"k": 0.5}, "got 0.5"),
    "integers": ({"x": torch.ones(3, 5, dtype=torch.int64)}, "floating point, got torch.int64"),
    "scalar": ({"x": torch.tensor(1.0)}, r"x must be \[..., N\]"),
    "per": ({"per": "column"}, 'per must be "row" or "batch", got \'column\''),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments(fault: str):
    change, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        pk.topk_select(**{"x": torch.ones(3, 5), "k": 2, **change})
