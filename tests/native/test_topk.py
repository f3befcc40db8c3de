"""Row-sparse products in C++, every ISA, against the reference: shapes, threads, bad input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import partial_kernels as pk
from partial_kernels._native import native_status
from partial_kernels.topk.cases import CASES, Case, check
from partial_kernels.topk.native import BREAK_EVEN
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

FP32 = [
    case
    for case in CASES
    if case.dtype == torch.float32 and (case.per == "batch" or 3 * case.k <= case.outputs)
]

# Ends of panels and of blocks; few panels, which threads share; one row and many.
SHAPES = [
    Case("panel-64", (33,), 100, 64, 5),
    Case("panel-65", (34,), 100, 65, 5),
    Case("one-panel", (1500,), 90, 3, 2),
    Case("many-panels", (20,), 60, 700, 7),
    Case("one-token", (1,), 2000, 20, 300),
    Case("one-kept", (50,), 2000, 70, 1),
    Case("more-than-a-block", (3,), 5000, 40, 1000),
    Case("more-tokens-than-a-block", (2100,), 40, 40, 10),
]


@pytest.mark.parametrize("case", [*FP32, *SHAPES], ids=lambda case: case.name)
def test_it_is_the_reference(isa: str, case: Case):
    check(case, impl="native")


@settings(max_examples=60)
@given(st.integers(0, 90), st.integers(3, 200), st.integers(0, 150), st.floats(0, 1))
def test_any_shape(tokens: int, outputs: int, inputs: int, share: float):
    k = max(1, int(share * outputs * BREAK_EVEN))
    check(Case("", (tokens,), outputs, inputs, k), impl="native")


def products(dy: Tensor, index: Tensor, weight: Tensor, x: Tensor) -> list[Tensor]:
    return [ROW_DX(dy, index, weight, "native"), ROW_DWEIGHT(dy, index, x, "native")]


@pytest.mark.parametrize("inputs", [40, 1000])
def test_the_number_of_threads_changes_no_bit(
    isa: str, inputs: int, set_threads: Callable[[int], None]
):
    dy, weight, x = torch.randn(150, 300), torch.randn(300, inputs), torch.randn(150, inputs)
    index = pk.topk_select(dy, 20)
    found: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(products(dy, index, weight, x))
    assert all(map(torch.equal, found[0] + found[0], found[1] + found[2]))


def test_nothing_else_of_dy_is_read(isa: str):
    case = SHAPES[1]
    made, dy = case.make(), case.dy()
    index = pk.topk_select(dy, case.k)
    clean = products(dy, index, made["weight"], made["x"])
    dirty = torch.full_like(dy, math.nan).scatter(1, index, dy.gather(1, index))
    assert all(map(torch.equal, clean, products(dirty, index, made["weight"], made["x"])))


@pytest.mark.parametrize("row", [[0, 5, 5], [0, 5, 4], [-1, 2, 3], [0, 5, 30]])
def test_no_index_reaches_other_memory(isa: str, row: list[int]):
    """In a compiled graph nobody has looked at it before."""
    dy, weight, x = torch.ones(4, 30), torch.ones(30, 8), torch.ones(4, 8)
    index = torch.tensor([[0, 1, 2]] * 3 + [row])
    for op, other in ((ROW_DX, weight), (ROW_DWEIGHT, x)):
        with pytest.raises(RuntimeError, match="index must ascend in each row"):
            op(dy, index, other, "native")


def test_what_it_cannot_do_it_says():
    choice = pk.explain("topk_linear", **replace(SHAPES[0], dtype=torch.bfloat16).make())
    assert choice.backend == "reference"
    assert choice.reasons["native"].startswith("it computes in fp32, got torch.bfloat16")
    choice = pk.explain("topk_linear", **replace(SHAPES[0], k=50).make())
    assert (
        choice.reasons["native"] == "a dense product is faster for k > outputs / 3, got 50 of 100"
    )
    assert pk.explain("topk_linear", **SHAPES[0].make()).backend == "native"
