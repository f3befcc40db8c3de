"""Runs that start from the weights of another."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from maskedtrain.config import RunConfig, TrainConfig
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models.mlp import Config as MLPConfig
from maskedtrain.training.console import Console
from maskedtrain.training.run import Run
from maskedtrain.training.train import train

CONFIG = TrainConfig(
    DigitsConfig(image_size=8),
    MLPConfig(hidden=(16,)),
    StandardConfig(),
    run=RunConfig(max_steps=3, device="cpu"),
)


def run_in(out: Path, **options: object) -> Path:
    config = replace(CONFIG, run=replace(CONFIG.run, out=out, **options))  # pyright: ignore[reportArgumentType]
    train(config, Console(io.StringIO()))
    return out


def model_of(out: Path, **options: object) -> torch.nn.Module:
    config = replace(CONFIG, run=replace(CONFIG.run, out=out, **options))  # pyright: ignore[reportArgumentType]
    return Run(config, Console(io.StringIO())).model


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return Run.restore(run, Console(io.StringIO())).load_weights().weights


def test_a_run_starts_from_another(tmp_path: Path) -> None:
    first = run_in(tmp_path / "first")
    weights = weights_of(first)
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(weights, file)
    for source in (first, file):
        state = model_of(tmp_path / "second", init_from=source, seed=1).state_dict()
        assert all(torch.equal(state[name], weights[name]) for name in weights)
    # What it goes on with is its own.
    second = run_in(tmp_path / "second", init_from=first, seed=1)
    before = weights_of(second)
    assert not torch.equal(before["output.weight"], weights["output.weight"])
    resumed = replace(CONFIG.run, out=second, init_from=first, seed=1, max_steps=3)
    train(replace(CONFIG, run=resumed), Console(io.StringIO()), resume=True)
    assert all(torch.equal(before[name], value) for name, value in weights_of(second).items())


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    weights = dict(model_of(tmp_path).state_dict())
    file = tmp_path / "weights.safetensors"
    cases = [
        ({**weights, "more": torch.zeros(1)}, "has more, which the model has not"),
        ({k: v for k, v in weights.items() if k != "output.bias"}, "has no output.bias"),
        ({**weights, "output.bias": torch.zeros(3)}, r"must have shape \[10\], got \[3\]"),
    ]
    for state, message in cases:
        safetensors.torch.save_file(state, file)
        with pytest.raises(ValueError, match=message):
            model_of(tmp_path, init_from=file)
    file.write_bytes(b"nonsense")
    for source in (file, tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="is no run and no safetensors file"):
            model_of(tmp_path, init_from=source)
