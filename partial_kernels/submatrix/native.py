"""C++ backends for Prefix and Index masks on the CPU: torch's products, less around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from partial_kernels._native import native_op
from partial_kernels.submatrix.reference import OPS

_forward = native_op("submatrix_forward_cpu")
_dx = native_op("submatrix_dx_cpu")
_dweight = native_op("submatrix_dweight_cpu")

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def _supports(first: Tensor, second: Tensor, third: Tensor | int | None, *_: Any) -> str | None:
    if not first.is_cpu:
        return f"it runs on the CPU, got {first.device}"
    dtypes = {first.dtype, second.dtype}
    if isinstance(third, Tensor):
        dtypes.add(third.dtype)
    if len(dtypes) > 1:
        return f"it computes in one dtype, got {', '.join(sorted(map(str, dtypes)))}"
    if not dtypes <= _DTYPES:
        return f"it moves floating-point numbers of 16 to 64 bits, got {first.dtype}"
    if first.is_neg() or second.is_neg():
        return "it reads memory as it is, got a negated view"
    return None


OPS.forward.backend("native", _supports)(_forward)
OPS.dx.backend("native", _supports)(_dx)
OPS.dweight.backend("native", _supports)(_dweight)
