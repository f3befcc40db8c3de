"""CUDA backends of the row-sparse products: no dense dy, bytes in proportion to k."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.crossovers import crossover, dtype_name
from partial_kernels._core.gpu import elsewhere
from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX, dense_is_faster

_dx = native_op("topk_row_dx_cuda")
_dweight = native_op("topk_row_dweight_cuda")

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}

# Of the outputs, on an H200, untimed: for T tokens, gathered rows are T k I numbers at 5.5e12 bytes
# a second from the second-level cache, a dense product 2 T O I FLOPs at 780e12 a second in half
# precision, 60e12 in fp64, 50e12 in fp32 and 400e12 in TF32.
BREAK_EVEN = {
    "bfloat16": 1 / 142,
    "float16": 1 / 142,
    "float64": 1 / 44,
    "float32": 1 / 18,
    "tf32": 1 / 145,
}


def _supports(dy: Tensor, index: Tensor, other: Tensor) -> str | None:
    if (why := elsewhere(dy)) is not None:
        return why
    if dy.dtype not in _DTYPES or other.dtype != dy.dtype:
        return f"it computes in one dtype of 16 to 64 bits, got {dy.dtype} and {other.dtype}"
    return None


def _declines(dy: Tensor, index: Tensor, other: Tensor) -> str | None:
    name = dtype_name(dy.dtype)
    return dense_is_faster(dy, index, crossover(f"topk cuda {name}", dy.device, BREAK_EVEN[name]))


@ROW_DX.backend("cuda", _supports, _declines)
def _(dy: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return _dx(contiguous_rows(dy), index.contiguous(), contiguous_rows(weight))


@ROW_DWEIGHT.backend("cuda", _supports, _declines)
def _(dy: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return _dweight(contiguous_rows(dy), index.contiguous(), contiguous_rows(x))
