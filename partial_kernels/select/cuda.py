"""CUDA backend of ``topk_select``: rows as keys in registers, nothing sorted."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.gpu import elsewhere
from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.select.reference import SELECT

_select = native_op("topk_select_cuda")

# Numbers that one block of threads holds in registers, by the bytes of each.
_MAX_COLUMNS = {2: 28672, 4: 28672, 8: 14336}


def _supports(x: Tensor, k: int, by_column: bool) -> str | None:
    if (why := elsewhere(x)) is not None:
        return why
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"it compares fp32, fp64, bf16 and fp16, got {x.dtype}"
    # Columns are compared by their sums, in fp64.
    most = _MAX_COLUMNS[8 if by_column else x.dtype.itemsize]
    return f"it takes up to {most} columns, got {x.shape[1]}" if x.shape[1] > most else None


@SELECT.backend("cuda", _supports)
def _(x: Tensor, k: int, by_column: bool) -> Tensor:
    return _select(contiguous_rows(x), k, by_column)
