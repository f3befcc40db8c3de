"""A Transformer with a low-rank core: ATS against standard training, paired.

ATS trains the core at every other step, so that an epoch should take (1 + c) / 2 of a standard one,
c being the core's share of FLOPs. What a core does not make smaller (dropout's random numbers, the
loss over the vocabulary) weighs more in a small network, so that its epoch takes more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch

from bench.paired import figures
from maskedtrain import SubNetwork, Trainer, lowrank
from maskedtrain.methods import ATS, Method, Standard
from maskedtrain.models import Transformer
from maskedtrain.optim import MaskedAdamW
from maskedtrain.training.losses import cross_entropy

SENTENCES, LENGTH, VOCAB = 128, 16, 5000
# Layers of the sizes of the presets, three in the encoder and three in the decoder.
SIZES: dict[str, dict[str, Any]] = {
    "multi30k": {"d_model": 256, "ffn": 512, "encoder_layers": 3, "decoder_layers": 3},
    "iwslt14": {"d_model": 512, "ffn": 1024, "encoder_layers": 3, "decoder_layers": 3},
}
# Steps of one round: ATS is back where it was after two.
STEPS = 2
MARGIN = 1.1


class Steps:
    """Calling it runs ``STEPS`` training steps on one batch of random tokens."""

    def __init__(
        self,
        sizes: str,
        ratio: float | None,
        *,
        methods: Callable[[list[SubNetwork]], Method] = ATS,
        device: str = "cpu",
        shape: tuple[int, int] = (SENTENCES, LENGTH),
        autocast: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        model = Transformer(VOCAB, VOCAB, dropout=0.1, **SIZES[sizes])
        method: Method = Standard(SubNetwork.full(model))
        if ratio is not None:
            core = lowrank(model, model.lowrank_targets, ratio)
            method = methods([SubNetwork.full(model), core])
        optimizer = MaskedAdamW(model.to(device).parameters(), lr=1e-4)
        self.trainer = Trainer(model, method, optimizer, cross_entropy, autocast=autocast)
        *inputs, targets = (torch.randint(4, VOCAB, shape, device=device) for _ in range(3))
        self.batch = tuple(inputs), targets

    @cached_property
    def flops(self) -> int:
        plans = [self.trainer.method.plan(step) for step in range(STEPS)]
        subnets = [item.subnet for plan in plans for item in plan.passes]
        return sum(subnet.flops(*self.batch[0], training=True) for subnet in subnets)

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.trainer.train_step(iter([self.batch]))


@pytest.mark.parametrize("ratio", [1 / 32, 1 / 4])
@pytest.mark.parametrize("sizes", SIZES)
def test_ats(benchmark, note, sizes, ratio):
    """Two steps of ATS, and their time of two standard ones'."""
    ats, standard = Steps(sizes, ratio), Steps(sizes, None)
    benchmark.group = f"{STEPS} training steps of a Transformer, {SENTENCES} x {LENGTH} tokens"
    benchmark.pedantic(ats, rounds=3, warmup_rounds=1)
    share = ats.flops / standard.flops
    note(ms_per_step=1e3 * benchmark.stats["median"] / STEPS, flops_of_standard=share)
    note(bar=MARGIN * share)
    note(**figures("time_of_standard", standard, ats, rounds=7))
