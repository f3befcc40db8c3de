"""The core of ``lfc_linear`` through its op, as on CUDA; by default the CPU goes past it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels.lfc.cases import CASES, Case, check, flops, plain_lfc
from partial_kernels.lfc.reference import CORE
from tests.ops.lfc_toolbox import CORE as CASE
from tests.ops.lfc_toolbox import saved, tensors

NAMES = ("x", "u", "v", "bias")
FROZEN = [names for count in range(4) for names in combinations(NAMES, count)]


def made_of(case: Case, *frozen: str) -> dict[str, Any]:
    made = case.make(requires_grad=True)
    for name in frozen:
        made[name].requires_grad_(False)
    return {**made, "impl": "reference"}


@pytest.mark.parametrize("case", [c for c in CASES if c.core], ids=lambda case: case.name)
def test_results_and_gradients(case: Case):
    check(case, impl="reference")


@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_gradcheck(frozen: tuple[str, ...]):
    small = replace(CASE, batch=(2, 2), outputs=4, inputs=3, rank=2, dtype=torch.float64)
    made = made_of(small, *frozen)

    def function(*values: Tensor) -> Tensor:
        return pk.lfc_linear(**{**made, **dict(zip(NAMES, values, strict=True))})

    assert torch.autograd.gradcheck(function, tensors(made))
    assert torch.autograd.gradgradcheck(function, tensors(made))


def test_third_derivatives():
    made = made_of(replace(CASE, dtype=torch.float64))

    leaves = tensors(made)

    def third(y: Tensor) -> tuple[Tensor, ...]:
        loss = y.pow(3).sum()
        for _ in range(2):
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            loss = torch.stack([grad.square().sum() for grad in grads]).sum()
        return torch.autograd.grad(loss, leaves)

    plain = {name: value for name, value in made.items() if name != "impl"}
    found = third(pk.lfc_linear(**made)), third(plain_lfc(**plain))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_flops_are_those_of_two_layers(frozen: tuple[str, ...]):
    T, O, I, K = CASE.tokens, CASE.outputs, CASE.inputs, CASE.rank
    made = made_of(CASE, *frozen)
    with FlopCounterMode(display=False) as forward:
        y = pk.lfc_linear(**made)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    assert forward.get_total_flops() == flops(CASE)["forward"] == 2 * T * K * (I + O)
    dx, du, dv = (name not in frozen for name in ("x", "u", "v"))
    expected = 2 * T * K * (O * (dx or du) + I * dx + I * du + O * dv)
    assert backward.get_total_flops() == expected


@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_what_is_saved(frozen: tuple[str, ...]):
    made = made_of(CASE, *frozen)
    h = (CASE.tokens, CASE.rank)
    assert [t.shape for t in saved(made)] == ([] if "v" in frozen else [h])
    # An activation is dead weight unless somebody will ask for U's gradient.
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        pk.lfc_linear(**made)
    assert (made["x"].data_ptr() in kept) == ("u" not in frozen)


def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_parameters():
    made = made_of(CASE)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lfc_linear(**made)
        plain = pk.lfc_linear(**{**made, "impl": "auto"})
    assert torch.equal(y, plain) and y.dtype == torch.bfloat16
    dy = torch.ones_like(y)
    outside = torch.autograd.grad(y, tensors(made), dy, retain_graph=True)
    assert all(gradient.dtype == torch.float32 for gradient in outside)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, tensors(made), dy)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    for ours, theirs in zip(outside, torch.autograd.grad(plain, tensors(made), dy), strict=True):
        # Sums of some dozens of products, in bf16.
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_a_changed_parameter_is_noticed_before_the_backward():
    made = made_of(CASE)
    y = pk.lfc_linear(**made)
    with torch.no_grad():
        made["u"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_backend_that_is_named_runs_or_raises():
    made = CASE.make()
    expected = pk.lfc_linear(**made)
    assert torch.equal(pk.lfc_linear(**made, impl="reference"), expected)
    assert torch.equal(pk.lfc_linear(**made, impl="torch"), expected)
    assert pk.explain("lfc_linear", **made, impl="reference").op == "lfc_core"
    with pytest.raises(RuntimeError, match="no such backend"):
        pk.lfc_linear(**made, impl="cuda")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestCompilers:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("bias", [True, False])
    def test_opcheck(self, bias: bool):
        made = replace(CASE, bias=bias).make()
        args = made["x"], made["u"], made["v"], made.get("bias"), "auto"
        torch.library.opcheck(torch.ops.partial_kernels.lfc_core.default, args)
        y, h = CORE(*args)
        assert (y.shape, h.shape) == ((23, 13), (23, 3))

    @pytest.mark.parametrize("frozen", [(), ("u",), ("x", "v")], ids="-".join)
    def test_compiles_for_every_number_of_tokens(self, frozen: tuple[str, ...]):
        compiled = torch.compile(pk.lfc_linear, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (23, 29, 37):
            made = made_of(replace(CASE, batch=(tokens,)), *frozen)
            leaves = [leaf for leaf in tensors(made) if leaf.requires_grad]
            with torch.compiler.set_stance("default" if tokens == 23 else "fail_on_recompile"):
                ys = [compiled(**made), pk.lfc_linear(**made)]
            found = ([y, *torch.autograd.grad(y, leaves, y.detach())] for y in ys)
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)

    def test_exports_with_any_number_of_tokens(self):
        class Layer(torch.nn.Module):
            def forward(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
                return pk.lfc_linear(x, None, u, v, impl="reference")

        made = CASE.make()
        args = made["x"], made["u"], made["v"]
        dynamic = {"x": {0: torch.export.Dim("tokens")}, "u": None, "v": None}
        program = torch.export.export(Layer(), args, dynamic_shapes=dynamic).module()
        for tokens in (1, 5, 50):
            x = torch.randn(tokens, 11)
            torch.testing.assert_close(program(x, *args[1:]), Layer()(x, *args[1:]))
