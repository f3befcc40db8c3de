"""Independent subnet training written out: for every worker a network and an optimizer of its own,
of torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import SubNetwork
from maskedtrain.methods.ist import IST
from maskedtrain.models import MLP
from maskedtrain.optim.base import MaskedOptimizer
from partial_kernels import Mask

INPUTS, CLASSES, BATCH = 12, 4, 6

Loss = Callable[[nn.Module, int, int], Tensor]
"""``loss(network, step, worker)``: on that worker's mini-batch of that step."""


def mlp(
    *hidden: int, output_bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> MLP:
    torch.manual_seed(seed)
    model = MLP(INPUTS, hidden or (9, 7), CLASSES).to(dtype)
    if not output_bias:
        model.output.bias = None  # pyright: ignore[reportAttributeAccessIssue]
    return model


def examples(number: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(BATCH, *(shape or (INPUTS,)), generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(CLASSES, (BATCH,), generator=generator)


def classification(network: nn.Module, step: int, worker: int) -> Tensor:
    dtype = next(network.parameters()).dtype
    x, y = examples(100 * step + worker, dtype=dtype)
    return F.cross_entropy(network(x), y)


def train(
    method: IST, optimizer: MaskedOptimizer, steps: Iterable[int], loss: Loss = classification
) -> None:
    """The stock loop."""
    for step in steps:
        plan = method.plan(step)
        losses = (partial(loss, method.model, step, w) for w in range(plan.batches))
        plan.backward(*losses)
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        method.after_step(step, plan, optimizer)
        optimizer.zero_grad()


class Processes:
    """A round of n workers, each of which trains an extracted network."""

    def __init__(
        self, parts: list[SubNetwork], optimizer: Callable[[Any], torch.optim.Optimizer]
    ) -> None:
        self.model, self.parts = parts[0].model, parts
        self.networks = [part.extract() for part in parts]
        self.optimizers = [optimizer(network.parameters()) for network in self.networks]

    def step(self, step: int, loss: Loss = classification) -> None:
        for worker, network in enumerate(self.networks):
            network.zero_grad()
            loss(network, step, worker).backward()
            self.optimizers[worker].step()

    @torch.no_grad()
    def gather(self) -> None:
        """Put what the networks hold into the model they are of: the mean of what all have."""
        for name, parameter in self.model.named_parameters():
            held = [
                (mask, network.get_parameter(name))
                for part, network in zip(self.parts, self.networks, strict=True)
                if (mask := part.masks[name]) is not None
            ]
            self._put(parameter, held)
        for name, buffer in self.model.named_buffers():
            module = name.rpartition(".")[0]
            held = [
                (mask, network.get_buffer(name))
                for part, network in zip(self.parts, self.networks, strict=True)
                if (mask := part.masks[f"{module}.weight"]) is not None
            ]
            if buffer.ndim:
                self._put(buffer, held)
            else:
                buffer.copy_(held[0][1])

    def _put(self, tensor: Tensor, held: list[tuple[Mask, Tensor]]) -> None:
        if len(held) == len(self.parts) and held[0][1].shape == tensor.shape:
            tensor.copy_(torch.stack([own for _, own in held]).mean(0))
            return
        for mask, own in held:
            tensor[mask.dense(tensor.shape)] = own.flatten()


def assert_as_written_out(model: nn.Module, other: nn.Module) -> None:
    """The same parameters and buffers, to the rounding of a mean in fp64."""
    for (name, tensor), expected in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, expected, rtol=1e-11, atol=1e-13, msg=name)
