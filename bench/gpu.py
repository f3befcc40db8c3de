"""Builds the GPU kernels, proves them and times them: ``make gpu``, one command for a bare machine.

Stages: build, facts, tests, kernels, training. Each has a share of the time, and what one leaves
goes to the next; figures are written as they come, so that a run that is cut short leaves what it
had. ``--dry-run`` goes through all of it on the CPU, in small, with times made up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# A bare machine has the package's dependencies, not the package.
if find_spec("maskedtrain") is None:
    sys.path.append(str(ROOT / "python"))

from bench.gpu_cases import Stage, jobs  # noqa: E402
from bench.gpu_report import Report, Tests, read_tests  # noqa: E402
from bench.gpu_worker import FACTS, Worker, sentence  # noqa: E402
from partial_kernels._core.tables import slug  # noqa: E402

MINUTES = 9.0
# Seconds that a stage leaves to those after it, of so many minutes.
LEFT_AFTER = {"build": 400, "facts": 380, "tests": 210, "kernels": 45, "training": 8}
# Seconds of one job at most: some compile half a dozen kernels.
PATIENCE = 60
# What pytest needs to say what it has found, once it is interrupted.
LAST_WORDS = 15


@dataclass
class Run:
    """One run: its options, its time and what it has found."""

    report: Report
    dry: bool
    only: str
    minutes: float = MINUTES
    started: float = field(default_factory=time.monotonic)
    failures: list[str] = field(default_factory=list)

    def left(self, stage: str) -> float:
        """Seconds that the stage may take from now on."""
        end = 60 * self.minutes - LEFT_AFTER[stage] * self.minutes / MINUTES
        return self.started + end - time.monotonic()

    def stage(self, name: str, function: Callable[[], str]) -> None:
        """Run it and note what came of it; nothing that it raises ends the run."""
        print(f"{name}: {max(self.left(name), 0):.0f} s at most", flush=True)
        started = time.monotonic()
        try:
            result = function()
        except Exception as error:
            result = sentence(error)
            self.failures.append(name)
        seconds = time.monotonic() - started
        self.report.stages[name] = {"seconds": seconds, "result": result}
        self.report.save()
        print(f"{name}: {result} ({seconds:.0f} s)", flush=True)


def command(
    arguments: list[str], log: Path, timeout: float, environment: Mapping[str, str]
) -> int | None:
    """Run Python with these arguments; its exit code, or None if it took too long."""
    path = os.pathsep.join(filter(None, (str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    given = {**os.environ, "PYTHONPATH": path, **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=given,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            return process.wait(max(timeout, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS)
            return None
        finally:
            # Its own processes, too.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def build(run: Run) -> str:
    """Compile both libraries, CUDA's for this device alone."""
    major, minor = (9, 0) if run.dry else torch.cuda.get_device_capability()
    log = run.report.folder / "build.log"
    # The self-check reads setup.py and builds nothing.
    arguments = ["--name"] if run.dry else ["build_ext", "--inplace"]
    code = command(
        ["setup.py", "--quiet", *arguments],
        log,
        run.left("build"),
        {"PARTIAL_KERNELS_CUDA_ARCHS": f"{major}{minor}"},
    )
    # Without a library there is a package all the same, and a file that says why.
    reasons = [] if run.dry else sorted((ROOT / "partial_kernels").glob("_C*_failure.txt"))
    if code != 0 or reasons:
        run.failures.append("build")
        print(
            *log.read_text().splitlines()[-20:], *(path.read_text() for path in reasons), sep="\n"
        )
    return (
        "took too long" if code is None else f"exit code {code}, {len(reasons)} libraries missing"
    )


def facts(run: Run, worker: Worker) -> str:
    """What the device is and what it can do."""
    found = worker.run(FACTS, run.left("facts"))[FACTS]
    run.report.facts = found
    if "error" in found:
        raise RuntimeError(found["error"])
    missing = [name for name in ("cuda", "triton") if name in found["unavailable"]]
    if missing and not run.dry:
        run.failures.append("facts")
    gemm, copy = found["gemm_gflops_per_s"] / 1e3, found["copy_gb_per_s"]
    return f"{gemm:.0f} TFLOP/s, {copy:.0f} GB/s, not available: {missing or 'nothing'}"


def tests(run: Run) -> str:
    """pytest on all that needs a CUDA device."""
    # Others may import what a bare machine does not have.
    marked = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    junit, log = (run.report.folder / name for name in ("tests.xml", "tests.log"))
    junit.unlink(missing_ok=True)
    workers = 0 if run.dry else min(os.cpu_count() or 1, 8)
    options = ["-m", "gpu", "-q", "-rfE", "--timeout=150", f"--junitxml={junit}"]
    options += ["-p", "no:cacheprovider", "-n", str(workers), "--dist", "loadgroup"]
    # Of a package that torch imports where it is installed.
    options += ["-W", "ignore:The pynvml package is deprecated:FutureWarning"]
    environment = {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    if run.dry:
        environment["PARTIAL_KERNELS_DRY_RUN"] = "1"
    code = command(["-m", "pytest", *options, *marked], log, run.left("tests"), environment)
    run.report.tests = read_tests(junit) if junit.exists() else Tests()
    found = run.report.tests
    if code != 0:
        run.failures.append("tests")
        print(*log.read_text().splitlines()[-40:], sep="\n")
    sums = {
        outcome: sum(counts.get(outcome, 0) for counts in found.counts.values())
        for outcome in ("passed", "skipped", "failed")
    }
    end = "cut off" if code is None else f"exit code {code}"
    return f"{', '.join(f'{count} {outcome}' for outcome, count in sums.items())}, {end}"


def timings(run: Run, worker: Worker, stage: Stage) -> str:
    """The jobs of one stage, each in what time is left."""
    wanted = [name for name in jobs(run.dry)[stage] if run.only in name]
    done = 0
    for name in wanted:
        if (left := run.left(stage)) <= 0:
            run.report.add({name: {"error": "out of time"}})
            continue
        rows = worker.run(name, min(PATIENCE, left))
        run.report.add(rows)
        done += 1
        for line, row in rows.items():
            ratio = row.get("error") or f"{row['ratio']:.3f} of {row['baseline']}"
            print(f"  {line}: {ratio}", flush=True)
    return f"{done} of {len(wanted)} jobs"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, to check the run itself"
    )
    parser.add_argument("--minutes", type=float, default=MINUTES, help="that all may take")
    parser.add_argument("--only", default="", help="time jobs with this in their names; no tests")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    given = parser.parse_args(arguments)
    dry: bool = given.dry_run
    if not dry and not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    folder = given.results.resolve() / ("dry-run" if dry else slug(torch.cuda.get_device_name()))
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(Report(folder), dry, given.only, given.minutes)
    with contextlib.closing(Worker(dry)) as worker:
        if given.only:
            run.report.resume()
        else:
            run.stage("build", lambda: build(run))
        run.stage("facts", lambda: facts(run, worker))
        if not given.only:
            # The device is the tests' alone.
            worker.close()
            run.stage("tests", lambda: tests(run))
        run.stage("kernels", lambda: timings(run, worker, "kernels"))
        run.stage("training", lambda: timings(run, worker, "training"))
    print(*run.report.table(), sep="\n")
    print(
        f"figures: {folder / 'gpu.json'} and gpu.md; failed: {', '.join(run.failures) or 'nothing'}"
    )
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
