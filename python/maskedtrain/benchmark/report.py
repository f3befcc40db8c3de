"""What a run of ``maskedtrain bench`` found, as JSON, Markdown, drawings and a terminal's table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from maskedtrain.benchmark.figures import FIGURES, draw_all
from maskedtrain.benchmark.machine import Rates
from maskedtrain.benchmark.rows import Row
from maskedtrain.benchmark.training import TrainingRow
from maskedtrain.benchmark.verdict import BUSY, factor
from maskedtrain.files import atomic_write, make_folder, output_errors, write_json
from maskedtrain.training.console import (
    Console,
    format_bytes,
    format_count,
    format_duration,
    markdown_table,
)

__all__ = ["FILES", "Report", "check_folder", "markdown", "show", "write"]

FILES = ("bench.json", "bench.md", *FIGURES)


@dataclass
class Report:
    """Everything that was measured."""

    machine: Mapping[str, Any]
    options: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    model: list[dict[str, Any]] = field(default_factory=list)
    """What all linear layers of a model take together, by kind of mask."""
    model_name: str | None = None
    training: dict[str, list[TrainingRow]] = field(default_factory=dict)
    """By title of the experiment."""
    skipped: list[str] = field(default_factory=list)
    """What there was no time for."""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "machine": dict(self.machine),
            "options": dict(self.options),
            "rows": [row.as_dict() for row in self.rows],
            "model": self.model,
            "training": {
                title: [row.record() for row in rows] for title, rows in self.training.items()
            },
            "skipped": self.skipped,
            "seconds": self.seconds,
        }


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the folder, unless it has files of an earlier run that are not to be replaced.

    Raises:
        ValueError: it has; OutputError: it cannot be made.
    """
    found = [str(folder / name) for name in FILES if (folder / name).exists()]
    if found and not overwrite:
        raise ValueError(
            f"{' and '.join(found)} would be overwritten: choose another --out, or give --overwrite"
        )
    make_folder(folder)


def write(folder: Path, report: Report, rates: Rates, machine: str) -> str:
    """Write all files; what was written, in words. No drawing of an earlier run stays."""
    for name in FIGURES:
        with output_errors(folder / name):
            (folder / name).unlink(missing_ok=True)
    write_json(folder / "bench.json", report.as_dict())
    with atomic_write(folder / "bench.md") as file:
        file.write("\n".join(markdown(report, machine)).encode() + b"\n")
    drawn = draw_all(folder, report.rows, rates, machine)
    written = ", ".join(str(folder / name) for name in FILES[:2])
    if drawn is None:
        return f"{written} (no drawings: matplotlib is not installed)"
    return ", ".join([written, *map(str, drawn)])


def ms(value: float) -> str:
    """Three significant digits: 0.123, 1.23, 12.3, 123."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def spread(low: float, high: float) -> str:
    """The quartiles: "2.9–3.3"."""
    return f"{factor(low)[:-1]}–{factor(high)[:-1]}"


_Cell = Callable[[Row], str]
_MARKDOWN: dict[str, _Cell] = {
    "case": lambda row: row.label,
    "stage": lambda row: row.stage,
    "dense ms": lambda row: ms(row.dense_ms),
    "ms": lambda row: ms(row.ms),
    "speed-up": lambda row: factor(row.speedup),
    "quartiles": lambda row: spread(row.low, row.high),
    "dense FLOPs": lambda row: _or_dash(row.dense_flops, format_count),
    "FLOPs": lambda row: format_count(row.flops),
    "dense memory": lambda row: _or_dash(row.dense_mem_bytes, format_bytes),
    "memory": lambda row: _or_dash(row.mem_bytes, format_bytes),
    "of the roof": lambda row: f"{row.floor_share:.0%}",
    "backend": lambda row: row.backend or "–",
    "verdict": lambda row: row.verdict,
}


# What 80 columns have room for.
_TERMINAL = {
    "case": "case",
    "stage": "stage",
    "ms": "ms",
    "speed-up": "gain",
    "quartiles": "quartiles",
    "verdict": "verdict",
}
_RIGHT = {"ms", "speed-up", "quartiles"}


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


def markdown(report: Report, machine: str) -> Iterator[str]:
    """The lines of ``bench.md``."""
    yield f"# maskedtrain bench on {machine}"
    yield ""
    described = ", ".join(f"{key} {_short(value)}" for key, value in report.machine.items())
    yield f"{described}. {report.seconds:.0f} seconds."
    yield ""
    yield from _LEGEND
    for size, rows in groupby(report.rows, lambda row: _title(row)):
        yield from ("", f"## {size}", "")
        yield from _table(_MARKDOWN, [[cell(row) for cell in _MARKDOWN.values()] for row in rows])
    if report.model:
        yield from ("", f"## All linear layers of {report.model_name}, whole steps", "")
        yield from _table(_MODEL, _model_cells(report.model))
    for title, rows in report.training.items():
        yield from ("", f"## Training: {title}", "")
        yield from _table(_TRAINING, [[cell(row) for cell in _TRAINING.values()] for row in rows])
    if report.skipped:
        yield from (
            "",
            f"There was no time for {len(report.skipped)}: {', '.join(report.skipped)}.",
        )


_LEGEND = (
    "Times are medians, speed-ups medians of paired ratios (dense time / ours), with quartiles.",
    "Memory is what a whole step holds beside the parameters: tensors saved for the backward,",
    "gradients, optimizer state. Of the roof: the time that the measured rates of products and",
    "copies allow, as a share of ours.",
)

_MODEL = ("mask", "layers", "dense ms", "ms", "speed-up", "bounds", "verdict")
_TRAINING: dict[str, Callable[[TrainingRow], str]] = {
    "method": lambda row: row.method,
    "trains": lambda row: row.trains,
    "FLOPs / step": lambda row: format_count(row.training_flops_per_step),
    "FLOPs / epoch": lambda row: format_count(row.training_flops_per_epoch),
    "forward / epoch": lambda row: format_count(row.forward_flops_per_epoch),
    "s / step": lambda row: f"{row.seconds_per_step:.3g}",
    "time / epoch": lambda row: format_duration(row.seconds_per_epoch),
    "memory held": lambda row: format_bytes(row.held_bytes),
    "memory of a step": lambda row: format_bytes(row.step_bytes),
    "verdict": lambda row: row.verdict,
}
# What 80 columns have room for; verdicts are lines of their own.
_TRAINING_TERMINAL = [name for name in _TRAINING if name not in ("trains", "verdict")]


def _table(header: Iterable[str], body: Sequence[Sequence[str]]) -> list[str]:
    return markdown_table([(name, False) for name in header], body)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _title(row: Row) -> str:
    if row.kind == "meProp":
        return f"meProp's backward by batch, row-sparse gradient, {row.size}"
    return "Kernels without a layer" if row.stage == "kernel" else f"{row.size}, {row.dtype}"


def _model_cells(totals: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [
        [
            total["label"],
            str(total["layers"]),
            ms(total["dense_ms"]),
            ms(total["ms"]),
            factor(total["speedup"]),
            spread(total["low"], total["high"]),
            total["verdict"],
        ]
        for total in totals
    ]


def show(report: Report, console: Console) -> None:
    """Print the tables, in 80 columns."""
    for title, group in groupby(report.rows, _title):
        rows = list(group)
        console.print(f"\n{title}")
        if (dense := _dense_times(rows)) is not None:
            console.print(dense)
        cells = [[_MARKDOWN[name](row) for name in _TERMINAL] for row in rows]
        columns = [(_TERMINAL[name], name in _RIGHT) for name in _TERMINAL]
        console.table(columns, cells, max_width=80)
    if report.model:
        console.print(f"\nall linear layers of {report.model_name}, whole steps")
        console.table(
            [(name, 0 < i < 6) for i, name in enumerate(_MODEL)],
            _model_cells(report.model),
            max_width=80,
        )
    for title, rows in report.training.items():
        console.print(f"\ntraining: {title}")
        console.table(
            [(name.replace(" ", "\n"), name != "method") for name in _TRAINING_TERMINAL],
            [[_TRAINING[name](row) for name in _TRAINING_TERMINAL] for row in rows],
            max_width=80,
        )
        for row in rows:
            if row.of_standard or row.of_slimmable:
                console.print(row.verdict)
    if report.skipped:
        console.print(f"\nno time was left for {len(report.skipped)} more measurements")
    if disturbed := sum(row.waited > BUSY for row in report.rows):
        console.warn(
            f"{disturbed} of {len(report.rows)} measurements were disturbed by other programs"
        )


def _dense_times(rows: Sequence[Row]) -> str | None:
    """Of the one layer that all rows are compared with, the median by stage."""
    if any(row.stage == "kernel" or row.kind == "meProp" for row in rows):
        return None
    by_stage: dict[str, list[float]] = {}
    for row in rows:
        by_stage.setdefault(row.stage, []).append(row.dense_ms)
    times = (f"{stage} {ms(sorted(t)[len(t) // 2])} ms" for stage, t in by_stage.items())
    return f"the dense layer: {', '.join(times)}"
