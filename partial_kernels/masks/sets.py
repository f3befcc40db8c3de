"""Masks made of masks: unions, and what one adds to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from partial_kernels.masks.base import Mask, Shape
from partial_kernels.masks.compact import Full, Prefix
from partial_kernels.masks.zeroing import Element

__all__ = ["Difference", "union"]


@dataclass(frozen=True)
class Difference(Mask):
    """The elements of ``outer`` that are not in ``inner``.

    It is a region that optimizers update (what a sub-network adds to a smaller one), not something
    a forward pass can be restricted to.
    """

    outer: Mask
    inner: Mask

    compact: ClassVar[bool] = False

    def check(self, shape: Shape) -> None:
        self.outer.check(shape)
        self.inner.check(shape)

    def numel(self, shape: Shape) -> int:
        if self.inner.issubset(self.outer, shape):
            return self.outer.numel(shape) - self.inner.numel(shape)
        return int(self.dense(shape).sum())

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        outer = self.outer.dense(shape, device)
        return outer & ~self.inner.dense(shape, outer.device)

    def views(self, tensor: Tensor) -> list[Tensor] | None:
        inner, shape = self.inner, tensor.shape
        if not isinstance(self.outer, Full | Prefix) or not isinstance(inner, Prefix):
            return None
        if not inner.issubset(self.outer, shape):
            return None
        if inner.rows is None and inner.cols is None:
            return []
        outer = self.outer.restrict(tensor)
        # An L shape: the columns to the right of the inner rows, then the rows below them.
        rows = outer.shape[0] if inner.rows is None else inner.rows
        parts = [outer[rows:]]
        if inner.cols is not None:
            parts.insert(0, outer[:rows, inner.cols :])
        return [part for part in parts if part.numel()]

    def state(self) -> dict[str, Any]:
        return {
            "kind": "Difference",
            "outer": self.outer.state(),
            "inner": self.inner.state(),
        }

    @classmethod
    def _from_fields(cls, outer: dict[str, Any], inner: dict[str, Any]) -> Difference:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cls(Mask.from_state(outer), Mask.from_state(inner))


def union(first: Mask, second: Mask, shape: Shape) -> Mask:
    """The smallest mask that holds both: the larger of the two where they are nested, else an
    Element mask.
    """
    if first.issubset(second, shape):
        return second
    if second.issubset(first, shape):
        return first
    inside = first.dense(shape)
    return Element(inside | second.dense(shape, inside.device))
