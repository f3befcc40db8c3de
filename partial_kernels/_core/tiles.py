"""Which tile a Triton kernel takes: the fastest that was measured on the device, or its default.

Nothing is timed when a kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

from partial_kernels._core.tables import Tables, device_name

__all__ = [
    "TABLES",
    "Tile",
    "bucket",
    "choosing",
    "tuned",
]


@dataclass(frozen=True)
class Tile:
    """A kernel's configuration: sizes of its tile, and what the compiler is told beside them."""

    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int


TABLES: Tables[Tile] = Tables("tiles", encode=asdict, decode=lambda entry: Tile(**entry))

Choose = Callable[[str, Tile], Tile]

# Not a context variable: autograd runs a backward in threads of its own.
_choose: list[Choose] = []


@contextmanager
def choosing(choose: Choose) -> Generator[None]:
    """Within it ``choose(key, default)`` says which tile every kernel of the process takes."""
    _choose.append(choose)
    try:
        yield
    finally:
        _choose.pop()


def bucket(*sizes: int) -> str:
    """Sizes that share a tile: each rounded up to a power of two."""
    return "x".join(str(1 << max(size - 1, 0).bit_length()) for size in sizes)


def tuned(kernel: str, sizes: str, device: torch.device, default: Tile) -> Tile:
    """The tile of a kernel for a bucket of sizes, dtypes and whatever else its time depends on."""
    key = f"{kernel} {sizes}"
    if _choose:
        return _choose[-1](key, default)
    return TABLES.of(device_name(device)).get(key, default) if device.type == "cuda" else default
