"""Figure 4 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS 2022): what the
convergence of Theorem 1 rests on, while a Transformer is trained as usual and by ATS with its
half-width core.

p is the core, x~ = p x, and every gradient is that of the mini-batch which the next step is made
with. The panels are the paper's: (a) gradient overlap ``|g|^2 / |p g|^2``, (b) norm similarity
``|p g| / |p g~|``, (c) alignment ``|p g| |p g~| / <p g, p g~>``.

The paper's network is the Transformer of its IWSLT14 experiments (6 + 6 layers, d = 512); here it
is 2 + 2 layers of d = 128 on number words, or, with ``--data``, 3 + 3 layers of d = 256 on
Multi30k. The paper's lengths and smoothing are not known; here lines are running medians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from torch import Tensor

from maskedtrain.config import TrainConfig
from maskedtrain.data.multi30k import Config as Multi30kConfig
from maskedtrain.methods.ats import Config as ATSConfig
from maskedtrain.methods.base import Pass
from maskedtrain.methods.standard import Config as StandardConfig
from maskedtrain.presets import preset
from maskedtrain.reproduce._training import (
    TrainingFigure,
    draw_trainings,
    last_half,
    train_and_measure,
)
from maskedtrain.reproduce.base import Claim, Rows, column, select
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.theory.criteria import measure
from maskedtrain.training.console import Console
from maskedtrain.training.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Config"]

_METHODS = {"standard": StandardConfig(), "ATS": ATSConfig("width", (0.5,))}
_PANELS = {
    "overlap": (
        "(a) gradient overlap",
        r"$\|\nabla f(x)\|^2\;/\;\|p \odot \nabla f(x)\|^2$",
    ),
    "norm_similarity": (
        "(b) norm similarity",
        r"$\|p \odot \nabla f(x)\|\;/\;\|p \odot \nabla f(\tilde{x})\|$",
    ),
    "alignment": (
        "(c) gradient alignment",
        r"$\|p \odot \nabla f(x)\|\,\|p \odot \nabla f(\tilde{x})\|\;/\;"
        r"\langle p \odot \nabla f(x),\, p \odot \nabla f(\tilde{x})\rangle$",
    ),
}


@dataclass(frozen=True)
class Config(TrainingFigure):
    """Gradient overlap, norm similarity and alignment of a Transformer and its half-width core, in
    standard training and in ATS. --data takes the folder of Multi30k."""

    name = "figure4"
    size_in = (12.0, 3.6)

    steps: int = 300
    """Steps of each training."""
    every: int = 5
    """Steps between measurements."""

    def rows(self, console: Console) -> Rows:
        return [
            row
            for label, method in _METHODS.items()
            for row in train_and_measure(
                self, label, replace(self._training(), method=method), _measured, console
            )
        ]

    def _training(self) -> TrainConfig:
        if self.data is None:
            return preset("numbers-lowrank")
        config = preset("multi30k-lowrank")
        return replace(config, data=replace(cast(Multi30kConfig, config.data), data=self.data))

    def claims(self, rows: Rows) -> list[Claim]:
        late = {
            name: {training: last_half(rows, training, name) for training in _METHODS}
            for name in _PANELS
        }

        def text(name: str) -> str:
            values = ", ".join(f"{training} {late[name][training]:.3g}" for training in _METHODS)
            return f"median over the last half: {values}"

        def lower(name: str) -> bool:
            return late[name]["ATS"] < late[name]["standard"]

        first = column(select(rows, training="ATS"), "overlap")[0]
        overlap, norm = late["overlap"], late["norm_similarity"]
        return [
            Claim("ATS lowers (improves) the gradient overlap", text("overlap"), lower("overlap")),
            Claim(
                "with ATS the gradient overlap does not increase during training",
                f"{first:.3g} at the first step, median over the last half {overlap['ATS']:.3g}",
                overlap["ATS"] <= first,
            ),
            Claim(
                "perturbation increases the gradient's norm less with ATS (higher norm similarity)",
                text("norm_similarity"),
                norm["standard"] < norm["ATS"],
            ),
            Claim(
                "norm similarity is bounded by 1, with ATS or without",
                text("norm_similarity"),
                max(norm.values()) <= 1,
            ),
            Claim(
                "ATS lowers the ratio of Criterion 3, which improves gradient alignment",
                text("alignment"),
                lower("alignment"),
            ),
        ]

    def draw(self, figure: Figure, rows: Rows) -> None:
        panels = zip(figure.subplots(1, 3), _PANELS.items(), strict=True)
        for axes, (name, (title, ratio)) in panels:
            lines = [(training, name, training) for training in _METHODS]
            draw_trainings(axes, rows, lines, title, ratio, log=name == "alignment")


def _measured(run: Run, step: int, loss: Callable[[], Tensor]) -> dict[str, float]:
    found = measure(run.model, Pass(SubNetwork.width(run.model, 0.5)), loss).whole
    return {
        "overlap": found.c_norm**2,
        "norm_similarity": found.c_sim,
        "alignment": found.c_align,
    }
