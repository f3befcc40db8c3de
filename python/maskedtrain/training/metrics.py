"""What a run measured: `metrics.jsonl` (one record a line), TensorBoard, `summary.json` and plots.

A record is one JSON object:

    {"step": 120, "kind": "train", "subnet": "core", "loss": 1.2, "lr": 0.1, "time_s": 12.3}
    {"step": 120, "kind": "eval", "subnet": "full", "loss": 0.4, "accuracy": 0.93,
     "train_flops": 1.5e12, "time_s": 12.9}
    {"step": 101, "kind": "criteria", "subnet": "core", "alpha": 0.8, "c_norm": 1.4, "c_sim": 1.1,
     "c_align": 1.2, "q": 1.7, "drift": 3.5, "time_s": 12.0}

`step` counts finished optimizer steps and `subnet` names the network that was trained or evaluated.
`loss` is in nats, `accuracy` a fraction, `bleu` in [0, 100], `time_s` seconds and `train_flops`
floating-point operations since the run began; `targets_per_s` and `flop_utilization`, of the steps
since the network's last record, count images or tokens, and the share of this machine's rate in
large matrix products. Criteria are those of ``maskedtrain.theory.criteria``, before the step's
update, with the smoothness `L` and whether `assumption3` holds where these are measured; those with
a `layer` are of this module's own parameters. `alpha` of a train record is the factor of Theorem 1
that its step was made with, and part of its `lr`. Further fields may follow. NaN and infinities are
written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from maskedtrain.files import atomic_write, jsonable, make_folder, output_errors, write_json
from maskedtrain.training.scores import ACCURACY, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REQUIRED = {"step", "kind", "subnet"}
# Okabe and Ito's palette, which the colour-blind can tell apart, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class MetricsLog:
    """Appends records to `<folder>/metrics.jsonl`, and scalars to `<folder>/tensorboard` where
    TensorBoard is installed.

    With `resume_step=None` the log starts empty. Otherwise records of later steps, and a line that
    was cut short, are dropped first: a run that was interrupted and resumed from the checkpoint of
    `resume_step` ends with the records of an uninterrupted one, if those of a step are logged, and
    `sync()` called, before that step's checkpoint is saved.

    Raises OutputError; ValueError where an existing log is not a metrics log.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.path = make_folder(folder) / "metrics.jsonl"
        kept: list[dict[str, Any]] = []
        if resume_step is not None and self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resume_step]
        with atomic_write(self.path) as file:
            file.writelines(map(_line, kept))
        with output_errors(self.path):
            self._file = open(self.path, "ab")  # noqa: SIM115
        self._board = None
        if tensorboard:
            first_step = 0 if resume_step is None else resume_step + 1
            self._board = _tensorboard(self.path.with_name("tensorboard"), first_step)

    def log(self, step: int, kind: str, subnet: str, **values: Any) -> None:
        """Append one record and hand it to the system at once. Numbers may be 0-d tensors."""
        record = jsonable({"step": step, "kind": kind, "subnet": subnet, **values})
        with output_errors(self.path):
            self._file.write(_line(record))
            self._file.flush()
            if self._board is not None:
                of = "/".join([kind, subnet, *([values["layer"]] if "layer" in values else [])])
                for name in values:
                    if isinstance(record[name], (int, float)):
                        self._board.add_scalar(f"{name}/{of}", record[name], step)

    def sync(self) -> None:
        """Make every record survive a power failure: call it before saving a checkpoint."""
        with output_errors(self.path):
            os.fsync(self._file.fileno())
            if self._board is not None:
                self._board.flush()

    def close(self) -> None:
        """Close the files. Records are safe without it."""
        with output_errors(self.path):
            self._file.close()
            if self._board is not None:
                self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics log, without a last line that was cut short.

    Raises OSError, and ValueError for a line that is no record.
    """
    *lines, tail = Path(path).read_bytes().split(b"\n")
    records = [_record(line) for line in lines]
    if None in records:
        raise ValueError(f"{path}, line {records.index(None) + 1}: not a record of metrics")
    last = _record(tail)
    return [record for record in (*records, last) if record is not None]


def write_summary(folder: str | os.PathLike[str], summary: dict[str, Any]) -> Path:
    """Write `<folder>/summary.json`: strict JSON, atomically. Raises OutputError, TypeError."""
    path = make_folder(folder) / "summary.json"
    write_json(path, summary)
    return path


def plot_curves(
    metrics: str | os.PathLike[str],
    out_png: str | os.PathLike[str],
    *,
    title: str = "",
    score: Score = ACCURACY,
) -> str | None:
    """Plot training loss and validation score of each sub-network against the step.

    Returns None, or the reason why nothing was plotted. Raises OutputError.
    """
    records = read_metrics(metrics)
    trained, evaluated = _by_subnet(records, "train"), _by_subnet(records, "eval")
    if not trained and not evaluated:
        return f"no train or eval records in {metrics}"
    if (figure := new_figure(width_in=10, height_in=4)) is None:
        return "matplotlib is not installed"

    loss_axes, score_axes = figure.subplots(1, 2)
    for colour, subnet in zip(cycle(COLOURS), dict.fromkeys([*evaluated, *trained])):
        steps, losses = _columns(trained.get(subnet, []), "step", "loss")
        # The thin line shows the spread, the mean over a fiftieth of the run the trend.
        loss_axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        trend = _running_mean(losses, window=max(1, len(losses) // 50))
        loss_axes.plot(steps, trend, color=colour, label=subnet)
        found = evaluated.get(subnet, [])
        _plot_score(score_axes, found, "step", score, color=colour, label=subnet)
    for axes in (loss_axes, score_axes):
        _decorate(axes, "training step")
    loss_axes.set_ylabel("training loss (nats)")
    score_axes.set_ylabel(score.axis)
    figure.suptitle(title)
    save_figure(figure, out_png)
    return None


def plot_comparison(
    runs: Mapping[str, str | os.PathLike[str]],
    out_png: str | os.PathLike[str],
    *,
    title: str = "",
    score: Score = ACCURACY,
) -> str | None:
    """Plot the validation score of several runs, one column of panels for each network.

    `runs` maps a label to a metrics log. The upper row is against the training step, the lower one
    against cumulative training FLOPs; it is left out where no record has `train_flops`.
    Returns None, or the reason why nothing was plotted. Raises OutputError.
    """
    evaluated = {label: _by_subnet(read_metrics(path), "eval") for label, path in runs.items()}
    subnets = list(dict.fromkeys(name for networks in evaluated.values() for name in networks))
    if not subnets:
        return f"no eval records in {', '.join(map(str, runs.values()))}"
    everything = [r for networks in evaluated.values() for rs in networks.values() for r in rs]
    axis_names = {"step": "training step"}
    if any("train_flops" in record for record in everything):
        axis_names["train_flops"] = "training FLOPs"
    size = {"width_in": 1 + 4.5 * len(subnets), "height_in": 0.6 + 3.2 * len(axis_names)}
    if (figure := new_figure(**size)) is None:
        return "matplotlib is not installed"

    panels = figure.subplots(len(axis_names), len(subnets), squeeze=False, sharey=True)
    for row, (field, axis_name) in zip(panels, axis_names.items(), strict=True):
        for axes, subnet in zip(row, subnets, strict=True):
            for colour, (label, networks) in zip(cycle(COLOURS), evaluated.items()):
                if subnet in networks:
                    found = networks[subnet]
                    _plot_score(axes, found, field, score, color=colour, label=label)
            _decorate(axes, axis_name)
            axes.set_title(subnet)
        row[0].set_ylabel(score.axis)
    figure.suptitle(title)
    save_figure(figure, out_png)
    return None


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    complete = isinstance(record, dict) and record.keys() >= _REQUIRED
    return record if complete else None


def _tensorboard(folder: Path, first_step: int) -> Any:
    """A SummaryWriter that hides what was logged for `first_step` and later, None without it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    with output_errors(folder):
        return SummaryWriter(folder, purge_step=first_step)


def _by_subnet(records: list[dict[str, Any]], kind: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == kind:
            groups.setdefault(record["subnet"], []).append(record)
    return groups


def _columns(records: list[dict[str, Any]], *names: str) -> list[np.ndarray]:
    """The named fields, absent and null ones as NaN, which plots as a gap."""
    return [np.array([r.get(name) for r in records], dtype=np.float64) for name in names]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values that are not NaN."""
    present = ~np.isnan(values)
    sums = np.cumsum(np.where(present, values, 0.0))
    counts = np.cumsum(present)
    for cumulative in (sums, counts):
        cumulative[window:] -= cumulative[:-window].copy()
    return np.divide(sums, counts, out=np.full_like(sums, math.nan), where=counts > 0)


def new_figure(*, width_in: float, height_in: float) -> Figure | None:
    """A figure that no global state of pyplot knows of, None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plot_score(
    axes: Axes, records: list[dict[str, Any]], x: str, score: Score, **style: Any
) -> None:
    xs, values = _columns(records, x, score.name)
    axes.plot(xs, score.scale * values, marker="o", markersize=3, **style)


def _decorate(axes: Axes, x_name: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_xlabel(x_name)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if x_name == "training FLOPs":
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def save_figure(figure: Figure, out_png: str | os.PathLike[str]) -> None:
    with atomic_write(out_png) as file:
        figure.savefig(file, format="png", dpi=150)
