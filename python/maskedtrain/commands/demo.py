"""train a network and its core in several ways, compare, in minutes"""

from __future__ import annotations

import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from maskedtrain.commands import _demos
from maskedtrain.commands._options import parse
from maskedtrain.config import TrainConfig
from maskedtrain.files import atomic_write
from maskedtrain.training.console import Console, ResultRow, results_markdown
from maskedtrain.training.export import save_program
from maskedtrain.training.metrics import plot_comparison
from maskedtrain.training.run import Run
from maskedtrain.training.signals import Interrupted
from maskedtrain.training.train import Results, train


@dataclass(frozen=True)
class Options:
    """Compare ATS with other ways to train the same networks, in minutes on a CPU."""

    translation: bool = False
    """Low-rank cores of a Transformer on number words, in place of a ResNet on digits."""
    out: Path | None = None
    """Folder to write to, runs/demo or runs/demo-translation where not given; an earlier demo there
    is replaced."""
    epochs: float | None = None
    """Passes over the training data, the same for every row."""
    seeds: int = 1
    """Repeat with so many seeds, and print mean and standard deviation."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")


def main(arguments: Sequence[str], console: Console) -> None:
    options = parse(Options, arguments, command="demo")
    demo = _demos.translation() if options.translation else _demos.digits()
    folder = options.out or Path("runs", "demo-translation" if options.translation else "demo")
    console.print(demo.intro)
    found = [_train_all(demo, folder, options, seed, console) for seed in range(options.seeds)]
    tables = [results.results for results in found]
    rows = tables[0] if len(tables) == 1 else [_mean(cells) for cells in zip(*tables, strict=True)]
    console.print()
    console.results_table(rows)
    remarks = [
        "iterations: optimizer steps that trained this network; training FLOPs and seconds: of "
        "the whole training that the row comes from.",
        *demo.remarks(tables),
        *found[0].remarks,
    ]
    if len(tables) > 1:
        remarks.append(
            f"means over {len(tables)} seeds; ±: standard deviation of the "
            f"{'BLEU score' if options.translation else 'accuracy, in points'}."
        )
    for remark in remarks:
        console.print(textwrap.fill(remark, 80))
    run = Run.restore(folder / demo.extracted, console)
    plot = folder / "comparison.png"
    logs = {label: folder / name / "metrics.jsonl" for name, label in demo.labels.items()}
    reason = plot_comparison(dict(logs), plot, title=demo.title, score=run.task.score)
    _write_report(folder, demo.title, rows, remarks, plotted=reason is None)
    run.load_weights()
    program = folder / "core.pt2"
    save_program(run.subnet("core").extract().cpu().eval(), *run.task.example(), program)
    console.print(textwrap.fill(demo.check(run, program), 80))
    written = "report.md, core.pt2" + (
        ", comparison.png" if reason is None else f" (no plot: {reason})"
    )
    console.print(f"\nwritten to {folder}: {written}")


def _configured(
    demo: _demos.Demo, folder: Path, options: Options, name: str, seed: int
) -> TrainConfig:
    config = demo.configs[name]
    out = folder / (name if seed == 0 else f"{name}-seed{seed}")
    epochs = config.run.epochs if options.epochs is None else options.epochs
    return replace(config, run=replace(config.run, out=out, epochs=epochs, seed=seed))


def _train_all(
    demo: _demos.Demo, folder: Path, options: Options, seed: int, console: Console
) -> Results:
    """The rows of all trainings with a seed, and what is to be said of every one."""
    rows: list[ResultRow] = []
    remarks: Sequence[str] = ()
    for name, label in demo.labels.items():
        config = _configured(demo, folder, options, name, seed)
        try:
            found = train(config, console, overwrite=True, label=label)
        except Interrupted as stop:
            # The run could go on alone; the comparison starts over.
            raise Interrupted(stop.signum, "demo stopped; the next one starts over") from None
        remarks = found.remarks
        # Small networks first, as in the rows of the networks trained alone.
        rows += [
            replace(row, method=label)
            for row in sorted(found.results, key=lambda row: row.params or 0)
        ]
    return Results(rows, remarks)


def _mean(cells: Sequence[ResultRow]) -> ResultRow:
    """The row of means over seeds, the spread of its score in the network's name."""
    first = cells[0]
    means = {
        name: statistics.mean(getattr(cell, name) for cell in cells)
        for name in ("accuracy", "bleu", "exact_match", "seconds")
        if getattr(first, name) is not None
    }
    spread = statistics.stdev(
        100 * (cell.accuracy or 0.0) if cell.bleu is None else cell.bleu for cell in cells
    )
    return replace(
        first,
        network=f"{first.network} (±{spread:.2f})",
        peak_mem_bytes=max(cell.peak_mem_bytes or 0 for cell in cells) or None,
        **means,
    )


def _write_report(
    folder: Path, title: str, rows: Sequence[ResultRow], remarks: Sequence[str], *, plotted: bool
) -> None:
    parts = [f"# maskedtrain demo: {title}\n", results_markdown(rows), *(f"{r}\n" for r in remarks)]
    if plotted:
        parts.append("![validation score](comparison.png)\n")
    parts.append(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"Python {sys.version.split()[0]}\n"
    )
    with atomic_write(folder / "report.md") as file:
        file.write("\n".join(parts).encode())
