"""Linear layer of a sub-network cut out of a weight's rows and columns: the specification.

With S the rows and C the columns kept::

    y = x W[S, C]^T + b[S]        dx = dy W[S, C]        dW[S, C] = dy^T x, 0 elsewhere

A selection is ``rows, row_index, col_index``: without ``row_index`` it is the leading ``rows``,
without ``col_index`` as many leading columns as x has. The product is taken in x's dtype, whatever
the weight's; dW has the weight's dtype.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.linear_ops import linear_ops

# T tokens, O outputs, I inputs of the whole weight; S rows kept, C columns kept


def select(
    weight_OI: Tensor, rows: int, cols: int, row_index: Tensor | None, col_index: Tensor | None
) -> Tensor:
    """``W[S, C]``, C columns wide: a view where the selection is a leading part, else a copy."""
    weight_SI = weight_OI[:rows] if row_index is None else weight_OI.index_select(0, row_index)
    return weight_SI[:, :cols] if col_index is None else weight_SI.index_select(1, col_index)


def forward(
    x_TC: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    weight_SC = select(weight_OI, rows, x_TC.shape[1], row_index, col_index)
    if weight_SC.dtype != x_TC.dtype:
        weight_SC = weight_SC.to(x_TC.dtype)
    bias_S = None
    if bias_O is not None:
        bias_S = bias_O[:rows] if row_index is None else bias_O.index_select(0, row_index)
        bias_S = bias_S.to(x_TC.dtype)
    return F.linear(x_TC, weight_SC, bias_S)


def dx(
    dy_TS: Tensor,
    weight_OI: Tensor,
    width: int,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    return dy_TS @ select(weight_OI, rows, width, row_index, col_index).to(dy_TS.dtype)


def dweight(
    dy_TS: Tensor,
    x_TC: Tensor,
    weight_OI: Tensor,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    dweight_SC = (dy_TS.mT @ x_TC).to(weight_OI.dtype)
    outputs, inputs = weight_OI.shape
    # What an index does not place, one padding does.
    right = below = 0
    if col_index is None:
        right = inputs - dweight_SC.shape[1]
    else:
        wide = dweight_SC.new_zeros(dweight_SC.shape[0], inputs)
        dweight_SC = wide.index_copy(1, col_index, dweight_SC)
    if row_index is None:
        below = outputs - rows
    else:
        tall = dweight_SC.new_zeros(outputs, dweight_SC.shape[1])
        dweight_SC = tall.index_copy(0, row_index, dweight_SC)
    return F.pad(dweight_SC, (0, right, 0, below))


def dbias(
    dy_TS: Tensor,
    bias_O: Tensor,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    dbias_S = dy_TS.sum(0).to(bias_O.dtype)
    if row_index is not None:
        return bias_O.new_zeros(bias_O.shape).index_copy(0, row_index, dbias_S)
    return F.pad(dbias_S, (0, bias_O.shape[0] - rows))


def outputs(
    weight_OI: Tensor, rows: int, row_index: Tensor | None, col_index: Tensor | None
) -> int:
    """The number of rows kept."""
    return rows if row_index is None else row_index.shape[0]


OPS = linear_ops(
    "submatrix",
    "SymInt rows, Tensor? row_index, Tensor? col_index",
    forward=forward,
    dx=dx,
    dweight=dweight,
    dbias=dbias,
    outputs=outputs,
)
