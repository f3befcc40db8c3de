"""Prefix and Index layers in C++ against the reference: shapes, layouts, threads, bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core.linear_cases import LinearCase
from partial_kernels._native import native_status
from partial_kernels.submatrix.cases import CASES, check
from partial_kernels.submatrix.reference import OPS

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

COMPACT = [case for case in CASES if not isinstance(case.mask, pk.Full)]


@pytest.mark.parametrize("case", COMPACT, ids=lambda case: case.name)
def test_it_is_the_reference(case: LinearCase):
    check(case, impl="native")


@settings(max_examples=100)
@given(st.data())
def test_any_selection(data: st.DataObject):
    outputs, inputs = (data.draw(st.integers(1, 150)) for _ in range(2))

    def some(size: int) -> list[int]:
        return data.draw(st.sets(st.integers(0, size - 1)).map(sorted))

    kept = [data.draw(st.none() | st.integers(0, size)) for size in (outputs, inputs)]
    masks = [pk.Prefix(*kept), pk.Index(some(outputs), some(inputs)), pk.Index(some(outputs), None)]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    for mask in masks:
        check(LinearCase("any", (9,), outputs, inputs, mask, dtype), impl="native")


SCATTERED = pk.Index(list(range(3, 300, 2)), list(range(1, 200, 3)))
LARGE = LinearCase("large", (70,), 301, 203, SCATTERED)


@pytest.mark.parametrize("mask", [SCATTERED, pk.Prefix(170, 90), pk.Index(None, [5, 7])], ids=str)
def test_the_number_of_threads_changes_no_bit(mask: pk.Mask, set_threads: Callable[[int], None]):
    case = replace(LARGE, mask=mask)
    made = case.make(requires_grad=True)
    leaves = [made[name] for name in ("x", "weight", "bias")]

    def results(threads: int) -> list[Tensor]:
        set_threads(threads)
        y = pk.masked_linear(**made, impl="native")
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    # torch's products of this size do not depend on it, either.
    for one, two in zip(results(1), results(2), strict=True):
        torch.testing.assert_close(one, two)
        assert torch.equal(one == 0, two == 0)


def test_prefixes_are_not_copied():
    case = replace(LARGE, mask=pk.Prefix(170, 90), bias=False)
    made = case.make()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        y = pk.masked_linear(**made, impl="native")
    allocated = max(event.cpu_memory_usage for event in profiler.events() or ())
    assert allocated == 4 * y.numel() < 4 * 170 * 90


FAULTS: dict[str, tuple[int, list[int] | None, list[int] | None]] = {
    "rows": (7, None, None),
    "negative rows": (-1, None, None),
    "row index": (0, [0, 6], None),
    "unsorted row index": (0, [3, 2], None),
    "negative row index": (0, [-1, 2], None),
    "column index": (2, None, [0, 1, 2, 5]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_selection_reaches_other_memory(fault: str):
    """In a compiled graph nobody has looked at it before."""
    rows, *indices = FAULTS[fault]
    index: list[Any] = [None if i is None else torch.tensor(i) for i in indices]
    kept = rows if indices[0] is None else len(indices[0])
    x, weight, dy = torch.ones(3, 4), torch.ones(6, 5), torch.ones(3, max(kept, 0))
    calls = {
        OPS.forward: (x, weight, None),
        OPS.dx: (dy, weight, 4),
        OPS.dweight: (dy, x, weight),
    }
    for op, arguments in calls.items():
        with pytest.raises(RuntimeError, match=r"must keep 0 to 6|an index must ascend in \[0, "):
            op(*arguments, rows, *index, "native")


def test_what_it_cannot_do_it_says():
    made = LARGE.make()
    assert pk.explain("masked_linear", **made).backend == "native"
    with torch.autocast("cpu", torch.bfloat16):
        choice = pk.explain("masked_linear", **made)
    assert choice.backend == "reference"
    assert choice.reasons["native"].startswith("it computes in one dtype, got torch.bfloat16")
