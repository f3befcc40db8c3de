"""``topk_linear``: exact forward, backward from the largest elements of the output's gradient."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.checks import check_linear, compute_dtype, no_autocast
from partial_kernels._core.ops import asks, plain_call
from partial_kernels.select.function import Per
from partial_kernels.select.reference import SELECT
from partial_kernels.submatrix.reference import OPS as SUBMATRIX
from partial_kernels.topk.reference import ROW_DWEIGHT, ROW_DX, kept

__all__ = ["topk_linear"]

# Without complete types.
_torch: Any = torch

# T tokens, O outputs, I inputs

WeightGrad = Literal["full", "rows"]
BiasGrad = Literal["full", "topk"]


class _TopKLinear(torch.autograd.Function):
    # Old-style forward(ctx, ...): the setup_context form costs 17 us more a call.
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x_TI: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        k: int,
        per: Per,
        weight_grad: WeightGrad,
        bias_grad: BiasGrad,
        impl: str,
    ) -> Tensor:
        ctx.k, ctx.per, ctx.impl = k, per, impl
        ctx.weight_grad, ctx.bias_grad = weight_grad, bias_grad
        # A frozen weight must not keep its input alive.
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight, bias)
        cast_bias = None if bias is None else bias.to(x_TI.dtype)
        return F.linear(x_TI, weight.to(x_TI.dtype), cast_bias)

    @staticmethod
    def backward(ctx: Any, dy_TO: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_TI, weight, bias = ctx.saved_tensors
        needs_dx, needs_dweight, needs_dbias = ctx.needs_input_grad[:3]
        dx = dweight = dbias = None
        # A backward may run within autocast's context: what is in fp32 stays so.
        with no_autocast(dy_TO):
            index = SELECT(dy_TO.detach(), ctx.k, ctx.per == "batch", ctx.impl)
            # Grad mode is on in a backward only under create_graph=True: then take the formulas,
            # which autograd can differentiate once more.
            if torch.is_grad_enabled():
                kept_TO = kept(dy_TO, index)
                dx = kept_TO @ weight.to(dy_TO.dtype) if needs_dx else None
                dweight = kept_TO.mT @ x_TI if needs_dweight else None
            elif ctx.per == "row":
                if needs_dx:
                    dx = ROW_DX(dy_TO, index, weight.to(dy_TO.dtype), ctx.impl)
                if needs_dweight:
                    dweight = ROW_DWEIGHT(dy_TO, index, x_TI, ctx.impl)
            else:
                # A layer of k of the outputs; the backend that was named is the selection's.
                impl = "reference" if ctx.impl == "reference" else "auto"
                dy_Tk, rows = dy_TO.index_select(1, index), (0, index, None, impl)
                if needs_dx:
                    dx = SUBMATRIX.dx(dy_Tk, weight, weight.shape[1], *rows)
                if needs_dweight and ctx.weight_grad == "full":
                    dweight = SUBMATRIX.dweight(dy_Tk, x_TI, weight, *rows)
                elif needs_dweight:
                    dweight = _rows_of((dy_Tk.mT @ x_TI).to(weight.dtype), index, weight)
            if needs_dbias:
                some = dy_TO if ctx.bias_grad == "full" else kept(dy_TO, index)
                dbias = some.sum(0).to(bias.dtype)
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        return dx, dweight, dbias, *[None] * 5


_linear: Any = cast("Any", _TopKLinear).apply


def _rows_of(rows_kI: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """A gradient of the weight that has these rows alone."""
    return _torch.sparse_coo_tensor(
        index[None], rows_kI, weight.shape, is_coalesced=True, check_invariants=False
    )


def topk_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    per: Per = "row",
    weight_grad: WeightGrad = "full",
    bias_grad: BiasGrad = "full",
    impl: str = "auto",
) -> Tensor:
    """Linear layer ``y = x W^T + b`` whose backward uses k of the O outputs (meProp).

    With D the gradient dy of y where it is kept, and 0 elsewhere::

        dx = D W        dW = D^T x        db = dy^T 1   (bias_grad="topk": D^T 1)

    Kept are, by "row", the k largest ``|dy|`` of each row; by "batch", the k columns whose
    ``|dy|``, summed in fp64 over all rows, are largest. Ties and NaN: as ``topk_select``. Products
    cost ``k / O`` of the dense ones' FLOPs, ``2 T k I`` each for T rows; rows of dW without a kept
    element are exactly 0. With k >= O this is ``torch.nn.functional.linear``.

    Differentiable twice, with what is kept held constant. Accumulation is that of the matrix
    product used (fp32 for half precision); results are deterministic for one backend and thread
    count.

    Args:
        x: ``[..., I]``.
        weight: ``[O, I]``.
        bias: ``[O]`` or None.
        k: >= 1.
        per: "row" or "batch".
        weight_grad: "full", or "rows" for a row-sparse gradient (hybrid COO, as of
            ``torch.nn.Embedding(sparse=True)``), which needs per="batch"; it is dense under
            ``create_graph=True``.
        bias_grad: "full", as in the authors' code, or "topk".
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments. It is that of the backward; the forward is one plain PyTorch call.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an option is none of these.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.

    Source: Sun et al., "meProp: Sparsified Back Propagation for Accelerated Deep Learning with
    Reduced Overfitting" (ICML 2017), section 3.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight must be 2-D [O, I], got shape {list(weight.shape)}")
    outputs, inputs = weight.shape
    check_linear(x, weight, bias, rows=outputs, cols=inputs)
    _check_options(k, per, weight_grad, bias_grad)
    if k >= outputs:
        plain_call("topk_linear", "auto")
        return F.linear(x, weight, bias)
    x_TI = x.to(compute_dtype(x)).reshape(math.prod(x.shape[:-1]), inputs)
    if asks(impl):
        # Of dy's shape, dtype and device, without its memory.
        dy_TO = x_TI.detach().new_empty(()).expand(x_TI.shape[0], outputs)
        if per == "row":
            index = torch.empty((), dtype=torch.int64, device=x.device).expand(x_TI.shape[0], k)
            ROW_DX.announce(dy_TO, index, weight.to(x_TI.dtype), impl)
        SELECT.announce(dy_TO, k, per == "batch", impl)
    y_TO = _linear(x_TI, weight, bias, k, per, weight_grad, bias_grad, impl)
    return y_TO.reshape(*x.shape[:-1], outputs)


def _check_options(k: int, per: Per, weight_grad: WeightGrad, bias_grad: BiasGrad) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"k must be an int >= 1, got {k!r}")
    if per not in ("row", "batch"):
        raise ValueError(f'per must be "row" or "batch", got {per!r}')
    if weight_grad not in ("full", "rows"):
        raise ValueError(f'weight_grad must be "full" or "rows", got {weight_grad!r}')
    if weight_grad == "rows" and per != "batch":
        raise ValueError('weight_grad="rows" needs per="batch": rows share no columns')
    if bias_grad not in ("full", "topk"):
        raise ValueError(f'bias_grad must be "full" or "topk", got {bias_grad!r}')
