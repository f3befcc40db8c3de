"""What the families of masked linear layers share: three ops, one autograd.Function around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.ops import FUNC, Op, plain_call, transformed

__all__ = ["LinearOps", "linear_function", "linear_ops", "zeroed_linear_ops"]

# T tokens, O outputs, I inputs (of what the layer uses, where its mask is compact)


@dataclass(frozen=True)
class LinearOps:
    """The ops of one family and the formulas they were made from, for a second derivative and for
    ``torch.func``.
    """

    forward: Op
    dx: Op
    dweight: Op
    forward_formula: Callable[..., Tensor]
    dx_formula: Callable[..., Tensor]
    dweight_formula: Callable[..., Tensor]
    dbias_formula: Callable[..., Tensor]


def linear_ops(
    family: str,
    mask_schema: str,
    *,
    forward: Callable[..., Tensor],
    dx: Callable[..., Tensor],
    dweight: Callable[..., Tensor],
    dbias: Callable[..., Tensor],
    outputs: Callable[..., int],
) -> LinearOps:
    """Register a family's three ops, with their plain-PyTorch formulas as the backend "reference".

    With M the family's mask arguments and ``width`` that of x, the formulas are ``forward(x,
    weight, bias, *M)``, ``dx(dy, weight, width, *M)``, ``dweight(dy, x, weight, *M)`` and
    ``dbias(dy, bias, *M)``; the ops take ``impl`` as well. ``outputs(weight, *M)`` is y's width.
    """

    def forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        return x.new_empty(x.shape[0], outputs(weight, *rest[:-1]))

    def dx_fake(dy: Tensor, weight: Tensor, width: int, *rest: Any) -> Tensor:
        return dy.new_empty(dy.shape[0], width)

    def dweight_fake(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return weight.new_empty(weight.shape)

    def product_flops(a_shape: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        (tokens, inner), (_, outer) = a_shape, out_shape
        return 2 * tokens * inner * outer

    def dweight_flops(dy_shape: Any, x_shape: Any, *_: Any, **__: Any) -> int:
        return 2 * dy_shape[0] * dy_shape[1] * x_shape[1]

    def op(name: str, tensors: str, fake: Callable[..., Tensor], flops: Callable[..., int]) -> Op:
        schema = f"{family}_{name}({tensors}, {mask_schema}, str impl) -> Tensor"
        return Op(schema, fake=fake, flops=flops)

    x_weight_bias = "Tensor x, Tensor weight, Tensor? bias"
    ops = LinearOps(
        forward=op("forward", x_weight_bias, forward_fake, product_flops),
        dx=op("dx", "Tensor dy, Tensor weight, SymInt width", dx_fake, product_flops),
        dweight=op("dweight", "Tensor dy, Tensor x, Tensor weight", dweight_fake, dweight_flops),
        forward_formula=forward,
        dx_formula=dx,
        dweight_formula=dweight,
        dbias_formula=dbias,
    )
    ops.forward.backend("reference")(forward)
    ops.dx.backend("reference")(dx)
    ops.dweight.backend("reference")(dweight)
    return ops


def linear_function(ops: LinearOps) -> Callable[..., Tensor]:
    """``linear(x [T, I], weight, bias, impl, *M) -> y [T, O]``, differentiable twice."""

    class Linear(torch.autograd.Function):
        # Old-style forward(ctx, ...): the setup_context form costs 17 us more a call.
        @staticmethod
        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx: Any, x_TI: Tensor, weight: Tensor, bias: Tensor | None, impl: str, *mask: Any
        ) -> Tensor:
            # The width comes from x: of two equal symbols, a mask's and x's, dynamo keeps x's only.
            ctx.width, ctx.mask, ctx.impl = x_TI.shape[1], mask, impl
            # A frozen weight must not keep its input alive.
            ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight, bias)
            return ops.forward(x_TI, weight, bias, *mask, impl)

        @staticmethod
        def backward(ctx: Any, dy_TO: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            x_TI, weight, bias = ctx.saved_tensors
            needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
            dx = dweight = dbias = None
            # Grad mode is on in a backward only under create_graph=True: then take the formulas,
            # which autograd can differentiate once more.
            if torch.is_grad_enabled():
                if needs_dx:
                    dx = ops.dx_formula(dy_TO, weight, ctx.width, *ctx.mask)
                if needs_dweight:
                    dweight = ops.dweight_formula(dy_TO, x_TI, weight, *ctx.mask)
            else:
                if needs_dx:
                    dx = ops.dx(dy_TO, weight, ctx.width, *ctx.mask, ctx.impl)
                if needs_dweight:
                    dweight = ops.dweight(dy_TO, x_TI, weight, *ctx.mask, ctx.impl)
            if needs_dbias:
                dbias = ops.dbias_formula(dy_TO, bias, *ctx.mask)
            return dx, dweight, dbias, None, *[None] * len(ctx.mask)

    apply: Any = cast("Any", Linear).apply

    def linear(x_TI: Tensor, weight: Tensor, bias: Tensor | None, impl: str, *mask: Any) -> Tensor:
        if transformed():
            plain_call("masked_linear", impl, FUNC)
            return ops.forward_formula(x_TI, weight, bias, *mask)
        return apply(x_TI, weight, bias, impl, *mask)

    return linear


def zeroed_linear_ops(family: str, mask_schema: str, masked: Callable[..., Tensor]) -> LinearOps:
    """Ops of a full-width layer whose weight counts as zero off its mask: the specification.

    ``masked(A, *M)`` is A, of the weight's shape, with exact zeros off the mask::

        y = x masked(W)^T + b          dx = dy masked(W)          dW = masked(dy^T x)

    Products are taken in x's dtype; dW has the weight's dtype. FLOPs are the dense product's: the
    plain backend skips nothing.
    """

    def forward(x_TI: Tensor, weight: Tensor, bias: Tensor | None, *mask: Any) -> Tensor:
        bias = None if bias is None else bias.to(x_TI.dtype)
        return F.linear(x_TI, masked(weight, *mask).to(x_TI.dtype), bias)

    def dx(dy_TO: Tensor, weight: Tensor, width: int, *mask: Any) -> Tensor:
        return dy_TO @ masked(weight, *mask).to(dy_TO.dtype)

    def dweight(dy_TO: Tensor, x_TI: Tensor, weight: Tensor, *mask: Any) -> Tensor:
        return masked(dy_TO.mT @ x_TI, *mask).to(weight.dtype)

    def dbias(dy_TO: Tensor, bias: Tensor, *mask: Any) -> Tensor:
        return dy_TO.sum(0).to(bias.dtype)

    def outputs(weight: Tensor, *mask: Any) -> int:
        return weight.shape[0]

    return linear_ops(
        family,
        mask_schema,
        forward=forward,
        dx=dx,
        dweight=dweight,
        dbias=dbias,
        outputs=outputs,
    )
