"""Extragradient: the gradient where a step would lead, applied from where one is."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Config", "Extragradient", "Look"]

Look = Literal["same", "fresh", "past"]


class Extragradient(Method):
    """Update x by the gradient at ``x + dx``, ``dx = -distance g``, with p_t = 1.

    g is the gradient at x of the same mini-batch ("same") or of another one ("fresh"): two
    gradients a step, so twice the cost of standard training. With "past" (the optimistic variant)
    g is the gradient that the step before was made with: one gradient a step, none of dx in the
    first, and a copy of the gradients is kept.

    The parameters come back from ``x + dx`` bit for bit. The loss that is reported is that at x
    (with "past", at ``x + dx``).

    Args:
        subnet: the network to train.
        distance: length of the step ahead as a factor of the gradient, >= 0; about the learning
            rate. 0 is standard training.
        look: what g is.
        sign: -1, or 1 for a step uphill, as the paper prints it.

    Source: Korpelevich 1976; Popov 1980 ("past"); as partial SGD, section 3.5 of "Masked Training
    of Neural Networks with Partial Gradients" (AISTATS 2022).
    """

    def __init__(
        self, subnet: SubNetwork, *, distance: float, look: Look = "same", sign: Literal[-1, 1] = -1
    ) -> None:
        super().__init__([subnet])
        if not 0 <= distance < math.inf:
            raise ValueError(f"distance must be >= 0 and finite, got {distance}")
        if look not in ("same", "fresh", "past"):
            raise ValueError(f'look must be "same", "fresh" or "past", got {look!r}')
        if sign not in (-1, 1):
            raise ValueError(f"sign must be -1 or 1, got {sign}")
        self.model, self._factor = subnet.model, sign * distance
        self._ahead: list[Tensor | None] = []
        step = Pass(subnet, perturbed=self._moved)
        look_first = Pass(subnet, probe=self._look, batch=int(look == "fresh"))
        self._past = look == "past"
        self._plan = Plan((step,) if self._past else (look_first, step), update=subnet)

    @property
    def batches(self) -> int:
        return self._plan.batches

    def plan(self, step: int) -> Plan:
        return self._plan

    def _look(self, gradients: list[Tensor | None]) -> None:
        self._ahead = gradients

    @contextmanager
    def _moved(self) -> Generator[None]:
        moves = [
            (parameter, gradient)
            for parameter, gradient in zip(self.model.parameters(), self._ahead, strict=False)
            if gradient is not None
        ]
        before = [parameter.detach().clone() for parameter, _ in moves]
        with torch.no_grad():
            for parameter, gradient in moves:
                parameter.add_(gradient, alpha=self._factor)
        try:
            yield
        finally:
            with torch.no_grad():
                for (parameter, _), held in zip(moves, before, strict=True):
                    parameter.copy_(held)

    def after_backward(self, step: int, plan: Plan) -> Plan:
        # The optimizer may clip what the parameters hold.
        self._ahead = [
            None if parameter.grad is None or not self._past else parameter.grad.detach().clone()
            for parameter in self.model.parameters()
        ]
        return plan

    def state_dict(self) -> dict[str, Any]:
        if not self._past or not self._ahead:
            return {}
        names = (name for name, _ in self.model.named_parameters())
        return {
            "gradients": {
                name: gradient
                for name, gradient in zip(names, self._ahead, strict=True)
                if gradient is not None
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) - {"gradients"} or (state and not self._past):
            raise ValueError(f"{type(self).__name__} has no such state: {sorted(state)}")
        given = state.get("gradients", {})
        named = dict(self.model.named_parameters())
        for name, gradient in given.items():
            if name not in named or gradient.shape != named[name].shape:
                raise ValueError(f"the gradient of {name!r} fits no parameter of the model")
        self._ahead = [
            given[name].to(parameter.device) if name in given else None
            for name, parameter in named.items()
        ]


@dataclass(frozen=True)
class Config(MethodConfig):
    """Extragradient training of the whole network."""

    name = "extragradient"

    distance: float = 0.01
    """Length of the step ahead, as a factor of the gradient; about the learning rate."""
    look: Look = "same"
    """Which gradient leads ahead: of the same mini-batch, of a fresh one (twice the batches), or
    the past step's (one gradient a step)."""
    sign: Literal[-1, 1] = -1
    """Downhill, or uphill."""

    def build(self, model: nn.Module) -> Extragradient:
        return Extragradient(
            SubNetwork.full(model), distance=self.distance, look=self.look, sign=self.sign
        )
