"""Named configurations: ``maskedtrain train --preset NAME``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from maskedtrain.config import OptimConfig, RunConfig, TrainConfig, unknown_name
from maskedtrain.data.cifar10 import Config as CIFAR10Config
from maskedtrain.data.digits import Config as DigitsConfig
from maskedtrain.data.iwslt14 import Config as IWSLT14Config
from maskedtrain.data.multi30k import Config as Multi30kConfig
from maskedtrain.data.numbers import Config as NumbersConfig
from maskedtrain.data.sst2 import Config as SST2Config
from maskedtrain.data.wmt17 import Config as WMT17Config
from maskedtrain.methods import MethodConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.cores import CoreKind
from maskedtrain.methods.slimmable import Config as SlimmableConfig
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models.resnet import Config as ResNetConfig
from maskedtrain.models.text_classifier import Config as TextClassifierConfig
from maskedtrain.models.transformer import Config as TransformerConfig

__all__ = ["PRESETS", "preset"]

# The rows of the paper's comparison of widths: each network alone, ATS, slimmable training.
_IMAGE_ROWS: dict[str, MethodConfig] = {
    "-core": StandardConfig("core"),
    "-full": StandardConfig("full"),
    "-ats": ATSConfig(),
    "-slimmable": SlimmableConfig(),
}


def _text_rows(core: CoreKind, ratio: float) -> dict[str, MethodConfig]:
    """Rows of the paper's Tables 1 and 2: ATS, and each network alone."""
    return {
        "": ATSConfig(core, (ratio,)),
        "-core": StandardConfig("core", core, ratio),
        "-full": StandardConfig("full"),
    }


# The optimizer of the paper's translation experiments, fairseq's recipe for IWSLT14.
_ADAM = OptimConfig(
    "adamw",
    lr=5e-4,
    betas=(0.9, 0.98),
    eps=1e-9,
    weight_decay=1e-4,
    label_smoothing=0.1,
    schedule="inverse_sqrt",
    warmup_steps=4000,
)
_TEXT_RUN = RunConfig(epochs=30.0, log_every=100, select="best", keep_last=5)
_IWSLT14 = TrainConfig(
    IWSLT14Config(max_tokens=12_000), TransformerConfig(), optim=_ADAM, run=_TEXT_RUN
)

_EXPERIMENTS: dict[str, tuple[TrainConfig, dict[str, MethodConfig]]] = {
    # Small enough for a minute on two CPU cores.
    "digits-resnet8": (
        TrainConfig(
            DigitsConfig(image_size=16, batch_size=64),
            ResNetConfig(depth=8, width=32),
            optim=OptimConfig(lr=0.1, warmup_steps=20),
            run=RunConfig(epochs=40.0),
        ),
        _IMAGE_ROWS,
    ),
    # Table 3 of the paper. It leaves learning rate, batch size and length open: these are the usual
    # ones.
    "cifar10-resnet18": (
        TrainConfig(
            CIFAR10Config(batch_size=128),
            ResNetConfig(depth=18),
            optim=OptimConfig(lr=0.1),
            run=RunConfig(epochs=200.0, channels_last=True),
        ),
        _IMAGE_ROWS,
    ),
    # Small enough for a minute on two CPU cores, and hard enough not to be learned in it.
    "numbers-lowrank": (
        TrainConfig(
            NumbersConfig(largest=999_999_999, train_pairs=8000, max_tokens=1024),
            TransformerConfig(
                d_model=128, ffn=256, encoder_layers=2, decoder_layers=2, dropout=0.0
            ),
            optim=replace(_ADAM, lr=2e-3, warmup_steps=200),
            run=RunConfig(epochs=5.0),
        ),
        _text_rows("lowrank", 1 / 32),
    ),
    # A bag of words: a minute on two CPU cores.
    "sst2-width": (
        TrainConfig(
            SST2Config(),
            TextClassifierConfig(encoder="bag", dropout=0.3),
            optim=OptimConfig("adamw", lr=2e-3, weight_decay=1e-2, warmup_steps=100),
            run=RunConfig(epochs=5.0, log_every=50),
        ),
        _text_rows("width", 1 / 4),
    ),
    # For two CPU cores and half an hour.
    "multi30k-lowrank": (
        TrainConfig(
            Multi30kConfig(),
            TransformerConfig(
                d_model=256, ffn=512, encoder_layers=3, decoder_layers=3, dropout=0.2
            ),
            optim=replace(_ADAM, lr=1e-3, warmup_steps=500),
            run=replace(_TEXT_RUN, epochs=15.0, log_every=10),
        ),
        _text_rows("lowrank", 1 / 32),
    ),
    # Tables 1a and 2a of the paper.
    "iwslt14-lowrank": (_IWSLT14, _text_rows("lowrank", 1 / 32)),
    "iwslt14-width": (_IWSLT14, _text_rows("width", 1 / 4)),
    # Table 1b of the paper.
    "wmt17-lowrank": (
        TrainConfig(
            WMT17Config(max_tokens=18_000),
            TransformerConfig(heads=8, ffn=2048, dropout=0.1, tie_output=False),
            optim=replace(_ADAM, lr=7e-4, warmup_init_lr=1e-7, weight_decay=0.0),
            run=replace(_TEXT_RUN, epochs=22.0),
        ),
        _text_rows("lowrank", 1 / 32),
    ),
}

PRESETS: dict[str, TrainConfig] = {
    name + row: replace(
        experiment, method=method, run=replace(experiment.run, out=Path("runs", name + row))
    )
    for name, (experiment, rows) in _EXPERIMENTS.items()
    for row, method in rows.items()
}


def preset(name: str) -> TrainConfig:
    """The preset of this name; ValueError with the known ones otherwise."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
