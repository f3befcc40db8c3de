"""Block masks in C++ against the reference: edges, layouts, thread counts, every ISA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import partial_kernels as pk
from partial_kernels._core.linear_cases import LinearCase, check, dense_linear
from partial_kernels._native import native_status
from partial_kernels.blocksparse.cases import CASES

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

FP32 = [case for case in CASES if case.dtype == torch.float32 and case.mask.size >= 8]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


def block_case(tokens: int, outputs: int, inputs: int, size: int, density: float, **options: Any):
    shape = -(-outputs // size), -(-inputs // size)
    bitmap = torch.rand(shape, generator=torch.Generator().manual_seed(size)) < density
    name = f"{tokens}x{inputs}x{outputs}-{size}"
    return LinearCase(name, (tokens,), outputs, inputs, pk.Block(bitmap, size), **options)


# Tiles and strips that are cut off, sizes that fit no vector, more tokens than one share of work.
SHAPES = [
    block_case(97, 72, 80, 8, 0.5),
    block_case(23, 70, 61, 8, 0.3),
    block_case(50, 64, 64, 16, 0.4),
    block_case(29, 100, 75, 24, 0.5),
    block_case(300, 128, 96, 32, 0.25),
    block_case(31, 99, 131, 33, 0.5),
    block_case(13, 200, 150, 64, 0.5),
    block_case(5, 40, 40, 100, 1.0),
    block_case(7, 64, 64, 32, 0.0),
    block_case(1, 64, 64, 32, 0.5),
]


@pytest.mark.parametrize("case", [*FP32, *SHAPES], ids=lambda case: case.name)
def test_it_is_the_reference(isa: str, case: LinearCase):
    check(case, impl="native")


@pytest.mark.parametrize("x_layout", ["permuted", "sliced", "expanded"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "permuted", "sliced"])
def test_layouts(x_layout: str, weight_layout: str):
    case = replace(SHAPES[4], batch=(20, 15), x_layout=x_layout, weight_layout=weight_layout)
    check(case, impl="native")


@settings(max_examples=100)
@given(
    st.integers(0, 40), st.integers(1, 90), st.integers(1, 90), st.integers(8, 40), st.floats(0, 1)
)
def test_any_shape(tokens: int, outputs: int, inputs: int, size: int, density: float):
    case = block_case(tokens, outputs, inputs, size, density)
    # Small whole numbers, whose sums are exact in any order.
    arguments = {
        name: a.round().requires_grad_() if isinstance(a, torch.Tensor) else a
        for name, a in case.make().items()
    }
    leaves = [arguments[name] for name in ("x", "weight", "bias")]
    dy = torch.randint(-3, 4, (tokens, outputs)).float()
    y = pk.masked_linear(**arguments, impl="native")
    expected = dense_linear(**arguments)
    assert torch.equal(y, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(o, leaves, dy) for o in (y, expected)), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_the_number_of_threads_changes_no_bit(set_threads: Callable[[int], None]):
    case = block_case(700, 160, 224, 32, 0.4)
    dy = torch.randn(700, 160)

    def results(threads: int) -> list[torch.Tensor]:
        set_threads(threads)
        arguments = case.make(requires_grad=True)
        y = pk.masked_linear(**arguments, impl="native")
        leaves = [arguments[name] for name in ("x", "weight", "bias")]
        return [y, *torch.autograd.grad(y, leaves, dy)]

    for one, two in zip(results(1), results(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "it computes in fp32, got torch.float64"),
        ({"mask": pk.Block(torch.ones(10, 12, dtype=torch.bool), 7)}, "blocks are of 8 or more"),
    ],
)
def test_what_it_cannot_do_it_says(change: dict[str, Any], reason: str):
    arguments = replace(block_case(3, 70, 80, 8, 0.5), **change).make()
    with pytest.raises(RuntimeError, match=reason):
        pk.masked_linear(**arguments, impl="native")
    choice = pk.explain("masked_linear", **arguments)
    assert choice.backend == "reference" and reason in choice.reasons["native"]
