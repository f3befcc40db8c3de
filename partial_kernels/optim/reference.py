"""In-place SGD and AdamW over regions of tensors: the specification.

Per selected element, in the states' dtype (fp32, or fp64 for fp64 parameters), rounded once when
stored; g is the gradient, t the number of updates the region has had with this one. No other
element is read or written. Where elements are selected by their positions, gradients and states may
hold these alone, in the same order.

SGD::

    d = g + weight_decay p
    b = momentum b + d                    (momentum > 0; else b is absent and the step is lr d)
    p = p - lr b                          (Nesterov: p - lr (d + momentum b))

AdamW::

    p = p - lr weight_decay p
    m = m + (1 - beta1) (g - m)
    v = beta2 v + (1 - beta2) g^2
    p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

The order of the arithmetic is that of torch.optim, so that the results are equal bit for bit. The
learning rate and the counts of updates may be on the device (``device_steps``, int64, in place of
``steps``): a CUDA graph that holds the step goes on counting then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partial_kernels._core.ops import Op
from partial_kernels._core.regions import SELECTION, read, write

Selections = Sequence[Tensor | None]

SGD = Op(
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    f"{SELECTION}, Tensor lr, float momentum, bool nesterov, float weight_decay, str impl) -> ()",
    fake=lambda *_: None,
)
ADAMW = Op(
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    f"Tensor(c!)[] exp_avg_sqs, {SELECTION}, SymInt[] steps, Tensor? device_steps, "
    "Tensor lr, float beta1, float beta2, float eps, float weight_decay, str impl) -> ()",
    fake=lambda *_: None,
)


def _read(tensor: Tensor, param: Tensor, where: Sequence[Tensor | None]) -> Tensor:
    """The selected elements of a gradient or a state, which may be all that it holds."""
    return read(tensor, *where) if tensor.shape == param.shape else tensor


def number(lr: Tensor) -> float | Tensor:
    """The learning rate; on a device, whose answer would have to be waited for, as a tensor."""
    return lr.item() if lr.is_cpu else lr.double()


def _add_product(tensor: Tensor, other: Tensor, factor: float | Tensor) -> None:
    """``tensor += other * factor``, as torch.optim takes it where the factor is a number."""
    if isinstance(factor, Tensor):
        tensor.add_(other * factor)
    else:
        tensor.add_(other, alpha=factor)


def state_dtype(param: torch.dtype) -> torch.dtype:
    """The dtype of the optimizer state, and of the arithmetic, for parameters of this dtype."""
    return torch.float64 if param == torch.float64 else torch.float32


@SGD.backend("reference")
def sgd_reference(
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
    rate = number(lr)
    for i, (param, grad, *where) in enumerate(
        zip(params, grads, rows, cols, elements, strict=True)
    ):
        dtype = state_dtype(param.dtype)
        p, g = read(param, *where).to(dtype), _read(grad, param, where).to(dtype)
        if weight_decay != 0:
            g = g.add(p, alpha=weight_decay)
        if momentum != 0:
            buffer = _read(momentum_buffers[i], param, where)
            buffer.mul_(momentum).add_(g)
            write(momentum_buffers[i], buffer, *where)
            g = g.add(buffer, alpha=momentum) if nesterov else buffer
        _add_product(p, g, -rate)
        write(param, p, *where)


@ADAMW.backend("reference")
def adamw_reference(
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
    rate = number(lr)
    counts = steps if device_steps is None else device_steps.double()
    for param, grad, exp_avg, exp_avg_sq, step, *where in zip(
        params, grads, exp_avgs, exp_avg_sqs, counts, rows, cols, elements, strict=True
    ):
        dtype = state_dtype(param.dtype)
        p = read(param, *where).to(dtype)
        g, m, v = (_read(t, param, where).to(dtype) for t in (grad, exp_avg, exp_avg_sq))
        if weight_decay != 0:
            p.mul_(1 - rate * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        size = -rate / (1 - beta1**step)
        if isinstance(size, Tensor):
            p.add_(size * m / denominator)
        else:
            p.addcdiv_(m, denominator, value=size)
        for tensor, values in ((param, p), (exp_avg, m), (exp_avg_sq, v)):
            write(tensor, values, *where)
