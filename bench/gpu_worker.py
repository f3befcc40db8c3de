"""A process for the jobs: whatever one of them does to it, the next one has a sound one."""

from __future__ import annotations

import gc
import multiprocessing
import platform
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

import partial_kernels as pk
from bench.gpu_cases import Job, Row, Stage, jobs
from bench.gpu_timing import Clock, CudaClock, DryClock, NotCaptured, rates
from partial_kernels._core import discovery
from partial_kernels._native import cuda_status

__all__ = ["FACTS", "Worker", "sentence"]

MakeJobs = Callable[[bool], Mapping[Stage, Mapping[str, Job]]]

FACTS = "facts"
_GRACE = 5


def sentence(error: BaseException) -> str:
    """What went wrong, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"


class Worker:
    """Runs jobs in a process of its own, which is replaced if it dies, hangs or is spoilt."""

    def __init__(self, dry: bool, make_jobs: MakeJobs = jobs) -> None:
        self.dry, self.make_jobs = dry, make_jobs
        self._process: Any = None
        self._connection: Any = None

    def run(self, name: str, timeout: float) -> dict[str, Row]:
        """The job's rows; or one row, with the sentence that says why there are no others."""
        rows, spoilt = self._ask(name, timeout, eager=False)
        if spoilt == "eager":
            rows, _ = self._ask(name, timeout, eager=True)
            for row in rows.values():
                row["note"] = "not captured: timed with its launches"
        if spoilt:
            self.close()
        return rows

    def _ask(self, name: str, timeout: float, *, eager: bool) -> tuple[dict[str, Row], str | None]:
        if eager:
            self.close()
        if self._process is None:
            self._start(eager)
        try:
            self._connection.send(name)
            if not self._connection.poll(timeout):
                self.close()
                return {name: {"error": f"took over {timeout:.0f} s"}}, None
            return self._connection.recv()
        except (EOFError, OSError):
            code = self.close(_GRACE)
            return {name: {"error": f"the process died, exit code {code}"}}, None

    def _start(self, eager: bool) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        given = theirs, self.dry, eager, self.make_jobs
        self._process = spawn.Process(target=_serve, args=given, daemon=True)
        self._process.start()
        theirs.close()

    def close(self, grace: float = 0) -> int | None:
        """End the process, however busy it is, if it has not ended after so many seconds; its exit
        code.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        self._connection.close()
        process.join(grace)
        process.kill()
        process.join()
        return process.exitcode


def _serve(connection: Connection, dry: bool, eager: bool, make_jobs: MakeJobs) -> None:
    """Answer names of jobs with ``(rows, spoilt)``, until nobody asks."""
    todo = {name: job for named in make_jobs(dry).values() for name, job in named.items()}
    clock = DryClock() if dry else CudaClock(eager)
    todo[FACTS] = _facts
    # Each capture collects garbage: not through all that was imported.
    gc.freeze()
    with clock.context():
        if isinstance(clock, CudaClock):
            clock.heat()
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            connection.send(_answer(name, todo[name], clock))


def _answer(name: str, job: Job, clock: Clock) -> tuple[dict[str, Row], str | None]:
    try:
        return job(clock), None
    except NotCaptured as error:
        return {name: {"error": sentence(error)}}, "eager"
    except Exception as error:
        # After an error of the device nothing works in its process any more.
        lost = isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)
        return {name: {"error": sentence(error)}}, "lost" if lost else None
    finally:
        if clock.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def _facts(clock: Clock) -> dict[str, Row]:
    """What figures depend on beside the code."""
    dry = clock.device == "cpu"
    measured = rates(clock, *(64, 1 << 12) if dry else ())
    facts: Row = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "python": platform.python_version(),
        "partial_kernels": pk.__version__,
        "cuda_library": str(cuda_status().info or cuda_status().reason),
        "unavailable": discovery.unavailable(),
        "gemm_gflops_per_s": measured.flops_per_s / 1e9,
        "copy_gb_per_s": measured.bytes_per_s / 1e9,
    }
    if not dry:
        import triton

        found = torch.cuda.get_device_properties(0)
        facts |= {
            "triton": triton.__version__,
            "device": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gb": found.total_memory / 1e9,
            "l2_mb": found.L2_cache_size / 1e6,
        }
    return {FACTS: facts}
