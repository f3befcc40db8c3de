"""What the machine can do, measured on the spot, and what it is."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import partial_kernels as pk
from partial_kernels._core.tiles import slug
from partial_kernels._native import native_status


@dataclass(frozen=True)
class Rates:
    """The fastest matrix product and the fastest copy of fp32 numbers."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, flops: int, bytes_moved: int) -> float:
        """Seconds that so much work takes at least: of arithmetic or of memory."""
        return max(flops / self.flops_per_s, bytes_moved / self.bytes_per_s)


@cache
def rates() -> Rates:
    """Of this process's threads. Memory: of far more than any cache holds."""
    n, count = 2048, 1 << 26
    a, b, product = (torch.ones(n, n) for _ in range(3))
    source, target = torch.ones(count), torch.ones(count)
    gemm = _fastest(lambda: torch.mm(a, b, out=product))
    copy = _fastest(lambda: target.copy_(source))
    return Rates(2 * n**3 / gemm, 2 * source.nbytes / copy)


def _fastest(function: Callable[[], object], calls: int = 7) -> float:
    times: list[float] = []
    for _ in range(calls):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def processor() -> str:
    """Its name, as it says itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def device() -> str:
    """A name for folders: processor and threads."""
    return slug(f"{processor()} {torch.get_num_threads()}")


def description() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "isa": (native_status().info or {}).get("isa", "no compiled library"),
        "torch": torch.__version__,
        "partial_kernels": pk.__version__,
        "python": platform.python_version(),
        "gemm_gflops_per_s": rates().flops_per_s / 1e9,
        "copy_gb_per_s": rates().bytes_per_s / 1e9,
    }
