"""Masks that keep a parameter's shape: the sub-network sees zeros off the mask."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from partial_kernels.masks.base import ByContent, Shape, content, index_tensor, largest, to_list

__all__ = ["Block", "Element", "Packed"]


@dataclass(frozen=True, eq=False)
class Block(ByContent):
    """Square blocks of ``size``: block (i, j) of a matrix is kept where ``bitmap[i, j]`` is True.

    ``bitmap`` is a bool tensor ``[ceil(O / size), ceil(I / size)]``; blocks at the edge may be cut
    off.
    """

    bitmap: Tensor
    size: int

    compact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "bitmap", _bool_tensor(self.bitmap, "Block bitmap"))
        if self.bitmap.ndim != 2:
            raise ValueError(f"Block bitmap must be 2-D, got shape {list(self.bitmap.shape)}")
        if not isinstance(self.size, int) or isinstance(self.size, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"Block size must be an int, got {self.size!r}")
        if self.size < 1:
            raise ValueError(f"Block size must be >= 1, got {self.size}")

    def check(self, shape: Shape) -> None:
        if len(shape) != 2:
            raise ValueError(f"Block masks a matrix [O, I], got shape {list(shape)}")
        want = [-(-n // self.size) for n in shape]
        if list(self.bitmap.shape) != want:
            raise ValueError(
                f"Block bitmap for {list(shape)} with size {self.size} must be {want}, "
                f"got {list(self.bitmap.shape)}"
            )

    def numel(self, shape: Shape) -> int:
        return int(self.dense(shape).sum())

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        bitmap = self.bitmap.to(device) if device is not None else self.bitmap
        full = bitmap.repeat_interleave(self.size, 0).repeat_interleave(self.size, 1)
        return full[: shape[0], : shape[1]]

    @cached_property
    def _key(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (self.size, tuple(self.bitmap.shape), content(self.bitmap))

    def __repr__(self) -> str:
        blocks = " x ".join(str(n) for n in self.bitmap.shape)
        return f"Block({int(self.bitmap.sum())} of {blocks} blocks, size={self.size})"

    def state(self) -> dict[str, Any]:
        return {"kind": "Block", "size": self.size, **_pack_bits(self.bitmap)}

    @classmethod
    def _from_fields(cls, size: int, shape: list[int], bits: str) -> Block:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cls(_unpack_bits(shape, bits), size)


@dataclass(frozen=True, eq=False)
class Element(ByContent):
    """Any set of elements, as a bool tensor of the parameter's shape: True inside."""

    mask: Tensor

    compact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "mask", _bool_tensor(self.mask, "Element mask"))

    def check(self, shape: Shape) -> None:
        if tuple(self.mask.shape) != tuple(shape):
            raise ValueError(
                f"Element mask must have the parameter's shape {list(shape)}, "
                f"got {list(self.mask.shape)}"
            )

    @cached_property
    def _count(self) -> int:
        return int(self.mask.sum())

    def numel(self, shape: Shape) -> int:
        return self._count

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        return self.mask if device is None else self.mask.to(device)

    @cached_property
    def _key(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (tuple(self.mask.shape), content(self.mask))

    def __repr__(self) -> str:
        return f"Element({self._count} of {self.mask.numel()})"

    def state(self) -> dict[str, Any]:
        return {"kind": "Element", **_pack_bits(self.mask)}

    @classmethod
    def _from_fields(cls, shape: list[int], bits: str) -> Element:  # pyright: ignore[reportIncompatibleMethodOverride]
        return cls(_unpack_bits(shape, bits))


@dataclass(frozen=True, eq=False, init=False)
class Packed(ByContent):
    """A few elements, as strictly increasing flat int64 positions in the parameter's row-major
    order.
    """

    index: Tensor

    compact: ClassVar[bool] = False

    _largest: int = field(init=False, repr=False)

    def __init__(self, index: Tensor | Sequence[int]) -> None:
        object.__setattr__(self, "index", index_tensor(index, "Packed index"))
        object.__setattr__(self, "_largest", largest(self.index))

    def check(self, shape: Shape) -> None:
        if self._largest >= math.prod(shape):
            raise ValueError(f"Packed index must be < {math.prod(shape)}, got {self._largest}")

    def numel(self, shape: Shape) -> int:
        return len(self.index)

    def dense(self, shape: Shape, device: torch.device | str | None = None) -> Tensor:
        out = torch.zeros(math.prod(shape), dtype=torch.bool, device=device)
        index = cast("Tensor", self.on(out.device, "index"))
        out.index_fill_(0, index, True)
        return out.view(tuple(shape))

    @cached_property
    def _key(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return content(self.index)

    def __repr__(self) -> str:
        return f"Packed({len(self.index)} elements)"

    def state(self) -> dict[str, Any]:
        return {"kind": "Packed", "index": to_list(self.index)}


def _bool_tensor(tensor: Tensor, what: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool:  # pyright: ignore[reportUnnecessaryIsInstance]
        got = str(tensor.dtype)[6:] if isinstance(tensor, Tensor) else type(tensor).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{what} must be a bool tensor, got {got}")
    # A mask's strides would show in those of a gradient, and kernels read rows. Of a view, compiled
    # code would save another tensor in every call, and backends keep on it what they make of it.
    return tensor.detach().contiguous()


def _pack_bits(tensor: Tensor) -> dict[str, Any]:
    bits = np.packbits(tensor.detach().cpu().numpy())
    return {"shape": list(tensor.shape), "bits": base64.b64encode(bits.tobytes()).decode()}


def _unpack_bits(shape: list[int], bits: str) -> Tensor:
    packed = np.frombuffer(base64.b64decode(bits), dtype=np.uint8)
    values = np.unpackbits(packed, count=math.prod(shape))
    return cast(Any, torch).from_numpy(values).bool().view(shape)
