"""Linear layer with a few trained elements, ``y = x (W + dW)^T + b``: the specification.

W is frozen; dW holds ``values`` at the flat positions ``index`` of W, in row-major order, and is 0
elsewhere. With N elements of dW::

    y = x (W + dW)^T + b        dx = dy (W + dW)        dvalues = (dy^T x)[index]

Neither dW nor its gradient is ever stored: dW is added to a copy of W or, for few tokens, its part
of the product to y; the gradient comes from blocks of rows of ``dy^T x``. For the gradient alone,
``index`` may be int32 where W's positions fit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.ops import Op

__all__ = ["DVALUES", "DX", "FORWARD", "dvalues_formula", "few_tokens", "merged", "plus_packed"]

# T tokens, O outputs, I inputs, N trained elements

# Of the gradient of W, this share is in memory at a time; of fewer rows a product is slow.
_BLOCKS, _MIN_ROWS = 16, 64


def merged(weight_OI: Tensor, values_N: Tensor, index_N: Tensor, dtype: torch.dtype) -> Tensor:
    """``W + dW``, formed in the wider dtype of the two and rounded once to ``dtype``."""
    wide = torch.promote_types(weight_OI.dtype, values_N.dtype)
    flat = weight_OI.to(wide).reshape(-1).index_add(0, index_N, values_N.to(wide))
    return flat.view(weight_OI.shape).to(dtype)


def few_tokens(tokens: int, weight: Tensor, index: Tensor) -> bool:
    """Whether ``plus_packed`` moves fewer bytes than a copy of W does."""
    # Elsewhere its sums would be taken in any order.
    if weight.device.type != "cpu":
        return False
    # By token and trained element 7 numbers move, one at a time; they count double. Of W, 2.
    return 7 * tokens * len(index) < weight.numel()


def plus_packed(
    out: Tensor, a: Tensor, values_N: Tensor, columns_N: Tensor, to_columns_N: Tensor
) -> Tensor:
    """``out`` with ``a[:, columns] * values`` added in columns ``to_columns``."""
    wide = torch.promote_types(a.dtype, torch.float32)
    product = a.index_select(1, columns_N).to(wide) * values_N.to(wide)
    return out.to(wide).index_add_(1, to_columns_N, product).to(a.dtype)


def _forward_fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _dx_fake(dy: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _dvalues_fake(dy: Tensor, x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return values.new_empty(values.shape)


def _product_flops(a_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * weight_shape[0] * weight_shape[1]


def _dvalues_flops(dy_shape: Any, x_shape: Any, values_shape: Any, *_: Any, **__: Any) -> int:
    # What has to be computed; the plain backend takes the whole product.
    return 2 * dy_shape[0] * values_shape[0]


FORWARD = Op(
    "packed_forward(Tensor x, Tensor weight, Tensor values, Tensor index, Tensor? bias, str impl)"
    " -> Tensor",
    fake=_forward_fake,
    flops=_product_flops,
)
DX = Op(
    "packed_dx(Tensor dy, Tensor weight, Tensor values, Tensor index, str impl) -> Tensor",
    fake=_dx_fake,
    flops=_product_flops,
)
DVALUES = Op(
    "packed_dvalues(Tensor dy, Tensor x, Tensor values, Tensor index, str impl) -> Tensor",
    fake=_dvalues_fake,
    flops=_dvalues_flops,
)


@FORWARD.backend("reference")
def forward(
    x_TI: Tensor, weight_OI: Tensor, values_N: Tensor, index_N: Tensor, bias_O: Tensor | None
) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
    if not few_tokens(x_TI.shape[0], weight_OI, index_N):
        return F.linear(x_TI, merged(weight_OI, values_N, index_N, x_TI.dtype), bias_O)
    y_TO = F.linear(x_TI, weight_OI.to(x_TI.dtype), bias_O)
    rows, cols = _places(index_N, weight_OI)
    return plus_packed(y_TO, x_TI, values_N, cols, rows)


@DX.backend("reference")
def dx(dy_TO: Tensor, weight_OI: Tensor, values_N: Tensor, index_N: Tensor) -> Tensor:
    if not few_tokens(dy_TO.shape[0], weight_OI, index_N):
        return dx_formula(dy_TO, weight_OI, values_N, index_N)
    rows, cols = _places(index_N, weight_OI)
    return plus_packed(dy_TO @ weight_OI.to(dy_TO.dtype), dy_TO, values_N, rows, cols)


@DVALUES.backend("reference")
def dvalues(dy_TO: Tensor, x_TI: Tensor, values_N: Tensor, index_N: Tensor) -> Tensor:
    outputs, inputs = dy_TO.shape[1], x_TI.shape[1]
    out_N = values_N.new_zeros(values_N.shape)
    rows = max(_MIN_ROWS, -(-outputs // _BLOCKS))
    for first in range(0, outputs if len(index_N) else 0, rows):
        block = (dy_TO[:, first : first + rows].mT @ x_TI).flatten()
        # Without a question to the device how many of the elements these rows hold.
        place = index_N - first * inputs
        inside = (place >= 0) & (place < len(block))
        found = block.index_select(0, place.clamp(0, len(block) - 1)).to(values_N.dtype)
        out_N = torch.where(inside, found, out_N)
    return out_N


def dx_formula(dy_TO: Tensor, weight_OI: Tensor, values_N: Tensor, index_N: Tensor) -> Tensor:
    """dx in operations that autograd differentiates."""
    return dy_TO @ merged(weight_OI, values_N, index_N, dy_TO.dtype)


def dvalues_formula(dy_TO: Tensor, x_TI: Tensor, values_N: Tensor, index_N: Tensor) -> Tensor:
    """dvalues in operations that autograd differentiates, through the whole product."""
    return (dy_TO.mT @ x_TI).flatten().index_select(0, index_N).to(values_N.dtype)


def _places(index_N: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of flat positions."""
    inputs = weight_OI.shape[1]
    return index_N // inputs, index_N % inputs
