"""``packed_linear`` in C++, every ISA, against the reference: shapes, layouts, thread counts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import partial_kernels as pk
from partial_kernels._native import native_status
from partial_kernels.packed.cases import CASES, Case, check
from partial_kernels.packed.reference import DVALUES, DX, FORWARD

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

FP32 = [case for case in CASES if case.dtype == torch.float32]

# Ends of tiles, of strips and of blocks of rows; rows without elements, and one with all of them.
SHAPES = [
    Case("tile-128", (128,), 32, 64, 0.1),
    Case("tile-129", (129,), 33, 65, 0.1),
    Case("tokens-300", (300,), 50, 131, 0.05),
    Case("narrow", (77,), 90, 3, 0.3),
    Case("one-output", (77,), 1, 90, 0.3),
    Case("one-input", (77,), 90, 1, 0.3),
    Case("sparse", (200,), 300, 200, 0.0005),
    Case("last-row", (150,), 40, 70, range(39 * 70, 40 * 70)),
    Case("last-element", (150,), 40, 70, (40 * 70 - 1,)),
    Case("larger-than-a-chunk", (20,), 300, 200, 0.2),
]


@pytest.mark.parametrize("case", [*FP32, *SHAPES], ids=lambda case: case.name)
def test_it_is_the_reference(isa: str, case: Case):
    check(case, impl="native")


@pytest.mark.parametrize("x_layout", ["permuted", "sliced", "expanded"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "permuted", "sliced"])
def test_layouts(x_layout: str, weight_layout: str):
    case = replace(SHAPES[2], batch=(20, 15), x_layout=x_layout, weight_layout=weight_layout)
    check(case, impl="native")


@settings(max_examples=60)
@given(
    st.integers(0, 150), st.integers(1, 50), st.integers(1, 90), st.floats(0, 1, exclude_max=True)
)
def test_any_shape(tokens: int, outputs: int, inputs: int, share: float):
    check(Case("", (tokens,), outputs, inputs, share), impl="native")


def test_strided_values_and_index(isa: str):
    made = SHAPES[2].make()
    wide = {name: torch.stack([made[name], made[name]], 1)[:, 0] for name in ("values", "index")}
    assert wide["values"].stride() == (2,)
    expected = pk.packed_linear(**made, impl="native")
    assert torch.equal(pk.packed_linear(**{**made, **wide}, impl="native"), expected)
    dy = torch.randn(300, 50)
    results = [
        DVALUES(dy, made["x"], arguments["values"], arguments["index"], "native")
        for arguments in (made, wide)
    ]
    assert torch.equal(*results)


def test_the_number_of_threads_changes_no_bit(isa: str, set_threads: Callable[[int], None]):
    case = Case("", (700,), 160, 224, 0.05)
    made = case.make()
    dy = torch.randn(700, 160)

    def results(threads: int) -> list[Tensor]:
        set_threads(threads)
        merged = torch.ops.partial_kernels.packed_merged_cpu
        x, weight, values, index = (made[n] for n in ("x", "weight", "values", "index"))
        return [merged(weight, values, index), DVALUES(dy, x, values, index, "native")]

    expected = results(1)
    for threads in (2, 3):
        assert all(map(torch.equal, expected, results(threads)))


def test_zeros_of_padding_hide_no_nan(isa: str):
    made = SHAPES[1].make()
    dy = torch.randn(129, 33)
    index: Tensor = made["index"]
    row, column = int(index[0]) // 65, int(index[0]) % 65
    for tensor, place, where in ((dy, row, index // 65), (made["x"], column, index % 65)):
        for value in (math.nan, math.inf):
            changed = tensor.clone()
            changed[128, place] = value
            pair = (changed, made["x"]) if tensor is dy else (dy, changed)
            found = DVALUES(*pair, made["values"], index, "native")
            assert torch.equal(~found.isfinite(), where == place)


def test_subnormals(isa: str):
    dy, x = torch.full((40, 16), 2.0**-140), torch.full((40, 16), 2.0**-3)
    values, index = torch.zeros(3), torch.tensor([0, 100, 255])
    found = DVALUES(dy, x, values, index, "native")
    assert torch.equal(found, torch.full((3,), 40 * 2.0**-143))


def test_memory_beside_the_result_is_a_tile_a_thread(isa: str):
    dy, x = torch.randn(4096, 64), torch.randn(4096, 512)
    values, index = torch.zeros(1000), torch.arange(1000) * 32
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profiler:
        DVALUES(dy, x, values, index, "native")
    allocated = [event.cpu_memory_usage for event in profiler.events() or ()]
    # A tile is of 128 tokens at most.
    assert max(allocated) <= 4 * (1000 + torch.get_num_threads() * 128 * 512)


@pytest.mark.parametrize("op", [FORWARD, DX, DVALUES], ids=lambda op: op.name)
@pytest.mark.parametrize("wrong", [[0, 5, 5], [0, 5, 4], [-1, 2, 3], [0, 5, 16 * 24]])
def test_no_index_reaches_other_memory(isa: str, op: Any, wrong: list[int]):
    """In a compiled graph nobody has looked at it before."""
    x, weight, dy = torch.ones(300, 24), torch.ones(16, 24), torch.ones(300, 16)
    values, index = torch.ones(3), torch.tensor(wrong)
    arguments = {
        FORWARD: (x, weight, values, index, None),
        DX: (dy, weight, values, index),
        DVALUES: (dy, x, values, index),
    }[op]
    with pytest.raises(RuntimeError, match="index must be strictly increasing and within"):
        op(*arguments, "native")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_what_it_cannot_do_it_says(dtype: torch.dtype):
    made = replace(SHAPES[0], dtype=dtype).make()
    reason = f"it computes in fp32, got {dtype}"
    with pytest.raises(RuntimeError, match=reason):
        pk.packed_linear(**made, impl="native")
    choice = pk.explain("packed_linear", **made)
    assert choice.backend == "reference" and reason in choice.reasons["native"]


def test_auto_takes_it():
    assert pk.explain("packed_linear", **SHAPES[0].make()).backend == "native"
