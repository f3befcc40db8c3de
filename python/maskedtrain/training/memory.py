"""Memory of the process: what it keeps, and the peak of a stretch of work."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["keep_freed_memory", "peak_bytes", "reset_peak"]

_STATUS = Path("/proc/self/status")
# Of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# What of it is not there, without Linux or glibc, is left as it is.
_other_systems = suppress(OSError, AttributeError, TypeError)


def keep_freed_memory() -> None:
    """Have the process keep what it frees (Linux with glibc): else large tensors are of new pages
    in every step, and a sixth to a third of a small network's step on a CPU goes into faults.
    """
    with _other_systems:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def reset_peak(device: torch.device) -> None:
    """Start measuring anew from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with _other_systems:
        # What was kept from before is no part of it.
        ctypes.CDLL(None).malloc_trim(0)
    # 5 resets the process's high-water mark (proc(5)); other systems have no such file.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory held since ``reset_peak``: the allocator's on CUDA, else the process's (Linux
    only; since the process began where the system does not let it be reset).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    return None if kib is None else int(kib) * 1024
