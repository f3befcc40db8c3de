"""``MaskedAdamW``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

import partial_kernels as pk
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.optim.regions import RegionCounts
from partial_kernels.masks import Mask
from partial_kernels.optim.checks import check_adamw_options
from partial_kernels.optim.reference import state_dtype

__all__ = ["MaskedAdamW"]


class MaskedAdamW(MaskedOptimizer):
    """torch.optim.AdamW whose ``step(subnet)`` leaves everything outside the sub-network alone.

    On the elements inside the sub-network::

        p = p - lr weight_decay p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        p = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    t is an element's own count of updates as long as all masks its parameter is updated with are
    nested (ATS, hierarchies of sub-networks): every element ends where torch.optim.AdamW would take
    it, were its region stored as a separate parameter, bit for bit (CPU) but for torch's square
    root, which MKL may round wrongly. From the first two
    masks of a parameter that cross on (neither holds the other, as with masks drawn anew at each
    step), or with more than 32 nested ones, t is the parameter's count of updates, whichever of its
    elements they touched; this is for good.

    State costs two tensors of the parameter's full shape in fp32 (fp64 for fp64 parameters), also
    where masks are small. Parameters in half precision are updated in fp32 and rounded to nearest:
    relative changes below the dtype's resolution are lost.

    Args:
        params: parameters, or dicts of parameters and options, as for torch.optim.
        lr: learning rate, >= 0; a one-element tensor may take its place.
        betas: decay of the running averages m and v, each in [0, 1).
        eps: >= 0.
        weight_decay: >= 0.

    Raises:
        ValueError, TypeError: an option is out of range or no number.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (ICLR 2019), Algorithm 2.
    """

    _state_names = frozenset({"exp_avg", "exp_avg_sq", "regions"})

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def _check_options(self, group: dict[str, Any]) -> None:
        check_adamw_options(group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def _update(
        self, group: dict[str, Any], updates: list[tuple[Tensor, Mask]], lr: float | Tensor
    ) -> None:
        counts: list[tuple[dict[str, Any], RegionCounts]] = []
        regions: list[tuple[Any, ...]] = []
        for param, mask in updates:
            state = self._state(param)
            after, counted = state["regions"].updated(mask, param.shape)
            counts.append((state, after))
            tensors = param, param.grad, state["exp_avg"], state["exp_avg_sq"]
            regions += [(*tensors, region, step) for region, step in counted]
        pk.masked_adamw_(
            *([region[i] for region in regions] for i in range(6)),
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        for state, after in counts:
            state["regions"] = after

    def _state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            dtype = state_dtype(param.dtype)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            state["regions"] = RegionCounts()
        return state
