"""What a training step asks of a device, and never waits for.

On the meta device tensors have no values: whatever would read one (and so wait for a GPU, had it
been one) raises, whichever way it reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskedtrain import SubNetwork, Trainer
from maskedtrain.data.images import Augment, BatchLoader, ImageSplit
from maskedtrain.methods import ATS, Slimmable, Standard
from maskedtrain.methods.base import Method
from maskedtrain.methods.cores import CoreKind, core_chain
from maskedtrain.models import resnet8
from maskedtrain.models.transformer import Transformer
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from maskedtrain.training.losses import cross_entropy
from maskedtrain.training.throughput import Meter

METHODS: dict[str, Callable[[list[SubNetwork]], Method]] = {
    "standard": lambda subnets: Standard(subnets[1]),
    "ats": ATS,
    "slimmable": Slimmable,
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda parameters: MaskedSGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: MaskedAdamW(parameters, lr=1e-3),
}


class NoCopies(TorchDispatchMode):
    """Within it, what would be copied to the device from the host raises."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [item for item in args if isinstance(item, Tensor)]
        # A number that a kernel takes as an argument may lie on the host.
        host = any(tensor.is_cpu and tensor.ndim for tensor in given)
        device = any(isinstance(item, Tensor) and item.is_meta for item in [*given, result])
        if device and host:
            raise AssertionError(f"{func} copies from the host")
        return result


def translation_batches() -> Iterator[Any]:
    source, target = (torch.zeros(8, n, dtype=torch.int64, device="meta") for n in (6, 7))
    return itertools.repeat(((source, target), target))


def images() -> BatchLoader:
    split = ImageSplit(torch.zeros(96, 3, 8, 8, dtype=torch.uint8), torch.arange(96) % 10)
    options: Any = {"mean": [0.5] * 3, "std": [0.5] * 3, "augment": Augment(2, flip=True)}
    return BatchLoader(split, 8, device="meta", shuffle=True, channels_last=True, **options)


def networks(core: CoreKind | None) -> tuple[nn.Module, list[SubNetwork], Iterator[Any]]:
    if core is None:
        model = resnet8(width=16).to("meta")
        return model, core_chain(model, "width", (0.5,), round_to=8), images().stream()
    sizes: Any = {"d_model": 16, "heads": 2, "ffn": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = Transformer(60, 60, **sizes).to("meta")
    return model, core_chain(model, core, (0.25,), round_to=1), translation_batches()


@pytest.fixture
def without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast, which reads nothing, does not know the meta device, even to be off there."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.usefixtures("without_autocast")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("core", [None, "width", "lowrank"], ids=["resnet", "width", "lowrank"])
def test_a_step_waits_for_nothing(core: CoreKind | None, method: str, optimizer: str) -> None:
    model, subnets, batches = networks(core)
    options: Any = {"check_every": 1000, "clip_grad_norm": 1.0, "accumulate": 2}
    made = OPTIMIZERS[optimizer](model.parameters())
    trainer = Trainer(model, METHODS[method](subnets), made, cross_entropy, **options)
    # The first check is of step 0, which is not among these.
    trainer.step = 2
    meter = Meter(lambda plan: lambda inputs: 1, peak_flops_per_s=1.0)
    stream = meter.seen(batches)

    def step() -> None:
        report = trainer.train_step(stream)
        assert meter.step(report.plan, lambda: 1.0) == 2 * len(report.losses)
        assert all(loss.is_meta for loss in report.losses.values())

    # Masks go to the device once, each when it is first met.
    for _ in range(4):
        step()
    with NoCopies():
        for _ in range(2):
            step()
    # What is read when it is asked for.
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        meter.rates(subnets[1].name)
    trainer.check_every = 1
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step()


def test_copies_from_the_host_are_seen() -> None:
    there = torch.zeros(3, device="meta")
    with NoCopies():
        (there * torch.tensor(2.0)).sum()
        for copy in (lambda: torch.ones(3).to("meta"), lambda: there.copy_(torch.ones(3))):
            with pytest.raises(AssertionError, match="copies from the host"):
                copy()
