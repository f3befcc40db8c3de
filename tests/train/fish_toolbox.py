"""A small network, its data and a stock loop for the tests of ``FishMask``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain.methods.fish import FishMask
from maskedtrain.models import MLP
from tests.train.toolbox import noise, snapshot

I, H, C = 12, 20, 4
# Of MLP(12, (20, 10), 4): its head, its parameters.
HEAD, ALL = 10 * 4 + 4, 12 * 20 + 20 + 20 * 10 + 10 + 44


def mlp() -> Any:
    torch.manual_seed(0)
    return MLP(I, (H, 10), C)


def batches(
    size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Tensor, Tensor]]:
    for number in itertools.count(1000 * seed):
        yield noise(size, I, seed=number).to(dtype), (torch.arange(size) * number) % C


def prepared(model: nn.Module, ratio: float = 0.2, **options: Any) -> FishMask:
    method = FishMask(model, ratio, **{"examples": 20, **options})
    method.prepare(batches(dtype=next(model.parameters()).dtype))
    return method


def inside(method: FishMask) -> dict[str, Tensor]:
    """Where the model is trained, by the names that the plain model's parameters have."""
    masks, update = {}, method.plan(0).update
    positions = method.state_dict()["positions"]
    for name, parameter in mlp().named_parameters():
        if name in positions:
            masks[name] = pk.Packed(positions[name].long()).dense(parameter.shape)
        else:
            assert update.masks[name] == pk.Full()
            masks[name] = torch.ones(parameter.shape, dtype=torch.bool)
    return masks


def plain_weights(method: FishMask) -> dict[str, Tensor]:
    """By the plain model's names."""
    return snapshot(method.full.extract())


def run(method: FishMask, optimizer: Any, steps: range) -> None:
    """A stock loop, with the hook that draws masks anew."""
    dtype = next(method.model.parameters()).dtype
    stream = itertools.islice(batches(seed=1, dtype=dtype), steps.start, None)
    for step in steps:
        x, y = next(stream)
        plan = method.plan(step)
        plan.backward(lambda: F.cross_entropy(method.model(x), y))  # noqa: B023
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        method.after_step(step, plan, optimizer)
        optimizer.zero_grad()
