"""``lfc_linear``: both forms and the core against fp64, and what they keep and compute."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import partial_kernels as pk
from partial_kernels._core.ops import Choice
from partial_kernels.lfc.cases import BENCH_CASES, CASES, Case, check, flops
from partial_kernels.lfc.reference import MERGE
from tests.ops.lfc_toolbox import CORE, FORMS, SUPER, saved, tensors


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case: Case):
    check(case)


@pytest.mark.parametrize("case", [replace(SUPER, form=form) for form in FORMS] + [CORE], ids=str)
@pytest.mark.parametrize("frozen", ["", "x", "weight", "u", "v", "bias"])
def test_gradcheck(case: Case, frozen: str):
    made = replace(case, batch=(2, 2), outputs=4, inputs=3, rank=2, dtype=torch.float64).make(
        requires_grad=True
    )
    if isinstance(made.get(frozen), Tensor):
        made[frozen].requires_grad_(False)
    names = [name for name, value in made.items() if isinstance(value, Tensor)]

    def function(*values: Tensor) -> Tensor:
        return pk.lfc_linear(**{**made, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(function, tensors(made))
    assert torch.autograd.gradgradcheck(function, tensors(made))


@pytest.mark.parametrize("rank", [1, 11])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("u",), ("v",), ("weight", "u")])
@pytest.mark.parametrize("batch", [(1,), (3,), (200,)])
def test_forms_agree_whatever_is_trained(batch: tuple[int], frozen: tuple[str, ...], rank: int):
    found = []
    for form in FORMS:
        made = replace(SUPER, batch=batch, rank=rank, form=form, dtype=torch.float64).make(
            requires_grad=True
        )
        for name in frozen:
            made[name].requires_grad_(False)
        y = pk.lfc_linear(**made)
        y.square().sum().backward()
        found.append([y, *(t.grad for t in tensors(made) if t.requires_grad)])
        assert all(made[name].grad is None for name in frozen)
    for merged, factored in zip(*found, strict=True):
        # fp64 sums of a hundred products in another order.
        torch.testing.assert_close(merged, factored, rtol=1e-11, atol=1e-10)


def counted(case: Case, *frozen: str) -> dict[str, int]:
    made = case.make(requires_grad=True)
    for name in frozen:
        made[name].requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        y = pk.lfc_linear(**made)
    dy = torch.ones_like(y)
    with FlopCounterMode(display=False) as backward:
        y.backward(dy)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.batch not in ((), (0,))], ids=lambda case: case.name
)
def test_flops_are_counted_and_are_those_of_the_formula(case: Case):
    assert counted(case) == flops(case)


@pytest.mark.parametrize(
    "frozen",
    [
        names
        for count in range(5)
        for names in itertools.combinations(("x", "weight", "u", "v"), count)
    ],
    ids="-".join,
)
def test_auto_takes_the_form_of_fewer_flops(frozen: tuple[str, ...]):
    taken = set()
    for tokens in (1, 2, 3, 4, 5, 6, 8, 10, 12, 200):
        case = replace(SUPER, batch=(tokens,))
        costs = {f: counted(replace(case, form=f), *frozen) for f in ("auto", *FORMS)}
        total = {form: sum(cost.values()) for form, cost in costs.items()}
        assert total["auto"] == min(total.values()), tokens
        taken |= {form for form in FORMS if costs["auto"] == costs[form]}
        # I O / (I + O) = 5.96: where all are trained, W' is worth forming from 6 tokens on.
        assert frozen or costs["auto"] == costs["merged" if tokens >= 6 else "factored"]
    assert taken == set(FORMS)


@pytest.mark.parametrize(("tokens", "form"), [(5, "factored"), (6, "merged")])
def test_auto_counts_no_gradients_where_none_are_taken(tokens: int, form: str):
    made = replace(SUPER, batch=(tokens,)).make(requires_grad=True)
    # With gradients, W' would be worth forming from 3 tokens on.
    for name in ("u", "v"):
        made[name].requires_grad_(False)
    found = []
    for choice in ("auto", form):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            pk.lfc_linear(**{**made, "form": choice})
        found.append(counter.get_total_flops())
    assert found[0] == found[1]


def test_factors_of_a_frozen_weight_take_dweight_where_that_is_cheaper():
    T, O, I, K = 200, 13, 11, 11
    case = replace(SUPER, batch=(T,), rank=K, form="merged")
    # dx, dW, and dU and dV from it; by token these would be 4 T K (I + O).
    assert counted(case, "weight")["backward"] == 4 * T * O * I + 4 * O * I * K


def test_a_training_step_costs_a_plain_ones_and_a_share_by_rank_and_token():
    for case in (c for c in BENCH_CASES if not c.core):
        plain = 6 * case.tokens * case.outputs * case.inputs
        assert sum(flops(case).values()) == plain * (1 + case.rank / case.tokens)


def test_what_is_saved():
    case = Case("", (40,), 16, 12, 3)
    assert [t.shape for t in saved(replace(case, form="merged").make(requires_grad=True))] == [
        (16, 12)
    ]
    for thin in (replace(case, form="factored"), replace(case, core=True)):
        assert [t.shape for t in saved(thin.make(requires_grad=True))] == [(40, 3)]
    # W' is for dx alone.
    made = replace(case, form="merged").make(requires_grad=True)
    made["x"].requires_grad_(False)
    assert not saved(made)
    # An activation is dead weight unless somebody will ask for a parameter's gradient.
    made = replace(case, form="merged").make()
    x = made["x"].requires_grad_()
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        pk.lfc_linear(**made)
    assert kept and x.data_ptr() not in kept


@pytest.mark.parametrize(("form", "low", "high"), [("merged", 0.14, 0.19), ("factored", 0, 0.03)])
def test_the_low_rank_part_in_bf16(form: str, low: float, high: float):
    """The docstring's figure: an error of 16 % merged where V U is 1 % of W."""
    torch.manual_seed(0)
    x = torch.randn(16384, 64).bfloat16().float()
    # In bf16 already, so that V U alone is what W' can lose.
    weight = (torch.randn(48, 64) / 8).bfloat16().float()
    u, v = torch.randn(8, 64) / 8, 0.01 * torch.randn(48, 8) / 8**0.5
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lfc_linear(x, weight, u, v, form=form)
    assert y.dtype == torch.bfloat16
    # The matrix that was applied: rounding of y, new at each of many tokens, averages out.
    applied = torch.linalg.lstsq(x.double(), y.double()).solution.T - weight.double()
    low_rank = v.double() @ u.double()
    assert low <= (applied - low_rank).norm() / low_rank.norm() < high


def test_autocast_rounds_once():
    made = replace(SUPER, form="merged").make(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        (merged,) = saved(made, dtype=torch.bfloat16, shape=(13, 11))
        y = pk.lfc_linear(**made)
    expected = torch.addmm(made["weight"], made["v"], made["u"]).bfloat16()
    assert torch.equal(merged, expected)
    assert y.dtype == torch.bfloat16
    outside = torch.autograd.grad(y, tensors(made), torch.ones_like(y), retain_graph=True)
    assert all(gradient.dtype == torch.float32 for gradient in outside)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y, tensors(made), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
class TestCompilers:
    @pytest.fixture(autouse=True)
    def fresh_dynamo(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def results(function: Callable[..., Tensor], made: dict[str, Any]) -> list[Tensor]:
        y = function(**made)
        leaves = tensors(made)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y).cumsum(0))]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_opcheck(self, dtype: torch.dtype):
        made = SUPER.make()
        args = made["weight"], made["u"], made["v"], dtype, "auto"
        torch.library.opcheck(torch.ops.partial_kernels.lfc_merge.default, args)
        assert MERGE(*args).dtype == dtype

    @pytest.mark.parametrize(
        "case", [replace(SUPER, form=form) for form in ("auto", *FORMS)] + [CORE], ids=str
    )
    def test_compiles_for_every_number_of_tokens(self, case: Case):
        compiled = torch.compile(pk.lfc_linear, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens in (23, 29, 37):
            made = replace(case, batch=(tokens,)).make(requires_grad=True)
            with torch.compiler.set_stance("default" if tokens == 23 else "fail_on_recompile"):
                ours = self.results(compiled, made)
            for a, b in zip(ours, self.results(pk.lfc_linear, made), strict=True):
                torch.testing.assert_close(a, b)

    @pytest.mark.parametrize("case", [SUPER, CORE], ids=["super", "core"])
    def test_exports_with_any_number_of_tokens(self, case: Case):
        class Layer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                made = case.make()
                self.form = made.pop("form")
                self.x = made.pop("x")
                for name, value in made.items():
                    self.register_buffer(name, value)

            def forward(self, x: Tensor) -> Tensor:
                return pk.lfc_linear(x, self.weight, self.u, self.v, self.bias, form=self.form)

        layer = Layer()
        dynamic = {"x": {0: torch.export.Dim("tokens")}}
        program = torch.export.export(layer, (layer.x,), dynamic_shapes=dynamic)
        stored = io.BytesIO()
        torch.export.save(program, stored)
        stored.seek(0)
        loaded = torch.export.load(stored).module()
        for tokens in (1, 5, 50):
            x = torch.randn(tokens, 11)
            torch.testing.assert_close(loaded(x), layer(x))


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"u": torch.zeros(3)}, r"u must be 2-D \[K, I\], got shape \[3\]"),
            ({"v": torch.zeros(13, 4)}, r"v must be \[O, K\] = \[13, 3\] as u says, got \[13, 4\]"),
            (
                {"weight": torch.zeros(11, 13)},
                r"weight must be \[O, I\] = \[13, 11\] as v and u say, got \[11, 13\]",
            ),
            ({"x": torch.zeros(2, 12)}, r"x must be \[..., I\] = \[..., 11\], got shape \[2, 12\]"),
            ({"bias": torch.zeros(11)}, r"bias must be \[O\] = \[13\], got \[11\]"),
            ({"u": torch.zeros(3, 11).double()}, "u must have x's dtype torch.float32, got"),
            ({"x": torch.zeros(2, 11).half()}, "weight must have x's dtype torch.float16, got"),
            ({"form": "fast"}, 'form must be "auto", "merged" or "factored", got \'fast\''),
        ],
    )
    def test_arguments_that_do_not_fit(self, changes: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            pk.lfc_linear(**{**SUPER.make(), **changes})

    def test_matrices_of_two_dtypes_under_autocast(self):
        made = {**SUPER.make(), "u": torch.zeros(3, 11, dtype=torch.bfloat16)}
        message = "weight, u and v must have one dtype, got torch.float32, torch.bfloat16 and"
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=message):
            pk.lfc_linear(**made)

    def test_an_explicit_backend_runs_or_raises(self):
        made = replace(SUPER, form="merged").make()
        assert torch.equal(pk.lfc_linear(**made, impl="reference"), pk.lfc_linear(**made))
        with pytest.raises(RuntimeError, match="no such backend"):
            pk.lfc_linear(**made, impl="cuda")
        with pytest.raises(RuntimeError, match="one plain PyTorch call"):
            pk.lfc_linear(**replace(SUPER, form="factored").make(), impl="reference")

    def test_explain(self):
        assert pk.explain("lfc_linear", **SUPER.make()).backend == "reference"
        core = pk.explain("lfc_linear", **CORE.make())
        assert isinstance(core, Choice) and core.backend == "torch"
