"""What a table of a paper is: rows, each a network of some training, over several seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from maskedtrain.config import TrainConfig
from maskedtrain.reproduce.base import Claim, Section
from maskedtrain.reproduce.plan import Result
from maskedtrain.reproduce.trainings import ANYWHERE, Place, Training

__all__ = [
    "Entry",
    "Quoted",
    "Sample",
    "Samples",
    "Scale",
    "Table",
    "TableConfig",
    "beats",
    "longer",
    "reaches",
    "row_of",
    "score",
]

Scale = Literal["cpu", "gpu", "paper"]

# By degrees of freedom, Student's t: 95 % of differences that are none are no larger, in standard
# errors.
_T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Quoted:
    """A figure of the paper, with its standard deviation where it gives one."""

    mean: float
    std: float | None = None


@dataclass(frozen=True)
class Sample:
    """Scores of one network, a value for each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite of a single seed, which says nothing of spread."""
        return math.inf if self.std is None else self.std / math.sqrt(len(self.values))


@dataclass(frozen=True)
class Entry:
    """A row of a table.

    Args:
        key: by which statements name it.
        method: the training, in words.
        network: the sub-network whose score this is.
        preset, config: the training, of whichever seed.
        paper: the paper's figure for it; None where it has none.
    """

    key: str
    method: str
    network: Literal["full", "core"]
    preset: str
    config: TrainConfig
    paper: Quoted | None = None


def longer(entry: Entry) -> Entry:
    """The entry with a training of twice as many epochs, which the paper has no figure for."""
    run = entry.config.run
    config = replace(entry.config, run=replace(run, epochs=2 * run.epochs))
    method = f"{entry.method}, twice as long"
    return replace(entry, key=f"twice {entry.key}", method=method, config=config, paper=None)


Samples = Mapping[str, Sample]
"""By entry; those that no run has measured yet are missing."""


@dataclass(frozen=True)
class Table:
    """A table, with what the paper says of it.

    Args:
        title: what it is of, here.
        paper: which table of the paper it stands beside, and what that was of.
        score: of a network in the results: ``bleu``, or ``accuracy`` (shown in per cent).
        entries: its rows.
        judge: the paper's statements, judged by the entries' scores and their training FLOPs.
        same: whether data and networks are the paper's, so that the figures can be compared.
    """

    title: str
    paper: str
    score: Literal["bleu", "accuracy"]
    entries: tuple[Entry, ...]
    judge: Callable[[Samples, Mapping[str, float]], list[Claim]]
    same: bool

    @property
    def unit(self) -> str:
        return "BLEU" if self.score == "bleu" else "accuracy (%)"

    def trainings(self, seeds: Sequence[int], place: Place = ANYWHERE) -> list[Training]:
        """The trainings behind it, each once, all of the first seed first."""
        found: dict[str, Training] = {}
        for seed in seeds:
            for entry in self.entries:
                training = self.training(entry, seed, place)
                found.setdefault(training.id, training)
        return list(found.values())

    def training(self, entry: Entry, seed: int, place: Place = ANYWHERE) -> Training:
        """The training of an entry with a seed."""
        config = replace(entry.config, run=replace(entry.config.run, seed=seed))
        return Training(entry.preset, config, self.name(entry), place)

    def name(self, entry: Entry) -> str:
        """What a person calls the training of an entry, of whichever seed."""
        return f"{self.title}: {entry.method}"

    def value(self, entry: Entry, result: Result) -> float:
        """The score of an entry in a result of its training."""
        return score(result, entry.network, self.score)


def score(result: Result, network: str, name: str) -> float:
    """A network's score in a result: accuracy in per cent, BLEU as it is."""
    row = row_of(result, network)
    return (100 if name == "accuracy" else 1) * row[name]


def row_of(result: Result, network: str) -> Mapping[str, Any]:
    """The row of a network in a result."""
    return next(row for row in result["results"] if row["network"] == network)


class TableConfig:
    """A table of the paper; a subclass in each table's file, named ``Config``."""

    name: ClassVar[str]

    def tables(self, scale: Scale) -> list[Table]:
        """What stands for the paper's table at this scale: one table, or several."""
        raise NotImplementedError

    def counted(self) -> list[Section]:
        """What of the paper's table takes no training, at any scale."""
        return []


def beats(samples: Samples, better: str, worse: str, paper: str) -> list[Claim]:
    """That one entry's score is higher than another's; nothing where either is missing."""
    if better not in samples or worse not in samples:
        return []
    one, other = samples[better], samples[worse]
    return [Claim(paper, _shown(one, other), _above(one, other, 0.0))]


def reaches(samples: Samples, one: str, other: str, margin: float, paper: str) -> list[Claim]:
    """That one entry's score is no more than a margin below another's; nothing where either is
    missing.
    """
    if one not in samples or other not in samples:
        return []
    first, second = samples[one], samples[other]
    shown = f"{_shown(first, second)}; holds down to {-margin:+.2f}"
    return [Claim(paper, shown, _above(first, second, -margin))]


def _above(one: Sample, other: Sample, least: float) -> bool | None:
    """Whether the means differ by more than that, by Welch's t test on the level of 5 %; None where
    chance may have made it so.
    """
    distance, error = one.mean - other.mean - least, math.hypot(one.error, other.error)
    return None if abs(distance) <= _t95(one, other) * error else distance > 0


def _t95(one: Sample, other: Sample) -> float:
    """Of the degrees of freedom by Welch and Satterthwaite, rounded down."""
    squares = [sample.error**2 for sample in (one, other)]
    if not all(map(math.isfinite, squares)) or not any(squares):
        return _T95[-1]
    counts = [len(sample.values) - 1 for sample in (one, other)]
    freedom = sum(squares) ** 2 / sum(s**2 / n for s, n in zip(squares, counts, strict=True))
    return _T95[min(int(freedom), len(_T95) - 1)]


def _shown(one: Sample, other: Sample) -> str:
    error = math.hypot(one.error, other.error)
    spread = f" ± {error:.2f}" if math.isfinite(error) else ", one seed: no spread"
    difference = one.mean - other.mean
    return f"{one.mean:.2f} against {other.mean:.2f}, difference {difference:+.2f}{spread}"
