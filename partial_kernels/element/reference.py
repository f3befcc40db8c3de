"""Linear layer whose weight counts as zero off an element mask: the specification."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.linear_ops import zeroed_linear_ops


def masked(weight_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """``M * W``, exactly 0 off the mask whatever W holds there (a product would keep NaN)."""
    return torch.where(mask_OI, weight_OI, weight_OI.new_zeros(()))


OPS = zeroed_linear_ops("element", "Tensor mask", masked)
