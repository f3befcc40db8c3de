"""``ErrorFeedback``: its state, options and runs."""

from __future__ import annotations

import io
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskedtrain import Trainer, cli, methods
from maskedtrain.config import TrainConfig, from_dict, to_dict
from maskedtrain.methods import ErrorFeedback
from maskedtrain.methods.error_feedback import Config, Memory
from maskedtrain.optim import MaskedSGD
from maskedtrain.training.checkpoint import Checkpoints
from tests.train.error_feedback_toolbox import Given, batches, memory_of, mlp
from tests.train.toolbox import assert_equal, snapshot

# State


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, Trainer]:
        model = mlp()
        optimizer = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, Trainer(model, ErrorFeedback(model, 0.05), optimizer, F.cross_entropy)

    saved, data = io.BytesIO(), batches(9)
    model, trainer = make()
    for report in trainer.steps(data, until=9):
        if report.step == 4:
            torch.save([model.state_dict(), trainer.state_dict()], saved)
    after = snapshot(model)
    ended = memory_of(trainer.method)  # pyright: ignore[reportArgumentType]
    for kept in (True, False):
        saved.seek(0)
        weights, state = torch.load(saved, weights_only=True)
        model, trainer = make()
        model.load_state_dict(weights)
        if not kept:
            state["method"]["memory"] = {}
        trainer.load_state_dict(state)
        for _ in trainer.steps(data[4:], until=9):
            pass
        same = all(torch.equal(tensor, after[name]) for name, tensor in snapshot(model).items())
        # Without its memory it would be another run.
        assert same == kept
        if kept:
            assert_equal(memory_of(trainer.method), ended)  # pyright: ignore[reportArgumentType]


def test_a_loaded_state_is_a_copy() -> None:
    model = Given((3,))
    method = ErrorFeedback(model, 1)
    model.step(method, torch.tensor([3.0, 2.0, 1.0]))
    state = method.state_dict()
    other = ErrorFeedback(model, 1)
    other.load_state_dict(state)
    method.scale_memory(0.0)
    assert memory_of(other)["p0"].tolist() == [0.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"must hold a memory, got \[\]"),
        ({"memory": {}, "k": 1}, "must hold a memory"),
        ({"memory": {"p1": torch.ones(3)}}, "the memory of 'p1' fits no parameter"),
        ({"memory": {"p0": torch.ones(4)}}, "the memory of 'p0' fits no parameter"),
    ],
)
def test_states_that_do_not_fit(state: dict[str, Any], message: str) -> None:
    model = Given((3,))
    method = ErrorFeedback(model, 1)
    model.step(method, torch.tensor([3.0, 2.0, 1.0]))
    before = memory_of(method)
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(state)
    assert_equal(memory_of(method), before)


# Options and runs


@pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, float("nan"), True, "1"])
def test_counts_that_are_none(k: Any) -> None:
    with pytest.raises(ValueError, match="k must be a count"):
        ErrorFeedback(mlp(), k)


def test_other_bad_options() -> None:
    with pytest.raises(ValueError, match=r'scope must be "global" or "tensor", got \'layer\''):
        ErrorFeedback(mlp(), 1, scope="layer")
    with pytest.raises(ValueError, match="k must be a count"):
        Config(ratio=2.0)
    for factor in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="factor must be >= 0 and finite"):
            Memory().scale(factor)


def test_it_is_found_by_its_name() -> None:
    assert methods.configs()["errorfeedback"] is Config
    built = Config(ratio=0.2, scope="tensor").build(mlp())
    assert (built.k, built.scope) == (0.2, "tensor")
    assert Config(k=5).build(mlp()).k == 5
    config = TrainConfig(method=Config(ratio=0.1))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_a_run_resumes_bit_for_bit_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    options = "--model mlp --hidden 40 20 --method errorfeedback --ratio 0.05 --epochs 2"
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    cli.main(["train", *shlex.split(options), "--out", str(whole), "--max-steps", "6"])
    cli.main(["train", *shlex.split(options), "--out", str(parted), "--max-steps", "3"])
    cli.main(["train", "--resume", str(parted), "--max-steps", "6"])
    first, second = (Checkpoints(run / "checkpoints").load() for run in (whole, parted))
    assert first.step == second.step == 6
    assert_equal(second.weights, first.weights)
    method = first.state["trainer"]["method"]
    assert_equal(second.state["trainer"]["method"]["memory"], method["memory"])
    assert sum(int(held.count_nonzero()) for held in method["memory"].values()) > 0
