"""How often each region of a parameter has been updated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

from partial_kernels.masks import Difference, Mask

__all__ = ["MAX_NESTED", "RegionCounts"]

MAX_NESTED = 32
"""Most nested masks whose regions are counted apart: each costs an update of its own a step."""


@dataclass(frozen=True)
class RegionCounts:
    """Counts of the updates of one parameter's elements.

    As long as all the masks it was updated with are nested, M_1 in M_2 in ..., ``updates[k]``
    counts the updates with ``masks[k]``, and an element's count is the sum over the masks that
    hold it: one number for each of the regions M_1, M_2 \\ M_1, ... After two masks that cross, or
    more than ``MAX_NESTED``, there is one count for the whole parameter, ``updates[0]``, and
    ``masks`` is None, for good.
    """

    masks: tuple[Mask, ...] | None = ()
    updates: tuple[int, ...] = ()
    regions: tuple[Mask, ...] = ()

    def updated(
        self, mask: Mask, shape: Sequence[int]
    ) -> tuple[RegionCounts, list[tuple[Mask, int]]]:
        """The counts after an update with ``mask``, and its regions with the count of each."""
        counts = self._with(mask, shape)
        if counts.masks is None:
            total = counts.updates[0] + 1
            return replace(counts, updates=(total,)), [(mask, total)]
        level = next(i for i, known in enumerate(counts.masks) if known is mask)
        updates = list(counts.updates)
        updates[level] += 1
        # Region j is in M_j and all that hold it.
        totals = list(accumulate(reversed(updates)))[::-1]
        regions = zip(counts.regions[: level + 1], totals, strict=False)
        return replace(counts, updates=tuple(updates)), list(regions)

    def _with(self, mask: Mask, shape: Sequence[int]) -> RegionCounts:
        """These counts, with ``mask`` (this very object) among the masks."""
        masks = self.masks
        if masks is None or any(known is mask for known in masks):
            return self
        # What follows may cost as much as the masks have elements, but next time this one is known.
        for level, known in enumerate(masks):
            if known == mask:
                return self._spliced(level, level + 1, mask, self.updates[level])
        level = 0
        while level < len(masks) and masks[level].issubset(mask, shape):
            level += 1
        if level and mask.issubset(masks[level - 1], shape):
            return self._spliced(level - 1, level, mask, self.updates[level - 1])
        crosses = level < len(masks) and not mask.issubset(masks[level], shape)
        if crosses or len(masks) == MAX_NESTED:
            return RegionCounts(None, (sum(self.updates),))
        return self._spliced(level, level, mask, 0)

    def _spliced(self, start: int, stop: int, mask: Mask, updates: int) -> RegionCounts:
        """Masks ``start`` to ``stop`` replaced by this one."""
        assert self.masks is not None
        return _nested(
            (*self.masks[:start], mask, *self.masks[stop:]),
            (*self.updates[:start], updates, *self.updates[stop:]),
        )

    def state(self) -> dict[str, Any]:
        """As numbers, strings and lists; ``from_state`` is the inverse."""
        masks = None if self.masks is None else [mask.state() for mask in self.masks]
        return {"masks": masks, "updates": list(self.updates)}

    @staticmethod
    def from_state(state: dict[str, Any], shape: Sequence[int]) -> RegionCounts:
        """The counts that ``state()`` described, of a parameter of this shape."""
        updates = tuple(state["updates"])
        if state["masks"] is None:
            return RegionCounts(None, updates)
        masks = tuple(Mask.from_state(mask) for mask in state["masks"])
        for mask in masks:
            mask.check(shape)
        return _nested(masks, updates)


def _nested(masks: tuple[Mask, ...], updates: tuple[int, ...]) -> RegionCounts:
    steps = (Difference(outer, inner) for inner, outer in pairwise(masks))
    return RegionCounts(masks, updates, (*masks[:1], *steps))
