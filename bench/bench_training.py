"""Time and FLOPs of a training step: standard, ATS and slimmable training of a ResNet and its
core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import pytest
import torch
import torch.nn.functional as F

from bench.paired import figures
from maskedtrain import SubNetwork, Trainer
from maskedtrain.methods import ATS, Method, Slimmable, Standard
from maskedtrain.models import resnet8, resnet18
from maskedtrain.optim import MaskedSGD

# model, image side, batch size
MODELS: dict[str, tuple[Callable[..., torch.nn.Module], int, int]] = {
    "resnet8": (lambda: resnet8(width=32), 16, 64),
    "resnet18": (resnet18, 32, 16),
}
METHODS: dict[str, Callable[[SubNetwork, SubNetwork], Method]] = {
    "core": lambda full, core: Standard(core),
    "standard": lambda full, core: Standard(full),
    "ats": lambda full, core: ATS([full, core]),
    "slimmable": lambda full, core: Slimmable([full, core]),
}
# Steps of one round: ATS is back where it was after two.
STEPS = 2


class Steps:
    """Calling it runs ``STEPS`` training steps on one batch of random images."""

    def __init__(
        self,
        model: str,
        method: str,
        *,
        device: str = "cpu",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        build, side, given = MODELS[model]
        self.batch_size = batch_size or given
        network = build()
        full, core = SubNetwork.full(network), SubNetwork.width(network, 0.5)
        parameters = network.to(device).parameters()
        optimizer = MaskedSGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
        planned = METHODS[method](full, core)
        self.trainer = Trainer(network, planned, optimizer, F.cross_entropy, autocast=autocast)
        images = torch.randn(self.batch_size, 3, side, side, device=device)
        self.batch = images, torch.randint(10, (self.batch_size,), device=device)

    @cached_property
    def flops(self) -> int:
        plans = [self.trainer.method.plan(step) for step in range(STEPS)]
        image = self.batch[0][:1]
        return self.batch_size * sum(
            item.subnet.flops(image, training=True) for plan in plans for item in plan.passes
        )

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.trainer.train_step(iter([self.batch]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_step(benchmark, note, model, method):
    """Two training steps, and ATS paired with slimmable training of the same network."""
    steps = Steps(model, method)
    benchmark.group = f"{STEPS} training steps of {model}, batch {steps.batch_size}"
    benchmark.pedantic(steps, rounds=5, warmup_rounds=1)
    seconds = benchmark.stats["median"]
    note(
        ms_per_step=1e3 * seconds / STEPS,
        flops=steps.flops,
        gflops_per_s=steps.flops / seconds / 1e9,
        threads=torch.get_num_threads(),
    )
    if method == "ats":
        slimmable = Steps(model, "slimmable")
        note(flops_of_slimmable=steps.flops / slimmable.flops)
        note(**figures("time_of_slimmable", slimmable, steps, rounds=7))
