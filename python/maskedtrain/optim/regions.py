"""How often each region of a parameter has been updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from partial_kernels.masks import Difference, Mask

__all__ = ["MAX_NESTED", "DeviceCounts", "RegionCounts"]

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
        counts = self.knowing(mask, shape)
        regions = counts.regions_of(mask)
        updates = list(counts.updates)
        updates[len(regions) - 1] += 1
        counts = replace(counts, updates=tuple(updates))
        return counts, list(zip(regions, counts.totals, strict=False))

    @property
    def totals(self) -> list[int]:
        """How often each region has been updated: region j is in M_j and all that hold it."""
        return list(accumulate(reversed(self.updates)))[::-1]

    def with_totals(self, totals: Sequence[int]) -> RegionCounts:
        """The same regions, updated so often."""
        updates = (a - b for a, b in zip(totals, [*totals[1:], 0], strict=True))
        return replace(self, updates=tuple(updates))

    def regions_of(self, mask: Mask) -> list[Mask]:
        """The regions that make up a mask that these counts know: the first ones."""
        if self.masks is None:
            return [mask]
        level = next(i for i, known in enumerate(self.masks) if known is mask)
        return list(self.regions[: level + 1])

    def knowing(self, mask: Mask, shape: Sequence[int]) -> RegionCounts:
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


class DeviceCounts:
    """The counts of several parameters' regions, as one tensor on the parameters' device: a CUDA
    graph that holds a step goes on counting.

    Args:
        counts: of each parameter; how often its regions have been updated so far is copied.
        device: the parameters'.
    """

    def __init__(self, counts: Mapping[Tensor, RegionCounts], device: torch.device) -> None:
        self._counts = dict(counts)
        ends = accumulate(len(count.updates) for count in counts.values())
        self._first = {
            param: end - len(count.updates)
            for (param, count), end in zip(counts.items(), ends, strict=True)
        }
        totals = [total for count in counts.values() for total in count.totals]
        self._totals = torch.tensor(totals, dtype=torch.int64, device=device)
        self._places: dict[tuple[tuple[int, int], ...], Tensor] = {}

    def has(self, param: Tensor, counts: RegionCounts) -> bool:
        """Whether these very regions of the parameter are counted here."""
        known = self._counts.get(param)
        return known is not None and known.masks is counts.masks

    def places(self, regions: Sequence[tuple[Tensor, int]]) -> Tensor:
        """Where the first regions of some parameters are counted, so many of each."""
        key = tuple((id(param), count) for param, count in regions)
        if key not in self._places:
            firsts = ((self._first[param], count) for param, count in regions)
            places = [place for first, count in firsts for place in range(first, first + count)]
            self._places[key] = torch.tensor(places, device=self._totals.device)
        return self._places[key]

    def after(self, places: Tensor) -> Tensor:
        """The counts at these places, one update later."""
        return self._totals.index_select(0, places) + 1

    def keep(self, places: Tensor, counts: Tensor) -> None:
        """They are these now."""
        self._totals.index_copy_(0, places, counts)

    def fetched(self) -> dict[Tensor, RegionCounts]:
        """The counts as numbers, which waits for the device."""
        totals: list[int] = self._totals.tolist()
        found: dict[Tensor, RegionCounts] = {}
        for param, counts in self._counts.items():
            first = self._first[param]
            found[param] = counts.with_totals(totals[first : first + len(counts.updates)])
        return found


def _nested(masks: tuple[Mask, ...], updates: tuple[int, ...]) -> RegionCounts:
    steps = (Difference(outer, inner) for inner, outer in pairwise(masks))
    return RegionCounts(masks, updates, (*masks[:1], *steps))
