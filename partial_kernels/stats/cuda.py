"""CUDA backend of ``masked_stats``: two launches for all tensors, the same bits on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from partial_kernels._core.gpu import refuses_region
from partial_kernels._native import native_op
from partial_kernels.stats.reference import STATS, Selections

_stats = native_op("masked_stats_cuda")


def _supports(grads: Sequence[Tensor], other_grads: Selections, *_: Any) -> str | None:
    for grad, other in zip(grads, other_grads, strict=True):
        if (why := refuses_region(grad, "reads fp32, fp64, bf16 and fp16")) is not None:
            return why
        if other is not None and other.dtype != grad.dtype:
            return f"it reads two gradients of one dtype, got {grad.dtype} and {other.dtype}"
    return None


@STATS.backend("cuda", _supports)
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
