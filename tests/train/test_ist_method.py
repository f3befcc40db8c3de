"""IST: against workers with networks of their own, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain import Trainer
from maskedtrain.methods._dealing import Dealer
from maskedtrain.methods.ist import IST
from maskedtrain.models import MLP
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.optim.base import MaskedOptimizer
from tests.train.ist_toolbox import (
    CLASSES,
    INPUTS,
    Processes,
    assert_as_written_out,
    classification,
    examples,
    mlp,
    train,
)
from tests.train.toolbox import assert_equal, snapshot

SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAMW: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
RULES: dict[
    str, tuple[Callable[[Any], MaskedOptimizer], Callable[[Any], torch.optim.Optimizer]]
] = {
    "sgd": (partial(MaskedSGD, **SGD), partial(torch.optim.SGD, **SGD)),
    "nesterov": (
        partial(MaskedSGD, **SGD, nesterov=True),
        partial(torch.optim.SGD, **SGD, nesterov=True),
    ),
    "adamw": (partial(MaskedAdamW, **ADAMW), partial(torch.optim.AdamW, **ADAMW)),
}
rules = pytest.mark.parametrize("rule", RULES)


# Parallel steps are steps one after the other


@pytest.mark.parametrize("hidden", [(8,), (9, 7), (6, 5, 8)])
def test_it_is_the_workers_steps_interleaved(hidden: tuple[int, ...]) -> None:
    """p_t = p_1, p_2, p_3, p_1, ...: bit for bit where nothing is shared."""
    model, other = mlp(*hidden, output_bias=False), mlp(*hidden, output_bias=False)
    train(IST(model, 3, local_steps=4), MaskedSGD(model.parameters(), lr=0.1), range(8))
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    dealer = Dealer(other, 3)
    for step in range(8):
        for worker, part in enumerate(dealer.parts(step // 4)):
            with part.activate():
                classification(other, step, worker).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert_equal(snapshot(model), snapshot(other))


@rules
@pytest.mark.usefixtures("correct_roots")
def test_workers_with_networks_of_their_own_do_the_same(rule: str) -> None:
    """The parts bit for bit; what is shared is the mean of the workers'."""
    masked, plain = RULES[rule]
    model, other = mlp(), mlp()
    method, optimizer = IST(model, 3, local_steps=5), masked(model.parameters())
    workers = Processes(Dealer(other, 3).parts(0), plain)
    for step in range(5):
        train(method, optimizer, [step])
        workers.step(step)
        # At any time, not at the end of a round alone.
        workers.gather()
        for name, parameter in model.named_parameters():
            expected = other.get_parameter(name)
            if name == "output.bias":
                torch.testing.assert_close(parameter, expected, rtol=1e-14, atol=1e-16)
            else:
                assert torch.equal(parameter, expected), name
    assert method.round == 1 and not optimizer.state


@rules
def test_over_several_rounds(rule: str) -> None:
    masked, plain = RULES[rule]
    model, other = mlp(), mlp()
    train(IST(model, 2, local_steps=3, seed=5), masked(model.parameters()), range(12))
    dealer = Dealer(other, 2, seed=5)
    for round in range(4):
        # A new optimizer in each: weights alone travel.
        workers = Processes(dealer.parts(round), plain)
        for step in range(3 * round, 3 * round + 3):
            workers.step(step)
        workers.gather()
    assert_as_written_out(model, other)


def test_in_single_precision_to_rounding() -> None:
    model, other = mlp(dtype=torch.float32), mlp(dtype=torch.float32)
    exact = mlp()
    exact.load_state_dict(model.state_dict())
    masked, plain = RULES["sgd"]
    train(IST(model, 3, local_steps=10), masked(model.parameters()), range(10))
    for network in (other, exact):
        workers = Processes(Dealer(network, 3).parts(0), plain)
        for step in range(10):
            workers.step(step)
        workers.gather()
    for ours, theirs, right in zip(
        model.parameters(), other.parameters(), exact.parameters(), strict=True
    ):
        errors = [float((p.detach() - right.detach()).abs().max()) for p in (ours, theirs)]
        eps = torch.finfo(torch.float32).eps * float(right.detach().abs().max())
        assert errors[0] <= 2 * errors[1] + eps


def test_what_is_shared_is_trained_by_synchronous_sgd_in_rounds_of_one_step() -> None:
    model = mlp()
    before = snapshot(model)["output.bias"]
    method, optimizer = IST(model, 3, local_steps=1), MaskedSGD(model.parameters(), lr=0.1)
    gradients: list[Tensor] = []
    for worker, part in enumerate(method.parts):
        with part.activate():
            loss = classification(model, 0, worker)
        gradients += torch.autograd.grad(loss, [model.output.bias])
    train(method, optimizer, [0])
    mean = torch.stack(gradients).mean(0)
    torch.testing.assert_close(model.output.bias.detach(), before - 0.1 * mean, rtol=1e-14, atol=0)
    assert method.round == 1


# Clipping, accumulation


def test_clipping_scales_every_workers_gradient() -> None:
    model, other = mlp(), mlp()
    method, optimizer = IST(model, 3, local_steps=9), MaskedSGD(model.parameters(), **SGD)
    workers = Processes(Dealer(other, 3).parts(0), partial(torch.optim.SGD, **SGD))
    for step, largest in enumerate((0.3, 1e9, 0.05)):
        plan = method.plan(step)
        plan.backward(*(partial(classification, model, step, w) for w in range(3)))
        plan = method.after_backward(step, plan)
        norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step(plan.update)
        method.after_step(step, plan, optimizer)
        optimizer.zero_grad()
        for worker, network in enumerate(workers.networks):
            network.zero_grad()
            classification(network, step, worker).backward()
        shared = [network.get_parameter("output.bias").grad for network in workers.networks]
        dealt = [
            p.grad
            for network in workers.networks
            for name, p in network.named_parameters()
            if name != "output.bias"
        ]
        mean = torch.stack(shared).mean(0)  # pyright: ignore[reportArgumentType, reportCallIssue]
        squares = [(grad**2).sum() for grad in [mean, *dealt]]  # pyright: ignore[reportOptionalOperand]
        total = math.sqrt(sum(squares))
        torch.testing.assert_close(float(norm), total, rtol=1e-13, atol=0)
        for network, own in zip(workers.networks, workers.optimizers, strict=True):
            for p in network.parameters():
                p.grad.mul_(min(1.0, largest / (total + 1e-6)))  # pyright: ignore[reportOptionalMemberAccess]
            own.step()
    workers.gather()
    assert_as_written_out(model, other)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [examples(number) for number in range(count)]


def test_accumulated_micro_batches_are_one_batch() -> None:
    model, other = mlp(), mlp()
    whole = batches(12)
    # Trainer takes all micro-batches of one worker, then those of the next.
    halves = [(x[i : i + 3], y[i : i + 3]) for x, y in whole for i in (0, 3)]
    for network, data, accumulate in ((model, whole, 1), (other, halves, 2)):
        method = IST(network, 2, local_steps=4)
        optimizer = MaskedSGD(network.parameters(), **SGD)
        options = {"accumulate": accumulate, "clip_grad_norm": 0.4}
        trainer = Trainer(network, method, optimizer, F.cross_entropy, **options)
        for _ in trainer.steps(data, until=6):
            pass
    assert_as_written_out(other, model)


def test_the_gradient_of_what_is_shared_is_the_mean() -> None:
    model = mlp()
    method = IST(model, 3, local_steps=2)
    plan = method.plan(0)
    losses = plan.backward(*(partial(classification, model, 0, w) for w in range(3)))
    assert list(losses) == list(method.networks) == ["worker0", "worker1", "worker2"]
    summed = model.output.bias.grad
    assert summed is not None
    plan = method.after_backward(0, plan)
    torch.testing.assert_close(model.output.bias.grad, summed / 3, rtol=0, atol=0)
    # A zeroed gradient that stays a tensor is no gradient of the next step's.
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    optimizer.step(plan.update)
    method.after_step(0, plan, optimizer)
    optimizer.zero_grad(set_to_none=False)
    train(method, optimizer, [1])
    other = mlp()
    train(IST(other, 3, local_steps=2), MaskedSGD(other.parameters(), lr=0.1), range(2))
    assert_equal(snapshot(model), snapshot(other))


# Costs, and what is left alone


def test_what_no_worker_has_rests() -> None:
    model = mlp()
    method, optimizer = IST(model, 3, local_steps=3), MaskedAdamW(model.parameters(), **ADAMW)
    before = model.hidden[1].weight.detach().clone()
    shape = before.shape
    dealt = [part.masks["hidden.1.weight"].dense(shape) for part in method.parts]  # pyright: ignore[reportOptionalMemberAccess]
    inside = torch.stack(dealt).any(0)
    train(method, optimizer, range(2))
    state = optimizer.state[model.hidden[1].weight]
    train(method, optimizer, [2])
    after = model.hidden[1].weight.detach()
    assert torch.equal(after[~inside], before[~inside]) and int((~inside).sum()) == 42
    assert not bool((after[inside] == before[inside]).any())
    assert not bool(state["exp_avg"][~inside].any()) and bool(state["exp_avg"][inside].any())


def test_a_workers_pass_costs_its_part() -> None:
    n, batch = 4, 8
    model = MLP(16, (32, 24), 10)
    method, x = IST(model, n, local_steps=1), torch.zeros(batch, 16)
    first, second, last = 16 * 32 // n, 32 * 24 // n**2, 24 * 10 // n
    # A first layer has no gradient of its inputs to compute.
    cost = 2 * batch * (2 * first + 3 * (second + last))
    loss = [lambda: model(x).sum()] * n
    for part in method.networks.values():
        assert part.flops(x, training=True) == cost
    with FlopCounterMode(display=False) as counter:
        method.plan(0).backward(*loss)
    assert counter.get_total_flops() == method.plan(0).flops(x) == n * cost


def test_bytes_of_a_distributed_run() -> None:
    model = mlp(9, 7)
    method, optimizer = IST(model, 3, local_steps=2), MaskedSGD(model.parameters(), lr=0.1)
    train(method, optimizer, range(5))
    dealt = 9 * (INPUTS + 1) + 3 * (3 + 2 + 2) + 7 * (1 + CLASSES)
    assert method.bytes_sent == 2 * 8 * (dealt + 2 * 2 * CLASSES)
