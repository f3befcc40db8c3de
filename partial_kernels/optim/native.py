"""C++ backends for masked_sgd_ and masked_adamw_ on the CPU: one pass over what is selected.

The same arithmetic in the same order as the reference, with the fused multiply-adds of torch's
kernels. Results are equal bit for bit (NaN's payload apart), but for one operation: square roots
are rounded correctly here, while torch built with MKL is off by one unit in the last place in about
one of five. So SGD and AdamW's moments are the reference's bits, and AdamW's parameters would be
with a correct root. This holds for AVX2 and AVX-512; portable kernels on x86 multiply and add
separately, as torch does where it finds neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from partial_kernels._core.derived import derived
from partial_kernels._native import native_op
from partial_kernels.optim.reference import ADAMW, SGD, Selections

_sgd = native_op("masked_sgd_cpu")
_adamw = native_op("masked_adamw_cpu")
_mask_bits = native_op("mask_bits_cpu")

_DTYPES = {torch.float32, torch.float64, torch.bfloat16, torch.float16}


def _bits(param: Tensor, elements: Tensor | None) -> Tensor | None:
    """The elements, a mask as bits: an eighth of what is to be read in every step."""
    if elements is None or elements.dtype != torch.bool:
        return elements
    if elements.shape != param.shape:
        raise RuntimeError(
            f"tensors must have one shape, got {list(elements.shape)} and {list(param.shape)}"
        )
    return derived(elements, "bits", lambda: _mask_bits(elements.contiguous()))


def _supports(params: Sequence[Tensor], *rest: Any) -> str | None:
    for param in params:
        if not param.is_cpu:
            return f"it runs on the CPU, got {param.device}"
        if param.dtype not in _DTYPES:
            return f"it computes in fp32 and fp64, got {param.dtype}"
    return None


@SGD.backend("native", _supports)
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    rows: Selections,
    cols: Selections,
    elements: Selections,
    lr: Tensor,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    where = rows, cols, [*map(_bits, params, elements)]
    _sgd(params, grads, momentum_buffers, *where, lr.item(), momentum, nesterov, weight_decay)


@ADAMW.backend("native", _supports)
def _(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    rows: Selections,
    cols: Selections,
    elements: Selections,
    steps: Sequence[int],
    device_steps: Tensor | None,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    states, where = (exp_avgs, exp_avg_sqs), (rows, cols, [*map(_bits, params, elements)])
    if device_steps is not None:
        steps = cast("Any", device_steps).tolist()
    _adamw(params, grads, *states, *where, steps, lr.item(), beta1, beta2, eps, weight_decay)
