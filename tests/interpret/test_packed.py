"""``packed_linear``: any size, any stride, any positions; tiles without any, and full ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core.linear_cases import WEIGHT_LAYOUTS, X_LAYOUTS
from partial_kernels.packed import kernels
from partial_kernels.packed.cases import Case, check
from partial_kernels.packed.kernels import positions
from partial_kernels.packed.reference import DVALUES, merged


@st.composite
def cases(draw: Any) -> Case:
    outputs, inputs = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    some = st.sets(st.integers(0, outputs * inputs - 1)).map(sorted)
    return Case(
        "",
        (draw(st.integers(0, 150)),),
        outputs,
        inputs,
        draw(some | st.floats(0, 1)),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(sorted(X_LAYOUTS))),
        weight_layout=draw(st.sampled_from(sorted(WEIGHT_LAYOUTS))),
    )


@settings(max_examples=60)
@given(cases())
def test_any_product(case: Case) -> None:
    check(case, impl="triton")


SHAPES = [
    Case("tiles-of-several-groups", (5,), 600, 70, 0.01),
    Case("tiles-without-positions", (5,), 200, 200, (0, 130 * 200 + 130)),
    Case("more-than-a-chunk", (5,), 150, 150, 1.0),
    Case("more-than-a-chunk-in-one-tile", (5,), 640, 64, range(3 * 64 * 64, 4 * 64 * 64)),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_tiles(case: Case) -> None:
    check(case, impl="triton")


def test_strided_values_and_index() -> None:
    made = Case("", (30,), 50, 131, 0.05).make()
    wide = {name: torch.stack([made[name], made[name]], 1)[:, 0] for name in ("values", "index")}
    dy = torch.randn(30, 50)

    def results(arguments: dict[str, Any]) -> list[Tensor]:
        x, values, index = (arguments[name] for name in ("x", "values", "index"))
        y = pk.packed_linear(**arguments, impl="triton")
        return [y, DVALUES(dy, x, values, index, "triton")]

    assert all(map(torch.equal, results(made), results({**made, **wide})))


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("values_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_the_sum_is_rounded_once(
    weight_dtype: torch.dtype, values_dtype: torch.dtype, layout: str
) -> None:
    made = Case("", (1,), 50, 31, 0.3, weight_layout=layout).make()
    weight, values = made["weight"].to(weight_dtype), made["values"].to(values_dtype)
    found = kernels._merged(weight, values, made["index"], torch.float16)
    expected = merged(weight, values, made["index"], torch.float16)
    assert found.data_ptr() != weight.data_ptr()
    assert torch.equal(found, expected)


def test_a_nan_spoils_its_row_and_its_column_alone() -> None:
    made = Case("", (9,), 70, 65, 0.1).make()
    dy, index = torch.randn(9, 70), made["index"]
    row, column = int(index[0]) // 65, int(index[0]) % 65
    for name, where in (("dy", index // 65 == row), ("x", index % 65 == column)):
        pair = {"dy": dy.clone(), "x": made["x"].clone()}
        pair[name][4, row if name == "dy" else column] = torch.nan
        found = DVALUES(pair["dy"], pair["x"], made["values"], index, "triton")
        assert torch.equal(found.isnan(), where)


@pytest.mark.parametrize("wrong", [[-1, 2, 3], [0, 5, 16 * 24], [0, 5, 2**40]])
def test_no_index_reaches_other_memory(wrong: list[int]) -> None:
    """In a compiled graph nobody has looked at it before."""
    weight, values, index = torch.ones(16, 24), torch.ones(3), torch.tensor(wrong)
    inside = [place for place in wrong if 0 <= place < 16 * 24]
    found = kernels._merged(weight, values, index, torch.float32).flatten()
    assert (found == 2).nonzero().flatten().tolist() == inside
    dvalues = DVALUES(torch.ones(5, 16), torch.ones(5, 24), values, index, "triton")
    assert dvalues.tolist() == [5.0 if place in inside else 0.0 for place in wrong]


def test_positions_by_tile() -> None:
    index = torch.tensor([0, 4, 6, 9, 13, 14])
    # 3 x 5 in tiles of 2 x 4: two a row.
    starts, places, order = positions(index, (3, 5), (2, 4))
    assert starts.tolist() == [0, 2, 4, 5, 6]
    assert order.tolist() == [0, 2, 1, 3, 4, 5]
    assert places.tolist() == [0, 5, 0, 4, 3, 0]
    assert positions(index, (3, 5), (2, 4)).starts is starts
    assert positions(index, (5, 3), (2, 4)).starts is not starts


def test_auto_takes_it() -> None:
    choice = pk.explain("packed_linear", **Case("", (40,), 64, 48, 0.02).make())
    assert choice.backend == "triton"
