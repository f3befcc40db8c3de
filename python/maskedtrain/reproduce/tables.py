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
    "SCALES",
    "Entry",
    "Quoted",
    "Sample",
    "Samples",
    "Scale",
    "Table",
    "TableConfig",
    "beats",
    "reaches",
    "row_of",
    "score",
]

Scale = Literal["cpu", "gpu", "paper"]
SCALES: tuple[Scale, ...] = ("cpu", "gpu", "paper")

# So many standard errors are no chance.
_SURE = 2.0


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
    """

    title: str
    paper: str
    score: Literal["bleu", "accuracy"]
    entries: tuple[Entry, ...]
    judge: Callable[[Samples, Mapping[str, float]], list[Claim]]

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
        return Training(entry.preset, config, f"{self.title}: {entry.method}", place)

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
    difference, error = _difference(samples[better], samples[worse])
    return [Claim(paper, _shown(samples, better, worse), _sign(difference, error))]


def reaches(samples: Samples, one: str, other: str, margin: float, paper: str) -> list[Claim]:
    """That one entry's score is no more than a margin below another's; nothing where either is
    missing.
    """
    if one not in samples or other not in samples:
        return []
    difference, error = _difference(samples[one], samples[other])
    shown = f"{_shown(samples, one, other)}; counted as reached: no more than {margin:g} below"
    return [Claim(paper, shown, _sign(difference + margin, error))]


def _difference(one: Sample, other: Sample) -> tuple[float, float]:
    """Of the means, and its standard error."""
    return one.mean - other.mean, math.hypot(one.error, other.error)


def _sign(value: float, error: float) -> bool | None:
    """Whether it is positive; None where chance may have made it so."""
    return None if abs(value) < _SURE * error else value > 0


def _shown(samples: Samples, one: str, other: str) -> str:
    difference, error = _difference(samples[one], samples[other])
    spread = f" ± {error:.2f}" if math.isfinite(error) else ", one seed: no spread"
    return (
        f"{samples[one].mean:.2f} against {samples[other].mean:.2f}, "
        f"difference {difference:+.2f}{spread}"
    )
