"""CUDA backends of masked_sgd_ and masked_adamw_: all regions in as few launches as they fit in.

The arithmetic is the CPU kernels' in the same order, fused multiply-adds included. A learning rate
or counts of updates on the device are read there: nothing waits, and a CUDA graph that holds the
step sees their new values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from partial_kernels._core.gpu import refuses_region
from partial_kernels._native import native_op
from partial_kernels.optim.reference import ADAMW, SGD, Selections

_sgd = native_op("masked_sgd_cuda")
_adamw = native_op("masked_adamw_cuda")


def _supports(params: Sequence[Tensor], *rest: Any) -> str | None:
    for param in params:
        if (why := refuses_region(param, "computes in fp32 and fp64")) is not None:
            return why
        if param.device != params[0].device:
            return f"it runs on one device, got {params[0].device} and {param.device}"
    return None


def _rate(lr: Tensor) -> tuple[float, Tensor | None]:
    """The learning rate as a number, or where it is on the device."""
    return (lr.item(), None) if lr.is_cpu else (0.0, lr.double())


@SGD.backend("cuda", _supports)
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
    where = rows, cols, elements
    _sgd(params, grads, momentum_buffers, *where, *_rate(lr), momentum, nesterov, weight_decay)


@ADAMW.backend("cuda", _supports)
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
    states, where = (exp_avgs, exp_avg_sqs), (rows, cols, elements)
    count, options = (steps, device_steps), (beta1, beta2, eps, weight_decay)
    _adamw(params, grads, *states, *where, *count, *_rate(lr), *options)
