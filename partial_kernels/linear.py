"""``masked_linear``: one linear layer for every kind of mask; families add the kinds they serve."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.checks import check_linear, compute_dtype
from partial_kernels._core.ops import plain_call
from partial_kernels.masks import Full, Mask

__all__ = ["masked_linear", "masks_linear"]

_Function = TypeVar("_Function", bound=Callable[..., Tensor])

_BY_MASK: dict[type[Mask], Callable[..., Tensor]] = {}


def masks_linear(*kinds: type[Mask]) -> Callable[[_Function], _Function]:
    """Decorator: this function is ``masked_linear`` for these kinds of masks."""

    def add(function: _Function) -> _Function:
        _BY_MASK.update(dict.fromkeys(kinds, function))
        return function

    return add


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Mask, impl: str = "auto"
) -> Tensor:
    """Linear layer of the sub-network that ``mask`` cuts out of ``weight``: ``y = x (p * W)^T +
    b``.

    For ``Prefix`` and ``Index`` the call is compact: with S rows and C columns kept, x is ``[...,
    C]`` and ``y = x W[S, C]^T + b[S]`` is ``[..., S]``, at the cost of the small product. For
    ``Block``, ``Element`` and ``Packed`` x is ``[..., I]`` and y is ``[..., O]``. ``Full`` is
    ``torch.nn.functional.linear``.

    Gradients: ``weight.grad`` and ``bias.grad`` have the full shape and are exactly 0 off the mask;
    x's gradient has x's shape. Differentiable twice; for ``torch.func`` (per-sample gradients, say)
    plain formulas take the ops' place. Accumulation is that of the matrix product used (fp32 for
    half precision); results are deterministic for one backend and thread count.

    Args:
        x: ``[..., I]``, or ``[..., C]`` with a compact mask.
        weight: ``[O, I]``. Under autocast only the part inside a compact mask is cast.
        bias: ``[O]`` or None.
        mask: which elements of ``weight`` take part; the bias follows the rows.
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments.

    Raises:
        TypeError: ``mask`` is not one of the kinds above.
        ValueError: shapes, dtypes or devices do not fit, or the mask does not fit the weight.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
        why.

    Source: partial SGD with masks p_t, Algorithm 1 of "Masked Training of Neural Networks with
    Partial Gradients" (AISTATS 2022).
    """
    linear = _BY_MASK.get(type(mask))
    if linear is None and type(mask) is not Full:
        kinds = ", ".join(sorted(kind.__name__ for kind in (Full, *_BY_MASK)))
        raise TypeError(f"mask must be one of {kinds}, got {type(mask).__name__}")
    if weight.ndim != 2:
        raise ValueError(f"weight must be 2-D [O, I], got shape {list(weight.shape)}")
    mask.check(weight.shape)
    rows, cols = mask.restricted_shape(weight.shape)
    check_linear(x, weight, bias, rows=rows, cols=cols)
    if linear is None:
        plain_call("masked_linear", impl)
        return F.linear(x, weight, bias)
    dtype = compute_dtype(x)
    # What changes nothing costs a microsecond all the same.
    x_TI = x if x.dtype is dtype else x.to(dtype)
    if x.ndim == 2:
        return linear(x_TI, weight, bias, mask, impl)
    # -1 for the tokens would be ambiguous where no column is kept.
    x_TI = x_TI.reshape(math.prod(x.shape[:-1]), cols)
    return linear(x_TI, weight, bias, mask, impl).reshape(*x.shape[:-1], rows)
