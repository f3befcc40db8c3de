"""``masked_linear`` for Prefix and Index masks: the compact linear layer of a sub-network."""

from __future__ import annotations

from torch import Tensor

from partial_kernels._core.linear_ops import linear_function
from partial_kernels.linear import masks_linear
from partial_kernels.masks import Index, Prefix
from partial_kernels.submatrix.reference import OPS

Selection = tuple[int, Tensor | None, Tensor | None]


_linear = linear_function(OPS)


def _selection(mask: Prefix | Index, weight: Tensor) -> Selection:
    if isinstance(mask, Prefix):
        return weight.shape[0] if mask.rows is None else mask.rows, None, None
    row_index, col_index = (
        None if index is None else mask.on(weight.device, index) for index in (mask.rows, mask.cols)
    )
    # An index's own length would be one more symbol for dynamo to carry to the backward.
    return weight.shape[0] if row_index is None else 0, row_index, col_index


@masks_linear(Prefix, Index)
def submatrix_linear(
    x_TC: Tensor, weight: Tensor, bias: Tensor | None, mask: Prefix | Index, impl: str
) -> Tensor:
    return _linear(x_TC, weight, bias, impl, *_selection(mask, weight))
