"""Which tile a Triton kernel takes: the fastest that was measured on the device, or its default.

Tables are JSON files, one for each device: those of ``partial_kernels/tiles`` are shipped, those of
``$XDG_CONFIG_HOME/maskedtrain/tiles`` are the user's own, written by ``maskedtrain bench --tune``,
and come first. Nothing is timed when a kernel runs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "SHIPPED",
    "Tile",
    "bucket",
    "choosing",
    "device_file",
    "put",
    "read",
    "slug",
    "tuned",
    "write",
]

SHIPPED = Path(__file__).resolve().parents[1] / "tiles"


@dataclass(frozen=True)
class Tile:
    """A kernel's configuration: sizes of its tile, and what the compiler is told beside them."""

    sizes: Mapping[str, int]
    num_warps: int
    num_stages: int


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
    return _table(device).get(key, default) if device.type == "cuda" else default


@cache
def _table(device: torch.device) -> dict[str, Tile]:
    file = device_file(torch.cuda.get_device_name(device))
    return {**read(SHIPPED / file), **read(user_folder() / file)}


def device_file(name: str) -> str:
    """The name of the table of devices of this name."""
    return f"{slug(name)}.json"


def slug(name: str) -> str:
    """The name as one of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_folder() -> Path:
    """Where the user's own tables are."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "maskedtrain" / "tiles"


def read(file: Path) -> dict[str, Tile]:
    """The tiles of a table; none where there is no such file.

    Raises:
        ValueError: it is no table of tiles.
    """
    if not file.exists():
        return {}
    try:
        entries: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return {key: Tile(**entry) for key, entry in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no table of tiles: {error}") from error


def write(file: Path, tiles: Mapping[str, Tile]) -> None:
    """Add these to the table."""
    put(file, {key: asdict(tile) for key, tile in {**read(file), **tiles}.items()})
    _table.cache_clear()


def put(file: Path, entries: Mapping[str, Any]) -> None:
    """Put a table in the place of the one that was there, all at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(file)
