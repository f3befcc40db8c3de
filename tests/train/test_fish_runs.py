"""``FishMask``: masks drawn anew, resuming, the command line, other models."""

from __future__ import annotations

import copy
import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import SubNetwork, Trainer, cli
from maskedtrain.config import TrainConfig, from_dict, to_dict
from maskedtrain.methods import configs
from maskedtrain.methods.fish import Config, FishMask
from maskedtrain.models import resnet8
from maskedtrain.models.text_classifier import TextClassifier
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.checkpoint import Checkpoints
from tests.train.fish_toolbox import (
    batches,
    inside,
    mlp,
    plain_weights,
    prepared,
    run,
)
from tests.train.toolbox import Tied, assert_equal, noise, snapshot

# Drawing anew


@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_drawn_anew_is_that_of_a_run_begun_there(packed: bool) -> None:
    """With the examples that follow and an optimizer of its own."""
    options: Any = {"lr": 0.01, "weight_decay": 0.1}
    method = prepared(mlp(), packed=packed, redraw_every=3)
    first = inside(method)
    run(method, MaskedAdamW(method.model.parameters(), **options), range(5))

    other = prepared(mlp(), packed=packed)
    assert_equal(inside(other), first)
    run(other, MaskedAdamW(other.model.parameters(), **options), range(3))
    model: Any = other.full.extract()
    again = FishMask(model, 0.2, examples=20, packed=packed)
    later = (one for batch in batches() for one in zip(*batch, strict=True))
    again.prepare((x[None], y[None]) for x, y in itertools.islice(later, 20, None))
    run(again, MaskedAdamW(model.parameters(), **options), range(3, 5))
    assert_equal(inside(method), inside(again))
    assert any(not torch.equal(mask, first[name]) for name, mask in inside(method).items())
    assert_equal(plain_weights(method), plain_weights(again))


def test_masks_drawn_anew_keep_the_parameters_that_an_optimizer_holds() -> None:
    method = prepared(mlp(), redraw_every=2)
    optimizer = MaskedSGD(method.model.parameters(), lr=0.1, momentum=0.9)
    before, sizes = list(method.model.parameters()), [p.numel() for p in method.model.parameters()]
    full, pass_of = method.subnets["full"], method.plan(0).passes[0].subnet
    run(method, optimizer, range(7))
    after = list(method.model.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert [p.numel() for p in after] != sizes and sum(p.numel() for p in after) == method.budget
    assert method.subnets["full"] is full is pass_of


# Saving and resuming


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("redraw_every", [None, 3])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(
    redraw_every: int | None, packed: bool
) -> None:
    def made() -> tuple[FishMask, Any]:
        model = mlp()
        method = FishMask(model, 0.2, examples=20, redraw_every=redraw_every, packed=packed)
        return method, model

    def trainer(method: FishMask, model: nn.Module) -> Trainer:
        method.prepare(batches())
        optimizer = MaskedAdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        return Trainer(model, method, optimizer, F.cross_entropy, accumulate=2, clip_grad_norm=0.5)

    method, model = made()
    whole = trainer(method, model)
    stream, saved = batches(seed=1), {}
    for report in whole.steps(stream, until=8):
        if report.step == 4:
            saved = copy.deepcopy({"trainer": whole.state_dict(), "weights": model.state_dict()})
    method, model = made()
    method.load_state_dict(saved["trainer"]["method"])
    model.load_state_dict(saved["weights"])
    resumed = trainer(method, model)
    resumed.load_state_dict(saved["trainer"])
    for _ in resumed.steps(itertools.islice(batches(seed=1), 8, None), until=8):
        pass
    assert_equal(snapshot(model), snapshot(whole.model))
    first, second = whole.state_dict(), resumed.state_dict()
    assert str(first["optimizer"]) == str(second["optimizer"])
    assert first["method"]["draws"] == second["method"]["draws"] == (3 if redraw_every else 1)
    assert_equal(first["method"]["positions"], second["method"]["positions"])


def test_a_state_is_loaded_into_a_model_that_goes_on() -> None:
    """As the best weights of a run are, after masks were drawn anew."""
    method = prepared(mlp(), redraw_every=2)
    optimizer = MaskedSGD(method.model.parameters(), lr=0.1)
    run(method, optimizer, range(1))
    state, weights = copy.deepcopy((method.state_dict(), method.model.state_dict()))
    best = plain_weights(method)
    run(method, optimizer, range(1, 3))
    method.load_state_dict(state)
    method.model.load_state_dict(weights)
    assert_equal(plain_weights(method), best)
    assert_equal(method.state_dict()["positions"], state["positions"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"draws": 1}, r"the state must hold draws and positions, got \['draws'\]"),
        ({"draws": 1, "positions": {"fc.weight": torch.arange(2)}}, r"got \['fc.weight'\]"),
    ],
)
def test_a_state_of_another_model_is_refused(state: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FishMask(mlp(), 0.2).load_state_dict(state)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "run", tmp_path / "plain.safetensors"
    options = (
        "--model mlp --hidden 16 --method fish --ratio 0.3 --examples 8 --redraw-every 4 "
        "--lr 0.05 --image-size 8 --batch-size 16 --device cpu"
    )
    run_options = ["--out", str(folder), "--max-steps", "6"]
    cli.main(["train", *shlex.split(options), *run_options])
    cli.main(["train", "--resume", str(folder), "--max-steps", "9"])
    cli.main(["eval", str(folder)])
    cli.main(["extract", str(folder), "--subnet", "full", "--out", str(out)])
    assert out.exists() and "fish" in capsys.readouterr().out
    whole = tmp_path / "whole"
    cli.main(["train", *shlex.split(options), "--out", str(whole), "--max-steps", "9"])
    first, second = (Checkpoints(path / "checkpoints").load() for path in (folder, whole))
    assert_equal(first.weights, second.weights)
    first, second = first.state["trainer"], second.state["trainer"]
    assert_equal(first["method"]["positions"], second["method"]["positions"])
    # Drawn at the start, after 4 and after 8 steps.
    assert first["method"]["draws"] == second["method"]["draws"] == 3
    assert str(first["optimizer"]) == str(second["optimizer"])


def test_its_configuration_survives_a_file() -> None:
    config = TrainConfig(method=Config(0.01, head=("output",), redraw_every=5))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert configs()["fish"] is Config
    built = Config(0.3, examples=7, kind="true", packed=False).build(mlp())
    assert (built.ratio, built.examples, built.kind) == (0.3, 7, "true")
    with pytest.raises(ValueError, match="ratio must be"):
        Config(ratio=2.0)


# Other models


@pytest.mark.parametrize("packed", [True, False])
def test_a_text_classifiers_embedding_is_tuned_too(packed: bool) -> None:
    torch.manual_seed(0)
    model = TextClassifier(30, 2, d_model=8, ffn=16, heads=2, encoder_layers=1, dropout=0.0)
    plain = copy.deepcopy(model)
    tokens = torch.randint(4, 30, (8, 5), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 2
    method = FishMask(model, 0.5, examples=8, packed=packed)
    method.prepare([(tokens, labels)])
    assert len(method.state_dict()["positions"]["encoder.embed_tokens.weight"]) > 10
    optimizer = MaskedAdamW(model.parameters(), lr=0.01)
    losses = []
    for step in range(10):
        plan = method.plan(step)
        losses += plan.backward(lambda: F.cross_entropy(model(tokens), labels)).values()
        optimizer.step(plan.update)
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    extracted: Any = method.full.extract()
    assert not any("maskedtrain.layers" in type(m).__module__ for m in extracted.modules())
    assert torch.equal(extracted(tokens), model(tokens))
    start = plain.state_dict()
    changed = sum(int((w != start[n]).sum()) for n, w in extracted.state_dict().items())
    assert changed <= method.budget


def test_a_convolutional_network() -> None:
    torch.manual_seed(0)
    model = resnet8(width=4)
    start = snapshot(model)
    x, y = noise(4, 3, 8, 8), torch.arange(4)
    method = FishMask(model, 0.1, examples=4)
    method.prepare([(x, y)])
    optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(2):
        plan = method.plan(step)
        plan.backward(lambda: F.cross_entropy(model(x), y))
        optimizer.step(plan.update)
        optimizer.zero_grad()
    after = method.full.extract().state_dict()
    trained = [n for n, _ in resnet8(width=4).named_parameters()]
    assert 0 < sum(int((after[n] != start[n]).sum()) for n in trained) <= method.budget
    assert sum(p.numel() for p in model.parameters() if p.ndim == 1) < sum(
        map(Tensor.numel, start.values())
    )


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(Tied(), nn.Linear(5, 3))
    tokens, targets = torch.tensor([[0, 3, 2, 1]]), torch.tensor([[0, 1, 2, 1]])
    method = FishMask(model, 0.7, examples=1)
    method.prepare([(tokens, targets)])
    assert method.budget == round(0.7 * (5 * 4 + 5 * 3 + 3))
    assert list(method.state_dict()["positions"]) == ["0.embedding.weight"]
    assert SubNetwork.full(model).numel() == method.budget


@pytest.mark.parametrize("packed", [True, False])
def test_criteria_of_its_steps_can_be_measured(packed: bool) -> None:
    method = prepared(mlp(), packed=packed)
    optimizer = MaskedSGD(method.model.parameters(), lr=0.1)
    trainer = Trainer(method.model, method, optimizer, F.cross_entropy, measure_every=1)
    (report,) = trainer.steps(batches(), until=1)
    assert report.criteria["full"].whole.quantities()["c_norm"] >= 1
