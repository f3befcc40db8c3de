"""``masked_stats`` in C++, every ISA, against exact sums: masks, layouts, numbers of threads."""

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
from partial_kernels._core.region_cases import LAYOUTS, arranged, masks
from partial_kernels._native import native_status
from partial_kernels.stats.cases import CASES, Case, check
from partial_kernels.stats.function import MaskedStats

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# More than one chunk of work; rows that fill vectors, and ends that do not.
LARGE = [
    Case(f"large-{name}-{'x'.join(map(str, shape))}", shape, mask, layout=layout)
    for shape, layout in (
        ((40000,), "contiguous"),
        ((301, 263), "contiguous"),
        ((301, 263), "permuted"),
        ((3, 20000), "contiguous"),
        ((3, 20000), "sliced"),
        ((48, 33, 3, 3), "contiguous"),
        ((48, 33, 3, 3), "channels_last"),
    )
    for name, mask in masks(shape).items()
] + [
    Case(f"prefix-{rows}x{cols}", (40, 30, 3), pk.Prefix(rows, cols), tensors=2)
    for rows in (0, 1, 40)
    for cols in (0, 7, 30)
]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: f"{case.name}-{case.layout}")
def test_sums_are_exact(isa: str, case: Case):
    check(case, impl="native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(37,), (5, 23), (4, 6, 3, 3)], ids=str)
def test_every_mask_in_every_dtype_and_layout(isa: str, shape: tuple[int, ...], dtype: torch.dtype):
    for name, mask in masks(shape).items():
        for layout in LAYOUTS if len(shape) == 4 else LAYOUTS[:3]:
            check(Case(name, shape, mask, dtype, layout), impl="native")


def test_gradients_of_two_layouts(isa: str):
    case = Case("", (12, 10, 3, 3), None)
    g, h = (case.make()[name][0] for name in ("grads", "other_grads"))
    for mask in masks(case.shape).values():
        expected = pk.masked_stats([g], [h], [mask], impl="reference")
        for first in LAYOUTS:
            for second in LAYOUTS:
                result = pk.masked_stats(
                    [arranged(g, first)], [arranged(h, second)], [mask], impl="native"
                )
                assert_equal(result, expected)


def test_expanded_gradients(isa: str):
    row = torch.arange(19.0)
    for g in (row.expand(7, 19), row[:, None].expand(19, 5), torch.tensor(2.0).expand(6, 5)):
        for mask in masks(tuple(g.shape)).values():
            expected = pk.masked_stats([g.clone()], [g.clone()], [mask], impl="reference")
            assert_equal(pk.masked_stats([g], [g], [mask], impl="native"), expected)


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from(LAYOUTS[:3]),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_any_shape(shape: list[int], layout: str, dtype: torch.dtype, data: Any):
    sizes = tuple(shape)
    options: dict[str, pk.Mask | None] = {"none": None, "full": pk.Full()}
    if math.prod(sizes):
        options |= masks(sizes)
    mask = options[data.draw(st.sampled_from(sorted(options)))]
    check(Case("", sizes, mask, dtype, layout), impl="native")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_half_precision(isa: str, dtype: torch.dtype):
    g = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    g = g[g.isfinite()]
    for one in g.split(997):
        expected = one.double().square().sum()
        result = pk.masked_stats([one], [one], [pk.Full()], impl="native")
        # fp64 sums in another order.
        torch.testing.assert_close(result.inner[0], expected, rtol=1e-12, atol=0.0)
    # One by one, exactly: in a vector's lanes, and in the ends of runs.
    for padding in (0, 15):
        some = g[:: 1 + 6 * (padding == 0)]
        lists = [torch.cat([value[None], value.new_zeros(padding)]) for value in some[:2048]]
        result = pk.masked_stats(lists, lists, [pk.Full()] * len(lists), impl="native")
        assert torch.equal(result.sq, some[:2048].double().square())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**-149])
@pytest.mark.parametrize("at", [0, 8, 17, 40])
def test_nan_infinity_and_subnormals(isa: str, value: float, at: int):
    inside = torch.ones(41, dtype=torch.bool)
    for everywhere in (True, False):
        inside[at] = everywhere
        g, h = torch.ones(41), torch.full((41,), 2.0)
        g[at] = h[at] = value
        for mask in (pk.Element(inside), pk.Packed(inside.nonzero().flatten())):
            expected = pk.masked_stats([g], [h], [mask], impl="reference")
            assert_equal(pk.masked_stats([g], [h], [mask], impl="native"), expected)


def test_sums_beyond_fp32(isa: str):
    g = torch.tensor([3e38, 1e-30, 2.0])
    result = pk.masked_stats([g], [g], [pk.Full()], impl="native")
    assert result.sq == g.double().square().sum()


def test_the_number_of_threads_changes_no_bit(isa: str, set_threads: Callable[[int], None]):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 257), (7,), (64, 33, 3, 3), (50000,), ()]
    grads, others = (
        [torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)
    )
    element = torch.rand(64, 33, 3, 3, generator=generator) < 0.4
    kept = [pk.Prefix(200, 200), pk.Full(), pk.Element(element), pk.Packed([1, 9, 49999]), None]

    def results(threads: int) -> MaskedStats:
        set_threads(threads)
        return pk.masked_stats(grads, others, kept, impl="native")

    assert_equal(results(1), results(2))


def test_a_negated_view(isa: str):
    z = torch.randn(20, dtype=torch.complex64)
    g, h = z.conj().imag, torch.randn(20)
    assert g.is_neg()
    expected = pk.masked_stats([g.resolve_neg().clone()], [h], [pk.Full()], impl="native")
    assert_equal(pk.masked_stats([g], [h], [pk.Full()], impl="native"), expected)


def test_what_it_cannot_do_it_says():
    case = CASES[0]
    for change, reason in (
        ({"other_grads": case.make()["other_grads"][0].double()}, "two gradients of one dtype"),
        ({"grads": torch.zeros(7, dtype=torch.float8_e5m2)}, "reads fp32, fp64, bf16 and fp16"),
    ):
        arguments = {**case.make(), **{name: [grad] for name, grad in change.items()}}
        with pytest.raises(RuntimeError, match=reason):
            pk.masked_stats(**arguments, impl="native")
        choice = pk.explain("masked_stats", **arguments)
        assert choice.backend == "reference" and reason in choice.reasons["native"]


def test_auto_takes_it(isa: str):
    assert pk.explain("masked_stats", **replace(CASES[0], tensors=2).make()).backend == "native"


def assert_equal(result: MaskedStats, expected: MaskedStats) -> None:
    def same(a: Tensor, b: Tensor) -> bool:
        return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))

    named = zip(MaskedStats._fields, result, expected, strict=True)
    assert not {name: (a, b) for name, a, b in named if not same(a, b)}
