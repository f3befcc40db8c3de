"""Argument checks that every public function makes once; kernels assume them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_linear", "check_tensors", "compute_dtype", "no_autocast"]

# Other devices (meta) know no autocast, and asking whether it is on raises there. Asked here, since
# dynamo of torch 2.11 cannot trace the question.
_AUTOCASTING = {
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "privateuseone")
    if torch.amp.is_autocast_available(device)
}


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer computes in: autocast's where it is on, else x's."""
    if _autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it products on x's device are taken in their operands' dtype."""
    if not _autocasts(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return device in _AUTOCASTING and torch.is_autocast_enabled(device)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, rows: int, cols: int) -> None:
    """Check x [..., cols] against weight [O, I] and bias [O], of which ``rows`` x ``cols`` are
    used.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be 2-D [O, I], got shape {list(weight.shape)}")
    if x.ndim < 1 or x.shape[-1] != cols:
        raise ValueError(
            f"x must have {cols} features (the mask keeps {rows} x {cols} of weight "
            f"{list(weight.shape)}), got shape {list(x.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [O] = [{weight.shape[0]}], got {list(bias.shape)}")
    check_tensors(x, weight=weight, bias=bias)


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    """Check that all are floating point, on x's device and, without autocast, of x's dtype."""
    dtype, device = x.dtype, x.device
    for name, tensor in {"x": x, **others}.items():
        if tensor is None or (
            tensor.dtype is dtype and tensor.device == device and dtype.is_floating_point
        ):
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.dtype != x.dtype and not _autocasts(x):
            raise ValueError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
