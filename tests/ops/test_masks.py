"""Masks: every method agrees with the definition of the mask, element by element."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

import partial_kernels as pk
from partial_kernels.masks import Difference, union

Shape = tuple[int, ...]


def shapes() -> st.SearchStrategy[Shape]:
    """Vectors, matrices (most of them) and convolution kernels."""
    dimensions = st.sampled_from([1, 2, 2, 2, 3, 4])
    return dimensions.flatmap(lambda ndim: st.tuples(*[st.integers(0, 6)] * ndim))


def counts(size: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(0, size)


def indices(size: int) -> st.SearchStrategy[list[int] | None]:
    some = st.sets(st.integers(0, size - 1)).map(sorted) if size else st.just([])
    return st.none() | some


def bits(shape: Shape) -> st.SearchStrategy[Tensor]:
    count = math.prod(shape)
    flags = st.lists(st.booleans(), min_size=count, max_size=count)
    return flags.map(lambda values: torch.tensor(values, dtype=torch.bool).view(shape))


@st.composite
def masks(draw: st.DrawFn, shape: Shape) -> pk.Mask:
    kinds = ["full", "prefix", "index", "element", "packed"] + ["block"] * 2 * (len(shape) == 2)
    kind = draw(st.sampled_from(kinds))
    has_cols = len(shape) > 1
    if kind == "prefix":
        return pk.Prefix(draw(counts(shape[0])), draw(counts(shape[1])) if has_cols else None)
    if kind == "index":
        return pk.Index(draw(indices(shape[0])), draw(indices(shape[1])) if has_cols else None)
    if kind == "element":
        return pk.Element(draw(bits(shape)))
    if kind == "packed":
        return pk.Packed(draw(indices(math.prod(shape))) or [])
    if kind == "block":
        size = draw(st.integers(1, 7))
        return pk.Block(draw(bits((-(-shape[0] // size), -(-shape[1] // size)))), size)
    return pk.Full()


@st.composite
def masked_shapes(draw: st.DrawFn, count: int = 1) -> tuple[Any, ...]:
    """A shape and ``count`` masks that fit it."""
    shape = draw(shapes())
    return shape, *(draw(masks(shape)) for _ in range(count))


def defined(mask: pk.Mask, shape: Shape) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Membership of every element, from the definition of the mask in its docstring."""
    at = np.indices(shape)
    inside = np.ones(shape, dtype=bool)
    match mask:
        case pk.Prefix(rows=rows, cols=cols):
            for axis, count in enumerate((rows, cols)):
                if count is not None:
                    inside &= at[axis] < count
        case pk.Index(rows=rows, cols=cols):
            for axis, index in enumerate((rows, cols)):
                if index is not None:
                    inside &= np.isin(at[axis], index.tolist())
        case pk.Block(bitmap=bitmap, size=size):
            if inside.size:
                inside = bitmap.numpy()[at[0] // size, at[1] // size]
        case pk.Element(mask=elements):
            inside = elements.numpy()
        case pk.Packed(index=index):
            inside = np.isin(np.arange(inside.size), index.tolist()).reshape(shape)
        case _:
            assert isinstance(mask, pk.Full)
    return inside


def numbered(shape: Shape) -> Tensor:
    """No element is 0 and no two are equal."""
    return torch.arange(1.0, 1 + math.prod(shape)).view(shape)


def coverage(mask: pk.Mask, shape: Shape) -> Tensor | None:
    """How often the mask's views hold each element."""
    target = torch.zeros(shape)
    views = mask.views(target)
    for view in views or []:
        view += 1
    return None if views is None else target


@given(masked_shapes())
def test_dense_and_numel_follow_the_definition(drawn: tuple[Shape, pk.Mask]) -> None:
    shape, mask = drawn
    mask.check(shape)
    dense = mask.dense(shape)
    assert dense.dtype == torch.bool
    np.testing.assert_array_equal(dense.numpy(), defined(mask, shape), strict=True)
    assert mask.numel(shape) == defined(mask, shape).sum()
    assert torch.equal(mask.dense(shape, "cpu"), dense)


@given(masked_shapes())
def test_restrict_cuts_out_or_zeroes(drawn: tuple[Shape, pk.Mask]) -> None:
    shape, mask = drawn
    tensor, inside = numbered(shape), torch.from_numpy(defined(mask, shape))
    restricted = mask.restrict(tensor)
    assert tuple(restricted.shape) == mask.restricted_shape(shape)
    if mask.compact:
        assert restricted.flatten().tolist() == tensor[inside].tolist()
    else:
        assert torch.equal(restricted, tensor * inside)
        assert torch.equal(mask.restrict(torch.where(inside, tensor, math.nan)), tensor * inside)


@given(masked_shapes())
def test_restrict_is_differentiable(drawn: tuple[Shape, pk.Mask]) -> None:
    shape, mask = drawn
    tensor = numbered(shape).requires_grad_()
    (gradient,) = torch.autograd.grad(mask.restrict(tensor).sum(), tensor)
    assert torch.equal(gradient, torch.from_numpy(defined(mask, shape)).float())


@given(masked_shapes())
def test_views_hold_exactly_the_mask(drawn: tuple[Shape, pk.Mask]) -> None:
    shape, mask = drawn
    covered = coverage(mask, shape)
    assert (covered is None) == (not isinstance(mask, pk.Full | pk.Prefix))
    if covered is not None:
        assert torch.equal(covered, torch.from_numpy(defined(mask, shape)).float())


@given(masked_shapes(count=2))
def test_set_operations_follow_the_definition(drawn: tuple[Shape, pk.Mask, pk.Mask]) -> None:
    shape, first, second = drawn
    a, b = defined(first, shape), defined(second, shape)
    assert first.issubset(second, shape) == bool((a <= b).all())
    both = union(first, second, shape)
    np.testing.assert_array_equal(both.dense(shape).numpy(), a | b, strict=True)
    if (a <= b).all() or (b <= a).all():
        assert both in (first, second)


@given(masked_shapes(count=2))
def test_difference_follows_the_definition(drawn: tuple[Shape, pk.Mask, pk.Mask]) -> None:
    shape, outer, inner = drawn
    difference = Difference(outer, inner)
    a, b = defined(outer, shape), defined(inner, shape)
    difference.check(shape)
    np.testing.assert_array_equal(difference.dense(shape).numpy(), a & ~b, strict=True)
    assert difference.numel(shape) == (a & ~b).sum()
    assert pk.Mask.from_state(json.loads(json.dumps(difference.state()))) == difference
    covered = coverage(difference, shape)
    if covered is not None:
        assert torch.equal(covered, torch.from_numpy(a & ~b).float())


@given(shapes(), st.data())
def test_difference_of_prefixes_has_views(shape: Shape, data: st.DataObject) -> None:
    outer = pk.Prefix(*(data.draw(counts(n)) for n in shape[:2]))
    kept = outer.restricted_shape(shape)[:2]
    inner = pk.Prefix(*(data.draw(counts(n)) for n in kept))
    assume(inner.issubset(outer, shape))
    covered = coverage(Difference(outer, inner), shape)
    assert covered is not None
    inside = defined(outer, shape) & ~defined(inner, shape)
    assert torch.equal(covered, torch.from_numpy(inside).float())


@given(masked_shapes())
def test_state_round_trip(drawn: tuple[Shape, pk.Mask]) -> None:
    shape, mask = drawn
    again = pk.Mask.from_state(json.loads(json.dumps(mask.state())))
    assert type(again) is type(mask)
    assert again == mask and hash(again) == hash(mask)
    np.testing.assert_array_equal(again.dense(shape).numpy(), defined(mask, shape), strict=True)


@given(masked_shapes(count=2))
def test_equality_is_by_content(drawn: tuple[Shape, pk.Mask, pk.Mask]) -> None:
    _, first, second = drawn
    assert (first == second) == (first.state() == second.state())
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert twin is not first and twin == first and hash(twin) == hash(first)
    assert first != object()


def test_equality_tells_kinds_and_layouts_apart() -> None:
    ones = torch.ones(2, 3, dtype=torch.bool)
    different = [
        pk.Full(),
        pk.Prefix(),
        pk.Prefix(2),
        pk.Prefix(None, 2),
        pk.Index(),
        pk.Index([]),
        pk.Index(None, []),
        pk.Index([0, 1]),
        pk.Index(None, [0, 1]),
        pk.Packed([0, 1]),
        pk.Element(ones),
        pk.Element(ones.view(3, 2)),
        pk.Element(~ones),
        pk.Block(ones, 1),
        pk.Block(ones, 2),
        pk.Block(ones.view(3, 2), 1),
    ]
    assert len(set(different)) == len(different)
    assert pk.Element(ones.mT.contiguous().mT) == pk.Element(ones)


@pytest.mark.parametrize(
    ("mask", "field"),
    [
        (pk.Prefix(1, 2), "rows"),
        (pk.Index([0]), "rows"),
        (pk.Block(torch.ones(1, 1, dtype=torch.bool), 2), "size"),
        (pk.Element(torch.ones(1, dtype=torch.bool)), "mask"),
        (pk.Packed([0]), "index"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, pk.Mask) else value,
)
def test_masks_are_immutable(mask: pk.Mask, field: str) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(mask, field, None)


def test_repr_is_short() -> None:
    assert repr(pk.Prefix(64, None)) == "Prefix(rows=64, cols=None)"
    assert repr(pk.Index(range(500))) == "Index(rows=500, cols=all)"
    assert repr(pk.Block(torch.eye(3, dtype=torch.bool), 32)) == "Block(3 of 3 x 3 blocks, size=32)"
    assert repr(pk.Element(torch.eye(3, dtype=torch.bool))) == "Element(3 of 9)"
    assert repr(pk.Packed([1, 5])) == "Packed(2 elements)"


def test_masks_are_contiguous() -> None:
    bits = torch.ones(2, 3, dtype=torch.bool).mT
    for tensor in (pk.Element(bits).mask, pk.Block(bits, 2).bitmap):
        assert tensor.is_contiguous() and torch.equal(tensor, bits)
    rows = pk.Index(torch.arange(6)[::2]).rows
    assert rows is not None and rows.is_contiguous() and rows.tolist() == [0, 2, 4]


def test_index_accepts_tensors_and_sequences() -> None:
    rows = torch.tensor([1, 4])
    assert pk.Index(rows).rows is rows
    assert pk.Index(rows) == pk.Index([1, 4]) == pk.Index((1, 4)) == pk.Index(range(1, 7, 3))
    empty = pk.Index([]).rows
    assert empty is not None and empty.dtype == torch.int64 and empty.shape == (0,)


BOOL = torch.ones(2, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pk.Prefix(-1), ValueError, r"Prefix rows must be >= 0, got -1"),
        (lambda: pk.Prefix(1, -2), ValueError, r"Prefix cols must be >= 0, got -2"),
        (lambda: pk.Prefix(1.5), TypeError, r"Prefix rows must be an int or None, got 1\.5"),
        (lambda: pk.Prefix(None, True), TypeError, r"Prefix cols must be an int or None, got True"),
        (
            lambda: pk.Index([1, 0]),
            ValueError,
            r"Index rows .* increasing, got 0 after 1 at pos.* 1",
        ),
        (lambda: pk.Index(None, [0, 3, 3]), ValueError, r"Index cols .* got 3 after 3 at pos.* 2"),
        (lambda: pk.Index([-1, 2]), ValueError, r"Index rows must be >= 0, got -1"),
        (lambda: pk.Index([0.5, 1.5]), ValueError, r"Index rows .* 1-D int64.*, got 1-D float32"),
        (lambda: pk.Index([False, True]), ValueError, r"Index rows .*, got 1-D bool"),
        (lambda: pk.Index(torch.tensor([0, 1]).int()), ValueError, r"Index rows .*, got 1-D int32"),
        (lambda: pk.Index([[0, 1]]), ValueError, r"Index rows .*, got 2-D int64"),
        (lambda: pk.Index(torch.tensor(1)), ValueError, r"Index rows .*, got 0-D int64"),
        (lambda: pk.Packed([3, 2]), ValueError, r"Packed index .* got 2 after 3 at position 1"),
        (lambda: pk.Packed([-3]), ValueError, r"Packed index must be >= 0, got -3"),
        (lambda: pk.Block(BOOL.long(), 4), TypeError, r"Block bitmap must be a bool .* got int64"),
        (lambda: pk.Block(BOOL[0], 4), ValueError, r"Block bitmap must be 2-D, got shape \[2\]"),
        (lambda: pk.Block(BOOL, 0), ValueError, r"Block size must be >= 1, got 0"),
        (lambda: pk.Block(BOOL, 1.5), TypeError, r"Block size must be an int, got 1\.5"),
        (lambda: pk.Element(BOOL.float()), TypeError, r"Element mask .* bool tensor, got float32"),
        (lambda: pk.Element([True]), TypeError, r"Element mask must be a bool tensor, got list"),
    ],
)
def test_bad_masks_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "shape", "message"),
    [
        (pk.Prefix(5), (4, 3), r"Prefix\(rows=5, cols=None\): rows must be <= 4, got 5"),
        (pk.Prefix(4, 4), (4, 3), r"cols must be <= 3, got 4"),
        (pk.Prefix(2, 2), (4,), r"has cols, but the parameter has shape \[4\]"),
        (pk.Prefix(0), (), r"has rows, but the parameter is a scalar"),
        (pk.Index([0, 4]), (4, 3), r"Index rows must be < 4, got 4"),
        (pk.Index(None, [3]), (4, 3), r"Index cols must be < 3, got 3"),
        (pk.Index([0], [3]), (4, 3), r"Index cols must be < 3, got 3"),
        (pk.Index(None, [0]), (4,), r"has cols, but the parameter has shape \[4\]"),
        (pk.Block(BOOL, 2), (4, 5), r"\[4, 5\] with size 2 must be \[2, 3\], got \[2, 2\]"),
        (pk.Block(BOOL, 2), (4, 4, 1, 1), r"masks a matrix \[O, I\], got shape \[4, 4, 1, 1\]"),
        (pk.Element(BOOL), (2, 3), r"parameter's shape \[2, 3\], got \[2, 2\]"),
        (pk.Packed([1, 12]), (4, 3), r"Packed index must be < 12, got 12"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: pk.Mask, shape: Shape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask.check(shape)


@pytest.mark.parametrize("mask", [pk.Index([0, 2], [1]), pk.Packed([1, 5])], ids=repr)
def test_an_index_is_copied_to_a_device_once(mask: pk.Mask) -> None:
    name = "index" if isinstance(mask, pk.Packed) else "rows"
    meta, here = torch.device("meta"), torch.device("cpu")
    there = mask.on(meta, name)
    assert there is not None and there.device == meta and mask.on(meta, name) is there
    assert mask.on(here, name) is getattr(mask, name)
    assert copy.deepcopy(mask) == mask and copy.deepcopy(mask).on(here, name) is not there
    assert pk.Index(cols=[1]).on(meta, "rows") is None


def test_a_copy_of_an_index_serves_every_mode() -> None:
    mask, meta = pk.Index([0, 2]), torch.device("meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = mask.on(meta, "rows")
    with torch.inference_mode():
        copied = mask.on(meta, "rows")
    assert copied is not None and copied is not fake and not copied.is_inference()
    assert mask.on(meta, "rows") is copied
