"""``topk_select`` in C++, every ISA: ends of vectors, wrong guesses, thread counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import partial_kernels as pk
from partial_kernels._native import native_status
from partial_kernels.select.cases import CASES, NUMBERS, Case, check

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

DTYPES = (torch.float32, torch.bfloat16)
HERE = [case for case in CASES if case.dtype in DTYPES]

# Each row is another kind of numbers, so that what the row before suggests is wrong.
MIXED = [
    *(Case(f"mixed-{n}-{k}", (0, n), k) for n in (64, 300, 2048) for k in (1, 10, 60)),
    Case("mixed-long", (0, 20_000), 999),
    Case("mixed-longer", (0, 40_001), 7),
]


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_it_is_exact(isa: str, case: Case):
    check(case, impl="native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MIXED, ids=lambda case: case.name)
def test_rows_unlike_the_row_before(isa: str, case: Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(case.shape[1], generator=generator)
    kinds = [make(row) for make in NUMBERS.values()]
    x = torch.stack([*kinds, *kinds[::-1], 1e30 * row, 1e-30 * row, 1e-42 * row]).to(dtype)
    found = pk.topk_select(x, case.k, impl="native")
    assert torch.equal(found, pk.topk_select(x, case.k, impl="reference"))


@pytest.mark.parametrize("n", range(1, 70))
def test_ends_of_vectors(isa: str, n: int):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    for k in {1, -(-n // 2), n}:
        for one in (x, x.bfloat16()):
            expected = pk.topk_select(one, k, impl="reference")
            assert torch.equal(pk.topk_select(one, k, impl="native"), expected)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=60), st.floats(0, 1))
def test_any_bits(isa: str, bits: list[int], share: float):
    row = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for x in (row, row.view(torch.bfloat16)):
        k = round(share * len(x))
        expected = pk.topk_select(x, k, impl="reference")
        assert torch.equal(pk.topk_select(x, k, impl="native"), expected)


@pytest.mark.parametrize("per", ["row", "batch"])
def test_the_number_of_threads_changes_nothing(
    isa: str, per: Any, set_threads: Callable[[int], None]
):
    x = torch.randn(500, 700, generator=torch.Generator().manual_seed(0))
    x[100:200] *= 1e3
    found: list[torch.Tensor] = []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(pk.topk_select(x, 40, per=per, impl="native"))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_sums_of_columns_do_not_wait_for_whole_strips(isa: str):
    for columns in (1, 63, 1024, 1025, 3000):
        x = torch.randn(9, columns)
        expected = pk.topk_select(x, 1 + columns // 3, per="batch", impl="reference")
        found = pk.topk_select(x, 1 + columns // 3, per="batch", impl="native")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("k", [-1, 6])
def test_the_op_checks_what_would_reach_other_memory(k: int):
    with pytest.raises(RuntimeError, match=r"k must be in \[0, 5\]"):
        torch.ops.partial_kernels.topk_select_cpu(torch.ones(3, 5), k, False)


def test_what_it_cannot_do_it_says():
    choice = pk.explain("topk_select", torch.ones(3, 5, dtype=torch.float64), 2)
    assert choice.backend == "reference"
    assert choice.reasons["native"] == "it compares fp32 and bf16, got torch.float64"
    assert pk.explain("topk_select", torch.ones(3, 5), 2).backend == "native"
