"""What every mask is: a set of elements of a parameter, known by its shape alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from partial_kernels._core.index_check import first_unsorted

__all__ = ["ByContent", "Mask", "Shape", "content", "index_tensor", "largest", "to_list"]

Shape = Sequence[int]


class Mask:
    """A set of elements of a parameter. Use one of the subclasses."""

    kinds: ClassVar[dict[str, type[Mask]]] = {}
    """Every kind of mask, by the name of its class."""

    compact: ClassVar[bool]
    """True where the sub-network sees a smaller tensor, False where it sees zeros off the mask."""

    def __init_subclass__(cls) -> None:
        if "compact" in cls.__dict__:
            Mask.kinds[cls.__name__] = cls

    def check(self, shape: Shape) -> None:
        """Raise ValueError if this mask cannot belong to a parameter of this shape."""
        raise NotImplementedError

    def numel(self, shape: Shape) -> int:
        """Number of elements inside the mask, for a parameter of this shape."""
        raise NotImplementedError

    def restricted_shape(self, shape: Shape) -> tuple[int, ...]:
        """The shape of ``restrict(tensor)`` for a tensor of this shape."""
        return tuple(shape)

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        """The mask as a bool tensor of this shape: True inside."""
        raise NotImplementedError

    def laid_out(self, shape: Shape, device: torch.device) -> Tensor:
        """``dense``, kept for the next call: it is made in every optimizer step."""
        if torch.compiler.is_compiling():
            return self.dense(shape, device)
        where, held = self.__dict__.get("_laid_out", (None, None))
        if where == (tuple(shape), device):
            return cast("Tensor", held)
        with torch.inference_mode(False):
            made = self.dense(shape, device).contiguous()
        # A fake one holds nothing.
        if type(made) is Tensor:
            self.__dict__["_laid_out"] = (tuple(shape), device), made
        return made

    def on(self, device: torch.device, name: str) -> Tensor | None:
        """The mask's index of this name on the device, if it has one: copied there once, since to
        copy is to wait for the device.
        """
        index: Tensor | None = getattr(self, name)
        if index is None or index.device == device:
            return index
        if torch.compiler.is_compiling():
            # To be found there: a copy in a compiled call would be made, and waited for, in each.
            held: dict[Any, Tensor] = self.__dict__.get("_copies", {})
            return held[name, device] if (name, device) in held else index.to(device)
        copies: dict[Any, Tensor] = self.__dict__.setdefault("_copies", {})
        if (copied := copies.get((name, device))) is None:
            # One that is made in inference mode could not be saved for a backward later.
            with torch.inference_mode(False):
                copied = index.to(device)
            # A fake one holds nothing.
            if type(copied) is Tensor:
                copies[name, device] = copied
        return copied

    def restrict(self, tensor: Tensor) -> Tensor:
        """The tensor as the sub-network sees it: cut out if compact, else zero off the mask;
        differentiable.
        """
        return torch.where(self.dense(tensor.shape, tensor.device), tensor, tensor.new_zeros(()))

    def views(self, tensor: Tensor) -> list[Tensor] | None:
        """Strided views that together hold exactly the mask's elements, or None where none can."""
        return None

    def issubset(self, other: Mask, shape: Shape) -> bool:
        """Whether every element of this mask is in ``other``, for a parameter of this shape."""
        if self is other or self == other or other.numel(shape) == math.prod(shape):
            return True
        mine = self.dense(shape)
        return not bool((mine & ~other.dense(shape, mine.device)).any())

    def state(self) -> dict[str, Any]:
        """The mask as numbers, strings and lists (safe in any file); ``Mask.from_state`` is the
        inverse.
        """
        raise NotImplementedError

    @staticmethod
    def from_state(state: dict[str, Any]) -> Mask:
        """The mask that ``state()`` described."""
        fields = dict(state)
        kind = fields.pop("kind", None)
        if kind not in Mask.kinds:
            raise ValueError(f"a mask's kind must be one of {sorted(Mask.kinds)}, got {kind!r}")
        return Mask.kinds[kind]._from_fields(**fields)

    @classmethod
    def _from_fields(cls, **fields: Any) -> Mask:
        return cls(**fields)


class ByContent(Mask):
    """A mask that holds tensors: equal where their contents are."""

    _key: Any

    def __eq__(self, other: object) -> bool:
        return self is other or (
            type(self) is type(other) and self._key == getattr(other, "_key", None)
        )

    def __hash__(self) -> int:
        return hash((type(self), self._key))


def index_tensor(value: Tensor | Sequence[int], what: str) -> Tensor:
    """The value as an index: 1-D int64, strictly increasing, >= 0; ValueError about ``what`` if
    not.
    """
    index = value if isinstance(value, Tensor) else torch.as_tensor(value)
    if not isinstance(value, Tensor) and not index.numel():
        # An empty list has no dtype of its own.
        index = index.long()
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"{what} must be a 1-D int64 tensor, got {index.ndim}-D {str(index.dtype)[6:]}"
        )
    if (at := first_unsorted(index, torch.iinfo(torch.int64).max)) >= 0:
        value_at = int(index[at])
        if value_at < 0:
            raise ValueError(f"{what} must be >= 0, got {value_at} at position {at}")
        raise ValueError(
            f"{what} must be strictly increasing, "
            f"got {value_at} after {int(index[at - 1])} at position {at}"
        )
    return index.contiguous()


def largest(index: Tensor) -> int:
    """The largest element of an index; -1 where there is none."""
    return int(index[-1]) if len(index) else -1


def content(tensor: Tensor | None) -> bytes | None:
    """The values as bytes, to compare and hash by."""
    return None if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes()


def to_list(index: Tensor) -> list[int]:
    """The index as Python integers."""
    return cast("list[int]", cast(Any, index).tolist())
