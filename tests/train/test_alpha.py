"""Trainer(alpha="auto"): the step-size factor of Theorem 1, measured on the step's mini-batch."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import SubNetwork, Trainer, cli
from maskedtrain.layers import MaskedLinear
from maskedtrain.methods import ATS, Extragradient, LayerFreeze, Method, Slimmable, Standard
from maskedtrain.methods.base import Pass, Plan
from maskedtrain.models import MLP
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.theory.criteria import at_x, measure_step
from maskedtrain.training.loop import NonFiniteError
from tests.train.toolbox import assert_equal, gradients, snapshot


def batches(count: int, *, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 8, generator=generator, dtype=dtype),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(count)
    ]


def made(kind: str, *, dropout: float = 0.0) -> tuple[nn.Module, Method]:
    torch.manual_seed(0)
    model = MLP(8, (32,), 4, dropout=dropout)
    full, core = SubNetwork.full(model), SubNetwork.width(model, 0.5)
    methods: dict[str, Callable[[], Method]] = {
        "standard": lambda: Standard(full),
        "ats": lambda: ATS([full, core], lr_scales={"core": 0.5}),
        "slimmable": lambda: Slimmable([full, core]),
        "extragradient": lambda: Extragradient(full, distance=0.5),
    }
    return model, methods[kind]()


def alpha_by_hand(g: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """<p g, p g~> / |p g~|^2 in fp64; g~ is 0 outside the core."""
    inner = sum(float((g[name].double() * other[name].double()).sum()) for name in other)
    square = sum(float(other[name].double().square().sum()) for name in other)
    return min(1.0, max(0.0, inner / square))


def one_sgd_step(kind: str, step: int, alpha: str) -> tuple[nn.Module, Any]:
    model, method = made(kind)
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, method, optimizer, F.cross_entropy, alpha=alpha)
    trainer.step = step
    return model, trainer.train_step(iter(batches(1)))


def test_a_cores_step_is_scaled_by_it() -> None:
    model, method = made("ats")
    x, y = batches(1)[0]
    found: list[dict[str, Tensor]] = []
    for subnet in method.subnets.values():
        model.zero_grad()
        with subnet.activate():
            F.cross_entropy(model(x), y).backward()
        found.append(gradients(model))
    expected = alpha_by_hand(*found)
    assert 0.01 < expected < 0.99
    before = snapshot(model)

    trained, report = one_sgd_step("ats", 1, "auto")
    assert report.alpha == pytest.approx(expected, rel=1e-5)
    # With the method's own factor for the core.
    assert report.lr == pytest.approx(0.1 * 0.5 * expected, rel=1e-5)
    for name, tensor in trained.state_dict().items():
        step = before[name] - 0.05 * report.alpha * found[1].get(name, torch.zeros(()))
        torch.testing.assert_close(tensor, step)


@pytest.mark.parametrize(("kind", "step"), [("standard", 0), ("ats", 0)])
def test_whole_networks_steps_are_not_measured(
    kind: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr("maskedtrain.training.loop.step_gradients", fails)
    model, report = one_sgd_step(kind, step, "auto")
    assert report.alpha == 1.0
    assert_equal(snapshot(model), snapshot(one_sgd_step(kind, step, "one")[0]))
    with pytest.raises(AssertionError, match="measured"):
        one_sgd_step("ats", 1, "auto")


def test_what_is_at_x() -> None:
    model, ats = made("ats")
    assert at_x(ats.plan(0)) and not at_x(ats.plan(1))
    # A mask of the update alone perturbs nothing: alpha is 1.
    full, core = ats.subnets.values()
    frozen = Plan((Pass(full),), update=core)
    assert at_x(frozen)
    x, y = batches(1)[0]
    assert measure_step(model, frozen, lambda: F.cross_entropy(model(x), y)).alpha == 1.0
    _, moved = made("extragradient")
    assert not at_x(moved.plan(0))
    # What looks ahead at x is no part of the update.
    assert at_x(replace(moved.plan(0), passes=moved.plan(0).passes[:1]))


def test_of_several_passes_it_is_that_of_their_sum() -> None:
    model, method = made("slimmable")
    x, y = batches(1)[0]
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    full, core = method.subnets.values()
    plan = Plan((Pass(full, loss_weight=0.125), Pass(core, loss_weight=64.0)), update=full)
    found: list[dict[str, Tensor]] = []
    for subnet in (full, core):
        model.zero_grad()
        with subnet.activate():
            loss().backward()
        found.append(gradients(model))
    g, h = found
    total = {name: 0.125 * g[name] + 64.0 * h.get(name, torch.zeros(())) for name in g}
    # Of g each pass counts what its own network has.
    own = {name: parameter for name, parameter in model.named_parameters() if name in g}
    masks = {name: core.mask_of(parameter) for name, parameter in own.items()}
    inside = {n: m.dense(g[n].shape) if m else torch.tensor(False) for n, m in masks.items()}
    reference = {n: 0.125 * t + 64.0 * t * inside[n] for n, t in g.items()}
    expected = alpha_by_hand(reference, total)
    measured = measure_step(model, plan, loss)
    assert measured.alpha == pytest.approx(expected, rel=1e-5)
    assert 0.01 < expected < 0.99
    assert list(measured.passes) == ["full", "core"]
    # One after the other at x they are the whole gradient, twice.
    twice = Plan((Pass(full), Pass(full)), update=full)
    assert measure_step(model, twice, loss).alpha == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("kind", ["ats", "slimmable", "extragradient"])
def test_measuring_for_the_log_shares_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import maskedtrain.training.loop as loop

    calls: list[int] = []
    real = loop.step_gradients

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "step_gradients", counted)
    states: list[dict[str, Tensor]] = []
    for every in (0, 1):
        model, method = made(kind, dropout=0.3)
        optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = Trainer(
            model, method, optimizer, F.cross_entropy, measure_every=every, alpha="auto"
        )
        torch.manual_seed(3)
        calls.clear()
        reports = list(trainer.steps(batches(20), until=6))
        assert [bool(report.criteria) for report in reports] == [bool(every)] * 6
        assert len(calls) == (6 if every or kind != "ats" else 3)
        if every and kind != "slimmable":
            for report in reports:
                (found,) = report.criteria.values()
                assert report.alpha == pytest.approx(found.whole.alpha, rel=1e-6)
        states.append(snapshot(model))
    # Not even where alpha is 1 and only its measurement has rounding.
    assert_equal(*states)


class Opposed(nn.Module):
    """f(a, b) = a (1 - 2 b) with b dropped in the core: along a the gradients are opposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (MaskedLinear(1, 1, bias=False) for _ in range(2))
        for layer in (self.a, self.b):
            nn.init.ones_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * (1 - 2 * self.b(x))


@pytest.mark.parametrize("optimizer", [MaskedSGD, MaskedAdamW])
def test_at_zero_parameters_stay_and_the_optimizer_goes_on(optimizer: Any) -> None:
    model = Opposed()
    core = SubNetwork(model, {"b.weight": pk.Element(torch.zeros(1, 1).bool())}, name="core")
    options = {"momentum": 0.9} if optimizer is MaskedSGD else {}
    optim = optimizer(model.parameters(), lr=0.1, weight_decay=0.1, **options)
    method = Standard(core)
    trainer = Trainer(model, method, optim, lambda out, y: (out - y).mean(), alpha="auto")
    before = snapshot(model)
    report = trainer.train_step(iter([(torch.ones(1, 1), torch.zeros(1, 1))]))
    assert (report.alpha, report.lr) == (0.0, 0.0)
    assert_equal(snapshot(model), before)
    state = optim.state[model.a.weight]
    assert float(state["momentum_buffer" if optimizer is MaskedSGD else "exp_avg"]) != 0


def test_a_new_trainer_goes_on_bitwise() -> None:
    def make() -> tuple[nn.Module, Trainer]:
        model, method = made("ats", dropout=0.3)
        optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, Trainer(model, method, optimizer, F.cross_entropy, alpha="auto")

    saved, data = io.BytesIO(), batches(9)
    model, trainer = make()
    for report in trainer.steps(data, until=9):
        if report.step == 4:
            torch.save([model.state_dict(), trainer.state_dict()], saved)
    after = snapshot(model)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    model, trainer = make()
    model.load_state_dict(weights)
    trainer.load_state_dict(state)
    reports = list(trainer.steps(data[4:], until=9))
    assert_equal(snapshot(model), after)
    assert 0 < reports[1].alpha < 1


def test_a_gradient_that_is_not_finite_stops_it() -> None:
    model, method = made("ats")
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, method, optimizer, F.cross_entropy, alpha="auto", check_every=100)
    trainer.step = 1
    before = snapshot(model)
    (x, y) = batches(1)[0]
    with pytest.raises(NonFiniteError, match="alpha is nan at step 2"):
        trainer.train_step(iter([(x * float("inf"), y)]))
    assert_equal(snapshot(model), before)


def test_freezing_layers_needs_no_factor() -> None:
    model, _ = made("standard")
    method = LayerFreeze(model, [["hidden.0.*"], ["output.*"]], [2, 2])
    assert all(at_x(method.plan(step)) for step in range(4))


def test_another_word_is_refused() -> None:
    model, method = made("ats")
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'alpha must be "one" or "auto", got 0\.5'):
        Trainer(model, method, optimizer, F.cross_entropy, alpha=0.5)


def test_a_run_logs_it(tmp_path: Path) -> None:
    options = "--preset digits-resnet8-ats --max-steps 4 --log-every 1 --alpha auto"
    cli.main(["train", *options.split(), "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if line["kind"] == "train"}
    assert [line["alpha"] == 1.0 for line in found.values()] == [True, False, True, False]
    assert all(0 <= line["alpha"] <= 1 for line in found.values())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["optim"]["alpha"] == "auto"
