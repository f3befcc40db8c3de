"""Gradients of a linear layer from k elements of each row of dy: the specification.

With D = dy at the positions ``index`` [T, k], ascending in each row, and 0 elsewhere::

    dx = D W        dW = D^T x

The plain backend forms D and takes dense products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from partial_kernels._core.ops import Op

__all__ = ["ROW_DWEIGHT", "ROW_DX", "dense_is_faster", "kept"]

# T tokens, O outputs, I inputs


def kept(dy_TO: Tensor, index: Tensor) -> Tensor:
    """dy where it is kept, by row (index [T, k]) or by column (index [k]), 0 elsewhere."""
    index_Tk = index.expand(dy_TO.shape[0], index.shape[-1])
    return dy_TO.new_zeros(dy_TO.shape).scatter(1, index_Tk, dy_TO.gather(1, index_Tk))


def dense_is_faster(dy_TO: Tensor, index_Tk: Tensor, limit: float) -> str | None:
    """Why a kernel that takes time in proportion to k is not taken, if k is more than this share of
    the outputs.
    """
    k, outputs = index_Tk.shape[1], dy_TO.shape[1]
    # The quotient is rounded as 1 / 3 is: a product might not be.
    if k == 0 or k / outputs <= limit:
        return None
    most = f"outputs / {1 / limit:.3g}" if limit else "0"
    return f"a dense product is faster for k > {most}, got {k} of {outputs}"


def _dx_fake(dy: Tensor, index: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _dweight_fake(dy: Tensor, index: Tensor, x: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(dy.shape[1], x.shape[1])


def _flops(dy_shape: Any, index_shape: Any, other_shape: Any, *_: Any, **__: Any) -> int:
    # What has to be computed; the plain backend takes the whole product.
    return 2 * index_shape[0] * index_shape[1] * other_shape[1]


ROW_DX = Op(
    "topk_row_dx(Tensor dy, Tensor index, Tensor weight, str impl) -> Tensor",
    fake=_dx_fake,
    flops=_flops,
)
ROW_DWEIGHT = Op(
    "topk_row_dweight(Tensor dy, Tensor index, Tensor x, str impl) -> Tensor",
    fake=_dweight_fake,
    flops=_flops,
)


@ROW_DX.backend("reference")
def row_dx(dy_TO: Tensor, index_Tk: Tensor, weight_OI: Tensor) -> Tensor:
    return kept(dy_TO, index_Tk) @ weight_OI


@ROW_DWEIGHT.backend("reference")
def row_dweight(dy_TO: Tensor, index_Tk: Tensor, x_TI: Tensor) -> Tensor:
    return kept(dy_TO, index_Tk).mT @ x_TI
