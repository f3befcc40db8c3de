"""What is written and shown of rows: the same figures everywhere."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from maskedtrain.benchmark import report as module
from maskedtrain.benchmark.machine import Rates
from maskedtrain.benchmark.report import FILES, Report, check_folder, markdown, show, write
from maskedtrain.benchmark.rows import Row
from maskedtrain.benchmark.training import Share, TrainingRow
from maskedtrain.training.console import Console

ROW = Row(
    family="blocksparse",
    kind="Block 64",
    label="Block 64 50 %",
    stage="step",
    shape=(512, 2048),
    tokens=1024,
    density=0.5,
    dtype="float32",
    baseline="F.linear",
    dense_ms=43.21,
    ms=21.98,
    speedup=1.966,
    low=1.912,
    high=2.045,
    noise=0.01,
    waited=0.0,
    rounds=7,
    dense_flops=6_442_450_944,
    flops=3_221_225_472,
    dense_bytes=50_000_000,
    bytes=40_000_000,
    dense_floor_share=0.9,
    floor_share=0.823,
    backend="native",
    verdict="masked wins 2.0x",
    dense_mem_bytes=16 << 20,
    mem_bytes=12 << 20,
)
KERNEL = replace(
    ROW, kind="stats", label="stats full", stage="kernel", shape=(), tokens=None, density=None,
    dense_flops=None, dense_bytes=None, dense_mem_bytes=None, mem_bytes=None, backend=None,
)  # fmt: skip
SWEEP = [
    replace(ROW, kind="meProp", label=f"meProp h=2048 k={k}", stage="backward", density=k / 2048)
    for k in (2, 128)
]
ROWS = [
    ROW,
    replace(ROW, stage="backward", verdict="no gain: use dense (auto does)"),
    replace(ROW, label="Block 64 12.5 %", density=0.125, speedup=6.0, low=5.0, high=7.0),
    *SWEEP,
    KERNEL,
]
RATES = Rates(200e9, 20e9)


def made(**more: Any) -> Report:
    machine = {"processor": "a CPU", "gemm_gflops_per_s": 200.0}
    return Report(machine, {"quick": True}, ROWS, seconds=12.3, **more)


def test_the_file_has_every_row(tmp_path: Path):
    write(tmp_path, made(skipped=["Element 5 % step"]), RATES, "a CPU")
    found = json.loads((tmp_path / "bench.json").read_text())
    expected = [{**row.as_dict(), "shape": list(row.shape)} for row in ROWS]
    assert found["rows"] == expected
    assert found["skipped"] == ["Element 5 % step"]
    assert found["machine"]["processor"] == "a CPU"


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_the_rows_figures():
    lines = list(markdown(made(skipped=["Element 5 % step"]), "a CPU"))
    head = cells(next(line for line in lines if line.startswith("| case")))
    row = dict(zip(head, cells(next(line for line in lines if ROW.label in line)), strict=True))
    assert row == {
        "case": "Block 64 50 %",
        "stage": "step",
        "dense ms": "43.2",
        "ms": "22",
        "speed-up": "2.0x",
        "quartiles": "1.9–2.0",
        "dense FLOPs": "6.44 G",
        "FLOPs": "3.22 G",
        "dense memory": "16.0 MiB",
        "memory": "12.0 MiB",
        "of the roof": "82%",
        "backend": "native",
        "verdict": "masked wins 2.0x",
    }
    assert "## 512x2048:1024, float32" in lines and "## Kernels without a layer" in lines
    kernel = cells(next(line for line in lines if "stats full" in line))
    assert kernel[6] == kernel[8] == "–"
    assert lines[-1] == "There was no time for 1: Element 5 % step."


def test_the_tables_of_a_model():
    total = {"label": "Prefix 25 %", "layers": 48, "dense_ms": 100.0, "ms": 30.0}
    total |= {"speedup": 3.33, "low": 3.1, "high": 3.5, "verdict": "masked wins 3.3x"}
    lines = list(markdown(made(model=[total], model_name="my:build"), "a CPU"))
    assert "| Prefix 25 % | 48 | 100 | 30 | 3.3x | 3.1–3.5 | masked wins 3.3x |" in lines


def test_what_is_shown_fits_80_columns():
    out = io.StringIO()
    show(made(), Console(out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("Block 64 50 %") and "masked wins 2.0x" in line for line in lines)
    assert "the dense layer: step 43.2 ms, backward 43.2 ms" in lines


def test_drawings_are_of_what_there_is(tmp_path: Path):
    pytest.importorskip("matplotlib")
    written = write(tmp_path, made(), RATES, "a CPU")
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    assert all(str(tmp_path / name) in written for name in FILES)
    # An old drawing does not stay beside new rows.
    write(tmp_path, replace(made(), rows=[KERNEL]), RATES, "a CPU")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "roofline.png"}


def test_without_matplotlib_there_is_a_line_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "draw_all", lambda *_: None)
    assert "no drawings: matplotlib is not installed" in write(tmp_path, made(), RATES, "a CPU")
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md"}


def test_files_of_an_earlier_run_are_not_replaced_unasked(tmp_path: Path):
    folder = tmp_path / "new"
    check_folder(folder, overwrite=False)
    assert folder.is_dir()
    (folder / "bench.md").write_text("old")
    with pytest.raises(ValueError, match=r"bench.md would be overwritten: choose another --out"):
        check_folder(folder, overwrite=False)
    check_folder(folder, overwrite=True)
    assert (folder / "bench.md").read_text() == "old"


TRAINING = TrainingRow(
    method="ats",
    trains="the full network and the core in turn",
    device="cpu",
    batch_size=16,
    steps_per_epoch=2812.5,
    forward_flops_per_step=11.1e9,
    forward_flops_per_epoch=31.26e12,
    training_flops_per_step=33.3e9,
    training_flops_per_epoch=93.6e12,
    seconds_per_step=0.2241,
    seconds_per_epoch=630.3,
    held_bytes=85 << 20,
    step_bytes=104 << 20,
    of_slimmable=Share("slimmable", 0.5, 0.503, 0.5, 0.51, 9, noisy=False, baseline_s=0.4455),
)


def test_trainings_are_shown_with_what_an_epoch_costs():
    report = made(training={"a ResNet": [TRAINING]})
    (line,) = (line for line in markdown(report, "a CPU") if line.startswith("| ats "))
    shown = ["33.3 G", "93.6 T", "31.3 T", "0.224", "10:30", "85.0 MiB", "104 MiB"]
    assert cells(line) == ["ats", TRAINING.trains, *shown, TRAINING.verdict]
    output = io.StringIO()
    show(report, Console(output))
    lines = output.getvalue().splitlines()
    (row,) = (line for line in lines if line.startswith("ats  "))
    assert row.split() == ["ats", *" ".join(shown).split()]
    assert len(row) <= 80
    assert TRAINING.verdict in lines
