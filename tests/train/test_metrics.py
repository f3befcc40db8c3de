"""Not a record is lost, doubled or unreadable, and the plots show what was measured."""

from __future__ import annotations

import builtins
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskedtrain.files import OutputError, jsonable
from maskedtrain.training import metrics
from maskedtrain.training.metrics import (
    MetricsLog,
    plot_comparison,
    plot_curves,
    read_metrics,
    write_summary,
)


def strict(text: str | bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def write_run(folder: Path, steps: range, resume_step: int | None = None) -> Path:
    with MetricsLog(folder, resume_step=resume_step, tensorboard=False) as log:
        for step in steps:
            log.log(step, "train", ("core", "full")[step % 2], loss=1 / step, lr=0.1)
            if step % 5 == 0:
                for subnet in ("core", "full"):
                    log.log(step, "eval", subnet, accuracy=1 - 1 / step, train_flops=1e9 * step)
    return log.path


def test_records_are_strict_json_of_plain_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, "train", "core", loss=torch.tensor(0.5), lr=np.float32(0.25), n=np.int64(3))
        log.log(2, "train", "core", loss=float("nan"), lr=torch.tensor(float("inf")), note="é")
        # Nothing waits in a buffer: a killed run has lost no record.
        lines = log.path.read_text().splitlines()
    assert strict(lines[0]) == {
        "step": 1, "kind": "train", "subnet": "core", "loss": 0.5, "lr": 0.25, "n": 3
    }  # fmt: skip
    assert strict(lines[1]) == {
        "step": 2, "kind": "train", "subnet": "core", "loss": None, "lr": None, "note": "é"
    }  # fmt: skip


def test_what_has_no_json_form_is_refused_and_leaves_no_line(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        with pytest.raises(TypeError, match="a set has no JSON form"):
            log.log(1, "train", "core", loss={1})
        with pytest.raises((RuntimeError, ValueError)):
            log.log(1, "train", "core", loss=torch.zeros(2))
        assert log.path.read_bytes() == b""


@pytest.mark.parametrize("cut", [1, 5, 7, 19, 20])
def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(tmp_path: Path, cut: int) -> None:
    whole = write_run(tmp_path / "whole", range(1, 21))
    # It got further than its last checkpoint, and died in the middle of a line.
    path = write_run(tmp_path / "cut", range(1, min(cut + 4, 21)))
    with path.open("ab") as file:
        file.write(b'{"step": 24, "kind": "tr')
    write_run(tmp_path / "cut", range(cut + 1, 21), resume_step=cut)
    assert path.read_bytes() == whole.read_bytes()


def test_every_torn_tail_is_dropped(tmp_path: Path) -> None:
    path = write_run(tmp_path, range(1, 4))
    data = path.read_bytes()
    records = read_metrics(path)
    start = data.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start, len(data) - 1):
        path.write_bytes(data[:end])
        assert read_metrics(path) == records[:-1]
    path.write_bytes(data[:-1])
    assert read_metrics(path) == records


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    path = write_run(tmp_path, range(1, 4))
    write_run(tmp_path, range(0))
    assert path.read_bytes() == b""


def test_a_foreign_file_is_not_rewritten(tmp_path: Path) -> None:
    path = write_run(tmp_path, range(1, 4))
    lines = path.read_bytes().splitlines(keepends=True)
    for line in (b"hello\n", b"3\n", b'{"loss": 1}\n'):
        data = b"".join([lines[0], line, *lines[1:]])
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not a record"):
            MetricsLog(tmp_path, resume_step=2)
        assert path.read_bytes() == data


def test_a_log_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^cannot write .*file/run: Not a directory$"):
        MetricsLog(tmp_path / "file" / "run")
    log = MetricsLog(tmp_path, tensorboard=False)
    log._file.close()
    # Every write to this device fails as on a full disk.
    log._file = open("/dev/full", "wb")  # noqa: SIM115
    with pytest.raises(OutputError, match=r"metrics.jsonl: No space left on device$"):
        log.log(1, "train", "core", loss=1.0)
    with pytest.raises(OutputError, match=r"metrics.jsonl: No space left on device$"):
        log.close()


def test_a_failed_rewrite_keeps_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path, range(1, 9))
    data = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"metrics.jsonl: No space left on device$"):
        MetricsLog(tmp_path, resume_step=2)
    assert path.read_bytes() == data
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_scalars_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def scalars() -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        tags = events.Tags()["scalars"]
        values = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
        return {tag: value for tag, value in values.items() if value}

    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, "train", "core", loss=float(step), note="no number")
        log.log(5, "eval", "full", accuracy=0.5, loss=float("nan"))
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.log(4, "train", "core", loss=-4.0)
        log.sync()
        assert scalars() == {"loss/train/core": [(1, 1.0), (2, 2.0), (3, 3.0), (4, -4.0)]}
    with MetricsLog(tmp_path) as log:
        log.log(1, "train", "core", loss=7.0)
    assert scalars() == {"loss/train/core": [(1, 7.0)]}


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """`without(package)`: as if it were not installed."""

    def install(package: str) -> None:
        original = builtins.__import__

        def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == package or name == "torch.utils.tensorboard":
                raise ImportError(name)
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", refuse)

    return install


def test_without_tensorboard_the_log_is_complete(tmp_path: Path, without) -> None:
    without("tensorboard")
    with MetricsLog(tmp_path) as log:
        log.log(1, "train", "core", loss=1.0)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(log.path)) == 1


def test_summary(tmp_path: Path) -> None:
    path = write_summary(tmp_path / "new", {"accuracy": {"core": 0.5, "full": float("nan")}})
    assert path == tmp_path / "new" / "summary.json"
    assert strict(path.read_text()) == {"accuracy": {"core": 0.5, "full": None}}
    with pytest.raises(TypeError):
        write_summary(tmp_path / "new", {"accuracy": object()})
    assert strict(path.read_text()) == {"accuracy": {"core": 0.5, "full": None}}


def test_jsonable() -> None:
    value = {1: (np.float64(0.5), float("-inf")), "path": Path("a"), "flag": np.bool_(True)}
    assert jsonable(value) == {"1": [0.5, None], "path": "a", "flag": True}
    assert type(jsonable(np.float64(0.5))) is float


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that were saved."""
    pytest.importorskip("matplotlib")
    figures: list = []
    save = metrics.save_figure

    def record(figure: Any, out_png: Path) -> None:
        figures.append(figure)
        save(figure, out_png)

    monkeypatch.setattr(metrics, "save_figure", record)
    return figures


def lines_of(axes: Any) -> dict[str, np.ndarray]:
    labelled = [line for line in axes.lines if not line.get_label().startswith("_")]
    return {line.get_label(): np.array(line.get_xydata()) for line in labelled}


def test_plot_curves(tmp_path: Path, drawn: list) -> None:
    path = write_run(tmp_path, range(1, 21))
    assert plot_curves(path, tmp_path / "curves.png", title="a run") is None
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    loss, accuracy = drawn[0].axes
    assert loss.get_xlabel() == accuracy.get_xlabel() == "training step"
    assert loss.get_ylabel() == "training loss (nats)"
    assert accuracy.get_ylabel() == "validation accuracy (%)"
    assert lines_of(loss).keys() == lines_of(accuracy).keys() == {"core", "full"}
    steps = np.arange(2, 21, 2)
    assert np.allclose(lines_of(loss)["core"], np.stack([steps, 1 / steps], axis=1))
    steps = np.arange(5, 21, 5)
    assert np.allclose(lines_of(accuracy)["full"], np.stack([steps, 100 - 100 / steps], axis=1))
    assert len({line.get_color() for line in accuracy.lines}) == 2
    assert {text.get_text() for text in accuracy.get_legend().get_texts()} == {"core", "full"}


def test_plot_comparison(tmp_path: Path, drawn: list) -> None:
    runs: dict[str, Any] = {
        name: write_run(tmp_path / name, range(1, 1 + n)) for name, n in (("a", 10), ("b", 20))
    }
    assert plot_comparison(runs, tmp_path / "runs.png") is None
    panels = drawn[0].axes
    assert [(p.get_title(), p.get_xlabel()) for p in panels] == [
        ("core", "training step"), ("full", "training step"),
        ("core", "training FLOPs"), ("full", "training FLOPs"),
    ]  # fmt: skip
    assert all(lines_of(panel).keys() == {"a", "b"} for panel in panels)
    assert np.allclose(lines_of(panels[3])["a"], [[5e9, 80], [10e9, 90]])


def test_comparison_without_flops_has_one_row(tmp_path: Path, drawn: list) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.log(1, "eval", "core", accuracy=0.5)
    assert plot_comparison({"a": log.path}, tmp_path / "runs.png") is None
    assert [panel.get_xlabel() for panel in drawn[0].axes] == ["training step"]


def test_nothing_to_plot_and_nothing_to_plot_with_say_why(tmp_path: Path, without) -> None:
    path = write_run(tmp_path, range(0))
    out = tmp_path / "curves.png"
    assert plot_curves(path, out) == f"no train or eval records in {path}"
    assert plot_comparison({"a": path}, out) == f"no eval records in {path}"
    write_run(tmp_path, range(1, 6))
    without("matplotlib")
    assert plot_curves(path, out) == "matplotlib is not installed"
    assert plot_comparison({"a": path}, out) == "matplotlib is not installed"
    assert not out.exists()


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = write_run(tmp_path, range(1, 6))
    with pytest.raises(OutputError, match=r"^cannot write .*curves.png: No such file"):
        plot_curves(path, tmp_path / "missing" / "curves.png")


def test_running_mean_skips_missing_values() -> None:
    values = np.array([np.nan, 1, 3, np.nan, 5, 7])
    expected = [np.nan, 1, 2, 3, 5, 6]
    assert np.array_equal(metrics._running_mean(values, 2), expected, equal_nan=True)
    assert np.array_equal(metrics._running_mean(values[1:3], 5), [1, 2])
