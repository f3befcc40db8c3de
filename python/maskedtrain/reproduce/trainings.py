"""Pieces of a plan: a training, and a figure that is measured."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import partial_kernels
from maskedtrain.benchmark.machine import processor
from maskedtrain.config import NEUTRAL, TrainConfig, flag, flags, from_dict, to_dict
from maskedtrain.files import jsonable
from maskedtrain.presets import preset
from maskedtrain.reproduce.base import FigureConfig, to_csv
from maskedtrain.reproduce.plan import Result
from maskedtrain.training.checkpoint import CheckpointError, Checkpoints
from maskedtrain.training.console import Console
from maskedtrain.training.metrics import read_metrics
from maskedtrain.training.run import read_config
from maskedtrain.training.train import train

__all__ = ["ANYWHERE", "Figure", "Place", "Training"]

# That the process began with.
_THREADS = torch.get_num_threads()
# Of a result's contents: another number whenever they mean something else.
FORMAT = 1


@dataclass(frozen=True)
class Place:
    """Where the pieces of a plan run, which does not change what they are."""

    data: Path | None = None
    device: str = "auto"
    threads: int | None = None


ANYWHERE = Place()


@dataclass(frozen=True)
class Training:
    """A training as a piece of a plan.

    Args:
        preset: that ``maskedtrain train`` makes the configuration of, with some options.
        config: the configuration; what of it says where it runs is the place's.
        name: what a person calls it, without its seed.
        place: where it runs.
    """

    preset: str
    config: TrainConfig
    name: str
    place: Place = ANYWHERE

    @property
    def id(self) -> str:
        config = self.config
        name = f"{config.data.name}-{config.method.name}-seed{config.run.seed}"
        return f"{name}-{_digest(_essence(config))}"

    @property
    def kind(self) -> str:
        return replace(self, config=_seeded(self.config, 0)).id

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.config.run.seed}"

    @property
    def anywhere(self) -> TrainConfig:
        """The configuration without a place."""
        return replace(self.config, run=replace(self.config.run, out=Path("runs", self.id)))

    @property
    def command(self) -> str:
        """The command that trains this by itself."""
        options = flags(self.anywhere, preset(self.preset))
        return shlex.join(["maskedtrain", "train", "--preset", self.preset, *options])

    def matches(self, result: Result) -> bool:
        return (
            result["format"] == FORMAT
            and _essence(from_dict(result["config"])) == _essence(self.config)
            and {"results", "evaluations", "seconds", "environment"} <= result.keys()
        )

    def run(self, folder: Path, label: str, console: Console) -> dict[str, Any]:
        started = time.perf_counter()
        # Graphs of other trainings count against the limit of this one's.
        torch.compiler.reset()
        if self.place.threads is None:
            # A figure before this may have taken fewer.
            torch.set_num_threads(_THREADS)
        config = self._placed(folder)
        going_on = self._can_go_on(folder, console)
        found = train(config, console, resume=going_on, overwrite=not going_on, label=label)
        records = read_metrics(folder / "metrics.jsonl")
        seconds = found.results[0].seconds or 0.0
        return {
            "format": FORMAT,
            "config": to_dict(self.anywhere),
            "results": [asdict(row) for row in found.results],
            "remarks": list(found.remarks),
            "evaluations": [record for record in records if record["kind"] == "eval"],
            "rates": _rates(records),
            "seconds": seconds,
            # Of the last stretch alone where it was stopped on the way.
            "wall_seconds": max(seconds, time.perf_counter() - started),
            "environment": environment(config.run.device),
        }

    def _can_go_on(self, folder: Path, console: Console) -> bool:
        """Whether the folder has a checkpoint of just this training."""
        checkpoints = Checkpoints(folder / "checkpoints", report=console.warn)
        if not checkpoints.steps():
            return False
        try:
            same = _essence(read_config(folder)) == _essence(self.config)
            checkpoints.load()
        except (ValueError, CheckpointError):
            same = False
        if not same:
            console.warn(f"{folder} is damaged, or of other options: starting anew")
        return same

    def _placed(self, folder: Path) -> TrainConfig:
        config, place = self.config, self.place
        run = replace(config.run, out=folder, device=place.device, threads=place.threads)
        data = config.data
        if place.data is not None and any(field.name == "data" for field in fields(data)):
            data = replace(data, data=place.data)  # pyright: ignore[reportCallIssue]
        return replace(config, run=run, data=data)


@dataclass(frozen=True)
class Figure:
    """A figure that is measured, as a piece of a plan."""

    config: FigureConfig

    @property
    def id(self) -> str:
        return f"{self.config.name}-{_digest(self._options())}"

    @property
    def label(self) -> str:
        return self.config.name

    @property
    def kind(self) -> str:
        return self.id

    @property
    def command(self) -> str:
        """The command that measures this by itself."""
        options = {name: v for name, v in self._options().items() if name != "own_data"}
        defaults = type(self.config)()
        words = ["maskedtrain", "reproduce", self.config.name]
        for name, value in options.items():
            if value != jsonable(getattr(defaults, name)):
                words += flag(name, value)
        if not self._options()["own_data"]:
            words += ["--data", "FOLDER"]
        return shlex.join(words)

    def matches(self, result: Result) -> bool:
        return result["format"] == FORMAT and result["options"] == self._options()

    def run(self, folder: Path, label: str, console: Console) -> dict[str, Any]:
        started = time.perf_counter()
        rows = self.config.rows(console)
        return {
            "format": FORMAT,
            "options": self._options(),
            # JSON has no infinities.
            "csv": to_csv(rows),
            "seconds": time.perf_counter() - started,
            "environment": environment(getattr(self.config, "device", "cpu")),
        }

    def _options(self) -> dict[str, Any]:
        own = {"out", "overwrite", *NEUTRAL}
        options = {name: v for name, v in asdict(self.config).items() if name not in own}
        # With other data it is another figure.
        return jsonable({**options, "own_data": getattr(self.config, "data", None) is None})


def environment(device: str) -> dict[str, Any]:
    """What figures depend on beside the options."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.device(device).type
    names = {"cpu": processor, "cuda": partial(torch.cuda.get_device_name, torch.device(device))}
    return {
        "device": names[kind]() if kind in names else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "maskedtrain": partial_kernels.__version__,
        "python": platform.python_version(),
    }


def _seeded(config: TrainConfig, seed: int) -> TrainConfig:
    return replace(config, run=replace(config.run, seed=seed))


def _essence(config: TrainConfig) -> dict[str, Any]:
    """The options that what a training does depends on, those that are not the defaults."""
    found: dict[str, Any] = {}
    for group, values in to_dict(config).items():
        part = type(getattr(config, group))()
        defaults = to_dict(replace(TrainConfig(), **{group: part}))[group]
        found[group] = {
            name: value
            for name, value in values.items()
            if name == "name" or (name not in {"out", *NEUTRAL} and value != defaults[name])
        }
    return found


def _digest(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:10]


def _rates(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each network that was trained, medians of its speed."""
    found: dict[str, dict[str, float]] = {}
    for name in {record["subnet"] for record in records if "targets_per_s" in record}:
        own = [r for r in records if r["subnet"] == name and r.get("targets_per_s") is not None]
        found[name] = {
            rate: statistics.median(record[rate] for record in own)
            for rate in ("targets_per_s", "flop_utilization")
        }
    return found
