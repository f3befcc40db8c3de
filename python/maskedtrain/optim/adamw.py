"""``MaskedAdamW``."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

import partial_kernels as pk
from maskedtrain.optim.base import MaskedOptimizer, capturing, refuse_capture
from maskedtrain.optim.regions import DeviceCounts, RegionCounts
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
        capturable: count updates on the parameters' device, so that a CUDA graph that holds a step
            goes on counting (with a tensor as ``lr``, it follows that, too). Every sub-network
            whose step is captured must have been stepped with before.

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
        *,
        capturable: bool = False,
    ) -> None:
        self._on_device: dict[int, DeviceCounts] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "capturable": capturable})

    def _check_options(self, group: dict[str, Any]) -> None:
        check_adamw_options(group["lr"], group["betas"], group["eps"], group["weight_decay"])

    def _update(
        self, group: dict[str, Any], updates: list[tuple[Tensor, Mask]], lr: float | Tensor
    ) -> None:
        if group["capturable"] and updates:
            self._update_on_device(group, updates, lr)
            return
        if any(map(capturing, (param for param, _ in updates))):
            raise RuntimeError("a captured step needs capturable=True: it would count no updates")
        after = [
            self._state(param)["regions"].updated(mask, param.shape) for param, mask in updates
        ]
        steps = [step for _, counted in after for _, step in counted]
        regions = [[region for region, _ in counted] for _, counted in after]
        self._step(group, updates, regions, steps, lr)
        for (param, _), (counts, _) in zip(updates, after, strict=True):
            self.state[param]["regions"] = counts

    def _update_on_device(
        self, group: dict[str, Any], updates: list[tuple[Tensor, Mask]], lr: float | Tensor
    ) -> None:
        number = next(i for i, known in enumerate(self.param_groups) if known is group)
        counted, counts = self._on_device.get(number), {}
        states = {param: self._state(param)["regions"] for param, _ in updates}
        known = {param: states[param].knowing(mask, param.shape) for param, mask in updates}
        if counted is None or not all(counted.has(param, known[param]) for param in known):
            if any(map(capturing, known)):
                raise RuntimeError("a step that is captured must have been taken once before")
            self._fetch()
            counts = {
                param: self.state[param]["regions"]
                for param in group["params"]
                if self.state.get(param)
            }
            counts |= {param: counts[param].knowing(mask, param.shape) for param, mask in updates}
            counted = DeviceCounts(counts, updates[0][0].device)
            known = counts
        regions = [known[param].regions_of(mask) for param, mask in updates]
        sizes = [(param, len(r)) for (param, _), r in zip(updates, regions, strict=True)]
        places = counted.places(sizes)
        steps = counted.after(places)
        self._step(group, updates, regions, steps, lr)
        counted.keep(places, steps)
        self._on_device[number] = counted
        for param, count in counts.items():
            self.state[param]["regions"] = count

    def _step(
        self,
        group: dict[str, Any],
        updates: list[tuple[Tensor, Mask]],
        regions: list[list[Mask]],
        steps: list[int] | Tensor,
        lr: float | Tensor,
    ) -> None:
        params = [param for (param, _), some in zip(updates, regions, strict=True) for _ in some]
        pk.masked_adamw_(
            params,
            [cast(Tensor, param.grad) for param in params],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [region for some in regions for region in some],
            steps,
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _fetch(self) -> None:
        """Have the state say how often regions have been updated."""
        for counted in self._on_device.values():
            for param, counts in counted.fetched().items():
                self.state[param]["regions"] = counts

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; it can be read with ``torch.load(weights_only=True)``."""
        self._fetch()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken, bit for bit.

        Raises:
            ValueError: it is another optimizer's, or does not fit these parameters; nothing has
                been changed.
        """
        super().load_state_dict(state_dict)
        self._on_device.clear()

    def __getstate__(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._fetch()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._on_device = {}
        # Saved before there was this option.
        for group in self.param_groups:
            group.setdefault("capturable", False)

    def _state(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            refuse_capture(param)
            dtype = state_dtype(param.dtype)
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
            state["regions"] = RegionCounts()
        return state
