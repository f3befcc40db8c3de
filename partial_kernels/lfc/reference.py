"""Linear layer with a low-rank part, ``y = x (W + V U)^T + b``: the specification.

Once ``W' = W + V U`` is formed, at ``2 O I K`` FLOPs and none by token, the layer is a plain one::

    y = x W'^T + b        dx = dy W'        dW = dy^T x        dV = dW U^T        dU = V^T dW

The gradients of the factors need no token either, where dW is there; where W is frozen, they are
``dV = dy^T (x U^T)`` and ``dU = (dy V)^T x``.

The core, which has no W, takes two thin products forward, and two of the same form back::

    h = x U^T     y = h V^T + b        dh = dy V     dx = dh U        dV = dy^T h     dU = dh^T x
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.checks import no_autocast
from partial_kernels._core.ops import Op

__all__ = ["CORE", "MERGE", "core", "factor_costs", "factor_gradients", "merge"]

# T tokens, O outputs, I inputs, K rank


def merge(weight_OI: Tensor, u_KI: Tensor, v_OK: Tensor, dtype: torch.dtype) -> Tensor:
    """``W + V U``, formed in the parameters' dtype and rounded once to ``dtype``."""
    with no_autocast(weight_OI):
        return torch.addmm(weight_OI, v_OK, u_KI).to(dtype)


def _merge_fake(weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype, impl: str) -> Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


def _merge_flops(weight_shape: Any, u_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * weight_shape[0] * weight_shape[1] * u_shape[0]


MERGE = Op(
    "lfc_merge(Tensor weight, Tensor u, Tensor v, ScalarType dtype, str impl) -> Tensor",
    fake=_merge_fake,
    flops=_merge_flops,
)
MERGE.backend("reference")(merge)


def core(
    x_TI: Tensor, first_KI: Tensor, second_OK: Tensor, bias_O: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and h: ``h = x first^T`` and ``y = h second^T + b``, in x's dtype."""
    dtype = x_TI.dtype
    h_TK = F.linear(x_TI, first_KI.to(dtype))
    return F.linear(h_TK, second_OK.to(dtype), None if bias_O is None else bias_O.to(dtype)), h_TK


def _core_fake(
    x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    tokens, (outputs, rank) = x.shape[0], second.shape
    return x.new_empty(tokens, outputs), x.new_empty(tokens, rank)


def _core_flops(x_shape: Any, first_shape: Any, second_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * first_shape[0] * (first_shape[1] + second_shape[0])


CORE = Op(
    "lfc_core(Tensor x, Tensor first, Tensor second, Tensor? bias, str impl) -> (Tensor, Tensor)",
    fake=_core_fake,
    flops=_core_flops,
)
CORE.backend("reference")(core)


def factor_costs(
    tokens: int, outputs: int, inputs: int, rank: int, needs: tuple[bool, bool, bool]
) -> tuple[int, int]:
    """What dU and dV cost, in units of 2 FLOPs: from dW, and token by token.

    ``needs`` says which of dW, dU and dV are needed; a dW that is not would be formed for them.
    """
    needs_dweight, needs_du, needs_dv = needs
    from_dweight = outputs * inputs * rank * (needs_du + needs_dv)
    if not needs_dweight:
        from_dweight += tokens * outputs * inputs
    return from_dweight, tokens * rank * (inputs + outputs) * (needs_du + needs_dv)


def factor_gradients(
    dy_TO: Tensor,
    x_TI: Tensor,
    u_KI: Tensor,
    v_OK: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dW, dU and dV, those of them that are needed, in the fewest FLOPs; in the factors' dtype."""
    needs_dweight, needs_du, needs_dv = needs
    (tokens, outputs), (rank, inputs) = dy_TO.shape, u_KI.shape
    from_dweight, by_token = factor_costs(tokens, outputs, inputs, rank, needs)
    dweight = du = dv = None
    if needs_dweight or from_dweight <= by_token:
        dweight = (dy_TO.mT @ x_TI).to(u_KI.dtype)
    if dweight is not None and from_dweight <= by_token:
        du = v_OK.mT @ dweight if needs_du else None
        dv = dweight @ u_KI.mT if needs_dv else None
    else:
        u, v = u_KI.to(x_TI.dtype), v_OK.to(x_TI.dtype)
        du = ((dy_TO @ v).mT @ x_TI).to(u_KI.dtype) if needs_du else None
        dv = (dy_TO.mT @ (x_TI @ u.mT)).to(v_OK.dtype) if needs_dv else None
    return dweight if needs_dweight else None, du, dv
