"""Small models and masks, and what the tests of layers and sub-networks compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork
from maskedtrain.models import ResNet, resnet8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def element(*shape: int, seed: int = 0) -> pk.Element:
    return pk.Element(noise(*shape, seed=seed) > 0)


def mlp(hidden: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(MaskedLinear(6, hidden), nn.ReLU(), MaskedLinear(hidden, 3))


def narrow_mlp(model: nn.Module, mask: pk.Mask, name: str = "core") -> SubNetwork:
    """The hidden neurons that a mask of rows keeps."""
    masks: dict[type[pk.Mask], Callable[[Any], pk.Mask]] = {
        pk.Prefix: lambda m: pk.Prefix(None, m.rows),
        pk.Index: lambda m: pk.Index(None, m.rows),
    }
    return SubNetwork(model, {"0.weight": mask, "2.weight": masks[type(mask)](mask)}, name=name)


def small_resnet(**options: Any) -> ResNet:
    torch.manual_seed(0)
    return resnet8(width=8, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Tied(nn.Module):
    """An embedding tied to the output layer, aware of masks or not."""

    def __init__(self, output: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 4)
        self.output = output(4, 5, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens))


TOKENS = torch.tensor([[0, 3], [4, 1]])


def integers(*shape: int, seed: int = 0) -> Tensor:
    """Small integers in fp64, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 5, shape, generator=generator)
    return (values * (1 - 2 * torch.randint(0, 2, shape, generator=generator))).double()


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of x and of every parameter."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(integers(*y.shape, seed=99).to(y.dtype))
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}  # pyright: ignore[reportReturnType]


def active_results(subnet: SubNetwork, x: Tensor) -> dict[str, Tensor]:
    with subnet.activate():
        return results(subnet.model, x)
