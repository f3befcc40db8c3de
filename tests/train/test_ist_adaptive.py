"""IST that deals anew when Assumption 3 does not hold any more."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedtrain.methods._dealing import Dealer
from maskedtrain.methods.ist import IST
from maskedtrain.optim import MaskedSGD
from tests.train.ist_toolbox import Processes, classification, mlp, train

LR = 0.2


def norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float((tensor.detach() ** 2).sum()) for tensor in tensors))


def gradient(network: nn.Module, step: int, worker: int) -> float:
    parameters = list(network.parameters())
    loss = classification(network, step, worker)
    return norm(list(torch.autograd.grad(loss, parameters)))


class WrittenOut:
    """Rounds of workers with networks of their own, and what Assumption 3 says of them."""

    def __init__(self, workers: int, **options: Any) -> None:
        self.model = mlp(**options)
        self.dealer, self.round = Dealer(self.model, workers), -1
        self.begin()

    def begin(self) -> None:
        self.round += 1
        self.processes = Processes(self.dealer.parts(self.round), partial(torch.optim.SGD, lr=LR))
        self.start = [
            [parameter.detach().clone() for parameter in network.parameters()]
            for network in self.processes.networks
        ]
        self.first: list[float] = []

    def step(self, step: int) -> list[float]:
        """The drift of each worker after it."""
        networks = self.processes.networks
        present = [gradient(network, step, worker) for worker, network in enumerate(networks)]
        self.first = self.first or present
        self.processes.step(step)
        moved = [
            norm([p - x for p, x in zip(network.parameters(), start, strict=True)])
            for network, start in zip(networks, self.start, strict=True)
        ]
        return [
            math.hypot(*(m for j, m in enumerate(moved) if j != i)) / max(self.first[i], present[i])
            for i in range(len(moved))
        ]

    def end(self) -> None:
        self.processes.gather()
        self.begin()


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("workers", [2, 3])
def test_a_round_ends_exactly_when_the_condition_does(workers: int, output_bias: bool) -> None:
    expected = WrittenOut(workers, output_bias=output_bias)
    # Met by some steps of the first ten and not by others.
    smoothness = {2: 0.9, 3: 0.6}[workers]
    model = mlp(output_bias=output_bias)
    method = IST(model, workers, smoothness=smoothness)
    optimizer = MaskedSGD(model.parameters(), lr=LR)
    lengths = [0]
    for step in range(30):
        drifts = expected.step(step)
        train(method, optimizer, [step])
        assert method.drifts == pytest.approx(drifts, rel=1e-9)
        lengths[-1] += 1
        if max(drifts) >= 1 / (2 * smoothness):
            expected.end()
            lengths.append(0)
        assert (method.round, method.local_step) == (expected.round, lengths[-1])
    assert len(lengths) > 3 and max(lengths) > 1, lengths
    assert len(set(lengths[:-1])) > 1, lengths


def test_it_is_at_the_boundary_that_a_round_ends() -> None:
    def first_step(smoothness: float) -> IST:
        model = mlp()
        method = IST(model, 2, smoothness=smoothness)
        train(method, MaskedSGD(model.parameters(), lr=LR), [0])
        return method

    drift = max(first_step(1e-9).drifts)
    # A few units in the last place to either side.
    for factor, rounds in (1 + 1e-15, 1), (1 - 1e-15, 0):
        method = first_step(factor / (2 * drift))
        assert max(method.drifts) == drift and method.round == rounds, factor


def test_local_steps_are_a_bound() -> None:
    model = mlp()
    method = IST(model, 2, smoothness=1e-9, local_steps=2)
    optimizer = MaskedSGD(model.parameters(), lr=LR)
    train(method, optimizer, range(5))
    assert (method.round, method.local_step) == (2, 1)
    # Each step's norms went to the one other worker.
    fixed = mlp()
    other = IST(fixed, 2, local_steps=2)
    train(other, MaskedSGD(fixed.parameters(), lr=LR), range(5))
    assert method.bytes_sent - other.bytes_sent == 5 * 2 * 8


def test_who_does_not_move_is_not_far() -> None:
    model = mlp()
    method = IST(model, 2, smoothness=1e9)
    train(method, MaskedSGD(model.parameters(), lr=0.0), range(2))
    assert method.round == 0 and method.drifts == (0.0, 0.0)
    # Others that move away from a worker without a gradient are.
    model = mlp()
    method = IST(model, 2, smoothness=1e-9)

    def loss(network: nn.Module, step: int, worker: int) -> Tensor:
        return classification(network, step, worker) * (worker == 0)

    train(method, MaskedSGD(model.parameters(), lr=LR), [0], loss)
    assert method.drifts == (0.0, math.inf) and method.round == 1
