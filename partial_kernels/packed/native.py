"""C++ backends of ``packed_linear`` on the CPU: a gradient that costs what is trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._native import contiguous_rows, native_op
from partial_kernels.packed.reference import DVALUES, DX, FORWARD, dx, few_tokens, forward

_merged = native_op("packed_merged_cpu")
_sampled = native_op("packed_sampled_cpu")


def _supports(*arguments: Any) -> str | None:
    tensors = [t for t in arguments if isinstance(t, Tensor) and t.is_floating_point()]
    if tensors[0].device.type != "cpu":
        return f"it runs on the CPU, got {tensors[0].device}"
    if any(t.dtype != torch.float32 for t in tensors):
        return f"it computes in fp32, got {', '.join(str(t.dtype) for t in tensors)}"
    return None


@FORWARD.backend("native", _supports)
def _(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    if few_tokens(x.shape[0], weight, index):
        return forward(x, weight, values, index, bias)
    return F.linear(x, _merged(weight.contiguous(), values, index.contiguous()), bias)


@DX.backend("native", _supports)
def _(dy: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    if few_tokens(dy.shape[0], weight, index):
        return dx(dy, weight, values, index)
    return dy @ _merged(weight.contiguous(), values, index.contiguous())


@DVALUES.backend("native", _supports)
def _(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return _sampled(contiguous_rows(dy), contiguous_rows(x), index.long().contiguous())
