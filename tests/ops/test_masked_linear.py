"""``masked_linear`` equals the dense computation with masked weights set to zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels._core import discovery
from partial_kernels._core.linear_cases import (
    WEIGHT_LAYOUTS,
    X_LAYOUTS,
    LinearCase,
    check,
    flops,
    kept_indices,
)
from partial_kernels._core.testing import assert_zero_outside
from partial_kernels.masks import Difference

CASES = [
    case for _, module in discovery.cases() for case in module.CASES if isinstance(case, LinearCase)
]

Make = Callable[..., dict[str, Any]]


def tensors(made: dict[str, Any]) -> list[Tensor]:
    return [value for value in made.values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_equals_the_dense_computation(case: LinearCase) -> None:
    check(case)


@settings(max_examples=60)
@given(st.data())
def test_equals_the_dense_computation_for_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    outputs, inputs = draw(st.integers(0, 20)), draw(st.integers(0, 20))

    def subset(size: int) -> list[int] | None:
        return draw(st.none() | st.sets(st.integers(0, size - 1)).map(sorted)) if size else None

    def random(*shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        return torch.rand(shape, generator=generator) < draw(st.floats(0, 1))

    kind = draw(st.sampled_from(["prefix", "index", "block", "element"]))
    if kind == "prefix":
        mask: pk.Mask = pk.Prefix(draw(st.integers(0, outputs)), draw(st.integers(0, inputs)))
    elif kind == "index":
        mask = pk.Index(subset(outputs), subset(inputs))
    elif kind == "block":
        size = draw(st.integers(1, 9))
        mask = pk.Block(random(-(-outputs // size), -(-inputs // size)), size)
    else:
        mask = pk.Element(random(outputs, inputs))
    case = LinearCase(
        kind,
        tuple(draw(st.lists(st.integers(0, 5), max_size=3))),
        outputs,
        inputs,
        mask,
        # Sums of a case's fp64 numbers are exact: no budget, which few elements may miss by chance.
        dtype=torch.float64,
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(sorted(X_LAYOUTS))),
        weight_layout=draw(st.sampled_from(sorted(WEIGHT_LAYOUTS))),
    )
    check(case)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_first_and_second_derivatives(make: Make, mask: pk.Mask, bias: bool) -> None:
    def call(*arguments: Tensor) -> Tensor:
        return pk.masked_linear(*arguments, mask=mask)

    arguments = tensors(make(dtype=torch.float64, batch=(2, 3), bias=bias))
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


def test_gradients_under_create_graph_are_the_same(make: Make, mask: pk.Mask) -> None:
    made = make(dtype=torch.float64)
    y = pk.masked_linear(**made)
    dy = torch.ones_like(y)
    plain = torch.autograd.grad(y, tensors(made), dy, retain_graph=True)
    differentiable = torch.autograd.grad(y, tensors(made), dy, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, differentiable, strict=True))
    assert_zero_outside(differentiable[1].detach(), mask.dense(made["weight"].shape))


def test_second_derivatives_ignore_what_is_masked(make: Make, mask: pk.Mask) -> None:
    made = make()
    inside = mask.dense(made["weight"].shape)
    inside_rows = torch.zeros(len(inside), dtype=torch.bool)
    inside_rows[kept_indices(mask, made["weight"])[0]] = True
    with torch.no_grad():
        made["weight"][~inside] = torch.nan
        made["bias"][~inside_rows] = torch.inf
    y = pk.masked_linear(**made)
    (dx,) = torch.autograd.grad(y.square().sum(), made["x"], create_graph=True)
    (dweight,) = torch.autograd.grad(dx.square().sum(), made["weight"])
    assert dweight.isfinite().all()
    assert_zero_outside(dweight, inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_full_is_linear_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    case = LinearCase("", (2, 17), 8, 6, pk.Full(), dtype, bias)
    made = case.make(requires_grad=True)
    ours, plain = pk.masked_linear(**made), F.linear(*tensors(made))
    assert torch.equal(ours, plain)
    dy = torch.randn_like(plain)
    gradients = [torch.autograd.grad(y, tensors(made), dy) for y in (ours, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_repeated_calls_agree_bit_for_bit(make: Make) -> None:
    made = make(batch=(33,))

    def run() -> list[Tensor]:
        y = pk.masked_linear(**made)
        return [y, *torch.autograd.grad(y.square().sum(), tensors(made))]

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize(
    "mask", [pk.Full(), pk.Prefix(5, 4), pk.Prefix(3), pk.Index([0, 7], [1, 3, 4])], ids=repr
)
def test_counted_flops_are_the_mask_s(case: LinearCase, make: Make) -> None:
    made = make()
    counter = FlopCounterMode(display=False)
    with counter:
        y = pk.masked_linear(**made)
    assert counter.get_total_flops() == flops(case)["forward"] == 2 * 7 * case.mask.numel((8, 6))
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == flops(case)["dx"] + flops(case)["dweight"]

    # The narrow layer on its own costs exactly as much.
    outputs, inputs = case.kept
    with counter:
        torch.nn.Linear(inputs, outputs)(made["x"]).sum().backward()
    assert counter.get_total_flops() == sum(flops(case).values())


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen_arguments_cost_nothing(case: LinearCase, make: Make, frozen: str) -> None:
    made = make()
    made[frozen].requires_grad_(False)
    y = pk.masked_linear(**made)
    counter = FlopCounterMode(display=False)
    with counter:
        y.sum().backward()
    assert 0 < counter.get_total_flops() <= 2 * case.tokens * 8 * 6


def test_counted_flops_are_between_the_mask_s_and_the_dense(case: LinearCase, make: Make) -> None:
    counter = FlopCounterMode(display=False)
    with counter:
        pk.masked_linear(**make()).sum().backward()
    assert sum(flops(case).values()) <= counter.get_total_flops() <= 3 * 2 * 7 * 8 * 6


def test_meta_tensors_give_shapes(case: LinearCase) -> None:
    y = pk.masked_linear(**case.make(device="meta"))
    assert y.device.type == "meta"
    assert y.shape == (7, case.kept[0])


BOOL = torch.ones(8, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"mask": None}, TypeError, r"of Block, Element, Full, Index, Packed, Prefix, got None"),
        ({"mask": BOOL}, TypeError, r"mask must be one of .*, got Tensor"),
        ({"mask": Difference(pk.Full(), pk.Prefix(1))}, TypeError, r"one of .*, got Difference"),
        ({"weight": torch.ones(8)}, ValueError, r"weight must be 2-D \[O, I\], got shape \[8\]"),
        ({"x": torch.ones(7, 5)}, ValueError, r"x must have 4 features .*, got shape \[7, 5\]"),
        ({"x": torch.ones(())}, ValueError, r"x must have 4 features .*, got shape \[\]"),
        ({"mask": pk.Full()}, ValueError, r"x must have 6 features .*, got shape \[7, 4\]"),
        ({"mask": pk.Element(BOOL)}, ValueError, r"x must have 6 features"),
        ({"bias": torch.ones(5)}, ValueError, r"bias must be \[O\] = \[8\], got \[5\]"),
        ({"bias": torch.ones(8, 1)}, ValueError, r"bias must be \[O\] = \[8\], got \[8, 1\]"),
        ({"mask": pk.Prefix(9, 4)}, ValueError, r"rows must be <= 8, got 9"),
        ({"mask": pk.Prefix(5, 7)}, ValueError, r"cols must be <= 6, got 7"),
        ({"mask": pk.Index([8], [0])}, ValueError, r"Index rows must be < 8, got 8"),
        ({"mask": pk.Index([7], [6])}, ValueError, r"Index cols must be < 6, got 6"),
        ({"mask": pk.Packed([48])}, ValueError, r"Packed index must be < 48, got 48"),
        ({"mask": pk.Element(BOOL.mT)}, ValueError, r"shape \[8, 6\], got \[6, 8\]"),
        ({"mask": pk.Block(BOOL, 4)}, ValueError, r"size 4 must be \[2, 2\], got \[8, 6\]"),
        ({"x": torch.ones(7, 4).double()}, ValueError, r"weight must have x's dtype .*float64"),
        ({"weight": torch.ones(8, 6).half()}, ValueError, r"x's dtype .*32, got torch\.float16"),
        ({"bias": torch.ones(8).bfloat16()}, ValueError, r"bias must have x's dtype"),
        ({"x": torch.ones(7, 4).long()}, ValueError, r"x must be floating .* got torch\.int64"),
        ({"weight": torch.ones(8, 6).int()}, ValueError, r"weight must be floating point"),
        ({"bias": torch.ones(8).int()}, ValueError, r"bias must be floating point"),
        ({"weight": torch.ones(8, 6, device="meta")}, ValueError, r"x's device cpu, got meta"),
        ({"bias": torch.ones(8, device="meta")}, ValueError, r"bias must be on x's device cpu"),
        ({"impl": "cuda"}, RuntimeError, r"not cuda: submatrix_forward has no such backend"),
    ],
)
def test_bad_calls_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    good = {
        "x": torch.ones(7, 4),
        "weight": torch.ones(8, 6),
        "bias": torch.ones(8),
        "mask": pk.Prefix(5, 4),
    }
    pk.masked_linear(**good)
    with pytest.raises(error, match=message):
        pk.masked_linear(**{**good, **changes})
