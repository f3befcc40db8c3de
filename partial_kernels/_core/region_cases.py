"""Layouts and masks on which ops over lists of tensors are tested."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from partial_kernels.masks import Block, Difference, Element, Full, Index, Mask, Packed, Prefix

__all__ = ["LAYOUTS", "arranged", "masks"]

LAYOUTS = ("contiguous", "permuted", "sliced", "channels_last")


def arranged(values: Tensor, layout: str) -> Tensor:
    """A copy of the values in one of ``LAYOUTS``: same shape, other strides."""
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "permuted":
        reverse = tuple(reversed(range(values.ndim)))
        return values.permute(reverse).clone(memory_format=torch.contiguous_format).permute(reverse)
    if layout == "sliced":
        wide = values.new_full([2 * size + 1 for size in values.shape], math.nan)
        return wide[(slice(1, None, 2),) * values.ndim].copy_(values)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def masks(shape: tuple[int, ...]) -> dict[str, Mask]:
    """Masks of every kind that fit the shape, none of them empty or whole but ``full``."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    element = torch.rand(shape, generator=generator) < 0.4
    element.view(-1)[0], element.view(-1)[-1] = True, False
    rows, half = shape[0], -(-shape[0] // 2)
    scattered = list(range(0, rows - 1, 2))
    found: dict[str, Mask] = {
        "full": Full(),
        "prefix-rows": Prefix(half),
        "index-rows": Index(scattered),
        "element": Element(element),
        "packed": Packed(element.flatten().nonzero().flatten()),
        "difference-rows": Difference(Full(), Prefix(half)),
        "difference-element": Difference(Full(), Element(element)),
    }
    if len(shape) > 1:
        cols, narrow = shape[1], -(-shape[1] // 2)
        found |= {
            "prefix-cols": Prefix(None, narrow),
            "prefix": Prefix(half, narrow),
            "index-cols": Index(None, list(range(1, cols))),
            "index": Index(scattered, list(range(1, cols))),
            "difference": Difference(Full(), Prefix(half, narrow)),
            "difference-prefix": Difference(Prefix(rows - 1, cols - 1), Prefix(1, 1)),
            "difference-index": Difference(Prefix(rows - 1), Index(scattered, [0])),
        }
    if len(shape) == 2:
        bitmap = torch.ones(-(-shape[0] // 2), -(-shape[1] // 2), dtype=torch.bool)
        bitmap[0, -1] = bitmap[-1, 0] = False
        found["block"] = Block(bitmap, 2)
    return found
