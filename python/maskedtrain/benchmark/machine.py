"""What the machine can do, measured on the spot, and what it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import partial_kernels as pk
from maskedtrain.benchmark.timing import timed_on
from partial_kernels._core.tables import device_name, processor, slug
from partial_kernels._native import cuda_status, native_status

__all__ = ["Rates", "description", "device", "measure", "processor", "rates"]

CPU = torch.device("cpu")
# Seconds of work after which a GPU's clocks have settled.
_SETTLED_S = 1.0


@dataclass(frozen=True)
class Rates:
    """The fastest matrix product and the fastest copy."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, flops: int, bytes_moved: int) -> float:
        """Seconds that so much work takes at least: of arithmetic or of memory."""
        return max(flops / self.flops_per_s, bytes_moved / self.bytes_per_s)


def rates(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Rates:
    """Of products of this dtype, measured once; on a CPU, of this process's threads. Copies are of
    far more than any cache holds.
    """
    return _rates(device, dtype)


@cache
def _rates(device: torch.device, dtype: torch.dtype) -> Rates:
    timed = timed_on(device)
    if device.type != "cuda":
        return measure(device, dtype, timed, size=2048, copied=1 << 28, calls=7)
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    started = time.perf_counter()
    while time.perf_counter() - started < _SETTLED_S:
        timed(lambda: torch.mm(a, a))
    return measure(device, dtype, timed, size=8192, copied=1 << 31, calls=10)


def measure(
    device: torch.device | str,
    dtype: torch.dtype,
    timed: Callable[[Callable[[], object]], float],
    *,
    size: int,
    copied: int,
    calls: int,
) -> Rates:
    """The fastest of so many products of matrices of random numbers, ``size`` wide, and of so many
    copies of ``copied`` bytes.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(a)
    # Written once: pages are there when the clock runs.
    source, target = (torch.zeros(copied, dtype=torch.int8, device=device) for _ in range(2))
    gemm = min(timed(lambda: torch.mm(a, b, out=product)) for _ in range(calls))
    copy = min(timed(lambda: target.copy_(source)) for _ in range(calls))
    return Rates(2 * size**3 / gemm, 2 * source.nbytes / copy)


def device(on: torch.device = CPU) -> str:
    """A name for folders: a GPU's, or processor and threads."""
    return slug(device_name(on))


def description(on: torch.device = CPU, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a figure depends on beside the code."""
    measured = rates(on, dtype)
    described = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "isa": (native_status().info or {}).get("isa", "no compiled library"),
        "torch": torch.__version__,
        "partial_kernels": pk.__version__,
        "python": platform.python_version(),
        "gemm_gflops_per_s": measured.flops_per_s / 1e9,
        "copy_gb_per_s": measured.bytes_per_s / 1e9,
    }
    if on.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(on)
        described["cuda"] = torch.version.cuda
        described["cuda_library"] = str(cuda_status().info or cuda_status().reason)
    return described
