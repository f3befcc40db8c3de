"""Criteria measured while training: when, of what, and without a trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import SubNetwork, Trainer, cli
from maskedtrain.config import RunConfig
from maskedtrain.methods import (
    ATS,
    IST,
    ErrorFeedback,
    Extragradient,
    MeProp,
    Method,
    Slimmable,
)
from maskedtrain.models import MLP
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.theory.criteria import measure_step


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator))
        for _ in range(count)
    ]


def model_and(kind: str) -> tuple[nn.Module, Method]:
    torch.manual_seed(0)
    model = MLP(8, (32,), 4, dropout=0.3)
    full, core = SubNetwork.full(model), SubNetwork.width(model, 0.5)
    methods: dict[str, Any] = {
        "ats": lambda: ATS([full, core]),
        "slimmable": lambda: Slimmable([full, core]),
        "extragradient": lambda: Extragradient(full, distance=0.1),
        "fresh": lambda: Extragradient(full, distance=0.1, look="fresh"),
        "past": lambda: Extragradient(full, distance=0.1, look="past"),
    }
    return model, methods[kind]()


KINDS = ["ats", "slimmable", "extragradient", "fresh", "past"]


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_bitwise_the_same(kind: str) -> None:
    states: list[dict[str, Any]] = []
    for every in (0, 1):
        model, method = model_and(kind)
        optimizer = MaskedAdamW(model.parameters())
        trainer = Trainer(model, method, optimizer, F.cross_entropy, measure_every=every)
        torch.manual_seed(3)
        for report in trainer.steps(batches(20), until=5):
            assert bool(report.criteria) == bool(every)
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_every_few_steps_the_networks_of_the_step_are_measured() -> None:
    model, method = model_and("ats")
    optimizer = MaskedAdamW(model.parameters())
    trainer = Trainer(model, method, optimizer, F.cross_entropy, measure_every=3)
    reports = list(trainer.steps(batches(8), until=8))
    found = {report.step: list(report.criteria) for report in reports if report.criteria}
    assert found == {1: ["full"], 4: ["core"], 7: ["full"]}
    whole, core = (reports[i].criteria for i in (0, 3))
    assert whole["full"].whole.q == pytest.approx(1.0, rel=1e-5)
    assert core["core"].whole.c_norm > 1 and core["core"].whole.drift > 0


def test_slimmable_training_measures_each_network_against_the_update() -> None:
    model, method = model_and("slimmable")
    optimizer = MaskedAdamW(model.parameters())
    trainer = Trainer(model, method, optimizer, F.cross_entropy, measure_every=1)
    report = trainer.train_step(iter(batches(1)))
    assert list(report.criteria) == ["full", "core"]
    # The update holds everything.
    assert report.criteria["core"].whole.c_norm == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["extragradient", "fresh"])
def test_a_perturbation_is_measured_where_it_leads(kind: str) -> None:
    model, method = model_and(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = batches(2)
    x, y = data[1 if kind == "fresh" else 0]
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    length = sum(float(grad.square().sum()) for grad in grads) * 0.1**2
    optimizer = MaskedAdamW(model.parameters())
    trainer = Trainer(model, method, optimizer, F.cross_entropy, measure_every=1)
    report = trainer.train_step(iter(data))
    assert report.criteria["full"].whole.displacement_sq == pytest.approx(length, rel=1e-4)


@pytest.mark.parametrize("kind", ["meprop", "errorfeedback"])
def test_a_mask_that_is_drawn_from_the_gradient_is_the_one_that_counts(kind: str) -> None:
    torch.manual_seed(0)
    model = MLP(8, (32,), 4)
    count = sum(parameter.numel() for parameter in model.parameters())
    method = MeProp(model, 40, variant="true") if kind == "meprop" else ErrorFeedback(model, 40)
    trainer = Trainer(
        model, method, MaskedSGD(model.parameters(), lr=0.1), F.cross_entropy, measure_every=1
    )
    (report,) = trainer.steps(batches(1), until=1)
    measured = report.criteria["full"].whole
    # In the first step the memory of error feedback is empty.
    assert 1 < measured.c_norm <= (count / 40) ** 0.5
    assert (measured.c_sim, measured.c_align) == pytest.approx((1.0, 1.0))


def test_workers_parts_are_measured_within_all_that_a_step_updates() -> None:
    """Each worker's gradient at x against its own part of g; what is shared is part of the mask."""
    torch.manual_seed(0)
    model = MLP(8, (32,), 4)
    with torch.no_grad():
        model.output.weight.mul_(5.0)  # So that a half differs from the whole.
    method = IST(model, 2, local_steps=3)
    trainer = Trainer(
        model, method, MaskedSGD(model.parameters(), lr=0.1), F.cross_entropy, measure_every=1
    )
    (x, y), *_ = data = batches(2)
    named = dict(model.named_parameters())
    g = torch.autograd.grad(F.cross_entropy(model(x), y), named.values())
    total, reference = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    for part in method.parts:
        with part.activate():
            own = torch.autograd.grad(F.cross_entropy(model(x), y), named.values())
        for (name, parameter), gradient, whole in zip(named.items(), own, g, strict=True):
            mask = part.mask_of(parameter)
            assert mask is not None
            total[name] += gradient
            reference[name] += whole * mask.dense(parameter.shape)
    inner = sum(float((total[n] * reference[n]).sum()) for n in named)
    alpha = inner / sum(float(tensor.square().sum()) for tensor in total.values())
    assert 0.01 < alpha < 0.99
    assert measure_step(
        model, method.plan(0), *[lambda: F.cross_entropy(model(x), y)] * 2
    ).alpha == pytest.approx(alpha, rel=1e-4)
    (report,) = trainer.steps(data, until=1)
    # Two parts of one hidden layer are the whole network.
    assert report.criteria["worker0"].whole.c_norm == pytest.approx(1.0)


def test_a_run_logs_them(tmp_path: Path) -> None:
    options = "--preset digits-resnet8-ats --max-steps 4 --measure-every 2"
    cli.main(["train", *options.split(), "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "criteria"]
    assert [line["step"] for line in found] == [1, 3]
    assert {"alpha", "c_norm", "c_sim", "c_align", "q", "drift"} <= found[0].keys()
    assert all(line["c_norm"] >= 1 - 1e-6 for line in found)


def test_the_smoothness_is_measured_without_a_trace(tmp_path: Path) -> None:
    weights: list[dict[str, Tensor]] = []
    for measured in (False, True):
        model, method = model_and("ats")
        optimizer = MaskedAdamW(model.parameters())
        options = {"measure_every": 2, "measure_smoothness": measured}
        trainer = Trainer(model, method, optimizer, F.cross_entropy, **options)
        torch.manual_seed(3)
        reports = list(trainer.steps(batches(4), until=4))
        assert [report.smoothness is not None for report in reports] == [measured, False] * 2
        weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name

    options = "--preset digits-resnet8-ats --max-steps 2 --measure-every 1 --measure-smoothness"
    cli.main(["train", *options.split(), "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    full, core = (line for line in lines if line["kind"] == "criteria")
    # A pass of the whole network is at x: nothing drifts. Half of it is far away.
    assert full["L"] > 0 and full["drift"] == 0 and full["assumption3"] is True
    assert core["assumption3"] is (core["drift"] < 1 / (2 * core["L"]))


@pytest.mark.parametrize("option", ["measure_layers", "measure_smoothness"])
def test_an_option_of_no_measurement_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} needs measure_every"):
        RunConfig(**{option: True})


def test_a_run_logs_every_layer(tmp_path: Path) -> None:
    boards = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = "--preset digits-resnet8-ats --max-steps 2 --measure-every 1 --measure-layers"
    cli.main(["train", *options.split(), "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["kind"] == "criteria" and line["subnet"] == "core"]
    whole, *layers = found
    assert "layer" not in whole
    assert {"conv1", "layer1.0.conv2", "fc"} <= {line["layer"] for line in layers}
    # Norms that the super-network has for itself are all that the core's mask loses: infinite.
    norms = {line["layer"]: line["c_norm"] for line in layers}
    assert norms["bn1"] is None
    assert min(norm for norm in norms.values() if norm is not None) < whole["c_norm"]
    board = boards.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"c_norm/criteria/core", "c_norm/criteria/core/fc"} <= set(board.Tags()["scalars"])


def test_a_negative_interval_is_refused() -> None:
    model, method = model_and("ats")
    optimizer = MaskedAdamW(model.parameters())
    with pytest.raises(ValueError, match="measure_every must be >= 0, got -1"):
        Trainer(model, method, optimizer, F.cross_entropy, measure_every=-1)
