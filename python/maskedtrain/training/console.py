"""What a person sees: progress, messages and the table of results.

On a terminal a live bar (rich); anywhere else (a file, a pipe, TERM=dumb) plain lines without a
single control code. NO_COLOR switches colours off.
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import rich.console
import rich.progress
from rich.cells import cell_len
from rich.text import Text

from maskedtrain.training.scores import ACCURACY, Score

_MISSING = "–"
# The speed shown is the mean over this long, so that it follows a change but does not flicker.
_SPEED_WINDOW_S = 30.0


@dataclass(frozen=True)
class ResultRow:
    """One network of the results: what it reached and what that cost. None is shown as a dash.

    `iterations` optimizer steps that trained this network; `accuracy` and `exact_match` fractions
    in [0, 1], `bleu` in [0, 100], `matthews` in [-1, 1]; `forward_flops` per `unit`, an image, a
    token or a sentence; `train_flops` and `seconds` of the whole training.
    """

    network: str
    method: str | None = None
    iterations: int | None = None
    accuracy: float | None = None
    params: int | None = None
    forward_flops: float | None = None
    train_flops: float | None = None
    seconds: float | None = None
    peak_mem_bytes: int | None = None
    bleu: float | None = None
    exact_match: float | None = None
    matthews: float | None = None
    unit: str = "image"

    def __post_init__(self) -> None:
        ranges = {"accuracy": (0, 1), "exact_match": (0, 1), "bleu": (0, 100), "matthews": (-1, 1)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {value}")


def format_count(value: float) -> str:
    """Three significant digits and an SI prefix: 11173962 -> "11.2 M". Also for FLOPs."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E", "Z"))


def format_bytes(value: float) -> str:
    """Three significant digits and a binary prefix: 851443712 -> "812 MiB"."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def format_seconds(value: float) -> str:
    """Seconds to three significant digits, whole ones from 100 on: 7.256 -> "7.26"."""
    return _three_digits(value)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds: 87 -> "1:27", 3700 -> "1:01:40"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


# Header (its lines), right-aligned?, cell.
_Column = tuple[str, bool, Callable[[ResultRow], str | None]]


def _optional(field: str, show: Callable[[float], str]) -> Callable[[ResultRow], str | None]:
    def cell(row: ResultRow) -> str | None:
        value = getattr(row, field)
        return None if value is None else show(value)

    return cell


_COLUMNS: tuple[_Column, ...] = (
    ("network", False, lambda row: row.network),
    ("method", False, lambda row: row.method),
    ("iterations", True, _optional("iterations", "{:,}".format)),
    ("accuracy\n%", True, _optional("accuracy", lambda value: f"{100 * value:.2f}")),
    ("BLEU", True, _optional("bleu", "{:.2f}".format)),
    ("exact\n%", True, _optional("exact_match", lambda value: f"{100 * value:.2f}")),
    ("MCC\n%", True, _optional("matthews", lambda value: f"{100 * value:.2f}")),
    ("params", True, _optional("params", format_count)),
    ("forward\nFLOPs/\n{unit}", True, _optional("forward_flops", format_count)),
    ("training\nFLOPs", True, _optional("train_flops", format_count)),
    ("seconds", True, _optional("seconds", format_seconds)),
    ("peak\nmemory", True, _optional("peak_mem_bytes", format_bytes)),
)


def results_markdown(rows: Sequence[ResultRow]) -> str:
    """The table of results in Markdown, with a line break at its end."""
    columns = _columns(rows)
    names = [header.replace("/\n", "/").replace("\n", " ") for header, _, _ in columns]
    right = [right for _, right, _ in columns]
    lines = markdown_table(list(zip(names, right, strict=True)), _cells(columns, rows))
    return "".join(f"{line}\n" for line in lines)


def markdown_table(columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown. Of each column, its header and whether it is aligned to the
    right; of each row, its cells.
    """
    table = [
        [header for header, _ in columns],
        ["---:" if right else "---" for _, right in columns],
        *([text.replace("|", "\\|") for text in row] for row in rows),
    ]
    return [f"| {' | '.join(line)} |" for line in table]


class Progress:
    """One run's progress; made by `Console.progress`."""

    def __init__(
        self,
        total: int,
        start: int,
        score: Score,
        clock: Callable[[], float],
        show: Callable[[Progress], None],
    ) -> None:
        self.step, self.total = start, total
        self._loss: float | None = None
        self._value: float | None = None
        self._score, self._clock, self._show = score, clock, show
        self._history = deque([(clock(), start)])

    def update(self, step: int, *, loss: float | None = None, score: float | None = None) -> None:
        """Say that `step` steps of the whole run are done. `loss` and the value of the run's score
        stay on show until there is a newer one."""
        self.step = step
        self._loss = self._loss if loss is None else loss
        self._value = self._value if score is None else score
        now = self._clock()
        self._history.append((now, step))
        while len(self._history) > 2 and self._history[1][0] <= now - _SPEED_WINDOW_S:
            self._history.popleft()
        self._show(self)

    @property
    def steps_per_s(self) -> float:
        """Over the last half minute; 0 before the first step."""
        (first, start), (last, step) = self._history[0], self._history[-1]
        return (step - start) / (last - first) if last > first else 0.0

    def status(self, *, short: bool = False) -> list[str]:
        """The values on show, e.g. ["120/600", "loss 1.2345", "accuracy 93.4 %", …]."""
        parts = [f"{self.step}/{self.total}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if self._value is not None:
            parts.append(self._score.text(self._value, short=short))
        if speed := self.steps_per_s:
            parts.append(f"{_three_digits(speed)} steps/s")
            parts.append(f"{format_duration((self.total - self.step) / speed)} left")
        return parts


class Console:
    """Output to `file`, standard output by default.

    `interval_s` is the least time between two lines of progress where there is no terminal.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        *,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = sys.stdout if file is None else file
        # A dash that an old locale cannot print must not end a run at its last line.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        self.interactive = stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._interval_s, self._clock = interval_s, clock
        # force_* keep rich from finding a terminal, through FORCE_COLOR say, where there is none.
        self._rich = rich.console.Console(
            file=stream,
            force_terminal=self.interactive,
            force_jupyter=False,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def print(self, message: str = "") -> None:
        """Print a message, above the bar if there is one."""
        # The messages of torch may hold colour codes of their own.
        self._rich.print(Text.from_ansi(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a message that begins with "warning:"."""
        self._rich.print(Text.from_ansi(f"warning: {message}", style="yellow"), soft_wrap=True)

    @contextmanager
    def progress(
        self, total: int, *, start: int = 0, label: str = "", score: Score = ACCURACY
    ) -> Iterator[Progress]:
        """Show the progress from step `start` to step `total` while the body runs."""
        show = self._bar if self.interactive else self._lines
        with show(total, start, label, score) as progress:
            yield progress

    def results_table(self, rows: Sequence[ResultRow]) -> None:
        """Print the table of results, aligned, in as little as 80 columns."""
        columns = _columns(rows)
        self.table([(header, right) for header, right, _ in columns], _cells(columns, rows))

    def table(
        self,
        columns: Sequence[tuple[str, bool]],
        rows: Sequence[Sequence[str]],
        *,
        max_width: float = math.inf,
    ) -> None:
        """Print an aligned table. Of each column, its header, of one line or several, and whether
        it is aligned to the right; of each row, its cells. Columns move closer together where it
        would be wider than `max_width` or the terminal.
        """
        width = min(max_width, self._rich.width if self.interactive else math.inf)
        header, body = _aligned(columns, rows, width)
        self._rich.print("\n".join(header), style="bold", soft_wrap=True)
        self._rich.print("\n".join(body), soft_wrap=True)

    @contextmanager
    def _bar(self, total: int, start: int, label: str, score: Score) -> Iterator[Progress]:
        bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[status]}", markup=False),
            console=self._rich,
            expand=True,
        )

        def show(progress: Progress) -> None:
            bar.update(task, completed=progress.step, status="  ".join(progress.status(short=True)))

        progress = Progress(total, start, score, self._clock, show)
        task = bar.add_task(label, total=total)
        show(progress)
        with bar:
            yield progress

    @contextmanager
    def _lines(self, total: int, start: int, label: str, score: Score) -> Iterator[Progress]:
        prefix = f"{label}: step " if label else "step "
        shown_step, shown_at = start, self._clock()

        def write(progress: Progress) -> None:
            nonlocal shown_step, shown_at
            self.print(prefix + "  ".join(progress.status()))
            shown_step, shown_at = progress.step, self._clock()

        def show(progress: Progress) -> None:
            if self._clock() - shown_at >= self._interval_s:
                write(progress)

        progress = Progress(total, start, score, self._clock, show)
        try:
            yield progress
        finally:
            if progress.step != shown_step:
                write(progress)


def _columns(rows: Sequence[ResultRow]) -> list[_Column]:
    """Without those that no row has a value for."""
    unit = rows[0].unit if rows else "image"
    return [
        (header.format(unit=unit), right, cell)
        for header, right, cell in _COLUMNS
        if any(cell(row) is not None for row in rows)
    ]


def _cells(columns: Sequence[_Column], rows: Sequence[ResultRow]) -> list[list[str]]:
    return [[cell(row) or _MISSING for _, _, cell in columns] for row in rows]


def _aligned(
    columns: Sequence[tuple[str, bool]], body: Sequence[Sequence[str]], max_width: float
) -> tuple[list[str], list[str]]:
    """The lines of the header and those of the body; the gap narrows before `max_width` is hit."""
    height = max(header.count("\n") for header, _ in columns) + 1
    stacks = [header.split("\n") for header, _ in columns]
    head = list(zip(*([""] * (height - len(stack)) + stack for stack in stacks), strict=True))
    widths = [max(map(cell_len, column)) for column in zip(*head, *body, strict=True)]
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= max_width else 1

    def line(texts: Sequence[str]) -> str:
        parts = []
        for text, width, (_, right) in zip(texts, widths, columns, strict=True):
            space = " " * (width - cell_len(text))
            parts.append(space + text if right else text + space)
        return (" " * gap).join(parts).rstrip()

    rule = (" " * gap).join("─" * width for width in widths)
    return list(map(line, head)), [rule, *map(line, body)]


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    exponent = 0
    # Compared as it would be shown: 999.6 k is 1.00 M.
    while float(_three_digits(value)) >= base and exponent + 1 < len(units):
        value, exponent = value / base, exponent + 1
    text = _three_digits(value) if exponent else f"{value:.0f}"
    return f"{text} {units[exponent]}".rstrip()


def _three_digits(value: float) -> str:
    """At least three significant digits of a number >= 1: 7.26, 61.3, 215, 1234."""
    texts = [f"{value:.2f}", f"{value:.1f}", f"{value:.0f}"]
    return next((text for text in texts if len(text) <= 4), texts[-1])
