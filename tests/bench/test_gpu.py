"""``make gpu`` where there is no GPU: its stages, its processes and what it writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.gpu_cases import Job, Row, Stage, _figures
from bench.gpu_report import Report, crossing
from bench.gpu_timing import Clock, CudaClock, NotCaptured
from bench.gpu_worker import Worker
from maskedtrain.benchmark.timing import Paired

PASSED = '<testcase classname="tests.gpu.test_cases" name="test_case[topk-cuda-row-fp32]"/>'
SKIPPED = (
    '<testcase classname="tests.gpu.test_cases" name="test_case[lfc-triton-fp64]">'
    '<skipped message="no fp64"/></testcase>'
)
FAILED = (
    '<testcase classname="tests.gpu.test_cases" name="test_case[stats-cuda-full-1d]">'
    '<failure message="off by one&#10;and more"/></testcase>'
)


def make_run(folder: Path) -> gpu.Run:
    return gpu.Run(Report(folder), dry=True, only="")


def test_stages_share_the_time(tmp_path: Path) -> None:
    run = gpu.Run(Report(tmp_path), dry=True, only="", minutes=18.0)
    left = [run.left(stage) for stage in gpu.LEFT_AFTER]
    assert left == sorted(left) and left[-1] < 18 * 60
    assert left[0] == pytest.approx(2 * (540 - 400), abs=5)


def test_a_dry_run_times_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(only: str) -> dict[str, Any]:
        assert gpu.main(["--dry-run", "--results", str(tmp_path), "--only", only]) == 0
        return json.loads((tmp_path / "dry-run" / "gpu.json").read_text())

    found = run("adamw-full")
    assert found["cases"].keys() == {"optim-adamw-full", "optim-adamw-full [cuda]"}
    row = found["cases"]["optim-adamw-full [cuda]"]
    assert (row["ratio"], row["ran"], row["baseline"]) == (1.0, "reference", "fused AdamW")
    assert row["met"] == "yes" and row["floor_ms"] > 0
    assert found["machine"]["torch"] == torch.__version__
    assert found["stages"].keys() == {"facts", "kernels", "training"}
    # A run of other jobs keeps what is there.
    assert run("train-transformer")["cases"].keys() == {*found["cases"], "train-transformer"}
    page = (tmp_path / "dry-run" / "gpu.md").read_text()
    assert "| optim-adamw-full | 500 |" in page and "| train-transformer |" in page
    assert "optim-adamw-full [cuda]: 1.000 of fused AdamW" in capsys.readouterr().out


@pytest.mark.slow
def test_what_needs_a_gpu_is_run_on_the_cpu(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.stage("tests", lambda: gpu.tests(run))
    assert not run.failures, (tmp_path / "tests.log").read_text()
    assert run.report.tests.counts["blocksparse triton"]["passed"] > 0


def test_without_a_device_there_is_no_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_failed_tests_are_named_and_spoil_their_familys_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(arguments: list[str], log: Path, *_: Any) -> int:
        log.write_text("1 failed")
        (junit,) = (a.partition("=")[2] for a in arguments if a.startswith("--junitxml="))
        Path(junit).write_text(f"<testsuites>{PASSED}{SKIPPED}{FAILED}</testsuites>")
        return 1

    monkeypatch.setattr(gpu, "command", command)
    run = make_run(tmp_path)
    run.stage("tests", lambda: gpu.tests(run))
    report = run.report
    assert run.failures == ["tests"]
    assert report.stages["tests"]["result"] == "1 passed, 1 skipped, 1 failed, exit code 1"
    assert report.tests.counts == {
        "lfc triton": {"skipped": 1},
        "stats cuda": {"failed": 1},
        "topk cuda": {"passed": 1},
    }
    name = "test_cases.test_case[stats-cuda-full-1d]"
    assert report.tests.failures == {name: "off by one"} and report.tests.red == {"stats"}
    report.add({"stats-full": {"ratio": 0.5, "bar": 1.0}, "topk-row": {"ratio": 0.5, "bar": 0.4}})
    assert [row["met"] for row in report.rows.values()] == ["tests fail", "no"]
    assert f"- `{name}` off by one" in (tmp_path / "gpu.md").read_text()


def test_a_bar_may_be_a_share_of_the_floor(tmp_path: Path) -> None:
    report = Report(tmp_path, facts={"gemm_gflops_per_s": 1.0, "copy_gb_per_s": 1.0})
    row = {"ratio": 0.9, "flops": 10**6, "bytes": 2 * 10**6, "floor_bar": 1.25}
    report.add({"good": {**row, "ms": 2.4}, "slow": {**row, "ms": 2.6}, "error": {"error": "no"}})
    assert [row.get("met") for row in report.rows.values()] == ["yes", "no", None]
    assert report.rows["good"]["of_floor"] == pytest.approx(2 / 2.4)
    assert list(report.sentences()) == ["error: no"]


def test_break_even_is_said_of_our_kernels_alone(tmp_path: Path) -> None:
    report = Report(tmp_path)
    report.add(
        {
            "topk-row-k8": {"ratio": 0.5, "ran": "cuda"},
            "topk-row-k32": {"ratio": 1.0, "ran": "cuda reference"},
            "topk-row-k32 [cuda]": {"ratio": 1.5, "ran": "cuda"},
        }
    )
    assert list(report.crossings()) == ["break-even k, by row: 20"]
    assert crossing([(1, 0.5), (4, 0.9)]) == "none, faster from 1 to 4"
    assert crossing([(1, 1.5), (4, 1.9)]) == "none, not faster from 1 to 4"


def test_ratios_are_of_single_calls() -> None:
    found = Paired(
        0.5,
        0.4,
        0.6,
        1.0,
        noise=0,
        waited=0,
        rounds=5,
        rejected=0,
        a_ms=20.0,
        b_ms=10.0,
        load=0.0,
    )
    row = _figures(found, calls=20, baseline_calls=10)
    assert (row["ms"], row["baseline_ms"]) == (0.5, 2.0)
    assert (row["ratio"], row["low"], row["high"]) == (0.25, 0.2, 0.3)


class FakeEvent:
    """Of a device on which each replay of a graph takes 0.1 ms for each call in it."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


class FakeGraph:
    """Calls that are made within ``capturing`` are in the graph."""

    def __init__(self) -> None:
        self.calls = 0

    def replay(self) -> None:
        FakeEvent.now += 0.1 * self.calls


def test_short_calls_fill_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing: list[FakeGraph] = []

    @contextmanager
    def graph(made: FakeGraph, stream: Any) -> Iterator[None]:
        capturing.append(made)
        try:
            yield
        finally:
            capturing.remove(made)

    def step() -> None:
        for made in capturing:
            made.calls += 1

    def waits() -> None:
        if capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    clock = CudaClock(stream="side")
    program = clock.program([step, step])
    # 0.2 ms are too short.
    assert program.calls == 6 and clock.seconds(program.run) == pytest.approx(0.6e-3)
    assert clock.program([step] * 8).calls == 8
    with pytest.raises(NotCaptured, match="not permitted"):
        clock.program([waits])
    assert CudaClock(eager=True, stream="side").program([waits]).calls == 1


def test_sets_of_operands_fit_into_memory() -> None:
    clock = CudaClock(stream="side")
    assert clock.sets(10**8, 10**8) == 3
    assert clock.sets(10**9, 10**9) == 2
    assert clock.sets(1, 1) == 24
    assert clock.sets(10**6, 4 * 10**9) == 10


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = gpu.command(
        ["-c", "import os; print(os.environ['ONE']); exit(3)"], log, 60, {"ONE": "1"}
    )
    assert (code, log.read_text()) == (3, "1\n")
    assert gpu.command(["-c", "import time; time.sleep(100)"], log, 1, {}) is None


def odd_jobs(dry: bool) -> dict[Stage, dict[str, Job]]:
    def raises(_: Clock) -> dict[str, Row]:
        raise ValueError("not\nthis")

    def cannot_be_captured(_: Clock) -> dict[str, Row]:
        raise NotCaptured("it waits")

    return {
        "kernels": {
            "fine": lambda clock: {"fine": {"device": clock.device}},
            "raises": raises,
            "dies": lambda _: os._exit(7),
            "hangs": lambda _: time.sleep(1000) or {},
            "waits": cannot_be_captured,
        }
    }


def test_whatever_a_job_does_the_next_one_is_run() -> None:
    worker = Worker(True, odd_jobs)
    try:
        assert worker.run("fine", 60) == {"fine": {"device": "cpu"}}
        assert worker.run("hangs", 0.2) == {"hangs": {"error": "took over 0 s"}}
        assert worker.run("raises", 60) == {"raises": {"error": "ValueError: not this"}}
        assert worker.run("dies", 60) == {"dies": {"error": "the process died, exit code 7"}}
        waits = worker.run("waits", 60)["waits"]
        assert waits["error"] == "NotCaptured: it waits" and "with its launches" in waits["note"]
    finally:
        worker.close()
