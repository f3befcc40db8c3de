"""Products of Prefix and Index masks: any size, any stride, more than one tile a side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import partial_kernels as pk
from partial_kernels._core.linear_cases import WEIGHT_LAYOUTS, X_LAYOUTS, LinearCase, check
from partial_kernels._core.tiles import Tile, choosing
from partial_kernels.masks import Index, Mask, Prefix


@st.composite
def cases(draw: Any) -> LinearCase:
    outputs, inputs = draw(st.integers(1, 150)), draw(st.integers(1, 150))

    def kept(size: int) -> Any:
        return draw(st.none() | st.sets(st.integers(0, size - 1)).map(sorted))

    rows, columns = kept(outputs), kept(inputs)
    if draw(st.booleans()):
        mask: Mask = Index(rows, columns)
    else:
        mask = Prefix(*(None if some is None else len(some) for some in (rows, columns)))
    return LinearCase(
        "",
        (draw(st.integers(0, 150)),),
        outputs,
        inputs,
        mask,
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(sorted(X_LAYOUTS))),
        weight_layout=draw(st.sampled_from(sorted(WEIGHT_LAYOUTS))),
    )


@settings(max_examples=60)
@given(cases())
def test_any_product(case: LinearCase) -> None:
    check(case, impl="triton")


def test_tiles_of_several_groups() -> None:
    check(LinearCase("", (600,), 96, 80, Prefix(70, 66)), impl="triton")


@settings(max_examples=30)
@given(cases())
def test_any_product_of_tiles_that_descriptors_load(case: LinearCase) -> None:
    def by_tma(_: str, tile: Tile) -> Tile:
        return replace(tile, sizes={**tile.sizes, "TMA": 1})

    with choosing(by_tma):
        check(case, impl="triton")
        aligned = replace(case, x_layout="contiguous", dtype=torch.float16, inputs=80, outputs=96)
        for mask in (Prefix(64, 48), Index(range(0, 96, 2)), Prefix(8, 72)):
            check(replace(aligned, mask=mask), impl="triton")


def test_a_weight_of_another_dtype_is_cast_as_it_is_loaded() -> None:
    x, weight = torch.randn(5, 3).half(), torch.randn(8, 6)
    ops = torch.ops.partial_kernels
    y = ops.submatrix_forward(x, weight, None, 4, None, None, "triton")
    expected = ops.submatrix_forward(x, weight, None, 4, None, None, "reference")
    torch.testing.assert_close(y, expected)
    dweight = ops.submatrix_dweight(y, x, weight, 4, None, None, "triton")
    assert dweight.dtype == torch.float32
    torch.testing.assert_close(
        dweight,
        ops.submatrix_dweight(y, x, weight, 4, None, None, "reference"),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize(
    ("tokens", "mask", "why"),
    [
        (4, Prefix(2), "cuBLAS takes leading rows and columns where they are"),
        (4, Index([0], [1]), "columns are gathered first, for cuBLAS"),
        (2000, Index([0]), "rows are gathered first, for cuBLAS: there are many tokens"),
        (4, Index([0, 3]), None),
    ],
)
def test_auto_takes_it_where_it_is_faster(
    tokens: int, mask: Mask, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("partial_kernels.submatrix.function.SMALL", 0)
    _, columns = mask.restricted_shape((8, 6))
    choice = pk.explain("masked_linear", torch.ones(tokens, columns), torch.ones(8, 6), mask=mask)
    assert (choice.backend == "triton") == (why is None)
    assert choice.reasons.get("triton") == why
