"""Quantities measured along a training, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from maskedtrain.config import TrainConfig
from maskedtrain.reproduce.base import FigureConfig, Rows, column, finish_axes, median, select
from maskedtrain.training.console import Console
from maskedtrain.training.loop import Trainer
from maskedtrain.training.metrics import COLOURS
from maskedtrain.training.optimizer import make_optimizer
from maskedtrain.training.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TrainingFigure", "draw_trainings", "last_half", "train_and_measure"]

Measure = Callable[[Run, int, Callable[[], Tensor]], dict[str, float]]
"""Quantities of a run before a step, by name; the last argument computes the loss of the model as
it is then active, on the step's mini-batch."""


@dataclass(frozen=True)
class TrainingFigure(FigureConfig):
    """Options of a figure that is measured while training."""

    data: Path | None = None
    """Folder of the paper's kind of data; data that come with the package where not given."""
    steps: int = 400
    """Steps of each training."""
    every: int = 4
    """Steps between measurements."""
    device: str = "auto"
    """Device, such as cpu or cuda; auto takes cuda where there is one."""
    threads: int = 1
    """CPU threads. Small networks gain little from more, and lose much beside other work."""

    def __post_init__(self) -> None:
        # Of each half of the training there must be something to say.
        if self.every < 1 or self.steps < 2 * self.every:
            raise ValueError(
                "every must be >= 1 and steps at least twice as many, "
                f"got {self.every} and {self.steps}"
            )

    def configured(self, config: TrainConfig) -> TrainConfig:
        """The training with these options."""
        run = replace(
            config.run, seed=self.seed, device=self.device, threads=self.threads, out=self.out
        )
        return replace(config, run=run)


def train_and_measure(
    figure: TrainingFigure, label: str, config: TrainConfig, measure: Measure, console: Console
) -> list[dict[str, Any]]:
    """Rows of ``training``, ``step``, ``loss`` and what ``measure`` finds before the step."""
    run = Run(figure.configured(config), console)
    batches = run.task.train_batches().stream()
    optimizer, scheduler = make_optimizer(config.optim, run.model, figure.steps)
    trainer = Trainer(
        run.model,
        run.method,
        optimizer,
        run.task.loss,
        scheduler=scheduler,
        clip_grad_norm=config.optim.clip_grad_norm,
    )
    run.model.train()
    rows: list[dict[str, Any]] = []
    with console.progress(figure.steps, label=label) as bar:
        while trainer.step < figure.steps:
            step, (inputs, targets) = trainer.step, next(batches)
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            found: dict[str, float] | None = None
            if step % figure.every == 0:
                found = measure(
                    run, step, lambda a=arguments, y=targets: run.task.loss(run.model(*a), y)
                )
            report = trainer.train_step(iter([(inputs, targets)]))
            loss = float(next(iter(report.losses.values())))
            if found is not None:
                rows.append({"training": label, "step": step, "loss": loss, **found})
            bar.update(report.step, loss=loss)
    return rows


def last_half(rows: Rows, training: str, name: str) -> float:
    """Median of a quantity over the last half of a training's measurements."""
    values = column(select(rows, training=training), name)
    return median(values[len(values) // 2 :])


def draw_trainings(
    axes: Axes,
    rows: Rows,
    lines: Sequence[tuple[str, str, str]],
    title: str,
    y_name: str,
    *,
    log: bool = False,
) -> None:
    """Lines ``(training, quantity, label)`` against the step: thin what was measured, thick its
    running median over a tenth of the training.
    """
    for colour, (training, name, label) in zip(COLOURS, lines, strict=False):
        chosen = select(rows, training=training)
        steps, values = column(chosen, "step"), np.array(column(chosen, name))
        radius = max(1, len(values) // 20)
        trend = [np.median(values[max(0, i - radius) : i + radius + 1]) for i in range(len(values))]
        # Infinite ones, of gradients at right angles or wider, are gaps.
        measured, medians = (np.where(np.isfinite(v), v, np.nan) for v in (values, trend))
        axes.plot(steps, measured, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, medians, color=colour, label=label)
    if log:
        from matplotlib.ticker import LogFormatter

        axes.set_yscale("log")
        # 0.5 and 20, not powers of ten: these are ratios.
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    finish_axes(axes, title, "training step", y_name)
