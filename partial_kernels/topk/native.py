"""C++ backends of the row-sparse products on the CPU: no dense dy, time in proportion to k."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.crossovers import crossover
from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX, dense_is_faster

_dx = native_op("topk_row_dx_cpu")
_dweight = native_op("topk_row_dweight_cpu")

# Of the outputs: a dense product runs three times as many FLOPs a second.
BREAK_EVEN = 1 / 3


def _supports(dy: Tensor, index: Tensor, other: Tensor) -> str | None:
    if not dy.is_cpu:
        return f"it runs on the CPU, got {dy.device}"
    if dy.dtype != torch.float32 or other.dtype != torch.float32:
        return f"it computes in fp32, got {dy.dtype} and {other.dtype}"
    return None


def _declines(dy: Tensor, index: Tensor, other: Tensor) -> str | None:
    return dense_is_faster(dy, index, crossover("topk native float32", dy.device, BREAK_EVEN))


@ROW_DX.backend("native", _supports, _declines)
def _(dy: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return _dx(contiguous_rows(dy), index.contiguous(), contiguous_rows(weight))


@ROW_DWEIGHT.backend("native", _supports, _declines)
def _(dy: Tensor, index: Tensor, x: Tensor) -> Tensor:
    return _dweight(contiguous_rows(dy), index.contiguous(), contiguous_rows(x))
