"""``ErrorFeedback``: against MEM-SGD written out, what is kept and left alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import partial_kernels as pk
from maskedtrain import SubNetwork
from maskedtrain.methods import ErrorFeedback, MeProp, Method, Standard
from maskedtrain.methods.largest import largest
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from tests.train.error_feedback_toolbox import D, Given, loop, loss_of, memory_of, mlp
from tests.train.toolbox import TOKENS, Tied, assert_equal, gradients, integers, noise, snapshot

# The algorithm


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("k", [1.0, 10**6])
def test_all_elements_are_sgd_bit_for_bit(k: float, scope: Any) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    model, plain = mlp(), mlp()
    method = ErrorFeedback(model, k, scope=scope)
    loop(model, method, MaskedSGD(model.parameters(), **options), range(5))
    loop(
        plain, Standard(SubNetwork.full(plain)), MaskedSGD(plain.parameters(), **options), range(5)
    )
    assert_equal(snapshot(model), snapshot(plain))
    assert all(held.count_nonzero() == 0 for held in memory_of(method).values())


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_what_was_applied_and_the_memory_are_all_gradients(scope: Any) -> None:
    """Exactly: sums of small integers have no rounding."""
    model = Given((4, 5), (7,), dtype=torch.float64)
    method = ErrorFeedback(model, 0.2, scope=scope)
    given = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    applied = copy.deepcopy(given)
    for step in range(20):
        grads = [integers(*p.shape, seed=3 * step + i) for i, p in enumerate(model.parameters())]
        update = model.step(method, *grads)
        counts = {p: m.numel(p.shape) for p in model.parameters() if (m := update.mask_of(p))}
        assert sum(counts.values()) == 5  # 0.2 of 27, or of 20 and of 7
        assert scope == "global" or list(counts.values()) == [4, 1]
        for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
            given[name] += grad
            assert parameter.grad is not None
            assert parameter.grad.count_nonzero() == counts[parameter]
            applied[name] += parameter.grad
        memory = memory_of(method)
        assert_equal({name: applied[name] + memory[name] for name in given}, given)
        assert any(held.count_nonzero() for held in memory.values())


def mem_sgd(k: float, scope: str, rates: list[float]) -> Tensor:
    """Algorithm 1 of Stich et al.: m gathers lr g, and what is taken of it is subtracted."""
    model = mlp().double()
    parameters = list(model.parameters())
    held = torch.zeros(D, dtype=torch.float64)
    sizes = [D] if scope == "global" else [p.numel() for p in parameters]
    for step, lr in enumerate(rates):
        g = torch.autograd.grad(loss_of(model, step)(), parameters)
        held += lr * parameters_to_vector(g)
        taken = torch.zeros_like(held)
        for mine, part in zip(taken.split(sizes), held.split(sizes), strict=True):
            top = part.abs().argsort(descending=True)[: max(1, round(k * len(part)))]
            mine[top] = part[top]
        held -= taken
        with torch.no_grad():
            for p, c in zip(parameters, taken.split([p.numel() for p in parameters]), strict=True):
                p -= c.view_as(p)
    return parameters_to_vector(parameters).detach()


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(
    "rates", [[0.3] * 12, [0.3 / (1 + t) for t in range(12)]], ids=["constant", "falling"]
)
def test_it_is_mem_sgd(rates: list[float], scope: Any) -> None:
    expected = mem_sgd(0.05, scope, rates)

    def trained(*, scaled: bool) -> Tensor:
        model = mlp().double()
        method = ErrorFeedback(model, 0.05, scope=scope)
        optimizer = MaskedSGD(model.parameters(), lr=rates[0])
        for step, (before, lr) in enumerate(pairwise([rates[0], *rates])):
            optimizer.param_groups[0]["lr"] = lr
            if scaled:
                method.scale_memory(before / lr)
            loop(model, method, optimizer, range(step, step + 1))
        return parameters_to_vector(model.parameters()).detach()

    # fp64: the same sums in units of the gradient, a few roundings apart.
    torch.testing.assert_close(trained(scaled=True), expected, rtol=1e-12, atol=1e-14)
    constant = rates[0] == rates[-1]
    assert torch.allclose(trained(scaled=False), expected, rtol=1e-12, atol=1e-14) == constant


@pytest.mark.parametrize("k", [1, 25, 0.05, 0.5])
def test_the_largest_elements_hold_the_bound(k: float) -> None:
    """``|e + g| / |c| <= sqrt(d / k)``, and nothing that is left is larger than what is taken."""
    model = mlp()
    method = ErrorFeedback(model, k)
    count = k if isinstance(k, int) else round(k * D)
    held = torch.zeros(D)
    for step in range(4):
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        held += parameters_to_vector(list(gradients(model).values()))
        update = method.after_backward(step, plan).update
        assert update.numel() == count
        masks = [update.mask_of(p) for p in model.parameters()]
        assert all(isinstance(mask, pk.Packed) for mask in masks)
        dense = [m.dense(p.shape) for m, p in zip(masks, model.parameters(), strict=True)]  # pyright: ignore[reportOptionalMemberAccess]
        inside = parameters_to_vector(dense)
        assert held[inside].abs().min() >= held[~inside].abs().max()
        c = parameters_to_vector(list(gradients(model).values()))
        assert torch.equal(c, held * inside)
        lost = (held.double().norm() / c.double().norm()).item()
        assert 1 <= lost <= math.sqrt(D / count) * (1 + 1e-12)
        held -= c
        model.zero_grad()


def test_the_bound_is_reached_by_equal_elements() -> None:
    model = Given((2, 3), (2,))
    method = ErrorFeedback(model, 2)
    ones = [torch.ones_like(p) for p in model.parameters()]
    c = []
    for _ in range(2):
        model.step(method, *ones)
        c.append(parameters_to_vector(list(gradients(model).values())))
    # Of equal ones the first; then those that wait.
    assert c[0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert c[1].tolist() == [0, 0, 2, 2, 0, 0, 0, 0]
    assert 8 / c[0].square().sum() == 8 / 2


@pytest.mark.parametrize(
    "make",
    [
        lambda p: MaskedSGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: MaskedAdamW(p, 0.1, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_all_else_is_left_alone_bit_for_bit(make: Any) -> None:
    model = mlp()
    method, optimizer = ErrorFeedback(model, 0.05), make(model.parameters())
    # Momentum and moments everywhere, which could move what a step must not.
    loop(model, Standard(SubNetwork.full(model)), optimizer, range(3))

    def tensors() -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        for name, p in model.named_parameters():
            state = {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
            found.update({f"{name} {key}": value for key, value in state.items()})
        return found

    for step in range(5):
        before = tensors()
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update)
        optimizer.zero_grad()
        after, changed = tensors(), 0
        for name, p in model.named_parameters():
            inside = plan.update.mask_of(p).dense(p.shape)  # pyright: ignore[reportOptionalMemberAccess]
            for key in (key for key in after if key.split()[0] == name):
                assert torch.equal(after[key][~inside], before[key][~inside]), key
            changed += int((after[name] != before[name]).sum())
        assert changed == plan.update.numel() == round(0.05 * D)


# Why one remembers


class Noisy(nn.Module):
    """``x_0^2 / 2 + s x_0 + (x_1 - 1)^2 / 2`` with noise s of mean 0: the minimum is (0, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, s: float) -> Tensor:
        return self.x[0] ** 2 / 2 + s * self.x[0] + (self.x[1] - 1) ** 2 / 2


def on_a_quadratic(make: Callable[[nn.Module], Method], lr: float, steps: int) -> Tensor:
    model = Noisy()
    method, optimizer = make(model), MaskedSGD(model.parameters(), lr=lr)
    for step in range(steps):
        plan = method.plan(step)
        plan.backward(lambda s=3.0 * (-1) ** step: model(s))
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update)
        optimizer.zero_grad()
    return model.x.detach()


def test_it_converges_where_the_largest_elements_alone_stall() -> None:
    """The noise is always the largest element: without a memory the other one never moves."""
    stalled = on_a_quadratic(lambda m: MeProp(m, 1, variant="true"), 0.01, 400)
    assert stalled[1] == 0.0
    for lr in (0.04, 0.01):
        x = on_a_quadratic(lambda m: ErrorFeedback(m, 1), lr, 400)
        # At most lr e from SGD, which has converged; what waits is less than noise and gradient.
        assert (x - torch.tensor([0.0, 1.0])).abs().max() < 4 * lr


def test_the_iterates_are_those_of_sgd_less_what_waits() -> None:
    """``x_t - lr e_t`` moves by ``-lr g(x_t)``."""
    model = mlp().double()
    method = ErrorFeedback(model, 0.02)
    optimizer = MaskedSGD(model.parameters(), lr=0.2)
    virtual = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(10):
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        for name, grad in gradients(model).items():
            virtual[name] -= 0.2 * grad
        optimizer.step(method.after_backward(step, plan).update)
        optimizer.zero_grad()
        memory = memory_of(method)
        for name, p in model.named_parameters():
            mine = p.detach() - 0.2 * memory[name]
            # fp64: a few roundings in all.
            torch.testing.assert_close(mine, virtual[name], rtol=1e-12, atol=1e-14)


# Parameters of other kinds


def test_half_precision_keeps_what_rounding_loses() -> None:
    model = Given((64,), dtype=torch.bfloat16)
    method = ErrorFeedback(model, 0.25)
    given, applied, rounded = torch.zeros(64), torch.zeros(64), 0
    for step in range(12):
        grad = integers(64, seed=step).bfloat16() / 7
        update = model.step(method, grad)
        given += grad.float()
        assert model.p0.grad is not None and model.p0.grad.dtype == torch.bfloat16
        applied += model.p0.grad.float()
        (held,) = memory_of(method).values()
        assert held.dtype == torch.float32
        # fp32: sums of multiples of 2^-10 below 2^10 have no rounding.
        assert torch.equal(applied + held, given)
        inside = update.mask_of(model.p0).dense((64,))  # pyright: ignore[reportOptionalMemberAccess]
        assert (held[inside].abs() <= 2.0**-8 * model.p0.grad.float()[inside].abs()).all()
        rounded += int(held[inside].count_nonzero())
    assert rounded > 0


def test_what_waits_goes_without_a_gradient_of_its_own() -> None:
    model = Given((2,), (3,), (4,))
    model.p2.requires_grad = False
    method = ErrorFeedback(model, 1)
    # No gradient yet: not even counted.
    update = model.step(method, torch.tensor([1.0, -5.0]), None, None)
    assert update.mask_of(model.p0) == pk.Packed([1])
    assert update.mask_of(model.p1) is None and model.p1.grad is None
    # Of two parameters with gradients the other is larger: the first one waits.
    model.step(method, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0, 0.0]), None)
    update = model.step(method, None, None, None)
    assert model.p0.grad is not None and model.p0.grad.tolist() == [2.0, 0.0]
    assert update.numel() == 1 and update.mask_of(model.p2) is None
    # Frozen later, it keeps what it has.
    model.step(method, torch.tensor([3.0, 4.0]), torch.tensor([0.0, 9.0, 0.0]), None)
    model.p0.requires_grad = False
    update = model.step(method, None, None, None)
    assert update.mask_of(model.p0) is None and model.p0.grad is None
    assert memory_of(method)["p0"].tolist() == [3.0, 4.0]


def test_a_model_without_gradients_is_left_alone() -> None:
    model = Given((2,), (0, 3))
    for scope in ("global", "tensor"):
        method = ErrorFeedback(model, 0.5, scope=scope)
        assert model.step(method, None, None).numel() == 0
        # Of nothing there is nothing to take.
        assert model.step(method, torch.ones(2), torch.ones(0, 3)).numel() == 1


def test_tied_parameters_count_once() -> None:
    model = Tied()
    method = ErrorFeedback(model, 7)
    plan = method.plan(0)
    plan.backward(lambda: model(TOKENS).logsumexp(-1).sum())
    grad = gradients(model)["embedding.weight"]
    update = method.after_backward(0, plan).update
    weight = model.output.weight
    assert update.numel() == 7 == update.mask_of(weight).numel((5, 4))  # pyright: ignore[reportOptionalMemberAccess]
    assert list(memory_of(method)) == ["embedding.weight"]
    assert torch.equal(weight.grad + memory_of(method)["embedding.weight"], grad)  # pyright: ignore[reportOptionalOperand]


def test_layouts_do_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 2)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    states, images = [], noise(2, 3, 5, 5)
    for one in (model, last):
        method, optimizer = ErrorFeedback(one, 0.2), MaskedSGD(one.parameters(), lr=0.1)
        for _ in range(3):
            plan = method.plan(0)
            plan.backward(lambda one=one: one(images).square().sum())
            optimizer.step(method.after_backward(0, plan).update)
            optimizer.zero_grad()
        states.append({**snapshot(one), **{f"e {n}": e for n, e in memory_of(method).items()}})
    for name, tensor in states[0].items():
        # Convolutions of another layout add up in another order.
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-4, atol=1e-5)


def test_of_several_dtypes_magnitudes_compare() -> None:
    found = largest([torch.tensor([1.0, 3.0]).bfloat16(), torch.tensor([2.0, -4.0]).double()], 2)
    assert found == [pk.Packed([1]), pk.Packed([1])]
    assert largest([torch.ones(2)], 5) == [pk.Packed([0, 1])] and largest([], 3) == []
