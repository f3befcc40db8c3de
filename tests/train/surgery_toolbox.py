"""Models of plain torch, and what the tests of ``width`` and ``lowrank`` compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import SubNetwork
from maskedtrain.layers import MaskedModule
from maskedtrain.methods import ATS
from maskedtrain.optim import MaskedAdamW
from tests.train.toolbox import snapshot

FEED_FORWARD = ("*.fc1", "*.fc2")


class Block(nn.Module):
    """Two linear layers around a skip connection."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 32, bias)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(32, 6, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    """Grouped-query attention: 4 query heads, 2 key and value heads."""

    def __init__(self, width: int = 24, head_dim: int = 8, *, bias: bool = True) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, 4 * head_dim, bias)
        self.k_proj = nn.Linear(width, 2 * head_dim, bias)
        self.v_proj = nn.Linear(width, 2 * head_dim, bias)
        self.o_proj = nn.Linear(4 * head_dim, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def seeded(make: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return make().double()


def blocks(count: int = 2, *, bias: bool = True) -> Any:
    return seeded(lambda: nn.Sequential(*(Block(bias) for _ in range(count)), nn.Linear(6, 3)))


def torch_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def zeroed_twin(model: nn.Module, subnet: SubNetwork) -> Any:
    """A copy of the model with zeros written off the sub-network's masks."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            mask = subnet.masks[name]
            parameter.mul_(0 if mask is None else mask.dense(parameter.shape))
    return twin


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def assert_is(subnet: SubNetwork, original: nn.Module, *inputs: Tensor) -> None:
    """The active and the extracted sub-network compute what the original model, hand-zeroed,
    does.
    """
    expected = zeroed_twin(original, subnet)(*inputs)
    assert not torch.allclose(expected, original(*inputs), rtol=1e-3)
    with subnet.activate():
        y = subnet.model(*inputs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    extracted = subnet.extract()
    assert not any(isinstance(module, MaskedModule) for module in extracted.modules())
    torch.testing.assert_close(extracted(*inputs), y, rtol=1e-12, atol=1e-12)


def train(model: nn.Module, cores: Sequence[SubNetwork], x: Tensor) -> None:
    """ATS for two cycles: what a core's step leaves out does not move, and the core does."""
    full = SubNetwork.full(model)
    method = ATS([full, *cores])
    optimizer = MaskedAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(2 * (1 + len(cores))):
        before = snapshot(model)
        plan = method.plan(step)
        plan.backward(lambda: model(x).square().mean())
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        for name, parameter in model.named_parameters():
            mask = plan.update.mask_of(parameter)
            moved = parameter != before[name]
            inside = torch.zeros_like(moved) if mask is None else mask.dense(parameter.shape)
            assert not moved[~inside].any(), name
            assert moved[inside].any() or not inside.any(), name
        optimizer.zero_grad()
