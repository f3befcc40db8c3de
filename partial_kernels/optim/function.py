"""``masked_sgd_`` and ``masked_adamw_``: optimizer steps on regions of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partial_kernels._core.regions import split
from partial_kernels.masks import Mask
from partial_kernels.optim.checks import (
    check_adamw_options,
    check_lists,
    check_sgd_options,
    check_steps,
)
from partial_kernels.optim.reference import ADAMW, SGD

__all__ = ["masked_adamw_", "masked_sgd_"]


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None,
    masks: Sequence[Mask],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    impl: str = "auto",
) -> None:
    """One SGD step, in place, on the elements inside each parameter's mask.

    ::

        d = g + weight_decay p
        b = momentum b + d
        p = p - lr b                   (Nesterov: p - lr (d + momentum b); no momentum: p - lr d)

    Bit for bit what torch.optim.SGD computes on those elements (CPU; NaN's payload apart).

    An element outside its mask is neither read nor written, in any of the tensors. Arithmetic is
    in the state's dtype and rounded once at the store. Deterministic. Not recorded by autograd,
    but tensors saved for a backward count as modified.

    Args:
        params: tensors of any shape and strides. One may occur several times, with disjoint masks.
        grads: gradients of the parameters' shapes, in the parameters' or the state's dtype. Where
            the mask is ``Packed``, they and the state may instead hold its elements alone, ``[N]``.
        momentum_buffers: b, of the parameters' shapes, fp32 (fp64 for fp64 parameters); before a
            region's first update -0.0 (which, unlike 0.0, leaves the sign of a zero gradient) or
            0.0. Not used and may be None without momentum.
        masks: one mask per parameter.
        lr: >= 0 and finite. A one-element tensor may take its place, whose value is not checked; it
            keeps a compiled graph valid when the value changes.
        momentum, weight_decay: >= 0 and finite.
        nesterov: needs momentum > 0.
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments.

    Raises:
        ValueError, TypeError: the arguments do not fit together; nothing has been changed.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.
    """
    check_sgd_options(lr, momentum, nesterov, weight_decay)
    states: dict[str, Sequence[Tensor]] = {}
    if momentum != 0:
        if momentum_buffers is None:
            raise ValueError("momentum > 0 needs momentum_buffers, got None")
        states["momentum_buffers"] = momentum_buffers
    check_lists(params, grads, masks, **states)
    with torch.no_grad():
        _, (p, g, *buffers), selections = split(masks, params, grads, *states.values())
        if p:
            b = buffers[0] if buffers else []
            SGD(p, g, b, *selections, _tensor(lr), momentum, nesterov, weight_decay, impl)


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Mask],
    steps: Sequence[int] | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    impl: str = "auto",
) -> None:
    """One AdamW step, in place, on the elements inside each parameter's mask.

    ::

        p = p - lr weight_decay p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    On the CPU m and v are bit for bit what torch.optim.AdamW computes on those elements, and with
    impl="reference" p is, too. The native backend rounds sqrt(v) correctly, while torch built with
    MKL is off by one unit in its last place now and then.

    An element outside its mask is neither read nor written, in any of the tensors. Arithmetic is
    in the states' dtype and rounded once at the store. Deterministic. Not recorded by autograd,
    but tensors saved for a backward count as modified.

    Args:
        params: tensors of any shape and strides. One may occur several times, with disjoint masks.
        grads: gradients of the parameters' shapes, in the parameters' or the states' dtype. Where
            the mask is ``Packed``, they and the states may instead hold its elements alone,
            ``[N]``.
        exp_avgs, exp_avg_sqs: m and v, of the parameters' shapes, fp32 (fp64 for fp64 parameters);
            0 before a region's first update.
        masks: one mask per parameter.
        steps: t, the number of updates the region has had, this one included; >= 1. An int64
            tensor on the parameters' device may take the list's place, whose values are not
            checked: with it and a learning rate on the device, the step can be captured in a CUDA
            graph.
        lr: >= 0 and finite. A one-element tensor may take its place, whose value is not checked; it
            keeps a compiled graph valid when the value changes.
        betas: each in [0, 1).
        eps, weight_decay: >= 0 and finite.
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments.

    Raises:
        ValueError, TypeError: the arguments do not fit together; nothing has been changed.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), Algorithm 2.
    """
    check_adamw_options(lr, betas, eps, weight_decay)
    check_lists(params, grads, masks, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    check_steps(steps, params)
    with torch.no_grad():
        source, (p, g, m, v), selections = split(masks, params, grads, exp_avgs, exp_avg_sqs)
        if p:
            t, on_device = _steps(steps, source)
            rate = _tensor(lr)
            ADAMW(p, g, m, v, *selections, t, on_device, rate, *betas, eps, weight_decay, impl)


def _steps(steps: Sequence[int] | Tensor, source: list[int]) -> tuple[list[int], Tensor | None]:
    """The count of updates of every region: as numbers, or as a tensor."""
    if not isinstance(steps, Tensor):
        return [steps[i] for i in source], None
    # Most often each parameter is one region.
    if source == list(range(len(steps))):
        return [], steps.contiguous()
    return [], torch.stack([steps[i] for i in source])


def _tensor(lr: float | Tensor) -> Tensor:
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
