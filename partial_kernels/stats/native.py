"""C++ backend of ``masked_stats`` on the CPU: one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partial_kernels._native import native_op
from partial_kernels.stats.reference import STATS, Selections

_stats = native_op("masked_stats_cpu")

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def _supports(grads: Sequence[Tensor], other_grads: Selections, *_: Any) -> str | None:
    if grads[0].device.type != "cpu":
        return f"it runs on the CPU, got {grads[0].device}"
    for grad, other in zip(grads, other_grads, strict=True):
        if grad.dtype not in _DTYPES:
            return f"it reads fp32, fp64, bf16 and fp16, got {grad.dtype}"
        if other is not None and other.dtype != grad.dtype:
            return f"it reads two gradients of one dtype, got {grad.dtype} and {other.dtype}"
    return None


@STATS.backend("native", _supports)
def _(
    grads: Sequence[Tensor],
    other_grads: Selections,
    rows: Selections,
    cols: Selections,
    elements: Selections,
    source: Sequence[int],
    count: int,
) -> Tensor:
    return _stats(grads, other_grads, rows, cols, elements, source, count)
