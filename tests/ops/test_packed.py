"""``packed_linear``: results, two derivatives, what it keeps, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels.packed.cases import CASES, Case, check, flops
from partial_kernels.packed.reference import DVALUES, DX, FORWARD, few_tokens

# Dynamo makes instances of autograd.Function, against torch's advice.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SMALL = Case("", (7,), 13, 11, (0, 1, 12, 54, 55, 100, 142))
LEAVES = ("x", "values", "bias")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_results_and_gradients(case: Case, impl: str):
    check(case, impl=impl)


@pytest.mark.parametrize(
    ("batch", "index", "few"), [((1,), (4,), True), ((2, 2), (0, 4, 5, 11), False)]
)
@pytest.mark.parametrize("frozen", ["", *LEAVES])
def test_gradcheck(batch: tuple[int, ...], index: tuple[int, ...], few: bool, frozen: str):
    case = Case("", batch, 4, 3, index, dtype=torch.float64)
    assert few_tokens(case.tokens, torch.empty(4, 3), torch.empty(case.kept)) == few
    made = case.make(requires_grad=True)
    if frozen:
        made[frozen].requires_grad_(False)

    def function(*leaves: Tensor) -> Tensor:
        return pk.packed_linear(**{**made, **dict(zip(LEAVES, leaves, strict=True))})

    leaves = [made[name] for name in LEAVES]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_zeros_are_the_frozen_layer():
    made = SMALL.make()
    made["values"].zero_()
    plain = F.linear(made["x"], made["weight"], made["bias"])
    assert torch.equal(pk.packed_linear(**made), plain)


def test_index_as_a_mask():
    made = SMALL.make()
    expected = pk.packed_linear(**made)
    assert torch.equal(pk.packed_linear(**{**made, "index": pk.Packed(made["index"])}), expected)


def test_few_and_many_tokens_agree():
    case = replace(SMALL, outputs=64, inputs=48, index=0.02, dtype=torch.float64)
    made = replace(case, batch=(40,)).make(requires_grad=True)
    few = {**made, "x": made["x"].detach()[:2].requires_grad_()}
    assert few_tokens(2, made["weight"], made["index"])
    assert not few_tokens(40, made["weight"], made["index"])
    y, some = pk.packed_linear(**made), pk.packed_linear(**few)
    # fp64 sums in another order.
    torch.testing.assert_close(some, y[:2], rtol=1e-12, atol=1e-12)
    (dx,), (some_dx,) = (
        torch.autograd.grad(a.sum(), [b]) for a, b in ((y, made["x"]), (some, few["x"]))
    )
    torch.testing.assert_close(some_dx, dx[:2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", ["", "x", "values"])
def test_saves_nothing_of_its_own(frozen: str):
    made = SMALL.make(requires_grad=True)
    if frozen:
        made[frozen].requires_grad_(False)
    saved: set[int] = set()
    with saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
        pk.packed_linear(**made)
    assert saved <= {t.data_ptr() for t in made.values()}
    # An activation is dead weight unless somebody will ask for the values' gradient.
    assert (made["x"].data_ptr() in saved) == (frozen != "values")


class Largest(TorchDispatchMode):
    """The most elements that a result of an operator had within it."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_the_gradient_of_the_weight_is_never_formed():
    made = Case("", (3,), 1024, 512, 0.001).make()
    dy = torch.ones(3, 1024)
    with Largest() as largest:
        DVALUES._run(dy, made["x"], made["values"], made["index"], "reference")
    assert largest.size == 1024 * 512 // 16


def test_flops_are_counted():
    case = replace(SMALL, batch=(300,))
    made = case.make(requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = pk.packed_linear(**made)
    with FlopCounterMode(display=False) as backward:
        y.backward(torch.ones_like(y))
    count = flops(case)
    assert forward.get_total_flops() == count["forward"]
    assert backward.get_total_flops() == count["dx"] + count["dvalues"]


def test_autocast():
    made = replace(SMALL, batch=(300,)).make(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.packed_linear(**made)
    assert y.dtype == torch.bfloat16
    leaves = [made[name] for name in LEAVES]
    outside = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    assert all(grad.dtype == torch.float32 for grad in outside)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_values_finer_than_the_weight():
    made = replace(SMALL, batch=(300,)).make()
    made["weight"] = made["weight"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.packed_linear(**made)
    applied = made["weight"].float().flatten().index_add(0, made["index"], made["values"])
    expected = F.linear(
        made["x"].bfloat16(), applied.view(13, 11).bfloat16(), made["bias"].bfloat16()
    )
    assert torch.equal(y, expected)


@pytest.mark.parametrize("tokens", [2, 300])
def test_opcheck(tokens: int):
    made = replace(SMALL, batch=(tokens,), outputs=16, inputs=24, index=(0, 30, 383)).make()
    x, weight, values, index, bias = (
        made[name] for name in ("x", "weight", "values", "index", "bias")
    )
    dy = torch.ones(tokens, 16)
    torch.library.opcheck(FORWARD._call, (x, weight, values, index, bias, "auto"))
    torch.library.opcheck(DX._call, (dy, weight, values, index, "auto"))
    torch.library.opcheck(DVALUES._call, (dy, x, values, index, "auto"))


def test_compiles_into_one_graph():
    made = replace(SMALL, batch=(2, 30)).make(requires_grad=True)
    leaves = [made[name] for name in LEAVES]

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(**made)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    compiled = torch.compile(pk.packed_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for one, other in zip(results(pk.packed_linear), results(compiled), strict=True):
        assert torch.equal(one, other)


def test_explain():
    assert pk.explain("packed_linear", **SMALL.make(), impl="reference").backend == "reference"


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "features": ({"x": torch.ones(7, 10)}, r"x must be \[..., I\] = \[..., 11\], got shape"),
    "vector weight": ({"weight": torch.ones(13)}, r"weight must be 2-D \[O, I\]"),
    "bias": ({"bias": torch.ones(11)}, r"bias must be \[O\] = \[13\], got \[11\]"),
    "values": ({"values": torch.ones(6)}, r"values must be \[N\] = \[7\] as index says, got \[6\]"),
    "dtype": ({"values": torch.ones(7).double()}, "values must have x's dtype torch.float32"),
    "index dtype": ({"index": torch.arange(7).int()}, "index must be a 1-D int64 tensor"),
    "order": (
        {"index": torch.tensor([0, 1, 12, 12, 55, 100, 142])},
        "index must be strictly increasing, got 12 after 12 at position 3",
    ),
    "negative": (
        {"index": torch.tensor([-1, 1, 12, 13, 55, 100, 142])},
        r"index must be in \[0, O \* I\) = \[0, 143\), got -1 at position 0",
    ),
    "too large": (
        {"index": torch.tensor([0, 1, 12, 13, 55, 100, 143])},
        r"index must be in \[0, O \* I\) = \[0, 143\), got 143 at position 6",
    ),
    "mask too large": ({"index": pk.Packed([0, 1, 2, 3, 4, 5, 143])}, "Packed index must be < 143"),
    "trained weight": (
        {"weight": torch.ones(13, 11, requires_grad=True)},
        "weight is frozen here and must not require a gradient",
    ),
    "device": ({"index": torch.arange(7, device="meta")}, "index must be on x's device cpu"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments(fault: str):
    change, message = BAD[fault]
    with pytest.raises(ValueError, match=message):
        pk.packed_linear(**{**SMALL.make(), **change})


def test_a_weight_may_require_a_gradient_where_none_is_taken():
    made = SMALL.make()
    made["weight"].requires_grad_()
    with torch.no_grad():
        pk.packed_linear(**made)
