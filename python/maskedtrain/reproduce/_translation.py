"""What Tables 1 and 2 share: a core in translation, alone and by ATS, and the full network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from maskedtrain.config import TrainConfig
from maskedtrain.data.multi30k import Config as Multi30kConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.cores import CoreKind
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.models.transformer import Config as TransformerConfig
from maskedtrain.presets import preset
from maskedtrain.reproduce.base import Claim
from maskedtrain.reproduce.tables import Entry, Quoted, Samples, Table, beats, longer, reaches

__all__ = ["Ratio", "large", "small", "translation_table", "whole"]

# BLEU below which networks are as good: the paper's cores by ATS lose 0.4 at most.
_MARGIN = 0.5

Adapt = Callable[[TrainConfig], TrainConfig]


@dataclass(frozen=True)
class Ratio:
    """A core's size, and the paper's BLEU of it alone, of it by ATS, and of the full network by
    ATS.
    """

    value: float
    alone: Quoted
    core: Quoted
    full: Quoted

    def __str__(self) -> str:
        return f"r = 1/{round(1 / self.value)}"

    @property
    def gains(self) -> bool:
        """Whether the paper's core by ATS is better by more than the spread of both."""
        spread = (self.alone.std or 0.0) + (self.core.std or 0.0)
        return self.core.mean - self.alone.mean > spread


def translation_table(
    title: str,
    paper: str,
    *,
    preset_name: str,
    kind: CoreKind,
    ratios: Sequence[Ratio],
    standard: Quoted,
    adapt: Adapt,
    twice: Sequence[Ratio] = (),
) -> Table:
    """A table of cores of some sizes, trained as the presets of this name say, adapted.

    ``paper`` says what the table of the paper was of, ``standard`` is its full network alone. Cores
    of the sizes in ``twice`` are also trained by ATS for twice as long, when each network has as
    many steps of its own as it has alone.
    """
    same = adapt is whole

    def entry(key: str, method: str, network: str, suffix: str, paper: Quoted | None) -> Entry:
        config = adapt(preset(preset_name + suffix))
        ratio = next((r for r in ratios if key.endswith(str(r))), None)
        if isinstance(config.method, ATSConfig) and ratio is not None:
            # The paper's widths as they are, whatever a GPU would like better.
            changed = replace(config.method, core=kind, ratios=(ratio.value,), round_to=1)
            config = replace(config, method=changed)
        elif isinstance(config.method, StandardConfig) and ratio is not None:
            changed = replace(config.method, core=kind, ratio=ratio.value, round_to=1)
            config = replace(config, method=changed)
        return Entry(key, method, network, preset_name + suffix, config, paper)  # pyright: ignore[reportArgumentType]

    entries = [entry("full", "full network alone", "full", "-full", standard)]
    for r in ratios:
        entries.append(entry(f"alone {r}", f"core alone, {r}", "core", "-core", r.alone))
        ats = [
            entry(f"core {r}", f"ATS, {r}", "core", "", r.core),
            entry(f"full {r}", f"ATS, {r}", "full", "", r.full),
        ]
        entries += ats
        if r in twice:
            entries += map(longer, ats)

    def judge(samples: Samples, flops: Mapping[str, float]) -> list[Claim]:
        claims: list[Claim] = []
        for r in ratios:
            core, alone = f"core {r}", f"alone {r}"
            if r.gains:
                says = f"{r}: a core trained by ATS is better than the same core trained alone"
                claims += beats(samples, core, alone, says)
            else:
                says = f"{r}: a core trained by ATS is as good as the same core trained alone"
                claims += reaches(samples, core, alone, _MARGIN, says)
            loss = standard.mean - r.full.mean
            says = f"{r}: ATS costs the full network no more than {loss:.2f} BLEU"
            claims += reaches(samples, f"full {r}", "full", loss, says)
            # Not the paper's: there as many steps as alone, in all, are enough.
            for network, other in (("core", alone), ("full", "full")):
                says = f"{r}, twice as long: the {network} network by ATS is better than alone"
                claims += beats(samples, f"twice {network} {r}", other, says)
        return claims

    return Table(title, paper, "bleu", tuple(entries), judge, same=same)


def whole(config: TrainConfig) -> TrainConfig:
    """The paper's preset, with checkpoints more often than by the epoch: one of WMT17 is hours."""
    return replace(config, run=replace(config.run, save_every=1000))


def small(config: TrainConfig) -> TrainConfig:
    """The preset of Multi30k, at a size of some minutes on a CPU core."""
    model = cast(TransformerConfig, config.model)
    model = replace(model, d_model=128, ffn=256, encoder_layers=2, decoder_layers=2, dropout=0.1)
    return replace(
        config,
        data=replace(cast(Multi30kConfig, config.data), vocab_size=4000, max_tokens=2048),
        model=model,
        optim=replace(config.optim, lr=2e-3, warmup_steps=300),
        run=replace(config.run, epochs=3.0, keep_last=1),
    )


def large(config: TrainConfig) -> TrainConfig:
    """The preset of Multi30k with the paper's Transformer of IWSLT14, for a minute on a GPU: as it
    is, since to compile it takes longer.
    """
    model = cast(TransformerConfig, config.model)
    model = replace(model, d_model=512, ffn=1024, encoder_layers=6, decoder_layers=6, dropout=0.3)
    return replace(
        config,
        data=replace(cast(Multi30kConfig, config.data), max_tokens=8192),
        model=model,
        optim=replace(config.optim, lr=7e-4, warmup_steps=300),
        run=replace(config.run, epochs=12.0, keep_last=1, bf16=True),
    )
