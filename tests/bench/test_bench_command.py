"""``maskedtrain bench`` as a user calls it, on layers that take no time."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from maskedtrain.benchmark import machine, timing
from maskedtrain.commands import bench
from maskedtrain.training.console import Console
from partial_kernels._core import crossovers
from partial_kernels._core.tables import device_name
from partial_kernels._native import native_status


@pytest.fixture(autouse=True)
def without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Steps are not repeated until the clock can tell them apart.
    monkeypatch.setattr(timing, "SHORTEST", 0.0)
    monkeypatch.setattr(machine, "rates", lambda *_: machine.Rates(2e11, 3e10))
    monkeypatch.setattr("maskedtrain.benchmark.rows.rates", lambda *_: machine.Rates(2e11, 3e10))


def run(*arguments: str) -> None:
    bench.main(arguments, Console())


def test_shapes_and_families_choose_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--quick", "--families", "element", "--out", str(tmp_path / "out")]
    arguments += ["--shapes", "128x128:8", "128x256:8"]
    run(*arguments)
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert {tuple(row["shape"]) for row in found["rows"]} == {(128, 128), (128, 256)}
    assert {row["family"] for row in found["rows"]} == {"element"}
    assert {row["label"] for row in found["rows"]} == {"Element 5 %", "Element 50 %"}
    assert len(found["rows"]) == 2 * 2 * 4
    assert found["training"] == {} and found["skipped"] == []
    assert found["options"]["shapes"] == ["128x128:8", "128x256:8"]
    out = capsys.readouterr().out
    assert "128x256:8, float32" in out and "bench.json" in out
    with pytest.raises(ValueError, match="would be overwritten"):
        run(*arguments)
    run(*arguments, "--overwrite")


def test_a_models_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "two_layers.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(*(nn.Linear(128, 128) for _ in range(3)), nn.Linear(128, 256))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run(
        "--model",
        "two_layers:build",
        "--tokens",
        "8",
        "--families",
        "blocksparse",
        "--quick",
        "--out",
        "out",
    )
    found = json.loads(Path("out/bench.json").read_text())
    assert {row["stage"] for row in found["rows"]} == {"step"}
    assert {(*row["shape"], row["count"]) for row in found["rows"]} == {
        (128, 128, 3),
        (256, 128, 1),
    }
    assert {total["layers"] for total in found["model"]} == {4}
    assert len(found["model"]) == 6
    assert (
        "## All linear layers of two_layers:build, whole steps" in Path("out/bench.md").read_text()
    )


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--families stat", "unknown family 'stat'"),
        ("--shapes 512", "--shapes must be OUTPUTSxINPUTS:TOKENS"),
        ("--training digits", "unknown training 'digits'"),
        ("--model nothing", "unknown preset 'nothing'"),
        ("--model a:b --shapes 128x128:8", "no --shapes"),
        ("--tokens 0", "--tokens must be >= 1, got 0"),
        ("--families select --shapes 128x128:8", "nothing to time: select have no such layers"),
        ("--tune --families element", "--tune finds nothing to choose"),
    ],
)
def test_what_it_cannot_do_it_says(arguments: str, why: str):
    with pytest.raises(ValueError if "--tune" not in arguments else RuntimeError, match=why):
        run(*arguments.split())


def test_nothing_is_measured_for_files_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match="would be overwritten"):
        run("--out", str(tmp_path))


@pytest.mark.skipif(native_status().info is None, reason="needs the compiled library")
def test_tuning_keeps_crossovers_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("maskedtrain.benchmark.crossings._speedup", lambda *_: 0.5)
    run("--tune", "--families", "topk")
    crossovers.TABLES.forget()
    file = crossovers.TABLES.user_file(device_name(torch.device("cpu")))
    assert crossovers.TABLES.read(file) == {"topk native float32": 0.0}
    out = capsys.readouterr().out
    assert "topk native float32" in out and f"1 crossovers in {file}" in out


@pytest.mark.parametrize(("families", "tuned"), [("lfc", True), ("element", False)])
def test_on_a_gpu_tiles_alone_are_something_to_tune(
    families: str, tuned: bool, monkeypatch: pytest.MonkeyPatch
):
    seen: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.discovery, "unavailable", dict)
    monkeypatch.setattr(bench, "_tune_tiles", lambda families, *_: seen.append(families))
    with nullcontext() if tuned else pytest.raises(RuntimeError, match="finds nothing to choose"):
        run("--tune", "--families", families)
    assert seen == ([[families]] if tuned else [])
