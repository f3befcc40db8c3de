"""Which of a kernel's tiles is fastest here: tried one after the other, at the user's wish."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress

from partial_kernels._core.tiles import Tile, choosing

__all__ = ["tune"]

# A tile must be faster than another by as much as timing is off.
_MARGIN = 0.98


def tune(
    step: Callable[[], object],
    candidates: Mapping[str, Sequence[Tile]],
    seconds: Callable[[Callable[[], object]], float],
    found: dict[str, Tile],
) -> Iterator[tuple[str, float, float]]:
    """Find the tiles of the kernels that ``step`` launches; gives each key (kernel and bucket of
    sizes) with the times of the default and of the best.

    Keys that are there from steps before are not timed again. Tiles that do not compile, or that
    the device has no room for, are passed over.

    Args:
        step: launches the kernels; nothing else in it should take long.
        candidates: by kernel.
        seconds: times a step.
        found: by key, the tiles that are faster than the default; gets what is found.
    """
    defaults: dict[str, Tile] = {}

    def note(key: str, default: Tile) -> Tile:
        defaults.setdefault(key, default)
        return found.get(key, default)

    with choosing(note):
        step()
    for key, default in defaults.items():
        kernel = key.split(" ", 1)[0]
        if key in found or kernel not in candidates:
            continue

        def timed(tile: Tile, key: str = key) -> float:
            with choosing(lambda asked, tile_of: tile if asked == key else note(asked, tile_of)):
                return seconds(step)

        first = best = timed(default)
        for tile in candidates[kernel]:
            time = math.inf
            # Triton's errors of compilation and of resources have no other base in common.
            with suppress(Exception):
                time = math.inf if tile == default else timed(tile)
            if time < _MARGIN * best:
                best, found[key] = time, tile
        yield key, first, best
