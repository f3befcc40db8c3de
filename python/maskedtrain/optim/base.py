"""What the masked optimizers share: what a step touches, options, saving and loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from maskedtrain.optim.regions import RegionCounts
from partial_kernels.masks import Full, Mask
from partial_kernels.optim.reference import state_dtype

__all__ = ["MaskSource", "MaskedOptimizer", "capturing", "refuse_capture"]

_FULL = Full()


def capturing(param: Tensor) -> bool:
    """Whether what is done with the parameter now goes into a CUDA graph."""
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_capture(param: Tensor) -> None:
    """Raise RuntimeError while a graph is captured: state that it made would be made anew, and
    with it forgotten, in every replay.
    """
    if capturing(param):
        raise RuntimeError("a step that is captured must have been taken once before")


class MaskSource(Protocol):
    """What ``step`` is restricted to: a ``SubNetwork``, or whatever knows a mask per parameter."""

    def mask_of(self, parameter: Any, /) -> Mask | None:
        """The mask of one of the optimizer's parameters; None where it is outside."""
        ...


class MaskedOptimizer(Optimizer):
    """A torch optimizer whose ``step`` takes a sub-network.

    Elements of a parameter outside the sub-network, parameters wholly outside it, and parameters
    without a gradient are not touched: not their value, weight decay or state. State has the
    parameters' shapes, is created at a parameter's first update, and is fp32 (fp64 for fp64
    parameters).
    """

    _state_names: ClassVar[frozenset[str]]

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        subnet: MaskSource | None = None,
        *,
        closure: Callable[[], Any] | None = None,
        lr_scale: float = 1.0,
    ) -> Any:
        """Update what is inside ``subnet``; None is everything.

        Args:
            subnet: has ``mask_of(parameter)``, which returns a mask, or None for a parameter
                outside.
            closure: reevaluates the model and returns the loss.
            lr_scale: factor on every group's learning rate for this step, >= 0.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            TypeError: ``subnet`` is no source of masks.
            ValueError: a mask does not fit its parameter, an option is out of range, or a gradient
                is sparse; no parameter has been changed.
        """
        if subnet is not None and not hasattr(subnet, "mask_of"):
            hint = "; pass a closure as step(closure=...)" if callable(subnet) else ""
            raise TypeError(
                f"subnet must have mask_of(parameter), got {type(subnet).__name__}{hint}"
            )
        if not 0 <= lr_scale < math.inf:
            raise ValueError(f"lr_scale must be >= 0 and finite, got {lr_scale}")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._check_options(group)
        inside = [_inside(group, subnet) for group in self.param_groups]
        with torch.no_grad():
            for group, updates in zip(self.param_groups, inside, strict=True):
                self._update(group, updates, group["lr"] * lr_scale)
        return loss

    def _update(
        self, group: dict[str, Any], updates: list[tuple[Tensor, Mask]], lr: float | Tensor
    ) -> None:
        """Update these parameters of the group inside their masks."""
        raise NotImplementedError

    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise if one of the group's options is out of range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's; the options of the group are checked, too."""
        self._check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's; it can be read with ``torch.load(weights_only=True)``."""
        # A hook that runs before those of the user: these see what will be saved.
        hook = self.register_state_dict_post_hook(_encode, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken, bit for bit.

        Raises:
            ValueError: it is another optimizer's, or does not fit these parameters; nothing has
                been changed.
        """
        state: dict[Any, Any] = {}

        # torch.optim would cast the state to the parameters' dtype and cannot copy strings: it gets
        # the groups alone. The user's hooks run before ``take`` and after ``give``.
        def take(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            state.update(self._decode(given))
            return {**given, "state": {}}

        def give(_: Optimizer) -> None:
            self.state.update(state)

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(give, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _decode(self, state_dict: dict[str, Any]) -> dict[Any, Any]:
        """The state by parameter, each on its parameter's device and in the dtype of its state."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [param for group in self.param_groups for param in group["params"]]
        params = dict(zip(saved, own, strict=False))
        return {
            params[i]: self._decode_entry(i, params[i], entry)
            for i, entry in state_dict["state"].items()
            if i in params
        }

    def _decode_entry(self, i: int, param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        if set(entry) != self._state_names:
            raise ValueError(
                f"state of parameter {i} must hold {sorted(self._state_names)}, got {sorted(entry)}"
            )
        decoded: dict[str, Any] = {}
        for name, value in entry.items():
            if not isinstance(value, Tensor):
                decoded[name] = RegionCounts.from_state(value, param.shape)
                continue
            if value.shape != param.shape:
                raise ValueError(
                    f"{name} of parameter {i} must have shape {list(param.shape)}, "
                    f"got {list(value.shape)}"
                )
            decoded[name] = value.to(param.device, state_dtype(param.dtype))
        return decoded


def _encode(_: Optimizer, state_dict: dict[str, Any]) -> None:
    state_dict["state"] = {
        i: {k: v.state() if isinstance(v, RegionCounts) else v for k, v in entry.items()}
        for i, entry in state_dict["state"].items()
    }


def _inside(group: dict[str, Any], subnet: MaskSource | None) -> list[tuple[Tensor, Mask]]:
    """Parameters of the group that this step updates, with their masks."""
    inside: list[tuple[Tensor, Mask]] = []
    for param in group["params"]:
        mask = _FULL if subnet is None else subnet.mask_of(param)
        if mask is None or param.grad is None:
            continue
        if not isinstance(mask, Mask):
            raise TypeError(f"mask_of must return a Mask or None, got {type(mask).__name__}")
        mask.check(param.shape)
        if param.grad.layout != torch.strided:
            raise ValueError(
                f"gradients must be dense (torch.strided), got {param.grad.layout} for a parameter "
                f"of shape {list(param.shape)}"
            )
        inside.append((param, mask))
    return inside
