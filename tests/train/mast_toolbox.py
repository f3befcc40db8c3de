"""A small network, its batches and sketches, for the tests of ``MAST``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.methods.mast import MAST, BernoulliSketch, NetworkSketch, RandKSketch
from maskedtrain.models import MLP
from tests.train.toolbox import noise

BATCH = 8
SKETCHES: dict[str, NetworkSketch] = {
    "elements": BernoulliSketch(0.7),
    "k-elements": RandKSketch(0.5),
    "neurons": BernoulliSketch(0.7, unit="neuron"),
    "k-neurons": RandKSketch(3, unit="neuron"),
}
REDUCED: dict[str, dict[str, Any]] = {
    "sgd": {},
    "l-svrdsg": {"sketches": 5, "anchor_size": 3, "probability": 0.4},
    "s-page": {"sketches": 5, "anchor_size": 3, "probability": 0.4, "differences": 2},
}


def mlp() -> Any:
    torch.manual_seed(0)
    return MLP(5, (6, 4), 3)


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise(BATCH, 5, seed=seed), torch.arange(BATCH) % 3


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    x, y = batch(seed)
    return lambda: F.cross_entropy(model(x), y)


def moved(model: nn.Module, by: float = 0.1) -> None:
    """Away from the point that training started from."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(noise(*parameter.shape, seed=i).to(parameter), alpha=by)


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """v = 0 as tensors, with which the whole network is computed."""
    return {name: torch.zeros_like(p) for name, p in model.named_parameters()}


def diagonals(method: MAST, step: int) -> dict[str, Tensor]:
    draw = method.draw(step)
    return {name: draw.diagonal(p) for name, p in method.model.named_parameters()}


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Parameters as integers, to which -0.0 is not 0.0."""
    return {name: p.detach().clone().view(torch.int32) for name, p in model.named_parameters()}
