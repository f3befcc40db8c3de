"""Linear layer that keeps square blocks of its weight: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.derived import derived
from partial_kernels._core.linear_ops import zeroed_linear_ops

__all__ = ["OPS", "dense_is_faster", "masked", "on"]


def masked(weight_OI: Tensor, bitmap: Tensor, size: int) -> Tensor:
    """W where its block is kept, exactly 0 elsewhere; blocks at the edges may be cut off."""
    mask = on(weight_OI.device, bitmap).repeat_interleave(size, 0).repeat_interleave(size, 1)
    mask_OI = mask[: weight_OI.shape[0], : weight_OI.shape[1]]
    return torch.where(mask_OI, weight_OI, weight_OI.new_zeros(()))


def on(device: torch.device, bitmap: Tensor) -> Tensor:
    """The bitmap on the device: copied there once, since to copy is to wait for the device."""
    if bitmap.device == device:
        return bitmap

    def copied() -> Tensor:
        # On one that is made in inference mode nothing could be kept.
        with torch.inference_mode(False):
            return bitmap.to(device)

    return derived(bitmap, f"on {device}", copied)


def dense_is_faster(bitmap: Tensor, limit: float, what: str) -> str | None:
    """Why a kernel that takes time in proportion to the kept blocks is not taken, if these are more
    than this share of all.
    """
    kept, total = derived(bitmap, "kept", lambda: int(bitmap.sum())), bitmap.numel()
    if kept <= limit * total:
        return None
    return f"{what} is faster where {kept} of {total} blocks are kept"


OPS = zeroed_linear_ops("blocksparse", "Tensor bitmap, int size", masked)
