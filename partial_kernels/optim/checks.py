"""What the masked optimizers refuse, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from partial_kernels.masks import Mask, Packed
from partial_kernels.optim.reference import state_dtype

__all__ = ["check_adamw_options", "check_lists", "check_sgd_options", "check_steps"]


def check_sgd_options(
    lr: float | Tensor, momentum: float, nesterov: bool, weight_decay: float
) -> None:
    _check_lr(lr)
    _check_number("momentum", momentum)
    _check_number("weight_decay", weight_decay)
    if nesterov and momentum == 0:
        raise ValueError("nesterov needs momentum > 0, got 0")


def check_adamw_options(
    lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    _check_lr(lr)
    if len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas}")
    for i, beta in enumerate(betas):
        _check_number(f"betas[{i}]", beta, below=1.0)
    _check_number("eps", eps)
    _check_number("weight_decay", weight_decay)


def check_steps(steps: Sequence[int] | Tensor, params: Sequence[Tensor]) -> None:
    if len(steps) != len(params):
        raise ValueError(
            f"steps must have one entry per parameter, {len(params)}, got {len(steps)}"
        )
    if isinstance(steps, Tensor):
        if steps.ndim != 1 or steps.dtype != torch.int64:
            raise ValueError(
                f"steps must be ints or a 1-D int64 tensor, got {steps.ndim}-D {steps.dtype}"
            )
        if params and steps.device != params[0].device:
            raise ValueError(
                f"steps must be on the parameters' device {params[0].device}, got {steps.device}"
            )
        return
    for i, step in enumerate(steps):
        if isinstance(step, bool) or not isinstance(step, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"steps[{i}] must be an int, got {type(step).__name__}")
        if step < 1:
            raise ValueError(f"steps[{i}] counts this update and must be >= 1, got {step}")


def check_lists(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masks: Sequence[Mask],
    **states: Sequence[Tensor],
) -> None:
    """Check the lists' lengths, then every parameter with its gradient, mask and states."""
    for name, tensors in (("grads", grads), ("masks", masks), *states.items()):
        if len(tensors) != len(params):
            raise ValueError(
                f"{name} must have one entry per parameter, {len(params)}, got {len(tensors)}"
            )
    for i, (param, mask, grad, *held) in enumerate(
        zip(params, masks, grads, *states.values(), strict=True)
    ):
        _check_tensor("params", i, param)
        if not param.is_floating_point():
            raise ValueError(f"params[{i}] must be floating point, got {param.dtype}")
        _check_writable("params", i, param)
        if not isinstance(mask, Mask):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"masks[{i}] must be a Mask, got {type(mask).__name__}")
        shapes = [param.shape]
        mask.check(shapes[0])
        if isinstance(mask, Packed):
            shapes.append(mask.index.shape)
        dtype = state_dtype(param.dtype)
        _check_like("grads", i, grad, param, shapes, (param.dtype, dtype))
        for name, state in zip(states, held, strict=True):
            _check_like(name, i, state, param, shapes, (dtype,))
            _check_writable(name, i, state)


def _check_tensor(name: str, i: int, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}[{i}] must be dense (torch.strided), got {tensor.layout}")


def _check_like(
    name: str,
    i: int,
    tensor: Tensor,
    param: Tensor,
    shapes: list[torch.Size],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    _check_tensor(name, i, tensor)
    if tensor.shape not in shapes:
        expected = " or the packed ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"{name}[{i}] must have params[{i}]'s shape {expected}, got {list(tensor.shape)}"
        )
    if tensor.device != param.device:
        raise ValueError(
            f"{name}[{i}] must be on params[{i}]'s device {param.device}, got {tensor.device}"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(sorted({str(dtype) for dtype in dtypes}))
        raise ValueError(
            f"{name}[{i}] must be {expected} for {param.dtype} parameters, got {tensor.dtype}"
        )


def _check_writable(name: str, i: int, tensor: Tensor) -> None:
    if not tensor.is_contiguous() and any(
        step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(
            f"{name}[{i}] is updated in place and must not be expanded, got shape "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}"
        )


def _check_lr(lr: float | Tensor) -> None:
    if not isinstance(lr, Tensor):
        _check_number("lr", lr)
    elif lr.numel() != 1 or not lr.is_floating_point():
        raise ValueError(f"lr must be one number, got {lr.dtype} of shape {list(lr.shape)}")


def _check_number(name: str, value: float, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # Written so that NaN fails too.
    if not 0 <= value < below:
        limit = "finite" if below == math.inf else f"< {below:g}"
        raise ValueError(f"{name} must be >= 0 and {limit}, got {value}")
