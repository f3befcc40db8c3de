"""measure the papers' figures and tables, and judge their statements"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from maskedtrain import reproduce
from maskedtrain.commands._options import parse
from maskedtrain.config import unknown_name
from maskedtrain.data._files import find_root
from maskedtrain.patterns import matching_names
from maskedtrain.reproduce import report
from maskedtrain.reproduce.base import FigureConfig, Section, summary
from maskedtrain.reproduce.plan import Piece, Store, execute
from maskedtrain.reproduce.tables import Scale, Table
from maskedtrain.reproduce.trainings import Figure, Place
from maskedtrain.training.console import Console
from maskedtrain.training.signals import Interrupted

ALL = "all"
# The figures of the paper whose tables these are.
FIGURES = ("figure2", "figure3", "figure4")


@dataclass(frozen=True)
class Options:
    """Train what a table of the paper compares, over several seeds, and set the results beside the
    paper's, in report.html of the folder.

    What is done stays done: the same command goes on where an earlier one ended, several processes
    may share a folder, and a copy of its "results" is enough to go on elsewhere.
    """

    scale: Scale = "cpu"
    """cpu: small networks, an hour and a quarter on two cores; gpu: larger ones, for an hour on one
    GPU; paper: those of the paper, on IWSLT14, WMT17 and CIFAR-10."""
    seeds: int = 3
    """Repeat with so many seeds. A report is of further ones, too, where there are results."""
    rows: tuple[str, ...] = ()
    """Only rows whose training one of these patterns matches, by its name as in the progress:
    "*1/32*", or "*digits*: ATS"."""
    out: Path = Path("runs/reproduce")
    """Folder of the results and the report; it may hold results of other tables and scales."""
    data: Path | None = None
    """Folder that the data are in; the variable MASKEDTRAIN_DATA where not given."""
    device: str = "auto"
    """Device, such as cpu or cuda; auto takes cuda where there is one."""
    threads: int | None = None
    """CPU threads; torch's own choice where not given."""
    keep_runs: bool = False
    """Keep the runs' folders, with their checkpoints, in "work" when they are done."""
    report_only: bool = False
    """Train nothing: make the report of the results that are there."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")


def main(arguments: Sequence[str], console: Console) -> None:
    """The name of a figure or a table, or ``all``; then its options."""
    figures, tables = reproduce.configs(), reproduce.tables()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    name, *rest = arguments
    if name in figures:
        config = parse(figures[name], rest, command=f"reproduce {name}")
        reproduce.reproduce(config, console)
    elif name in tables or name == ALL:
        options = parse(Options, rest, command=f"reproduce {name}")
        _reproduce_tables(name, options, console)
    else:
        raise unknown_name("figure or table", name, [*figures, *tables, ALL])


def _reproduce_tables(name: str, options: Options, console: Console) -> None:
    configs = [config() for key, config in reproduce.tables().items() if name in (key, ALL)]
    chosen = _rows_of([t for c in configs for t in c.tables(options.scale)], options.rows)
    counted = [section for config in configs for section in config.counted()]
    figures = [Figure(_figure(key, options)) for key in (FIGURES if name == ALL else ())]
    place = Place(options.data, options.device, options.threads)
    seeds = range(options.seeds)
    # All of the first seed first: early on there is something of everything.
    trainings = [
        piece for seed in seeds for table in chosen for piece in table.trainings([seed], place)
    ]
    unique: dict[str, Piece] = {}
    for piece in (*trainings, *figures):
        unique.setdefault(piece.id, piece)
    pieces = list(unique.values())
    store = Store(options.out, keep_work=options.keep_runs)
    title = f"maskedtrain reproduce {name} --scale {options.scale} --seeds {options.seeds}"
    if options.rows:
        title += f" --rows {shlex.join(options.rows)}"

    def write_report() -> report.Report:
        found = report.collect(title, chosen, figures, seeds, store, counted=counted)
        report.write(options.out, found)
        return found

    failures: dict[str, str] = {}
    if not options.report_only:
        try:
            failures = execute(pieces, store, console)
        except Interrupted:
            write_report()
            raise
    for section in write_report().sections:
        _show(section, console)
    console.print(f"\nwritten to {options.out / 'report.html'}")
    if failures:
        first, reason = next(iter(failures.items()))
        raise RuntimeError(f"{len(failures)} of {len(pieces)} runs failed: {first}: {reason}")


def _rows_of(tables: Sequence[Table], patterns: Sequence[str]) -> list[Table]:
    """The tables with the rows that a pattern matches."""
    if not patterns:
        return list(tables)
    names = dict.fromkeys(table.name(entry) for table in tables for entry in table.entries)
    wanted = matching_names("rows", patterns, names, "row", of="the plan")
    found = [
        replace(table, entries=tuple(e for e in table.entries if table.name(e) in wanted))
        for table in tables
    ]
    return [table for table in found if table.entries]


def _show(section: Section, console: Console) -> None:
    """A section, without its drawing."""
    console.print(f"\n{section.title}\n")
    if section.rows:
        columns = [(name.replace(" ", "\n"), right) for name, right in section.columns]
        console.table(columns, section.rows, max_width=80)
        console.print()
    for claim in section.claims:
        console.print(str(claim))


def _figure(name: str, options: Options) -> FigureConfig:
    """A figure's options at this scale: its own, or those of a longer training on the data."""
    given: dict[str, Any] = {"device": options.device}
    if options.threads is not None:
        given["threads"] = options.threads
    if options.scale != "cpu":
        # A report needs no data, but knows which figure it is of.
        data = Path() if options.report_only else find_root(options.data, name)
        given |= {"data": data, "steps": 4000, "every": 20}
    return replace(reproduce.configs()[name](), **given)


def _usage() -> str:
    lines = [
        "usage: maskedtrain reproduce NAME [options]    (NAME --help lists them)",
        "",
        "Measure a figure or a table of the papers, and say what of their statements about it",
        "holds. A figure becomes NAME.csv and NAME.png, tables report.html.",
        "",
    ]
    abouts = {name: summary(kind) for name, kind in reproduce.configs().items()}
    abouts |= {name: summary(kind) for name, kind in reproduce.tables().items()}
    abouts[ALL] = f"All tables, and {', '.join(FIGURES)}, in one report."
    for name, about in abouts.items():
        lines += textwrap.wrap(
            f"  {name:<14} {about.rstrip('.')}", width=80, subsequent_indent=" " * 17
        )
    return "\n".join(lines)
