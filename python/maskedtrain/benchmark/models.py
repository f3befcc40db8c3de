"""The linear layers of a user's model: which shapes there are, and how many of each."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskedtrain.benchmark.cases import SMALLEST
from maskedtrain.benchmark.training import EXPERIMENTS
from maskedtrain.config import TrainConfig, unknown_name
from maskedtrain.layers import PackedLinear
from maskedtrain.presets import PRESETS
from maskedtrain.tasks import make_task

__all__ = ["Layers", "linear_layers", "load_model"]


@dataclass(frozen=True)
class Layers:
    """What of a model is timed."""

    counts: dict[tuple[int, int], int]
    """By shape of the weight [O, I], how many layers have it; those with most weights first."""
    small: int
    """Layers that are too small to be timed."""
    share: float
    """Of the model's parameters, those of weights that are timed."""


def load_model(name: str) -> nn.Module:
    """The model that ``module:callable`` returns, or a preset's.

    Raises:
        ValueError: there is no such module, callable or preset, or what it returns is no module.
    """
    if ":" in name:
        return _called(name)
    if name not in PRESETS:
        known = unknown_name("preset", name, PRESETS)
        raise ValueError(f"--model must be MODULE:CALLABLE or a preset; {known}")
    config = PRESETS[name]
    return config.model.build(**_sizes(config))


def _called(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    # A user's file lies where they are, as for python -m.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"--model {name}: cannot import {module!r}: {_said(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model {name}: {module} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"--model {name}: {attribute} must be callable, got {found!r}")
    build: Callable[[], Any] = found
    try:
        model = build()
    except Exception as error:
        raise ValueError(f"--model {name}: {attribute}() raised {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"--model {name}: {attribute}() must return an nn.Module, got {type(model).__name__}"
        )
    return model


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _sizes(config: TrainConfig) -> dict[str, Any]:
    """What the preset's model is told of its data: known of the usual ones without them."""
    for experiment in EXPERIMENTS.values():
        if experiment.config.data.name == config.data.name:
            return dict(experiment.sizes)
    return make_task(config, torch.device("cpu"), saved=None).model_arguments()


def linear_layers(model: nn.Module) -> Layers:
    """Of the model's ``nn.Linear`` and its kin.

    Raises:
        ValueError: there is none that is large enough to be timed.
    """
    weights = [
        module.weight for module in model.modules() if isinstance(module, nn.Linear | PackedLinear)
    ]
    if any(isinstance(weight, nn.UninitializedParameter) for weight in weights):
        raise ValueError("the model has lazy layers: call it once before it is returned")
    shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
    timed = [shape for shape in shapes if min(shape) >= SMALLEST]
    if not timed:
        raise ValueError(
            f"the model has no linear layer of at least {SMALLEST} x {SMALLEST} to be timed, "
            f"of {len(weights)} linear layers"
        )
    counts = Counter(timed)
    order = sorted(counts, key=lambda shape: -counts[shape] * shape[0] * shape[1])
    # Layers may share a weight; a packed layer's is no parameter.
    inside = {id(weight): weight.numel() for weight in weights if min(weight.shape) >= SMALLEST}
    total = {**inside, **{id(parameter): parameter.numel() for parameter in model.parameters()}}
    return Layers(
        counts={shape: counts[shape] for shape in order},
        small=len(weights) - len(timed),
        share=sum(inside.values()) / sum(total.values()),
    )
