"""How GPU work is timed: captured in CUDA graphs, its caches cold, by the device's own clock."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from maskedtrain.benchmark.machine import Rates, measure
from maskedtrain.benchmark.timing import seconds
from partial_kernels._core.contest import Step

__all__ = ["Clock", "CudaClock", "DryClock", "NotCaptured", "Program", "rates"]

# Bytes of operands that calls take turns with: several times any second-level cache, so that each
# call finds its operands in memory.
COLD_BYTES = 250e6
MAX_SETS = 24
MOST_BYTES = 40_000_000_000
# Seconds of one graph at least: starting it takes some microseconds.
LONG_ENOUGH = 0.5e-3


class NotCaptured(RuntimeError):
    """The calls cannot be captured in a CUDA graph; the process has to be given up."""


@dataclass(frozen=True)
class Program:
    """So many calls, one after the other."""

    run: Step
    calls: int


class Clock(Protocol):
    """What a benchmark needs to know of the device."""

    device: str
    rounds: int

    def context(self) -> AbstractContextManager[Any]:
        """Within it everything is made and run."""
        ...

    def allocated(self) -> int:
        """Bytes of the device's memory in use."""
        ...

    def sets(self, size: int, footprint: int) -> int:
        """How many sets of operands take turns, if a call moves so many bytes and a set takes so
        many.
        """
        ...

    def program(self, steps: Sequence[Step]) -> Program:
        """Calls of each of the steps in turn."""
        ...

    def seconds(self, step: Step) -> float:
        """The device's time of one call."""
        ...

    def wall_seconds(self, step: Step) -> float:
        """The time until one call's work is done."""
        ...


@dataclass
class CudaClock:
    """Of the current CUDA device. ``eager``: nothing is captured."""

    eager: bool = False
    device: str = "cuda"
    rounds: int = 9
    # A graph is captured on a stream of its own, and autograd runs a backward on the stream of its
    # forward: all goes on one.
    stream: Any = field(default_factory=lambda: torch.cuda.Stream())

    def context(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def heat(self, duration: float = 2.0) -> None:
        """Let the clocks settle."""
        a = torch.randn(4096, 4096, device=self.device, dtype=torch.bfloat16)
        started = time.perf_counter()
        while time.perf_counter() - started < duration:
            for _ in range(20):
                torch.mm(a, a)
            torch.cuda.synchronize()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated()

    def sets(self, size: int, footprint: int) -> int:
        wanted = math.ceil(COLD_BYTES / max(size, 1))
        return max(min(wanted, MAX_SETS, MOST_BYTES // max(footprint, 1)), 2)

    def program(self, steps: Sequence[Step]) -> Program:
        for _ in range(2):
            for step in steps:
                step()
        if self.eager:
            return Program(_in_turn(steps), len(steps))
        run = self._captured(steps)
        run()
        passes = math.ceil(LONG_ENOUGH / max(self.seconds(run), 1e-6))
        if passes > 1:
            run = self._captured([*steps] * passes)
        return Program(run, len(steps) * passes)

    def _captured(self, steps: Sequence[Step]) -> Step:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                for step in steps:
                    step()
        except RuntimeError as error:
            raise NotCaptured(f"cannot be captured in a CUDA graph: {error}") from error
        return graph.replay

    def seconds(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def wall_seconds(self, step: Step) -> float:
        def waited() -> None:
            step()
            torch.cuda.synchronize()

        return seconds(waited)


class DryClock:
    """Says "one second" of whatever runs on the CPU."""

    device = "cpu"
    rounds = 1

    def context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def allocated(self) -> int:
        return 0

    def sets(self, size: int, footprint: int) -> int:
        return 2

    def program(self, steps: Sequence[Step]) -> Program:
        return Program(_in_turn(steps), len(steps))

    def seconds(self, step: Step) -> float:
        step()
        return 1.0

    wall_seconds = seconds


def _in_turn(steps: Sequence[Step]) -> Step:
    def run() -> None:
        for step in steps:
            step()

    return run


def rates(clock: Clock, size: int = 8192, copied: int = 1 << 31) -> Rates:
    """The fastest bf16 product of matrices of random numbers, and the fastest copy of bytes."""
    return measure(clock.device, torch.bfloat16, clock.seconds, size=size, copied=copied, calls=10)
