"""C++ backends for Block masks on the CPU: time in proportion to the blocks that are kept."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from partial_kernels._core.crossovers import crossover
from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.blocksparse.reference import OPS, dense_is_faster, on

_forward = native_op("blocksparse_forward_cpu")
_dx = native_op("blocksparse_dx_cpu")
_dweight = native_op("blocksparse_dweight_cpu")

# Smaller blocks fill no vector.
MIN_SIZE = 8
# By size of the blocks, the share of them up to which these take less time than the dense product
# on two cores of an AMD EPYC; other sizes take the next smaller one's.
BREAK_EVEN = {8: 0.25, 16: 0.65, 32: 0.95, 64: 0.98, 128: 1.0}


def _supports(first: Tensor, second: Tensor, *rest: Any) -> str | None:
    size: int = rest[-1]
    tensors = [first, second, *(t for t in rest if isinstance(t, Tensor) and t.is_floating_point())]
    if first.device.type != "cpu":
        return f"it runs on the CPU, got {first.device}"
    if any(t.dtype != torch.float32 for t in tensors):
        return f"it computes in fp32, got {', '.join(str(t.dtype) for t in tensors)}"
    if size < MIN_SIZE:
        return f"its blocks are of {MIN_SIZE} or more, got {size}"
    return None


def _declines(*args: Any) -> str | None:
    first: Tensor = args[0]
    key, default = _break_even(args[-1])
    return dense_is_faster(args[-2], crossover(key, first.device, default), "a dense product")


@cache
def _break_even(size: int) -> tuple[str, float]:
    known = max(known for known in BREAK_EVEN if known <= size)
    return f"blocksparse native {known} float32", BREAK_EVEN[known]


@OPS.forward.backend("native", _supports, _declines)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, bitmap: Tensor, size: int) -> Tensor:
    return _forward(contiguous_rows(x), weight, bias, on(x.device, bitmap), size)


@OPS.dx.backend("native", _supports, _declines)
def _(dy: Tensor, weight: Tensor, width: int, bitmap: Tensor, size: int) -> Tensor:
    return _dx(contiguous_rows(dy), weight, on(dy.device, bitmap), size)


@OPS.dweight.backend("native", _supports, _declines)
def _(dy: Tensor, x: Tensor, weight: Tensor, bitmap: Tensor, size: int) -> Tensor:
    return _dweight(contiguous_rows(dy), contiguous_rows(x), on(x.device, bitmap), size)
