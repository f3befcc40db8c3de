"""So few shapes that batches of sentence pairs of many lengths are padded to.

# B pairs, S source tokens, T target tokens
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = ["Shape", "make_buckets"]

Lengths = NDArray[np.int64]

Shape = tuple[int, int, int]
"""(B, S, T) of a batch."""


def make_buckets(
    source: Lengths, target: Lengths, max_tokens: int, count: int
) -> tuple[NDArray[np.int64], list[Shape]]:
    """Divide pairs by their longer side among at most ``count`` buckets, such that an epoch has
    the fewest tokens, padding and the last, partly empty batch of each bucket included.

    Args:
        source: tokens of each pair's source.
        target: tokens of each pair's target.
        max_tokens: a batch has the most pairs that ``B * max(S, T) <= max_tokens`` allows, or one.
        count: >= 1.

    Returns:
        Each pair's bucket, and the shape of each bucket's batches, from short to long.
    """
    longest = np.maximum(source, target)
    lengths, pairs = np.unique(longest, return_counts=True)
    sides = np.zeros((2, len(lengths)), np.int64)
    place = np.searchsorted(lengths, longest)
    for side, tokens in zip(sides, (source, target), strict=True):
        np.maximum.at(side, place, tokens)
    cuts = _cheapest(_costs(pairs, sides, max_tokens), count)
    widths = [sides[:, start:stop].max(1).tolist() for start, stop in pairwise(cuts)]
    shapes = [(max(1, max_tokens // max(S, T)), S, T) for S, T in widths]
    return np.searchsorted(cuts[1:], place, side="right"), shapes


def _costs(pairs: Lengths, sides: Lengths, max_tokens: int) -> NDArray[np.float64]:
    """Tokens of an epoch of a bucket of lengths ``i`` to ``j - 1``, at ``[i, j]``."""
    count = len(pairs)
    costs = np.full((count + 1, count + 1), np.inf)
    np.fill_diagonal(costs, 0)
    for i in range(count):
        S, T = np.maximum.accumulate(sides[:, i:], axis=1)
        B = np.maximum(1, max_tokens // np.maximum(S, T))
        costs[i, i + 1 :] = -(-pairs[i:].cumsum() // B) * B * (S + T)
    return costs


def _cheapest(costs: NDArray[np.float64], count: int) -> list[int]:
    """Where to cut the lengths into at most ``count`` buckets, from 0 to their number."""
    # Of the first j lengths, by the number of buckets; where the last of these starts.
    best, starts = costs[0], list[NDArray[np.int64]]()
    for _ in range(count - 1):
        totals = best[:, None] + costs
        starts.append(totals.argmin(0))
        best = totals.min(0)
    cuts = [len(costs) - 1]
    for start in reversed(starts):
        cuts.append(int(start[cuts[-1]]))
    return sorted({0, *cuts})
