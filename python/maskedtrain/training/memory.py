"""Peak memory of a stretch of work."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["peak_bytes", "reset_peak"]

_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Start measuring anew from what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
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
