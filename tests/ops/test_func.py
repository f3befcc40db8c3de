"""``torch.func``: layers differentiate and vectorise like plain PyTorch, by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import partial_kernels as pk
from tests.ops.conftest import MASKS, SHAPE

Layer = tuple[Callable[..., Tensor], dict[str, Tensor], int]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def masked(mask: pk.Mask) -> Layer:
    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return pk.masked_linear(x, weight, bias, mask=mask)

    columns = mask.restricted_shape(SHAPE)[1]
    return layer, {"weight": random(*SHAPE), "bias": random(SHAPE[0])}, columns


def packed() -> Layer:
    index, weight = torch.tensor([0, 7, 20, 47]), random(*SHAPE)

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return pk.packed_linear(x, weight, values, index, bias)

    return layer, {"values": random(4), "bias": random(SHAPE[0])}, SHAPE[1]


def lowrank(core: bool) -> Layer:
    def layer(x: Tensor, u: Tensor, v: Tensor, weight: Tensor | None = None) -> Tensor:
        return pk.lfc_linear(x, weight, u, v, form="merged")

    factors = {"u": random(3, SHAPE[1]), "v": random(SHAPE[0], 3)}
    return layer, factors if core else {**factors, "weight": random(*SHAPE)}, SHAPE[1]


LAYERS: dict[str, Layer] = {
    **{name: masked(mask) for name, mask in MASKS.items()},
    "packed_linear": packed(),
    "lfc": lowrank(core=False),
    "lfc-core": lowrank(core=True),
}


def loss_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda parameters, x: function(x, **parameters).square().sum()


@pytest.mark.usefixtures("small_layers_use_ops")
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_sample(name: str) -> None:
    function, parameters, inputs = LAYERS[name]
    loss, samples = loss_of(function), random(5, 2, inputs)
    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, samples)
    for i, sample in enumerate(samples):
        leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
        grads = torch.autograd.grad(loss(leaves, sample), list(leaves.values()))
        for key, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(by_sample[key][i], grad)


@pytest.mark.usefixtures("small_layers_use_ops")
@pytest.mark.parametrize("name", LAYERS)
def test_a_second_derivative_along_a_direction(name: str) -> None:
    function, parameters, inputs = LAYERS[name]
    gradient = torch.func.grad(loss_of(function))
    x, towards = random(2, inputs), {key: random(*p.shape) for key, p in parameters.items()}

    def along(p: dict[str, Tensor]) -> Tensor:
        return sum(((g * towards[key]).sum() for key, g in gradient(p, x).items()), torch.zeros(()))

    found = torch.func.grad(along)(parameters)
    step = 1e-6
    ends = (
        gradient({key: p + sign * step * towards[key] for key, p in parameters.items()}, x)
        for sign in (1, -1)
    )
    above, below = ends
    for key, derivative in found.items():
        expected = (above[key] - below[key]) / (2 * step)
        torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-6)


def test_no_backend_can_be_asked_for() -> None:
    function: Any = lambda x: pk.masked_linear(  # noqa: E731
        x, random(*SHAPE), mask=MASKS["block"], impl="reference"
    ).sum()
    with pytest.raises(RuntimeError, match=r"torch\.func transforms plain PyTorch alone"):
        torch.func.grad(function)(random(2, SHAPE[1]))
