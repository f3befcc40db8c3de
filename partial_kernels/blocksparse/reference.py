"""Linear layer that keeps square blocks of its weight: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.linear_ops import zeroed_linear_ops


def masked(weight_OI: Tensor, bitmap: Tensor, size: int) -> Tensor:
    """W where its block is kept, exactly 0 elsewhere; blocks at the edges may be cut off."""
    mask = bitmap.repeat_interleave(size, 0).repeat_interleave(size, 1)
    mask_OI = mask[: weight_OI.shape[0], : weight_OI.shape[1]]
    return torch.where(mask_OI, weight_OI, weight_OI.new_zeros(()))


OPS = zeroed_linear_ops("blocksparse", "Tensor bitmap, int size", masked)
