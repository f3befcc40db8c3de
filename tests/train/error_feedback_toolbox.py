"""Networks and a stock loop for the tests of ``ErrorFeedback``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import SubNetwork
from maskedtrain.methods import ErrorFeedback, Method
from maskedtrain.models import MLP
from tests.train.toolbox import noise

BATCH = 16
D = 12 * 20 + 20 + 20 * 10 + 10 + 10 * 4 + 4


def mlp() -> Any:
    torch.manual_seed(0)
    return MLP(12, (20, 10), 4)


def loss_of(model: nn.Module, seed: int = 0) -> Callable[[], Tensor]:
    dtype = next(model.parameters()).dtype
    x, y = noise(BATCH, 12, seed=seed).to(dtype), torch.arange(BATCH) % 4
    return lambda: F.cross_entropy(model(x), y)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(noise(BATCH, 12, seed=i), torch.arange(BATCH) % 4) for i in range(count)]


def loop(model: nn.Module, method: Method, optimizer: Any, steps: range) -> None:
    """A stock loop."""
    for step in steps:
        plan = method.plan(step)
        plan.backward(loss_of(model, step))
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()


def memory_of(method: ErrorFeedback) -> dict[str, Tensor]:
    return {name: held.clone() for name, held in method.state_dict()["memory"].items()}


class Given(nn.Module):
    """Parameters whose gradients a test gives."""

    p0: nn.Parameter
    p1: nn.Parameter
    p2: nn.Parameter

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def step(self, method: ErrorFeedback, *grads: Tensor | None) -> SubNetwork:
        """Give gradients; ``parameter.grad`` is c_t then. Returns what would be updated."""
        for parameter, grad in zip(self.parameters(), grads, strict=True):
            parameter.grad = grad if grad is None else grad.clone()
        return method.after_backward(0, method.plan(0)).update
