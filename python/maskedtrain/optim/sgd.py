"""``MaskedSGD``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

import partial_kernels as pk
from maskedtrain.optim.base import MaskedOptimizer, refuse_capture
from partial_kernels.masks import Mask
from partial_kernels.optim.checks import check_sgd_options
from partial_kernels.optim.reference import state_dtype

__all__ = ["MaskedSGD"]


class MaskedSGD(MaskedOptimizer):
    """torch.optim.SGD whose ``step(subnet)`` leaves everything outside the sub-network alone.

    On the elements inside the sub-network::

        d = g + weight_decay p
        b = momentum b + d
        p = p - lr b                                    (Nesterov: p - lr (d + momentum b))

    Every element ends where torch.optim.SGD would take it, had that seen only the steps whose
    sub-network holds the element: bit for bit (fp32, CPU).

    With momentum, state costs one buffer of the parameter's full shape in fp32 (fp64 for fp64
    parameters), also where masks are small; without momentum there is none. Parameters in half
    precision are updated in fp32 and rounded to nearest: relative changes below the dtype's
    resolution are lost.

    Args:
        params: parameters, or dicts of parameters and options, as for torch.optim.
        lr: learning rate, >= 0; a one-element tensor may take its place.
        momentum, weight_decay: >= 0.
        nesterov: needs momentum > 0.

    Raises:
        ValueError, TypeError: an option is out of range or no number.
    """

    _state_names = frozenset({"momentum_buffer"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        check_sgd_options(group["lr"], group["momentum"], group["nesterov"], group["weight_decay"])

    def _update(
        self, group: dict[str, Any], updates: list[tuple[Tensor, Mask]], lr: float | Tensor
    ) -> None:
        momentum = group["momentum"]
        pk.masked_sgd_(
            [param for param, _ in updates],
            [cast(Tensor, param.grad) for param, _ in updates],
            [self._buffer(param) for param, _ in updates] if momentum else None,
            [mask for _, mask in updates],
            lr=lr,
            momentum=momentum,
            nesterov=group["nesterov"],
            weight_decay=group["weight_decay"],
        )

    def _buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if not state:
            refuse_capture(param)
            # -0.0 + d is d bit for bit, as torch.optim starts; 0.0 + d loses the sign of a zero.
            state["momentum_buffer"] = torch.full_like(param, -0.0, dtype=state_dtype(param.dtype))
        return state["momentum_buffer"]
