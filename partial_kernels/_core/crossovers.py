"""Up to which density "auto" takes a kernel that skips what a mask leaves out; beyond, the dense
product is faster.

Tables are JSON files, one for each device, which map a key (family, backend, block size, dtype) to
a density in [0, 1]: those of ``partial_kernels/crossovers`` are shipped, those of
``$XDG_CONFIG_HOME/maskedtrain/crossovers`` are the user's own, written by ``maskedtrain bench
--tune``, and come first. What neither has is the family's default. Nothing is timed when a kernel
runs.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from partial_kernels._core.contest import Step
from partial_kernels._core.gpu import precision
from partial_kernels._core.tiles import device_file, put, user_folder

__all__ = [
    "SHIPPED",
    "Crossing",
    "crossover",
    "device_name",
    "dtype_name",
    "processor",
    "read",
    "tables",
    "user_file",
    "write",
]

SHIPPED = Path(__file__).resolve().parents[1] / "crossovers"


@dataclass(frozen=True)
class Crossing:
    """How a crossover is measured; a family's ``crossings(device)`` gives them.

    Args:
        key: of the crossover.
        densities: to measure at, ascending.
        steps: of a density, our step and the dense one that "auto" would take instead.
    """

    key: str
    densities: tuple[float, ...]
    steps: Callable[[float], tuple[Step, Step]]


def crossover(key: str, device: torch.device, default: float) -> float:
    """The largest density at which "auto" takes the kernel."""
    # Part of a CPU's name: with another number of threads another table is in force.
    threads = 0 if device.type == "cuda" else torch.get_num_threads()
    return _table(device, threads).get(key, default)


@cache
def _table(device: torch.device, threads: int) -> dict[str, float]:
    return {key: density for file in tables(device) for key, density in read(file).items()}


def tables(device: torch.device) -> list[Path]:
    """The tables that are in force on the device; the later come first."""
    name = device_file(device_name(device))
    return [file for file in (SHIPPED / name, user_file(device)) if file.exists()]


def user_file(device: torch.device) -> Path:
    """Where the user's own table of the device is."""
    return user_folder().parent / "crossovers" / device_file(device_name(device))


def device_name(device: torch.device) -> str:
    """The GPU's name; for a CPU, its name and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()} {torch.get_num_threads()}"


@cache
def processor() -> str:
    """The CPU's name, as it says itself."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in a key: fp32 whose products are taken in TF32 is another one."""
    if dtype == torch.float32 and precision() == "tf32":
        return "tf32"
    return str(dtype)[6:]


def read(file: Path) -> dict[str, float]:
    """The crossovers of a table; none where there is no such file.

    Raises:
        ValueError: it is no table of crossovers.
    """
    if not file.exists():
        return {}
    try:
        entries: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no table of crossovers: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{file} is no table of crossovers: it is no JSON object")
    found = cast("dict[str, Any]", entries)
    for key, density in found.items():
        number = isinstance(density, int | float) and not isinstance(density, bool)
        if not number or not 0 <= density <= 1:
            raise ValueError(
                f"{file} is no table of crossovers: {key!r} must be in [0, 1], got {density!r}"
            )
    return found


def write(file: Path, crossovers: Mapping[str, float]) -> None:
    """Add these to the table."""
    put(file, {**read(file), **crossovers})
    _table.cache_clear()
