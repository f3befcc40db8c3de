"""``first_unsorted``: one pass that finds where an index stops being strictly increasing and in
range.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_unsorted"]

# C++ has an implementation for the CPU where the library is there; torch's dispatcher takes it.
torch.library.define("partial_kernels::first_unsorted", "(Tensor index, int upper) -> int")


@torch.library.impl("partial_kernels::first_unsorted", "CompositeExplicitAutograd")
def _first_unsorted(index: Tensor, upper: int) -> int:
    wrong = (index < 0) | (index >= upper)
    wrong[1:] |= index[1:] <= index[:-1]
    return int(wrong.int().argmax()) if bool(wrong.any()) else -1


def first_unsorted(index: Tensor, upper: int) -> int:
    """Position of the first element of a 1-D int64 tensor that is negative, >= ``upper`` or not
    greater than the one before it; -1 if there is none."""
    return torch.ops.partial_kernels.first_unsorted.default(index, upper)
