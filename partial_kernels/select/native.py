"""C++ backend of ``topk_select`` on the CPU: one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.select.reference import SELECT

_select = native_op("topk_select_cpu")


def _supports(x: Tensor, k: int, by_column: bool) -> str | None:
    if not x.is_cpu:
        return f"it runs on the CPU, got {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it compares fp32 and bf16, got {x.dtype}"
    if x.shape[1] >= 2**31:
        return f"it counts columns in 31 bits, got {x.shape[1]}"
    return None


@SELECT.backend("native", _supports)
def _(x: Tensor, k: int, by_column: bool) -> Tensor:
    return _select(contiguous_rows(x), k, by_column)
