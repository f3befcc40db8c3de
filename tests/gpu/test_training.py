"""Training on the GPU: what is outside the core stays, bit for bit, losses go down, and steps wait
for nothing.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from maskedtrain import SubNetwork, Trainer
from maskedtrain.data.images import Augment, BatchLoader, ImageSplit
from maskedtrain.data.token_batches import TokenBatches
from maskedtrain.data.translation import Ragged, TranslationSplit
from maskedtrain.methods import ATS
from maskedtrain.methods.cores import core_chain
from maskedtrain.models import resnet8
from maskedtrain.models.transformer import Transformer
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.throughput import Meter, Stretch
from tests.gpu.toolbox import DEVICE, DRY_RUN, no_waiting

pytestmark = pytest.mark.gpu

OPTIMIZERS = {
    "sgd": lambda parameters: MaskedSGD(parameters, lr=0.02, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda parameters: MaskedAdamW(parameters, lr=2e-3),
}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ats(name: str, autocast: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = resnet8(width=16).to(DEVICE)
    full, core = SubNetwork.full(model), SubNetwork.width(model, 0.5)
    optimizer = OPTIMIZERS[name](model.parameters())
    trainer = Trainer(model, ATS([full, core]), optimizer, F.cross_entropy, autocast=autocast)
    batch = torch.randn(16, 3, 8, 8, device=DEVICE), torch.arange(16, device=DEVICE) % 10
    losses: list[float] = []
    for step in range(8):
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        report = trainer.train_step(iter([batch]))
        losses += [float(loss) for loss in report.losses.values()]
        if step % 2 == 0:
            continue
        for key, parameter in model.named_parameters():
            mask = core.mask_of(parameter)
            outside = torch.ones_like(parameter, dtype=torch.bool)
            if mask is not None:
                outside = ~mask.dense(parameter.shape, parameter.device)
            assert torch.equal(parameter.detach()[outside], before[key][outside]), key
    assert losses[-2] < losses[0] and losses[-1] < losses[1]


def images() -> BatchLoader:
    split = ImageSplit(torch.zeros(64, 3, 16, 16, dtype=torch.uint8), torch.arange(64) % 10)
    options: Any = {"mean": [0.5] * 3, "std": [0.5] * 3, "augment": Augment(2, flip=True)}
    return BatchLoader(split, 16, device=DEVICE, shuffle=True, channels_last=True, **options)


def translations(device: str = DEVICE) -> TokenBatches:
    rng = np.random.default_rng(0)
    sides = (Ragged.of([rng.integers(4, 90, n) for n in rng.integers(1, 20, 60)]) for _ in "st")
    split = TranslationSplit(*sides, [""] * 60, [""] * 60)
    return TokenBatches(split, 256, device=device, buckets=2)


def networks(core: str) -> tuple[nn.Module, list[SubNetwork], BatchLoader | TokenBatches]:
    torch.manual_seed(0)
    if core == "resnet":
        model = resnet8(width=32).to(DEVICE)
        subnets = core_chain(model, "width", (0.5,), round_to=8)
        return model.to(memory_format=torch.channels_last), subnets, images()  # pyright: ignore[reportCallIssue]
    sizes: Any = {"d_model": 64, "heads": 2, "ffn": 128, "encoder_layers": 1, "decoder_layers": 1}
    model = Transformer(90, 90, **sizes).to(DEVICE)
    chosen: Any = core
    return model, core_chain(model, chosen, (0.5,), round_to=8), translations()


# What torch's compiler warns of is another in every release.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("core", ["resnet", "width", "lowrank"])
def test_steps_wait_for_nothing(core: str, compile: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    # Inductor's code for the CPU would take a dry run too long.
    backend = "aot_eager" if DRY_RUN else "inductor"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model, subnets, loader = networks(core)
    optimizer = OPTIMIZERS["sgd" if core == "resnet" else "adamw"](model.parameters())
    options: Any = {"autocast": torch.bfloat16, "clip_grad_norm": 1.0, "check_every": 1000}
    shapes = None if core == "resnet" else 2
    trainer = Trainer(
        model, ATS(subnets), optimizer, cross_entropy, compile=compile, shapes=shapes, **options
    )
    meter = Meter(lambda plan: lambda inputs: 1, peak_flops_per_s=1.0)
    # The same ones in a row: every network has met every shape, and every mask, before it counts.
    stream = meter.seen(batch for batch in loader.stream() for _ in subnets)

    def steps(count: int) -> None:
        for _ in range(count):
            stretch = Stretch(next(model.parameters()).device)
            report = trainer.train_step(stream)
            stretch.end()
            meter.step(report.plan, stretch.seconds)

    steps(2 * max(2, len(loader)))
    with no_waiting():
        steps(2 * len(loader))
    assert meter.rates("full")["targets_per_s"] > 0 and meter.rates("core")["targets_per_s"] > 0
    trainer.check()
    torch._dynamo.reset()


@pytest.mark.skipif(DRY_RUN, reason="the CPU has no streams")
def test_batches_are_copied_on_the_stream_that_uses_them() -> None:
    """On another one they could come after their use."""
    expected = itertools.islice(translations("cpu").stream(), 20)
    # The default stream is busy for a second or so.
    torch.cuda._sleep(2_000_000_000)
    with torch.cuda.stream(torch.cuda.Stream()):
        for (inputs, targets), (found, theirs) in zip(
            expected, translations().stream(), strict=False
        ):
            for mine, wanted in zip((*found, theirs), (*inputs, targets), strict=True):
                assert torch.equal(mine.cpu(), wanted)
