"""A step of a method costs the share of FLOPs that its page claims."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain import SubNetwork
from maskedtrain.methods import (
    ATS,
    IST,
    MAST,
    BernoulliSketch,
    ElementDropout,
    ErrorFeedback,
    Extragradient,
    FishMask,
    LayerFreeze,
    MeProp,
    MeSimp,
    Method,
    NeuronDropout,
    PruneWithFeedback,
    RandKSketch,
    Slimmable,
    Standard,
)
from maskedtrain.models import MLP
from tests.train.toolbox import noise

# inputs, two hidden layers, classes
I, H, C = 32, 128, 16
BATCH = 64


def linear(rows: int, cols: int) -> int:
    """FLOPs of one product of a linear layer."""
    return 2 * BATCH * rows * cols


# A first layer has no gradient of its inputs to compute.
FORWARD = linear(H, I) + linear(H, H) + linear(C, H)


def narrow(h: int) -> int:
    """FLOPs of a step of the network with h hidden neurons a layer."""
    return 3 * (linear(h, I) + linear(h, h) + linear(C, h)) - linear(h, I)


WHOLE, HALF, QUARTER = narrow(H), narrow(H // 2), narrow(H // 4)


def full_and_half(model: MLP) -> list[SubNetwork]:
    return [SubNetwork.full(model), SubNetwork.width(model, 0.5)]


def head_alone(model: MLP) -> FishMask:
    """A mask of no more than the head."""
    total = sum(parameter.numel() for parameter in model.parameters())
    method = FishMask(model, (C * H + C) / total, examples=1)
    method.prepare([(noise(1, I), torch.zeros(1, dtype=torch.int64))])
    return method


CASES: dict[str, tuple[Callable[[MLP], Method], list[int]]] = {
    "standard": (lambda m: Standard(SubNetwork.full(m)), [WHOLE]),
    "ats": (lambda m: ATS(full_and_half(m)), [WHOLE, HALF]),
    "slimmable": (lambda m: Slimmable(full_and_half(m)), [WHOLE + HALF]),
    "extragradient": (lambda m: Extragradient(SubNetwork.full(m), distance=0.1), [2 * WHOLE]),
    "extragradient-past": (
        lambda m: Extragradient(SubNetwork.full(m), distance=0.1, look="past"),
        [WHOLE],
    ),
    # The head alone; the second layer and the head: no gradient of the second one's inputs.
    "freeze": (
        lambda m: LayerFreeze(m, [["output.*"], ["hidden.1.*", "output.*"], ["*"]], [1, 1]),
        [
            FORWARD + linear(C, H),
            FORWARD + 2 * linear(C, H) + linear(H, H),
            WHOLE,
        ],
    ),
    # The hidden layers' backward from 8 of 128 outputs.
    "meprop-batch": (
        lambda m: MeProp(m, k=8, per="batch"),
        [FORWARD + 2 * linear(C, H) + linear(8, I) + 2 * linear(8, H)],
    ),
    "meprop-true": (lambda m: MeProp(m, k=0.1, variant="true"), [WHOLE]),
    "mesimp": (
        lambda m: MeSimp(m, k=8, per="batch"),
        [FORWARD + 2 * linear(C, H) + linear(8, I) + 2 * linear(8, H)],
    ),
    "dropout": (lambda m: NeuronDropout(m, 0.5), [HALF, HALF]),
    "dropout-weights": (lambda m: ElementDropout(m, 0.5), [WHOLE]),
    "mast": (lambda m: MAST(m, BernoulliSketch(0.5)), [WHOLE]),
    "mast-neurons": (lambda m: MAST(m, RandKSketch(H // 2, unit="neuron")), [HALF]),
    # Four workers of a quarter of the neurons each.
    "ist": (lambda m: IST(m, 4, local_steps=1), [4 * QUARTER]),
    "prune": (lambda m: PruneWithFeedback(m, 0.9, refresh_every=1), [WHOLE]),
    "errorfeedback": (lambda m: ErrorFeedback(m, 0.1), [WHOLE]),
    # No weight gradient but the head's.
    "fish": (lambda m: head_alone(m), [FORWARD + linear(C, H)]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_costs_what_is_claimed(name: str) -> None:
    make, expected = CASES[name]
    torch.manual_seed(0)
    model = MLP(I, (H, H), C)
    method = make(model)
    x, y = noise(BATCH, I), torch.arange(BATCH) % C
    for step, flops in enumerate(expected):
        plan = method.plan(step)
        assert plan.batches == method.batches
        # Twice: the first pass of a plan may know nothing of a past one yet.
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                plan.backward(*[loss_of(model, x, y)] * plan.batches)
            method.after_backward(step, plan)
        assert counter.get_total_flops() == flops
        assert plan.flops(x) == flops


def loss_of(model: MLP, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.nn.functional.cross_entropy(model(x), y)
