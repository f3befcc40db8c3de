"""``RegionCounts``: every element's count of updates, without counting elements one by one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import partial_kernels as pk
from maskedtrain.optim.regions import MAX_NESTED, RegionCounts
from partial_kernels.masks import Difference

SHAPE = (4, 3)


def counted(regions: list[tuple[pk.Mask, int]]) -> np.ndarray:
    """Each element's count, 0 where no region holds it; regions must not overlap."""
    total = torch.zeros(SHAPE, dtype=torch.int64)
    for region, count in regions:
        inside = region.dense(SHAPE)
        assert not (total[inside] != 0).any()
        total[inside] = count
    return total.numpy()


def elements(positions: list[int]) -> pk.Element:
    mask = torch.zeros(12, dtype=torch.bool)
    mask[positions] = True
    return pk.Element(mask.view(SHAPE))


MASKS = st.one_of(
    st.builds(pk.Prefix, st.integers(0, 4) | st.none(), st.integers(0, 3) | st.none()),
    st.builds(pk.Index, st.sets(st.integers(0, 3)).map(sorted) | st.none()),
    st.builds(elements, st.lists(st.integers(0, 11))),
    st.just(pk.Full()),
)


@given(st.lists(MASKS, min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=12))
def test_counts_follow_the_definition(masks: list[pk.Mask], order: list[int]) -> None:
    counts, own = RegionCounts(), np.zeros(SHAPE, dtype=np.int64)
    used: list[np.ndarray] = []
    for updates, pick in enumerate(order, start=1):
        mask = masks[pick % len(masks)]
        inside = mask.dense(SHAPE).numpy()
        own += inside
        used.append(inside)
        counts, regions = counts.updated(mask, SHAPE)
        nested = all((a <= b).all() or (b <= a).all() for a in used for b in used)
        expected = np.where(inside, own if nested else updates, 0)
        np.testing.assert_array_equal(counted(regions), expected)
        assert (counts.masks is not None) == nested


@given(st.lists(MASKS, min_size=1, max_size=4), st.lists(st.integers(0, 3), max_size=12))
def test_state_continues(masks: list[pk.Mask], order: list[int]) -> None:
    counts = again = RegionCounts()
    for pick in order:
        mask = masks[pick % len(masks)]
        again = RegionCounts.from_state(json.loads(json.dumps(again.state())), SHAPE)
        counts, regions = counts.updated(mask, SHAPE)
        again, same = again.updated(mask, SHAPE)
        np.testing.assert_array_equal(counted(regions), counted(same))
        assert counts.state() == again.state()


def test_equal_sets_are_one_mask_whatever_they_are_called() -> None:
    counts = RegionCounts()
    for mask in (pk.Full(), pk.Prefix(), pk.Prefix(4, 3), pk.Index([0, 1, 2, 3]), pk.Full()):
        counts, regions = counts.updated(mask, SHAPE)
        assert len(regions) == 1
    assert counts.updates == (5,)


def test_regions_of_prefixes_are_boxes() -> None:
    counts = RegionCounts()
    for mask in (pk.Full(), pk.Prefix(1, 1), pk.Prefix(2, 2)):
        counts, _ = counts.updated(mask, SHAPE)
    _, regions = counts.updated(counts.masks[-1] if counts.masks else pk.Full(), SHAPE)
    assert [count for _, count in regions] == [4, 3, 2]
    assert all(region.views(torch.zeros(SHAPE)) is not None for region, _ in regions)
    assert isinstance(regions[1][0], Difference)


def test_more_masks_than_are_counted_apart() -> None:
    counts, shape = RegionCounts(), (100,)
    for rows in range(1, MAX_NESTED + 1):
        counts, regions = counts.updated(pk.Prefix(rows), shape)
        assert len(regions) == rows
    counts, regions = counts.updated(pk.Prefix(MAX_NESTED + 1), shape)
    assert regions == [(pk.Prefix(MAX_NESTED + 1), MAX_NESTED + 1)]
    assert counts.masks is None


def test_known_masks_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    core, larger = elements([1, 5]), elements([1, 5, 7])
    counts = RegionCounts()
    for mask in (core, larger):
        counts, _ = counts.updated(mask, SHAPE)

    def compare(*_: object) -> bool:
        raise AssertionError("compared")

    for name in ("__eq__", "issubset", "dense"):
        monkeypatch.setattr(pk.Element, name, compare)
    for mask in (core, larger, larger, core):
        counts, _ = counts.updated(mask, SHAPE)
    assert counts.updates == (3, 3)


def test_an_equal_mask_takes_the_place_of_the_known_one() -> None:
    counts, _ = RegionCounts().updated(elements([1, 5]), SHAPE)
    mask = elements([1, 5])
    counts, regions = counts.updated(mask, SHAPE)
    assert counts.masks == (mask,)
    assert regions == [(mask, 2)]
    # From now on it is known by identity: masks read from a file, on the CPU, are not compared and
    # copied to the device again and again.
    assert regions[0][0] is mask


def test_masks_of_a_file_must_fit_the_parameter() -> None:
    state = RegionCounts().updated(pk.Prefix(4), SHAPE)[0].state()
    with pytest.raises(ValueError, match="rows must be <= 3, got 4"):
        RegionCounts.from_state(state, (3, 3))
