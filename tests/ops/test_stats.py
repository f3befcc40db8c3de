"""``masked_stats``: exact sums, nothing from outside the mask, no waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import partial_kernels as pk
from partial_kernels._core import region_cases
from partial_kernels.masks import Difference
from partial_kernels.stats.cases import CASES, Case, bytes_moved, check, dense_stats, flops
from partial_kernels.stats.reference import STATS

MASKS: dict[str, pk.Mask | None] = {**region_cases.masks((6, 5)), "none": None}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    check(case)


def test_fp32_sums_would_be_noticed() -> None:
    case = Case("", (300, 257), pk.Full())
    [grad] = case.make()["grads"]
    assert (grad * grad).sum().double() != dense_stats(case, case.make()).sq[0]


def test_tensors_of_all_kinds_in_one_call() -> None:
    cases = [
        Case("", (6, 5), pk.Prefix(2, 3)),
        Case("", (7,), None),
        Case("", (4, 3, 2, 2), pk.Index([1, 3], [0, 2]), torch.bfloat16),
        Case("", (6, 5), pk.Element(torch.eye(6, 5) > 0), torch.float64),
        Case("", (), pk.Full()),
    ]
    made = [case.make(i) for i, case in enumerate(cases)]
    lists = {name: [one[name][0] for one in made] for name in ("grads", "other_grads", "masks")}
    results = pk.masked_stats(**lists)
    expected = [dense_stats(case, one) for case, one in zip(cases, made, strict=True)]
    for result, *singles in zip(results, *expected, strict=True):
        assert result.dtype == torch.float64 and result.shape == (len(cases),)
        assert torch.equal(result, torch.cat(singles))


def test_no_gradients() -> None:
    assert all(result.shape == (0,) for result in pk.masked_stats([], [], []))


def test_other_gradient_is_not_needed_outside() -> None:
    result = pk.masked_stats([torch.ones(3)], [None], [None])
    assert [float(value) for value in result] == [0.0, 0.0, 0.0, 3.0]


def test_everything_kept_and_nothing_perturbed() -> None:
    grad = torch.randn(6, 5)
    result = pk.masked_stats([grad], [grad], [pk.Full()])
    assert result.masked_sq == result.other_masked_sq == result.inner == result.sq > 0


@given(st.integers(0, 6), st.integers(0, 5), st.integers(0, 2**20))
def test_cauchy_schwarz_and_parts_add_up(rows: int, cols: int, seed: int) -> None:
    core = pk.Prefix(rows, cols)
    rest = Difference(pk.Full(), core)
    [g], [h], _ = Case("", (6, 5), None).make(seed).values()
    inside, outside = (pk.masked_stats([g], [h], [mask]) for mask in (core, rest))
    whole = pk.masked_stats([g], [h], [pk.Full()])
    # Sums of these numbers are exact in fp64, whatever their order.
    for a, b, c in zip(inside[:3], outside[:3], whole[:3], strict=True):
        assert torch.equal(a + b, c)
    assert torch.equal(inside.sq, whole.masked_sq)
    assert inside.inner**2 <= inside.masked_sq * inside.other_masked_sq


@every_mask
def test_nothing_waits_for_the_device(mask: pk.Mask | None) -> None:
    made = Case("", (6, 5), mask).make()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        pk.masked_stats(**made, impl="reference")
    operators = {event.key.removeprefix("aten::") for event in profiler.key_averages()}
    assert "sum" in operators
    waits = {"nonzero", "masked_select", "_local_scalar_dense", "item", "is_nonzero", "equal"}
    assert not waits & operators


def test_gradients_with_a_graph_are_not_recorded() -> None:
    grad = (torch.ones(3, requires_grad=True) * 2).clone()
    result = pk.masked_stats([grad], [grad], [pk.Full()])
    assert not any(value.requires_grad for value in result)


@every_mask
def test_opcheck(mask: pk.Mask | None) -> None:
    made = Case("", (6, 5), mask, tensors=2).make()
    calls: list[tuple[Any, ...]] = []

    class Spy:
        def __call__(self, *args: Any) -> Tensor:
            calls.append(args)
            return STATS(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partial_kernels.stats.function.STATS", Spy())
        pk.masked_stats(**made)
    torch.library.opcheck(STATS._call, calls[0])


def test_compiles_into_one_graph() -> None:
    masks = list(MASKS.values())
    made = Case("", (6, 5), None, tensors=len(masks)).make()
    arguments = {**made, "masks": masks}

    def total(**arguments: Any) -> Tensor:
        return torch.stack(list(pk.masked_stats(**arguments))).sum(1)

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(**arguments), total(**arguments))


def test_explain() -> None:
    choice = pk.explain("masked_stats", **CASES[0].make(), impl="reference")
    assert choice.backend == "reference"


def _second(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {name: [arguments[name][0], change(arguments[name][1])]}


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], type[Exception], str]] = {
    "lengths": (
        lambda a: {"masks": a["masks"][:1]},
        ValueError,
        "masks must have one entry per gradient, 2, got 1",
    ),
    "no gradient": (_second("grads", lambda g: None), TypeError, r"grads\[1\] must be a tensor"),
    "no other gradient": (
        _second("other_grads", lambda g: None),
        TypeError,
        r"other_grads\[1\] must be a tensor, got NoneType",
    ),
    "sparse": (
        _second("grads", lambda g: g.to_sparse()),
        ValueError,
        r"grads\[1\] must be dense \(torch.strided\), got torch.sparse_coo",
    ),
    "shape": (
        _second("other_grads", lambda g: g.mT),
        ValueError,
        r"other_grads\[1\] must have grads\[1\]'s shape \[6, 5\], got \[5, 6\]",
    ),
    "integers": (
        _second("grads", lambda g: g.long()),
        ValueError,
        r"grads\[1\] must be floating point, got torch.int64",
    ),
    "device": (
        _second("grads", lambda g: g.to("meta")),
        ValueError,
        r"grads\[1\] must be on the device of grads\[0\], cpu, got meta",
    ),
    "mask": (_second("masks", lambda m: 3), TypeError, r"masks\[1\] must be a Mask or None"),
    "mask that does not fit": (
        _second("masks", lambda m: pk.Prefix(7)),
        ValueError,
        "rows must be <= 6, got 7",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments(fault: str) -> None:
    change, error, message = BAD[fault]
    arguments = Case("", (6, 5), pk.Prefix(2, 3), tensors=2).make()
    with pytest.raises(error, match=message):
        pk.masked_stats(**{**arguments, **change(arguments)})


def test_cost_models() -> None:
    case = Case("", (8, 4), pk.Prefix(4, 2), torch.bfloat16, tensors=3)
    assert flops(case) == 2 * 3 * (32 + 3 * 8)
    assert bytes_moved(case) == 2 * 3 * (32 + 8)
    assert flops(Case("", (8, 4), None)) == 64
    assert math.isclose(bytes_moved(Case("", (8, 4), None)), 128)
