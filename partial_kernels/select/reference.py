"""The k largest magnitudes of each row, or of whole columns by their sums: the specification.

Positions ascend. NaN counts as larger than infinity; of equal magnitudes (or sums, or NaNs) those
that come first are taken. Sums are taken in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_kernels._core.ops import Op

__all__ = ["SELECT"]

# T rows, N columns


def _fake(x: Tensor, k: int, by_column: bool, *_: Any) -> Tensor:
    shape = (k,) if by_column else (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.int64)


SELECT = Op("topk_select(Tensor x, SymInt k, bool by_column, str impl) -> Tensor", fake=_fake)


@SELECT.backend("reference")
def select(x_TN: Tensor, k: int, by_column: bool) -> Tensor:
    size = x_TN.abs().sum(0, dtype=torch.float64) if by_column else x_TN.abs()
    order = torch.sort(size, dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(-1).values
