"""Top-k gradients with error feedback: what is not applied now is remembered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskedtrain.layers.topk import kept_count
from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.largest import largest, only
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Mask
from partial_kernels.optim.reference import state_dtype

__all__ = ["Config", "ErrorFeedback", "Memory", "Scope"]

Scope = Literal["global", "tensor"]


class Memory:
    """Gradients that are still to be applied: a tensor of each parameter's shape, zeros at first.

    In fp32 where the parameter's dtype is smaller (fp64 for fp64), and laid out as the parameter.
    """

    def __init__(self) -> None:
        self._held: dict[Tensor, Tensor] = {}

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._held

    def __getitem__(self, parameter: Tensor) -> Tensor:
        if parameter not in self._held:
            self._held[parameter] = _zeros(parameter)
        return self._held[parameter]

    def scale(self, factor: float) -> None:
        """Multiply all that is held; ValueError unless ``factor`` is >= 0 and finite."""
        if not 0 <= factor < math.inf:
            raise ValueError(f"factor must be >= 0 and finite, got {factor}")
        for held in self._held.values():
            held.mul_(factor)

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """What is held, by the names of the model's parameters."""
        named = model.named_parameters()
        return {name: self._held[p] for name, p in named if p in self._held}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``; ValueError if it does not fit the model, and nothing has
        changed then.
        """
        named = dict(model.named_parameters())
        for name, held in state.items():
            if name not in named or held.shape != named[name].shape:
                raise ValueError(f"the memory of {name!r} fits no parameter of the model")
        self._held = {named[name]: _zeros(named[name]).copy_(held) for name, held in state.items()}


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter, dtype=state_dtype(parameter.dtype), requires_grad=False)


class ErrorFeedback(Method):
    """Apply the k largest elements of gradient and memory, remember the others::

        p_t = top-k(|e_t + g_t|),    c_t = p_t (e_t + g_t),    e_{t+1} = e_t + g_t - c_t

    One full pass a step, at dx_t = 0; the update is c_t at p_t, and everything outside p_t is left
    alone, momentum and decay included. Nothing is lost: what was applied and the memory add up to
    all gradients, so that ``x_t - lr e_t`` moves by ``-lr g_t``, as SGD does (without momentum, at
    a constant learning rate lr). The k largest of d elements hold ``|e + g| / |c| <= sqrt(d / k)``.
    With k of all it is SGD. Elements count by absolute value, ties by order; a step waits for the
    device.

    The memory is in units of the gradient, since that is what optimizers take: at a constant
    learning rate this is MEM-SGD, whose memory gathers lr g. Where the rate changes, what waits is
    applied at the rate of the step in which it leaves, not of that in which it came. To have
    MEM-SGD there, too, call ``scale_memory(lr before / lr after)`` at each change.

    In a stock loop, ``plan = method.after_backward(step, plan)`` before the optimizer's step puts
    c_t in ``parameter.grad``. Gradients that are clipped after that, as ``Trainer`` does, lose what
    is clipped.

    Memory is one buffer of the model's size, and another while a step selects. In half precision it
    is fp32 and takes up what c loses by rounding, too.

    Args:
        model: the network.
        k: an int is how many elements are applied, a float in (0, 1] their share; of those that
            have had a gradient.
        scope: "global" takes the k largest of the whole model, "tensor" of each parameter.

    Raises:
        ValueError: k or scope is none of these.

    Source: Stich et al., "Sparsified SGD with Memory" (NeurIPS 2018), algorithm 1.

    Example:
        >>> method = ErrorFeedback(model, 0.01)
        >>> for report in Trainer(model, method, optimizer, loss_fn).steps(batches, until=2000): ...
    """

    def __init__(self, model: nn.Module, k: int | float, *, scope: Scope = "global") -> None:
        kept_count(k, 1)
        if scope not in ("global", "tensor"):
            raise ValueError(f'scope must be "global" or "tensor", got {scope!r}')
        full = SubNetwork.full(model)
        super().__init__([full])
        self.model, self.k, self.scope = model, k, scope
        self._memory = Memory()
        self._plan = Plan((Pass(full),), update=full)

    def plan(self, step: int) -> Plan:
        return self._plan

    @torch.no_grad()
    def after_backward(self, step: int, plan: Plan) -> Plan:
        waiting = self._remember(plan.update)
        groups = [waiting] if self.scope == "global" else [[parameter] for parameter in waiting]
        masks: dict[nn.Parameter, Mask] = {}
        for group in groups:
            sums = [self._memory[parameter] for parameter in group]
            count = kept_count(self.k, sum(held.numel() for held in sums))
            for parameter, held, mask in zip(group, sums, largest(sums, count), strict=True):
                parameter.grad = mask.restrict(held).to(parameter.dtype)
                # Not set to 0: what was rounded off stays.
                held.sub_(parameter.grad)
                masks[parameter] = mask
        return replace(plan, update=only(self.model, masks, "top-k"))

    def _remember(self, subnet: SubNetwork) -> list[nn.Parameter]:
        """Add the gradients to the memory; returns the parameters that it holds something of."""
        waiting: list[nn.Parameter] = []
        for parameter in self.model.parameters():
            if not parameter.requires_grad or subnet.mask_of(parameter) is None:
                continue
            if parameter.grad is not None:
                self._memory[parameter].add_(parameter.grad)
            # Without a gradient in this step, what earlier ones left may still go.
            if parameter in self._memory:
                waiting.append(parameter)
        return waiting

    def scale_memory(self, factor: float) -> None:
        """Multiply the memory, for a learning rate that changes: by the one before over the one
        after.
        """
        self._memory.scale(factor)

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict(self.model)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"memory"}:
            raise ValueError(f"the state must hold a memory, got {sorted(state)}")
        self._memory.load_state_dict(self.model, state["memory"])


@dataclass(frozen=True)
class Config(MethodConfig):
    """Top-k gradients with error feedback: what is not applied now is remembered."""

    name = "errorfeedback"

    ratio: float = 0.01
    """Share of the elements that a step applies."""
    k: int | None = None
    """Or their number, in place of the share."""
    scope: Scope = "global"
    """The largest of the whole model, or of each parameter."""

    def __post_init__(self) -> None:
        kept_count(float(self.ratio) if self.k is None else self.k, 1)

    def build(self, model: nn.Module) -> ErrorFeedback:
        return ErrorFeedback(model, self.ratio if self.k is None else self.k, scope=self.scope)
