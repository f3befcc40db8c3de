"""``packed_linear``: a frozen weight of which a few elements are trained."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.checks import check_tensors, compute_dtype, no_autocast
from partial_kernels._core.index_check import first_unsorted
from partial_kernels._core.ops import FUNC, plain_call, transformed
from partial_kernels.masks import Packed
from partial_kernels.packed.reference import (
    DVALUES,
    DX,
    FORWARD,
    dvalues_formula,
    dx_formula,
    merged,
)

__all__ = ["packed_linear"]

# T tokens, O outputs, I inputs, N trained elements


class _PackedLinear(torch.autograd.Function):
    # Old-style forward(ctx, ...): the setup_context form costs 17 us more a call.
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_TI: Tensor,
        values: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        index: Tensor,
        impl: str,
    ) -> Tensor:
        needs_dx, needs_dvalues = ctx.needs_input_grad[:2]
        # W + dW is formed again for dx: it would take as much memory as W, in every layer.
        ctx.save_for_backward(
            x_TI if needs_dvalues else None, weight if needs_dx else None, values, index
        )
        ctx.impl, ctx.bias_dtype = impl, None if bias is None else bias.dtype
        return FORWARD(x_TI, weight, values, index, bias, impl)

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, weight, values, index = ctx.saved_tensors
        needs_dx, needs_dvalues, needs_dbias = ctx.needs_input_grad[:3]
        dx = dvalues = dbias = None
        # A backward may run within autocast's context: what is in fp32 stays so.
        with no_autocast(dy_TO):
            # Grad mode is on in a backward only under create_graph=True: then take the formulas,
            # which autograd can differentiate once more.
            if torch.is_grad_enabled():
                if needs_dx:
                    dx = dx_formula(dy_TO, weight, values, index)
                if needs_dvalues:
                    dvalues = dvalues_formula(dy_TO, x_TI, values, index)
            else:
                if needs_dx:
                    dx = DX(dy_TO, weight, values, index, ctx.impl)
                if needs_dvalues:
                    dvalues = DVALUES(dy_TO, x_TI, values, index, ctx.impl)
        if needs_dbias:
            dbias = dy_TO.sum(0).to(ctx.bias_dtype)
        return dx, dvalues, dbias, None, None, None


_linear: Any = cast("Any", _PackedLinear).apply


def packed_linear(
    x: Tensor,
    weight: Tensor,
    values: Tensor,
    index: Tensor | Packed,
    bias: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with a frozen weight and a few trained elements: ``y = x (W + dW)^T + b``.

    dW holds ``values`` at the positions ``index`` and is 0 elsewhere. It is added, not put in W's
    place: ``values`` of zeros are the pretrained layer.

    The gradient of ``values`` is ``(dy^T x)[index]``, ``2 T N`` FLOPs for T tokens and N elements;
    neither it nor anything an optimizer keeps has W's size. Saved for the backward: x, beside the
    arguments. While a product is taken there is a copy of W, except for few tokens on the CPU.

    Differentiable twice. Accumulation is that of the matrix product used (fp32 for half precision);
    results are deterministic for one backend and thread count.

    Args:
        x: ``[..., I]``.
        weight: W ``[O, I]``; gets no gradient and must not require one.
        values: ``[N]``.
        index: ``[N]``, int64: strictly increasing positions in W, ``row * I + column``. A
            ``pk.Packed`` was checked when it was made; of a tensor, the order is checked in every
            call on the CPU, and nowhere else, where that would wait for the device.
        bias: ``[O]`` or None.
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``index`` is no set of positions in W, or
            ``weight`` requires a gradient.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.

    Source: fixed sparse masks, "Training Neural Networks with Fixed Sparse Masks"
    (arXiv 2111.09839), section 3.
    """
    index = _check(x, weight, values, index, bias)
    outputs, inputs = weight.shape
    # -1 for the tokens would be ambiguous where there are no inputs.
    x_TI = x.to(compute_dtype(x)).reshape(math.prod(x.shape[:-1]), inputs)
    if transformed():
        plain_call("packed_linear", impl, FUNC)
        cast_bias = None if bias is None else bias.to(x_TI.dtype)
        y_TO = F.linear(x_TI, merged(weight, values, index, x_TI.dtype), cast_bias)
    else:
        y_TO = _linear(x_TI, values, bias, weight, index, impl)
    return y_TO.reshape(*x.shape[:-1], outputs)


def _check(
    x: Tensor, weight: Tensor, values: Tensor, index: Tensor | Packed, bias: Tensor | None
) -> Tensor:
    """The index as a tensor, if everything fits."""
    if weight.ndim != 2:
        raise ValueError(f"weight must be 2-D [O, I], got shape {list(weight.shape)}")
    outputs, inputs = weight.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        raise ValueError(f"x must be [..., I] = [..., {inputs}], got shape {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (outputs,):
        raise ValueError(f"bias must be [O] = [{outputs}], got {list(bias.shape)}")
    check_tensors(x, weight=weight, values=values, bias=bias)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight is frozen here and must not require a gradient")
    checked = isinstance(index, Packed)
    if isinstance(index, Packed):
        index.check(weight.shape)
        index = cast("Tensor", index.on(weight.device, "index"))
    if index.ndim != 1 or index.dtype != torch.int64:
        raise ValueError(
            f"index must be a 1-D int64 tensor, got {index.ndim}-D {str(index.dtype)[6:]}"
        )
    if values.shape != index.shape:
        raise ValueError(
            f"values must be [N] = [{len(index)}] as index says, got {list(values.shape)}"
        )
    if index.device != x.device:
        raise ValueError(f"index must be on x's device {x.device}, got {index.device}")
    if not checked and index.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_order(index, outputs * inputs)
    return index


def _check_order(index: Tensor, size: int) -> None:
    if (at := first_unsorted(index, size)) < 0:
        return
    found = int(index[at])
    if not 0 <= found < size:
        raise ValueError(f"index must be in [0, O * I) = [0, {size}), got {found} at position {at}")
    raise ValueError(
        f"index must be strictly increasing, "
        f"got {found} after {int(index[at - 1])} at position {at}"
    )
