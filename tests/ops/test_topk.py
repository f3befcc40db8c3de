"""``topk_linear``: gradients from what is kept, two derivatives, what it costs and refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels.topk.cases import CASES, Case, check, flops
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX

# Dynamo makes instances of autograd.Function, against torch's advice.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SMALL = Case("", (7,), 13, 11, 4)
LEAVES = ("x", "weight", "bias")
both = pytest.mark.parametrize("per", ["row", "batch"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_results_and_gradients(case: Case, impl: str):
    check(case, impl=impl)


def results(made: dict[str, Any], function: Callable[..., Tensor] = pk.topk_linear) -> list[Tensor]:
    y = function(**made)
    leaves = [made[name] for name in LEAVES]
    return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 2, y.numel()).view_as(y))]


@both
def test_all_of_it_is_back_propagation_bit_for_bit(per: str):
    made = replace(SMALL, k=13, per=per).make(requires_grad=True)
    plain = {name: made[name] for name in LEAVES}
    dense = F.linear(made["x"], made["weight"], made["bias"])
    grads = torch.autograd.grad(
        dense, list(plain.values()), torch.linspace(-1, 2, dense.numel()).view_as(dense)
    )
    for ours, theirs in zip(results(made), (dense, *grads), strict=True):
        assert torch.equal(ours, theirs)


@both
def test_gradcheck_of_the_gradient(per: str):
    # What is kept does not change within gradcheck's steps.
    case = replace(SMALL, batch=(3,), outputs=4, inputs=3, k=2, per=per, dtype=torch.float64)
    made = case.make(requires_grad=True)
    dy = case.dy().requires_grad_()

    def gradient(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = pk.topk_linear(**{**made, "x": x, "weight": weight})
        return torch.autograd.grad(y, [x, weight, made["bias"]], dy, create_graph=True)

    assert torch.autograd.gradcheck(gradient, [dy, made["x"], made["weight"]])


@both
@pytest.mark.parametrize("bias_grad", ["full", "topk"])
def test_the_graph_of_a_gradient_has_its_values(per: str, bias_grad: str):
    made = replace(SMALL, per=per, bias_grad=bias_grad).make(requires_grad=True)
    leaves, dy = [made[name] for name in LEAVES], SMALL.dy()
    y = pk.topk_linear(**made)
    once = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    twice = torch.autograd.grad(y, leaves, dy, create_graph=True)
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_is_frozen_costs_nothing(frozen: str):
    made = SMALL.make(requires_grad=True)
    made[frozen].requires_grad_(False)
    saved: set[int] = set()
    with saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        y = pk.topk_linear(**made)
    assert (made["x"].data_ptr() in saved) == (frozen != "weight")
    with FlopCounterMode(display=False) as counter:
        y.backward(torch.ones_like(y))
    assert counter.get_total_flops() == 2 * 7 * 4 * 11
    assert made[frozen].grad is None


@both
def test_flops_are_counted(per: str):
    case = replace(SMALL, per=per)
    made = case.make(requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = pk.topk_linear(**made)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    count = flops(case)
    assert forward.get_total_flops() == count["forward"]
    assert backward.get_total_flops() == count["dx"] + count["dweight"]


def test_row_sparse_gradients_accumulate():
    made = replace(SMALL, per="batch", weight_grad="rows").make(requires_grad=True)
    weight = made["weight"]
    for factor in (1.0, -2.0):
        y = pk.topk_linear(**made)
        y.backward(factor * SMALL.dy())
    dense = replace(SMALL, per="batch").make(requires_grad=True)
    for factor in (1.0, -2.0):
        pk.topk_linear(**dense).backward(factor * SMALL.dy())
    assert weight.grad.is_sparse and weight.grad.sparse_dim() == 1
    torch.testing.assert_close(weight.grad.to_dense(), dense["weight"].grad)
    torch.optim.SGD([weight], lr=0.1).step()  # pyright: ignore[reportUnknownMemberType]


@both
def test_autocast(per: str):
    made = replace(SMALL, per=per).make(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.topk_linear(**made)
    assert y.dtype == torch.bfloat16
    leaves, dy = [made[name] for name in LEAVES], SMALL.dy().bfloat16()
    outside = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert all(grad.dtype == torch.float32 for grad in outside)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_opcheck():
    made, dy = SMALL.make(), SMALL.dy()
    index = pk.topk_select(dy, 4)
    torch.library.opcheck(ROW_DX._call, (dy, index, made["weight"], "auto"))
    torch.library.opcheck(ROW_DWEIGHT._call, (dy, index, made["x"], "auto"))


@both
def test_compiles_into_one_graph(per: str):
    made = replace(SMALL, per=per).make(requires_grad=True)
    compiled = torch.compile(pk.topk_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for one, other in zip(results(made), results(made, compiled), strict=True):
        assert torch.equal(one, other)


def test_explain():
    row = pk.explain("topk_linear", **SMALL.make(), impl="reference")
    assert (row.op, row.backend) == ("topk_row_dx", "reference")
    batch = pk.explain("topk_linear", **replace(SMALL, per="batch").make(), impl="reference")
    assert (batch.op, batch.backend) == ("topk_select", "reference")
    with pytest.raises(RuntimeError, match="no such backend"):
        pk.topk_linear(**SMALL.make(), impl="nonsense")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "features": ({"x": torch.ones(7, 10)}, "x must have 11 features"),
    "vector weight": ({"weight": torch.ones(13)}, r"weight must be 2-D \[O, I\]"),
    "bias": ({"bias": torch.ones(11)}, r"bias must be \[O\] = \[13\], got \[11\]"),
    "dtype": ({"x": torch.ones(7, 11).double()}, "weight must have x's dtype torch.float64"),
    "k": ({"k": 0}, "k must be an int >= 1, got 0"),
    "share": ({"k": 0.05}, "k must be an int >= 1, got 0.05"),
    "per": ({"per": "token"}, "per must be"),
    "weight_grad": ({"weight_grad": "sparse"}, "weight_grad must be"),
    "bias_grad": ({"bias_grad": "none"}, "bias_grad must be"),
    "rows by row": ({"weight_grad": "rows"}, 'weight_grad="rows" needs per="batch"'),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments(fault: str):
    change, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        pk.topk_linear(**{**SMALL.make(), **change})
