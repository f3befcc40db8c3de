"""Named configurations: ``maskedtrain train --preset NAME``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from maskedtrain.config import OptimConfig, RunConfig, TrainConfig, unknown_name
from maskedtrain.data.cifar10 import Config as CIFAR10Config
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.methods import MethodConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.slimmable import Config as SlimmableConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models.resnet import Config as ResNetConfig

__all__ = ["PRESETS", "preset"]

# The rows of the paper's comparison: each network alone, ATS, slimmable training.
_METHODS: dict[str, MethodConfig] = {
    "core": StandardConfig("core"),
    "full": StandardConfig("full"),
    "ats": ATSConfig(),
    "slimmable": SlimmableConfig(),
}

_EXPERIMENTS: dict[str, TrainConfig] = {
    # Small enough for a minute on two CPU cores.
    "digits-resnet8": TrainConfig(
        DigitsConfig(image_size=16, batch_size=64),
        ResNetConfig(depth=8, width=32),
        optim=OptimConfig(lr=0.1, warmup_steps=20),
        run=RunConfig(epochs=40.0),
    ),
    # Table 3 of the paper. It leaves learning rate, batch size and length open: these are the usual
    # ones.
    "cifar10-resnet18": TrainConfig(
        CIFAR10Config(batch_size=128),
        ResNetConfig(depth=18),
        optim=OptimConfig(lr=0.1),
        run=RunConfig(epochs=200.0, channels_last=True),
    ),
}

PRESETS: dict[str, TrainConfig] = {
    f"{name}-{row}": replace(
        experiment, method=method, run=replace(experiment.run, out=Path("runs", f"{name}-{row}"))
    )
    for name, experiment in _EXPERIMENTS.items()
    for row, method in _METHODS.items()
}


def preset(name: str) -> TrainConfig:
    """The preset of this name; ValueError with the known ones otherwise."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
