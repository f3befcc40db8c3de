"""Compact masks: rows and columns of a parameter; the sub-network sees a smaller tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from partial_kernels.masks.base import (
    ByContent,
    Mask,
    Shape,
    content,
    index_tensor,
    largest,
    to_list,
)

__all__ = ["Full", "Index", "Prefix"]


@dataclass(frozen=True)
class Full(Mask):
    """Every element."""

    compact: ClassVar[bool] = True

    def check(self, shape: Shape) -> None:
        pass

    def numel(self, shape: Shape) -> int:
        return math.prod(shape)

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        return torch.ones(tuple(shape), dtype=torch.bool, device=device)

    def restrict(self, tensor: Tensor) -> Tensor:
        return tensor

    def views(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def issubset(self, other: Mask, shape: Shape) -> bool:
        return other.numel(shape) == math.prod(shape)

    def state(self) -> dict[str, Any]:
        return {"kind": "Full"}


@dataclass(frozen=True)
class Prefix(Mask):
    """The first ``rows`` rows and ``cols`` columns: ``W[:rows, :cols]``; None keeps all."""

    rows: int | None = None
    cols: int | None = None

    compact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, count in (("rows", self.rows), ("cols", self.cols)):
            if count is None:
                continue
            if type(count) is not int:
                raise TypeError(f"Prefix {name} must be an int or None, got {count!r}")
            if count < 0:
                raise ValueError(f"Prefix {name} must be >= 0, got {count}")

    def check(self, shape: Shape) -> None:
        for name, count, size in _axes(self, self.rows, self.cols, shape):
            if count > size:
                raise ValueError(f"{self}: {name} must be <= {size}, got {count}")

    def restricted_shape(self, shape: Shape) -> tuple[int, ...]:
        kept = list(shape)
        for axis, count in enumerate((self.rows, self.cols)):
            if count is not None:
                kept[axis] = count
        return tuple(kept)

    def numel(self, shape: Shape) -> int:
        return math.prod(self.restricted_shape(shape))

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        out = torch.zeros(tuple(shape), dtype=torch.bool, device=device)
        self.restrict(out).fill_(True)
        return out

    def restrict(self, tensor: Tensor) -> Tensor:
        if self.rows is not None:
            tensor = tensor[: self.rows]
        return tensor if self.cols is None else tensor[:, : self.cols]

    def views(self, tensor: Tensor) -> list[Tensor]:
        return [self.restrict(tensor)]

    def issubset(self, other: Mask, shape: Shape) -> bool:
        if isinstance(other, Prefix):
            mine, theirs = self.restricted_shape(shape), other.restricted_shape(shape)
            return 0 in mine or all(a <= b for a, b in zip(mine, theirs, strict=True))
        return super().issubset(other, shape)

    def state(self) -> dict[str, Any]:
        return {"kind": "Prefix", "rows": self.rows, "cols": self.cols}


@dataclass(frozen=True, eq=False, init=False)
class Index(ByContent):
    """The given rows and columns: ``W[rows][:, cols]``; strictly increasing int64 indices, None
    keeps all.

    Lists are turned into tensors. A tensor stays on its device; its values must not change
    afterwards.
    """

    rows: Tensor | None = None
    cols: Tensor | None = None

    compact: ClassVar[bool] = True

    # Read here, not when first checked: a compiled call cannot read a tensor's values.
    _largest: tuple[int, ...] = field(init=False, repr=False)

    def __init__(
        self, rows: Tensor | Sequence[int] | None = None, cols: Tensor | Sequence[int] | None = None
    ) -> None:
        for name, value in (("rows", rows), ("cols", cols)):
            index = None if value is None else index_tensor(value, f"Index {name}")
            object.__setattr__(self, name, index)
        given = [index for index in (self.rows, self.cols) if index is not None]
        object.__setattr__(self, "_largest", tuple(map(largest, given)))

    def check(self, shape: Shape) -> None:
        for (name, _, size), last in zip(
            _axes(self, self.rows, self.cols, shape), self._largest, strict=True
        ):
            if last >= size:
                raise ValueError(f"Index {name} must be < {size}, got {last}")

    def restricted_shape(self, shape: Shape) -> tuple[int, ...]:
        kept = list(shape)
        for axis, index in enumerate((self.rows, self.cols)):
            if index is not None:
                kept[axis] = index.shape[0]
        return tuple(kept)

    def numel(self, shape: Shape) -> int:
        return math.prod(self.restricted_shape(shape))

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        out = torch.ones(tuple(shape), dtype=torch.bool, device=device)
        for axis, index in enumerate((self.rows, self.cols)):
            if index is None:
                continue
            keep = torch.zeros(shape[axis], dtype=torch.bool, device=device)
            keep.index_fill_(0, index.to(keep.device), True)
            out &= keep.view(-1, *[1] * (len(shape) - 1 - axis))
        return out

    def restrict(self, tensor: Tensor) -> Tensor:
        # Two index_selects beat W[rows[:, None], cols] by 2-3x.
        for axis, name in enumerate(("rows", "cols")):
            if (index := self.on(tensor.device, name)) is not None:
                tensor = tensor.index_select(axis, index)
        return tensor

    @cached_property
    def _key(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (content(self.rows), content(self.cols))

    def __repr__(self) -> str:
        rows, cols = (None if i is None else len(i) for i in (self.rows, self.cols))
        return f"Index(rows={_some(rows)}, cols={_some(cols)})"

    def state(self) -> dict[str, Any]:
        rows, cols = (None if i is None else to_list(i) for i in (self.rows, self.cols))
        return {"kind": "Index", "rows": rows, "cols": cols}


def _axes(mask: Mask, rows: Any, cols: Any, shape: Shape) -> list[tuple[str, Any, int]]:
    """(name, value, size) of each axis that the mask cuts."""
    given = [("rows", rows), ("cols", cols)]
    if cols is not None and len(shape) < 2:
        raise ValueError(f"{mask} has cols, but the parameter has shape {list(shape)}")
    if rows is not None and len(shape) < 1:
        raise ValueError(f"{mask} has rows, but the parameter is a scalar")
    return [(n, v, shape[axis]) for axis, (n, v) in enumerate(given) if v is not None]


def _some(count: int | None) -> str:
    return "all" if count is None else str(count)
