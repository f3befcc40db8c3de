"""CUDA backends of the row-sparse products: no dense dy, bytes in proportion to k."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.gpu import elsewhere, precision
from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX

_dx = native_op("topk_row_dx_cuda")
_dweight = native_op("topk_row_dweight_cuda")

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}

# Of an H200: bytes a second from the second-level cache (taken, untimed) and FLOPs a second of a
# dense product.
_CACHE_SPEED = 5.5e12
_DENSE_SPEED = {
    torch.bfloat16: 780e12,
    torch.float16: 780e12,
    torch.float32: 50e12,
    torch.float64: 60e12,
}
_TF32_SPEED = 400e12


def _supports(dy: Tensor, index: Tensor, other: Tensor) -> str | None:
    if (why := elsewhere(dy)) is not None:
        return why
    if dy.dtype not in _DTYPES or other.dtype != dy.dtype:
        return f"it computes in one dtype of 16 to 64 bits, got {dy.dtype} and {other.dtype}"
    return None


def _declines(dy: Tensor, index: Tensor, other: Tensor) -> str | None:
    """For T tokens, gathered rows are T k I numbers, a dense product 2 T O I FLOPs."""
    speed = _DENSE_SPEED[dy.dtype]
    if dy.dtype == torch.float32 and precision() == "tf32":
        speed = _TF32_SPEED
    k, outputs = index.shape[1], dy.shape[1]
    ratio = round(speed * dy.dtype.itemsize / (2 * _CACHE_SPEED))
    if ratio * k <= outputs:
        return None
    return f"a dense product is faster for k > outputs / {ratio}, got {k} of {outputs}"


@ROW_DX.backend("cuda", _supports, _declines)
def _(dy: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return _dx(contiguous_rows(dy), index.contiguous(), contiguous_rows(weight))


@ROW_DWEIGHT.backend("cuda", _supports, _declines)
def _(dy: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return _dweight(contiguous_rows(dy), index.contiguous(), contiguous_rows(x))
