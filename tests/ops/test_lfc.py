"""``lfc_linear``: both forms and the core against fp64, and what they keep and compute."""

from __future__ import annotations

import io
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
from partial_kernels.lfc.cases import BENCH_CASES, CASES, Case, check, flops, plain_lfc
from partial_kernels.lfc.reference import MERGE

FORMS = ("merged", "factored")
SUPER = Case("", (23,), 13, 11, 3)
CORE = replace(SUPER, core=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case: Case):
    check(case)


def tensors(made: dict[str, Any]) -> list[Tensor]:
    return [value for value in made.values() if isinstance(value, Tensor)]


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


@pytest.mark.parametrize("tokens", [1, 5, 6, 200])
@pytest.mark.parametrize("frozen", [(), ("weight",)])
def test_auto_takes_the_form_of_fewer_flops(tokens: int, frozen: tuple[str, ...]):
    # I O / (I + O) = 5.96: from 6 tokens on W' is worth forming.
    case = replace(SUPER, batch=(tokens,))
    costs = {f: counted(replace(case, form=f), *frozen) for f in ("auto", *FORMS)}
    assert sum(costs["auto"].values()) == min(sum(costs[form].values()) for form in FORMS)
    assert costs["auto"] == costs["merged" if tokens >= 6 else "factored"]


def test_a_training_step_costs_a_plain_ones_and_a_share_by_rank_and_token():
    for case in (c for c in BENCH_CASES if not c.core):
        plain = 6 * case.tokens * case.outputs * case.inputs
        assert sum(flops(case).values()) == plain * (1 + case.rank / case.tokens)


def saved(made: dict[str, Any], **like: Any) -> list[Tensor]:
    """What the graph keeps beside the arguments, once each: all, or those with such attributes."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        y = pk.lfc_linear(**made)
    del y
    arguments = {t.untyped_storage().data_ptr() for t in tensors(made)}
    beside = [tensor for pointer, tensor in found.items() if pointer not in arguments]
    return [t for t in beside if all(getattr(t, name) == value for name, value in like.items())]


def test_what_is_saved():
    case = Case("", (40,), 16, 12, 3)
    assert [t.shape for t in saved(replace(case, form="merged").make(requires_grad=True))] == [
        (16, 12)
    ]
    for thin in (replace(case, form="factored"), replace(case, core=True)):
        assert [t.shape for t in saved(thin.make(requires_grad=True))] == [(40, 3)]
    # An activation is dead weight unless somebody will ask for a parameter's gradient.
    made = replace(case, form="merged").make()
    x = made["x"].requires_grad_()
    kept: list[int] = []
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        pk.lfc_linear(**made)
    assert kept and x.data_ptr() not in kept


@pytest.mark.parametrize("form", FORMS)
def test_the_low_rank_part_in_bf16(form: str):
    """The docstring's figures: an error of 16 % merged where V U is 1 % of W."""
    torch.manual_seed(0)
    x = torch.randn(512, 1024)
    weight = torch.randn(256, 1024) / 32
    u = torch.randn(8, 1024) / 32
    v = 0.01 * torch.randn(256, 8) / 8**0.5
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.lfc_linear(x, weight, u, v, form=form)
        base = pk.lfc_linear(x, weight.bfloat16().float(), u, torch.zeros_like(v), form=form)
    low_rank = x.double() @ (v.double() @ u.double()).T
    merged = (weight + v @ u).bfloat16().double() - weight.double()
    part_of_merged = merged @ x.double().T
    error = (part_of_merged.T - low_rank).norm() / low_rank.norm()
    assert 0.1 < error < 0.25
    assert y.dtype == base.dtype == torch.bfloat16
    if form == "factored":
        # What is added to x W^T is the low-rank part to bf16's precision.
        h = (x.bfloat16() @ u.bfloat16().T) @ v.bfloat16().T
        assert (h.double() - low_rank).norm() / low_rank.norm() < 0.01


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


class Merges:
    """Counts how often W' is formed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        (backend,) = MERGE.backends
        monkeypatch.setattr(MERGE, "backends", [replace(backend, run=self.run)])
        self._run = backend.run

    def run(self, *args: Any) -> Tensor:
        self.count += 1
        return self._run(*args)


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> Merges:
    return Merges(monkeypatch)


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

    def test_compiled_auto_changes_its_form(self, merges: Merges):
        compiled = torch.compile(pk.lfc_linear, backend="aot_eager", fullgraph=True, dynamic=True)
        for tokens, count in ((23, 1), (3, 1), (29, 2), (4, 2)):
            made = replace(SUPER, batch=(tokens,)).make(requires_grad=True)
            self.results(compiled, made)
            assert merges.count == count

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
            ({"form": "fast"}, 'form must be "auto", "merged" or "factored", got \'fast\''),
        ],
    )
    def test_arguments_that_do_not_fit(self, changes: dict[str, Any], message: str):
        with pytest.raises(ValueError, match=message):
            pk.lfc_linear(**{**SUPER.make(), **changes})

    def test_an_explicit_backend_runs_or_raises(self):
        made = replace(SUPER, form="merged").make()
        assert torch.equal(pk.lfc_linear(**made, impl="reference"), pk.lfc_linear(**made))
        with pytest.raises(RuntimeError, match="no such backend"):
            pk.lfc_linear(**made, impl="cuda")
        with pytest.raises(RuntimeError, match="one plain PyTorch call"):
            pk.lfc_linear(**CORE.make(), impl="cuda")

    def test_explain(self):
        assert pk.explain("lfc_linear", **SUPER.make()).backend == "reference"
        core = pk.explain("lfc_linear", **CORE.make())
        assert isinstance(core, Choice) and core.backend == "torch"


class TestCache:
    def test_reused_until_something_changes(self, merges: Merges):
        cache = pk.MergeCache()
        made = SUPER.make(requires_grad=True)

        def same() -> None:
            y = pk.lfc_linear(**made, cache=cache)
            torch.testing.assert_close(y, plain_lfc(**made))
            y.sum().backward()

        for _ in range(3):
            same()
        assert merges.count == 1
        for count, name in enumerate(("weight", "u", "v"), start=2):
            with torch.no_grad():
                made[name].add_(1)
            same()
            same()
            assert merges.count == count
        # Another tensor that holds the same is another.
        made["u"] = made["u"].detach().clone().requires_grad_()
        same()
        assert merges.count == 5

    def test_small_batches_use_what_there_is(self, merges: Merges):
        cache = pk.MergeCache()
        made = SUPER.make()
        few = made["x"][:2]
        pk.lfc_linear(**{**made, "x": few}, cache=cache)
        assert merges.count == 0
        pk.lfc_linear(**made, cache=cache)
        with FlopCounterMode(display=False) as counter:
            pk.lfc_linear(**{**made, "x": few}, cache=cache)
        assert merges.count == 1 and counter.get_total_flops() == 2 * 2 * 13 * 11

    def test_dtypes_have_their_own(self, merges: Merges):
        cache = pk.MergeCache()
        made = SUPER.make()
        for _ in range(2):
            pk.lfc_linear(**made, cache=cache)
            with torch.autocast("cpu", torch.bfloat16):
                assert pk.lfc_linear(**made, cache=cache).dtype == torch.bfloat16
        assert merges.count == 4

    def test_what_inference_mode_made_can_be_trained_with(self, merges: Merges):
        cache = pk.MergeCache()
        made = SUPER.make(requires_grad=True)
        with torch.inference_mode():
            expected = pk.lfc_linear(**made, cache=cache).clone()
        y = pk.lfc_linear(**made, cache=cache)
        y.sum().backward()
        assert torch.equal(y, expected) and merges.count == 1
        with torch.inference_mode():
            made = SUPER.make()
            for _ in range(2):
                pk.lfc_linear(**made, cache=cache)
        assert merges.count == 3

    def test_one_matrix_at_most_is_held(self, monkeypatch: pytest.MonkeyPatch):
        cache = pk.MergeCache()
        made = SUPER.make()
        held: list[bool] = []
        (backend,) = MERGE.backends

        def run(*args: Any) -> Tensor:
            held.append(cache._held is not None)
            return backend.run(*args)

        monkeypatch.setattr(MERGE, "backends", [replace(backend, run=run)])
        pk.lfc_linear(**made, cache=cache)
        made["weight"].add_(1)
        pk.lfc_linear(**made, cache=cache)
        assert held == [False, False] and cache._held is not None
        cache.clear()
        assert cache._held is None

    def test_a_changed_parameter_is_noticed_before_the_backward(self):
        made = SUPER.make(requires_grad=True)
        y = pk.lfc_linear(**made, cache=pk.MergeCache())
        with torch.no_grad():
            made["u"].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    def test_compiled_calls_go_past_it(self):
        torch._dynamo.reset()
        cache = pk.MergeCache()
        made = SUPER.make()

        def step(x: Tensor) -> Tensor:
            return pk.lfc_linear(**{**made, "x": x}, cache=cache)

        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
        compiled(made["x"])
        made["weight"].add_(1)
        torch.testing.assert_close(compiled(made["x"]), plain_lfc(**made))
        assert cache._held is None
