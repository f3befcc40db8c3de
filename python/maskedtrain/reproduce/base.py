"""What a figure is: rows that are measured once, and what is said and drawn of them alone."""

from __future__ import annotations

import csv
import inspect
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from maskedtrain.files import atomic_write, make_folder, output_errors
from maskedtrain.training.console import Console
from maskedtrain.training.metrics import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Claim",
    "FigureConfig",
    "Rows",
    "Section",
    "column",
    "from_csv",
    "median",
    "read_rows",
    "reproduce",
    "select",
    "summary",
    "to_csv",
    "with_columns",
]

Rows = Sequence[Mapping[str, Any]]
"""Rows of a table: the same names in each, numbers or words; NaN where there is no value."""


@dataclass(frozen=True)
class Claim:
    """What a paper says of a figure, and whether what was measured agrees."""

    paper: str
    measured: str
    holds: bool | None
    """None: too few runs, or too much spread among them, to say."""

    @property
    def verdict(self) -> str:
        words = {True: "holds", False: "DOES NOT HOLD", None: "NOT DECIDED"}
        return words[self.holds]

    def __str__(self) -> str:
        return f"[{self.verdict}] {self.paper} ({self.measured})"


@dataclass(frozen=True)
class Section:
    """A part of the report: a table, a figure, or both."""

    title: str
    about: str
    claims: Sequence[Claim]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    drawing: str | None = None
    """An image's address that holds the image itself."""
    caption: str = ""

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Of each column its name, and whether it is of numbers, which go to the right."""
        return [(name, at > 1) for at, name in enumerate(self.header)]


@dataclass(frozen=True)
class FigureConfig:
    """Options of a figure; a subclass in each figure's file, named ``Config``."""

    name: ClassVar[str]
    size_in: ClassVar[tuple[float, float]] = (10.0, 3.6)
    """Width and height of the drawing, in inches."""

    out: Path = Path("runs/reproduce")
    """Folder to write the figure's CSV and PNG files to."""
    overwrite: bool = False
    """Replace these files of an earlier run."""
    seed: int = 0
    """Seed of everything that is random."""

    def rows(self, console: Console) -> Rows:
        """Measure."""
        raise NotImplementedError

    def claims(self, rows: Rows) -> list[Claim]:
        """What the paper says of this figure, judged by these rows."""
        raise NotImplementedError

    def draw(self, figure: Figure, rows: Rows) -> None:
        """Draw the rows as the paper does."""
        raise NotImplementedError


def reproduce(config: FigureConfig, console: Console) -> list[Claim]:
    """Measure a figure, write ``<name>.csv`` and ``<name>.png``, print and return what of the
    paper's statements holds. No file is written before all is measured.

    Raises:
        ValueError: there are such files already and they are not to be overwritten, or bad options.
        OutputError: they could not be written.
    """
    table, drawing = (config.out / f"{config.name}.{kind}" for kind in ("csv", "png"))
    if not config.overwrite and (found := [str(p) for p in (table, drawing) if p.exists()]):
        raise ValueError(
            f"{' and '.join(found)} would be overwritten: choose another --out, or give --overwrite"
        )
    # A folder that cannot be written to is better known before the minutes of measuring.
    make_folder(config.out)
    rows = config.rows(console)
    # An old drawing is not left beside new rows.
    with output_errors(drawing):
        drawing.unlink(missing_ok=True)
    with atomic_write(table) as file:
        file.write(to_csv(rows).encode())
    figure = new_figure(width_in=config.size_in[0], height_in=config.size_in[1])
    if figure is not None:
        config.draw(figure, rows)
        save_figure(figure, drawing)
    claims = config.claims(rows)
    console.print("\nWhat the paper says, and whether it holds here (what was measured):\n")
    for claim in claims:
        console.print(str(claim))
    written = str(table) + (
        " (no drawing: matplotlib is not installed)" if figure is None else f" and {drawing}"
    )
    console.print(f"\nwritten: {written}")
    return claims


def to_csv(rows: Rows) -> str:
    """The rows as CSV; ``from_csv`` is the inverse."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def from_csv(text: str) -> Rows:
    """The rows of a CSV, numbers as floats."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    return [{name: _number(value) for name, value in row.items()} for row in rows]


def read_rows(path: Path) -> Rows:
    """The rows that ``reproduce`` wrote to a CSV file, numbers as floats."""
    return from_csv(path.read_text(encoding="utf-8"))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def summary(kind: type) -> str:
    """The first sentence of what a figure or a table is."""
    return " ".join((inspect.getdoc(kind) or "").split()).split(". ")[0].rstrip(".") + "."


def select(rows: Rows, **values: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def column(rows: Rows, name: str) -> list[float]:
    """One quantity of every row."""
    return [float(row[name]) for row in rows]


def median(values: Sequence[float]) -> float:
    """Of the values; one that is infinite here and there does no harm to it."""
    return statistics.median(values)


def with_columns(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows that all have the columns of each; NaN where one had none."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name, math.nan) for name in names} for row in rows]


def finish_axes(axes: Axes, title: str, x_name: str, y_name: str = "") -> None:
    """Titles, a grid, and the legend of the labelled lines."""
    axes.set_title(title)
    axes.set_xlabel(x_name)
    axes.set_ylabel(y_name, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
