"""Up to which density "auto" takes a kernel that skips what a mask leaves out; beyond, the dense
product is faster.

A key is of family, backend, block size and dtype. What no table has is the family's default.
Nothing is timed when a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from partial_kernels._core.contest import Step
from partial_kernels._core.gpu import precision
from partial_kernels._core.tables import Tables, device_name

__all__ = [
    "TABLES",
    "Crossing",
    "crossover",
    "dtype_name",
]


def _density(entry: Any) -> float:
    number = isinstance(entry, int | float) and not isinstance(entry, bool)
    if not number or not 0 <= entry <= 1:
        raise ValueError(f"must be in [0, 1], got {entry!r}")
    return entry


TABLES: Tables[float] = Tables("crossovers", encode=float, decode=_density)


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
    return TABLES.of(device_name(device)).get(key, default)


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in a key: fp32 whose products are taken in TF32 is another one."""
    if dtype == torch.float32 and precision() == "tf32":
        return "tf32"
    return str(dtype)[6:]
