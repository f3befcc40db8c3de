"""Extragradient: against the update written out, exact restoration, state, and its cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain import SubNetwork, Trainer
from maskedtrain.methods import Extragradient, Standard
from maskedtrain.methods.extragradient import Look
from maskedtrain.optim import MaskedAdamW, MaskedSGD

LR, DISTANCE = 0.1, 0.3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(5, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (5,), generator=generator),
        )
        for _ in range(count)
    ]


def trained(look: Look, count: int, **options: Any) -> nn.Sequential:
    model = network()
    method = Extragradient(SubNetwork.full(model), distance=DISTANCE, look=look, **options)
    trainer = Trainer(model, method, MaskedSGD(model.parameters(), lr=LR), F.cross_entropy)
    for _ in trainer.steps(batches(2 * count), until=count):
        pass
    return model


def written_out(look: Look, count: int, sign: int = -1) -> nn.Sequential:
    model, data = network(), iter(batches(2 * count))
    parameters, past = list(model.parameters()), None

    def gradient(batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), parameters))

    for _ in range(count):
        batch = next(data)
        ahead = past if look == "past" else gradient(next(data) if look == "fresh" else batch)
        at = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, ahead or [], strict=False):
                p.add_(g, alpha=sign * DISTANCE)
        past = gradient(batch)
        with torch.no_grad():
            for p, x, g in zip(parameters, at, past, strict=True):
                p.copy_(x - LR * g)
    return model


@pytest.mark.parametrize("look", ["same", "fresh", "past"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_it_is_the_update_written_out(look: Look, sign: int) -> None:
    for mine, expected in zip(
        trained(look, 4, sign=sign).parameters(),
        written_out(look, 4, sign).parameters(),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("look", ["same", "past"])
def test_no_distance_is_standard_training(look: Look) -> None:
    model, plain = network(), network()
    full = SubNetwork.full(plain)
    still = Extragradient(SubNetwork.full(model), distance=0.0, look=look)
    for one, method in ((model, still), (plain, Standard(full))):
        trainer = Trainer(one, method, MaskedAdamW(one.parameters()), F.cross_entropy)
        for _ in trainer.steps(batches(3), until=3):
            pass
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_come_back_bit_for_bit_and_the_loss_is_that_at_x() -> None:
    model = network()
    method = Extragradient(SubNetwork.full(model), distance=1 / 3)
    before = copy.deepcopy(model)
    x, y = batches(1)[0]
    losses = method.plan(0).backward(lambda: F.cross_entropy(model(x), y))
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is not None
    assert losses["full"] == F.cross_entropy(before(x), y)


def test_an_error_ahead_brings_the_parameters_back() -> None:
    model = network()
    method = Extragradient(SubNetwork.full(model), distance=1.0)
    before = copy.deepcopy(model)
    calls: list[int] = []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("ahead")
        return model(batches(1)[0][0]).sum()

    with pytest.raises(RuntimeError, match="ahead"):
        method.plan(0).backward(loss)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulated_batches_look_ahead_each_by_its_own_gradient() -> None:
    model = network()
    method = Extragradient(SubNetwork.full(model), distance=DISTANCE)
    optimizer = MaskedSGD(model.parameters(), lr=LR)
    trainer = Trainer(model, method, optimizer, F.cross_entropy, accumulate=2)
    data = batches(2)
    trainer.train_step(iter(data))
    expected = network()
    parameters, total = list(expected.parameters()), []
    for x, y in data:
        at = [p.detach().clone() for p in parameters]
        look = torch.autograd.grad(F.cross_entropy(expected(x), y), parameters)
        with torch.no_grad():
            for p, g in zip(parameters, look, strict=True):
                p.sub_(DISTANCE * g)
        total.append(torch.autograd.grad(F.cross_entropy(expected(x), y), parameters))
        with torch.no_grad():
            for p, held in zip(parameters, at, strict=True):
                p.copy_(held)
    with torch.no_grad():
        for p, one, other in zip(parameters, *total, strict=True):
            p.sub_(LR * (one + other) / 2)
    for a, b in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("look", "share"), [("same", 2.0), ("past", 1.0)])
def test_what_a_step_costs(look: Look, share: float) -> None:
    def flops(method: Any, model: nn.Module) -> int:
        x, y = batches(1)[0]
        with FlopCounterMode(display=False) as counter:
            method.plan(0).backward(lambda: F.cross_entropy(model(x), y))
        return counter.get_total_flops()

    model = network()
    full = SubNetwork.full(model)
    plain = flops(Standard(full), model)
    assert flops(Extragradient(full, distance=0.1, look=look), model) == share * plain


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    whole = trained("past", 4)
    model, data = network(), batches(8)

    def trainer() -> Trainer:
        method = Extragradient(SubNetwork.full(model), distance=DISTANCE, look="past")
        return Trainer(model, method, MaskedSGD(model.parameters(), lr=LR), F.cross_entropy)

    first = trainer()
    for _ in first.steps(data[:2], until=2):
        pass
    state = copy.deepcopy(first.state_dict())
    second = trainer()
    second.load_state_dict(state)
    for _ in second.steps(data[2:], until=4):
        pass
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": -1.0}, "distance must be >= 0 and finite, got -1.0"),
        ({"distance": 1.0, "look": "back"}, '"same", "fresh" or "past"'),
        ({"distance": 1.0, "sign": 0}, "sign must be -1 or 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Extragradient(SubNetwork.full(network()), **options)


def test_states_that_do_not_fit() -> None:
    model = network()
    past = Extragradient(SubNetwork.full(model), distance=1.0, look="past")
    with pytest.raises(ValueError, match="fits no parameter"):
        past.load_state_dict({"gradients": {"0.weight": torch.ones(2)}})
    with pytest.raises(ValueError, match="no such state"):
        Extragradient(SubNetwork.full(model), distance=1.0).load_state_dict({"gradients": {}})


def test_a_stock_loop_hands_in_a_fresh_batch() -> None:
    model = network()
    method = Extragradient(SubNetwork.full(model), distance=DISTANCE, look="fresh")
    optimizer = MaskedSGD(model.parameters(), lr=LR)
    with pytest.raises(
        ValueError, match="run on 2 mini-batches: backward needs the loss on each, got 1"
    ):
        method.plan(0).backward(lambda: model(batches(1)[0][0]).sum())
    data = iter(batches(8))
    for step in range(4):
        (x, y), (other_x, other_y) = next(data), next(data)
        plan = method.plan(step)
        plan.backward(
            lambda x=x, y=y: F.cross_entropy(model(x), y),
            lambda x=other_x, y=other_y: F.cross_entropy(model(x), y),
        )
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()
    for a, b in zip(model.parameters(), written_out("fresh", 4).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
