"""Figures of benchmarks: the table, the file, and what counts as slower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import results
from maskedtrain.benchmark import machine

ROWS = {
    "short": {"ms": 1.23456, "baseline": "F.linear", "ratio": 1.0, "bar": None},
    "much longer name": {"ms": 2.0, "ratio": "too noisy: " + "no ratio to be had here " * 3},
}


def test_the_table_has_a_column_for_every_figure():
    lines = list(results.table(ROWS))
    assert lines[0].split() == ["case", "ms", "baseline", "ratio", "bar"]
    assert lines[1].split() == ["short", "1.235", "F.linear", "1", "-"]
    # A sentence does not widen its column.
    assert len(lines[0]) == len(lines[1]) < 60
    assert ROWS["much longer name"]["ratio"] in lines[2]


def test_a_file_says_what_its_figures_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "rates", lambda *_: machine.Rates(2e11, 3e10))
    path = tmp_path / "device" / "suite.json"
    results.write(path, ROWS)
    written = json.loads(path.read_text())
    assert written["cases"] == ROWS
    assert written["machine"]["gemm_gflops_per_s"] == 200
    assert {"processor", "threads", "torch", "load"} <= written["machine"].keys()


def test_cases_that_were_not_run_again_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "rates", lambda *_: machine.Rates(2e11, 3e10))
    path = tmp_path / "suite.json"
    results.write(path, {"one": {"ms": 1.0}, "two": {"ms": 2.0}})
    results.write(path, {"two": {"ms": 3.0}})
    assert json.loads(path.read_text())["cases"] == {"one": {"ms": 1.0}, "two": {"ms": 3.0}}
    # Not beside those of other software.
    monkeypatch.setattr(torch, "__version__", "0")
    results.write(path, {"two": {"ms": 4.0}})
    assert json.loads(path.read_text())["cases"] == {"two": {"ms": 4.0}}


def test_the_floor_is_of_arithmetic_or_of_memory():
    rates = machine.Rates(flops_per_s=100.0, bytes_per_s=10.0)
    assert rates.floor_s(200, 1) == 2.0
    assert rates.floor_s(1, 30) == 3.0


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [(1.0, 1.05, 0), (1.0, 1.2, 1), (1.0, 0.5, 0), (1.0, "too noisy", 0), ("too noisy", 2.0, 0)],
)
def test_a_case_is_slower_if_its_ratio_has_grown(
    before: float | str,
    after: float | str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    for name, ratio in {"old": before, "new": after}.items():
        cases = {"a": {"ratio": ratio}, name: {"ratio": 9.0}}
        (tmp_path / name).write_text(json.dumps({"cases": cases}))
    assert results.main([str(tmp_path / "old"), str(tmp_path / "new")]) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{code} of 1 cases are slower by over 10%"
    assert lines[:-1] == (["a: 1.000 -> 1.200 of its baseline's time"] if code else [])


def test_usage(capsys: pytest.CaptureFixture[str]):
    assert results.main([]) == 2
    assert capsys.readouterr().err == "usage: python -m bench.results OLD.json [NEW.json]\n"


def test_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "suite.json"
    rows = {"test_kernel[a-b]": ROWS["short"], "long": ROWS["much longer name"]}
    path.write_text(json.dumps({"cases": rows}))
    assert results.main([str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a-b | 1.235 | F.linear | 1 | - |",
        "| long | 2 | - | - | - |",
    ]
