"""The report of a plan: its tables beside the paper's, curves, figures, in one HTML file.

All of it is computed from the results that the runs left, and from nothing else.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from maskedtrain.files import atomic_write, make_folder
from maskedtrain.reproduce import curves
from maskedtrain.reproduce.base import Section, from_csv, summary
from maskedtrain.reproduce.plan import Result, Store
from maskedtrain.reproduce.tables import Entry, Quoted, Sample, Table, row_of
from maskedtrain.reproduce.trainings import Figure, Training
from maskedtrain.training.console import format_count, format_duration, markdown_table
from maskedtrain.training.metrics import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

__all__ = ["Report", "Row", "Run", "collect", "to_html", "to_markdown", "write"]

MISSING = "–"
_OTHER = " Data and network are others here: what can be compared is the order of the rows."


@dataclass(frozen=True)
class Row:
    """One row of a table: what was measured, beside the paper's."""

    method: str
    network: str
    measured: Sample | None
    paper: Quoted | None
    train_flops: float | None
    """Of one training, of which the row is a network."""
    seconds: float | None
    """Of its steps; None where seeds ran on different machines."""

    @property
    def cells(self) -> list[str]:
        """As they are shown."""
        difference = MISSING
        if self.measured is not None and self.paper is not None:
            difference = f"{self.measured.mean - self.paper.mean:+.2f}"
        return [
            self.method,
            self.network,
            MISSING if self.measured is None else _spread(self.measured.mean, self.measured.std),
            MISSING if self.measured is None else str(len(self.measured.values)),
            MISSING if self.paper is None else _spread(self.paper.mean, self.paper.std),
            difference,
            MISSING if self.train_flops is None else format_count(self.train_flops),
            MISSING if self.seconds is None else format_duration(self.seconds),
        ]


@dataclass(frozen=True)
class Run:
    """A training of the plan, and where it stands."""

    label: str
    command: str
    state: str
    """"done", "not done", or why it failed."""
    scores: str = MISSING
    seconds: str = MISSING
    speed: str = MISSING
    place: str = MISSING

    @property
    def cells(self) -> list[str]:
        """As they are shown, under ``RUNS``."""
        return [self.label, self.scores, self.seconds, self.speed, self.place, self.state]


RUNS = ("run", "test scores", "time", "speed", "on", "state")


@dataclass(frozen=True)
class Report:
    """All that is on the page."""

    command: str
    sections: Sequence[Section]
    runs: Sequence[Run]
    places: Sequence[str] = ()
    """On what the runs ran, one line each."""
    remarks: Sequence[str] = field(default_factory=tuple)

    @property
    def done(self) -> int:
        return sum(run.state == "done" for run in self.runs)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many statements hold, do not, and are not decided."""
        found = [claim.verdict for section in self.sections for claim in section.claims]
        return dict(Counter(found).most_common())


def collect(
    command: str,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    seeds: Sequence[int],
    store: Store,
    *,
    counted: Sequence[Section] = (),
) -> Report:
    """The report of the results that are there, those of further seeds too, and of what was counted
    without a run.
    """
    pieces: dict[str, Training | Figure] = {}
    results: dict[str, Result] = {}

    def is_done(piece: Training | Figure) -> bool:
        """Whether there is a result, which is read once."""
        if piece.id not in results and (result := store.result(piece)) is not None:
            results[piece.id] = result
        return piece.id in results

    trainings = [training for table in tables for training in table.trainings(seeds)]
    seeds = list(seeds)
    for seed in itertools.count(len(seeds)):
        further = [t for table in tables for t in table.trainings([seed]) if is_done(t)]
        if not further:
            break
        trainings += further
        seeds.append(seed)
    for piece in (*trainings, *figures):
        pieces.setdefault(piece.id, piece)
        is_done(piece)
    sections = [*(_table(table, seeds, results) for table in tables), *counted]
    sections += [_figure(figure, results.get(figure.id)) for figure in figures]
    runs = [_run(piece, results.get(id), store) for id, piece in pieces.items()]
    places = dict.fromkeys(_place(result) for result in results.values())
    remarks = dict.fromkeys(r for result in results.values() for r in result.get("remarks", ()))
    if new_figure(width_in=1, height_in=1) is None:
        remarks["There are no drawings: matplotlib is not installed."] = None
    return Report(command, sections, runs, list(places), list(remarks))


def write(folder: Path, report: Report) -> Path:
    """Write ``report.html`` and ``report.md`` to the folder; the path of the first."""
    make_folder(folder)
    for name, text in (("report.md", to_markdown(report)), ("report.html", to_html(report))):
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    return folder / "report.html"


def to_html(report: Report) -> str:
    """One page that needs no other file."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("maskedtrain", "reproduce"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(report=report, runs=RUNS)


def to_markdown(report: Report) -> str:
    """Tables and statements, without drawings."""
    lines = [f"# `{report.command}`", "", f"{report.done} of {len(report.runs)} runs are done."]
    for section in report.sections:
        lines += ["", f"## {section.title}", "", section.about]
        if section.rows:
            lines += ["", *markdown_table(section.columns, section.rows)]
        if section.claims:
            lines += ["", *(f"- {claim}" for claim in section.claims)]
    lines += [
        "",
        "## Runs",
        "",
        *markdown_table([(name, False) for name in RUNS], [run.cells for run in report.runs]),
    ]
    lines += ["", *(f"- {line}" for line in (*report.places, *report.remarks)), ""]
    return "\n".join(lines)


def _table(table: Table, seeds: Sequence[int], results: Mapping[str, Result]) -> Section:
    samples: dict[str, Sample] = {}
    flops: dict[str, float] = {}
    rows: list[Row] = []
    found: dict[str, list[Result]] = {}
    for entry in table.entries:
        done = [
            result
            for seed in seeds
            if (result := results.get(table.training(entry, seed).id)) is not None
        ]
        found[entry.key] = done
        if done:
            samples[entry.key] = Sample(tuple(table.value(entry, result) for result in done))
            flops[entry.key] = _mean(done, entry, "train_flops")
        rows.append(
            Row(
                entry.method,
                entry.network,
                samples.get(entry.key),
                entry.paper,
                flops.get(entry.key),
                # Seconds of different machines have no mean.
                _mean(done, entry, "seconds") if len(set(map(_place, done))) == 1 else None,
            )
        )
    header = ["training", "network", f"{table.unit} here", "seeds", "in the paper"]
    header += ["difference" if table.same else "difference (other data)", "training FLOPs", "time"]
    drawing = _drawn(lambda drawing: curves.draw(drawing, table, found), 10.0, 3.8)
    return Section(
        title=table.title,
        about=f"Mean (standard deviation) over the seeds, on the test data. Beside it the paper's "
        f"{table.paper}.{'' if table.same else _OTHER} FLOPs and time are those of the training's "
        "steps, of whichever network.",
        claims=table.judge(samples, flops),
        header=header,
        rows=[row.cells for row in rows],
        drawing=drawing if samples else None,
        caption=f"{table.unit} on the validation data while training; bands are from the lowest "
        "to the highest seed.",
    )


def _figure(figure: Figure, result: Result | None) -> Section:
    name = figure.config.name
    title = f"Figure {name.removeprefix('figure')}" if name.startswith("figure") else name
    about = summary(type(figure.config))
    if result is None:
        return Section(title, f"{about} Not measured yet.", ())
    rows = from_csv(result["csv"])
    drawing = _drawn(lambda drawing: figure.config.draw(drawing, rows), *figure.config.size_in)
    return Section(title, about, figure.config.claims(rows), drawing=drawing)


def _run(piece: Training | Figure, result: Result | None, store: Store) -> Run:
    if result is None:
        failure = store.failure(piece)
        state = "not done" if failure is None else f"failed: {failure}"
        return Run(piece.label, piece.command, state)
    return Run(
        piece.label,
        piece.command,
        "done",
        _scores(result),
        format_duration(result["seconds"]),
        _speed(result),
        _place(result),
    )


def _scores(result: Result) -> str:
    """Of every network of a training."""
    shown = []
    for row in result.get("results", ()):
        value, unit = row.get("bleu"), "BLEU"
        if value is None:
            value, unit = 100 * row["accuracy"], "%"
        shown.append(f"{row['network']} {value:.2f} {unit}")
    return ", ".join(shown) or MISSING


def _speed(result: Result) -> str:
    """Of the steps of every network: targets are tokens or images."""
    unit = next((row["unit"] for row in result.get("results", ())), "target")
    shown = [
        f"{name} {rates['targets_per_s']:,.0f} {unit}s/s, "
        f"{rates['flop_utilization']:.0%} of the product rate"
        for name, rates in sorted(result.get("rates", {}).items())
    ]
    return "; ".join(shown) or MISSING


def _place(result: Result) -> str:
    found = result["environment"]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return (
        f"{found['device']}, {threads}, torch {found['torch']}, "
        f"maskedtrain {found['maskedtrain']}, Python {found['python']}"
    )


def _mean(results: Sequence[Result], entry: Entry, name: str) -> float:
    return statistics.mean(row_of(result, entry.network)[name] for result in results)


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None or not math.isfinite(std) else f"{mean:.2f} ({std:.2f})"


def _drawn(draw: Callable[[Drawing], Any], width_in: float, height_in: float) -> str | None:
    """The drawing as the address of an image; None without matplotlib."""
    figure = new_figure(width_in=width_in, height_in=height_in)
    if figure is None:
        return None
    from matplotlib import rc_context

    draw(figure)
    file = io.BytesIO()
    # Without a date, and names drawn at random, the same results are the same file.
    with rc_context({"svg.hashsalt": "maskedtrain"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
