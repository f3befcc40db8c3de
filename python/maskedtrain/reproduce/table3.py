"""Table 3 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022): a ResNet
and its half-width core by ATS and by slimmable training, CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import cast

from maskedtrain.benchmark.training import EXPERIMENTS, epoch_flops
from maskedtrain.config import TrainConfig
from maskedtrain.models.resnet import Config as ResNetConfig
from maskedtrain.presets import preset
from maskedtrain.reproduce.base import Claim, Section
from maskedtrain.reproduce.tables import (
    Entry,
    Quoted,
    Samples,
    Scale,
    Table,
    TableConfig,
    beats,
    longer,
    reaches,
)

__all__ = ["Config"]

_BESIDE = "Table 3: CIFAR-10, ResNet-18"
# Points of accuracy below which networks are as good.
_MARGIN = 0.5
# By how much counted FLOPs may be off.
_FLOPS = 0.005
# FLOPs of an epoch.
_PAPER_FLOPS = {"ats": ("ATS", 31.3e12), "slimmable": ("slimmable", 62.7e12)}


class Config(TableConfig):
    """A ResNet and its half-width core, by ATS and by slimmable training."""

    name = "table3"

    def tables(self, scale: Scale) -> list[Table]:
        if scale == "cpu":
            return [
                _table("Table 3, digits, ResNet-8", "digits-resnet8", lambda config: config),
                _table("Table 3, CIFAR-10, ResNet-8", "cifar10-resnet18", _small, twice=True),
            ]
        adapt = partial(_fast, epochs=20.0 if scale == "gpu" else 200.0)
        return [_table("Table 3, CIFAR-10, ResNet-18", "cifar10-resnet18", adapt, same=True)]

    def counted(self) -> list[Section]:
        experiment = EXPERIMENTS["cifar10-resnet18"]
        rows: list[list[str]] = []
        claims: list[Claim] = []
        for method, (label, paper) in _PAPER_FLOPS.items():
            found = epoch_flops(experiment, method).forward
            here, off = f"{found / 1e12:.2f} T", found / paper - 1
            rows.append([label, "both", here, f"{paper / 1e12:.1f} T", f"{off:+.2%}"])
            statement = f"{label}: an epoch takes {paper / 1e12:.1f} T FLOPs"
            claims.append(Claim(statement, f"{here}, {off:+.2%}", abs(off) <= _FLOPS))
        return [
            Section(
                title="Table 3, FLOPs",
                about="An epoch of ResNet-18 and its half-width core, 45,000 images of CIFAR-10: "
                "FLOPs of the forward passes, 2 per multiply-add, as torch counts them.",
                claims=claims,
                header=["training", "networks", "here", "in the paper", "difference"],
                rows=rows,
            )
        ]


def _small(config: TrainConfig) -> TrainConfig:
    """A narrow ResNet-8 for a minute an epoch on a CPU core."""
    model = replace(cast(ResNetConfig, config.model), depth=8, width=16)
    run = replace(config.run, epochs=3.0, channels_last=False)
    return replace(config, model=model, optim=replace(config.optim, warmup_steps=100), run=run)


def _fast(config: TrainConfig, *, epochs: float) -> TrainConfig:
    """As a GPU likes it."""
    return replace(config, run=replace(config.run, epochs=epochs, bf16=True, compile=True))


def _table(
    title: str,
    preset_name: str,
    adapt: Callable[[TrainConfig], TrainConfig],
    *,
    same: bool = False,
    twice: bool = False,
) -> Table:
    """``twice``: ATS for slimmable training's FLOPs, too."""

    def entry(key: str, method: str, network: str, row: str, paper: float | None) -> Entry:
        name = f"{preset_name}-{row}"
        quoted = None if paper is None else Quoted(paper)
        return Entry(key, method, network, name, adapt(preset(name)), quoted)  # pyright: ignore[reportArgumentType]

    entries = [
        entry("core alone", "core alone", "core", "core", None),
        entry("full alone", "full network alone", "full", "full", None),
        entry("core ATS", "ATS", "core", "ats", 93.94),
        entry("full ATS", "ATS", "full", "ats", 95.05),
        entry("core slimmable", "slimmable", "core", "slimmable", 93.99),
        entry("full slimmable", "slimmable", "full", "slimmable", 94.72),
    ]
    if twice:
        entries += [longer(e) for e in entries if e.method == "ATS"]
    return Table(title, _BESIDE, "accuracy", tuple(entries), _judge, same=same)


def _judge(samples: Samples, flops: Mapping[str, float]) -> list[Claim]:
    claims: list[Claim] = []
    for network in ("core", "full"):
        says = f"ATS trains the {network} network as well as slimmable training does"
        ats, slimmable = f"{network} ATS", f"{network} slimmable"
        claims += reaches(samples, ats, slimmable, _MARGIN, says)
        # Not the paper's: there half of slimmable training's FLOPs are enough.
        says = f"twice as long, for slimmable training's FLOPs: ATS's {network} network is better"
        claims += beats(samples, f"twice {ats}", slimmable, says)
    if {"core ATS", "core slimmable"} <= flops.keys():
        share = flops["core ATS"] / flops["core slimmable"]
        measured = f"{share:.4f} of its training FLOPs, counted"
        claim = "ATS takes half of slimmable training's FLOPs"
        claims.append(Claim(claim, measured, abs(2 * share - 1) <= _FLOPS))
    return claims
