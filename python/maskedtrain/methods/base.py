"""The template of partial SGD: every method is a choice of masks and perturbations, written as a
plan.

    x_{t+1} = x_t - lr_t * alpha_t * p_t * g_t,      g_t a stochastic gradient at x_t + dx_t

(Algorithm 1 of "Masked Training of Neural Networks with Partial Gradients", AISTATS 2022.)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.subnetwork import SubNetwork

__all__ = ["Method", "MethodConfig", "Pass", "Plan"]


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a step: a gradient of ``loss_weight * f`` at ``x + dx``.

    Running a sub-network is the perturbation ``dx = -(1 - p) * x``. ``perturbed()`` is a context in
    which the parameters are moved by any further ``dx``, and from which they come back exactly.
    ``probe(gradients)``, where there is one, gets the model's gradients (None where the pass does
    not reach) in the place of ``parameter.grad``: the pass says where to go and is no part of the
    update. ``batch`` is the number of the step's mini-batch that the pass runs on.
    """

    subnet: SubNetwork
    loss_weight: float = 1.0
    perturbed: Callable[[], AbstractContextManager[None]] = nullcontext
    probe: Callable[[list[Tensor | None]], None] | None = None
    batch: int = 0


@dataclass(frozen=True)
class Plan:
    """What one step does: its passes, the parameters it updates (p_t), its step-size factor
    (alpha_t).
    """

    passes: tuple[Pass, ...]
    update: SubNetwork
    lr_scale: float = 1.0
    updated_in_all: SubNetwork | None = None
    """All that the step updates, where the method's own hooks update more than ``update``."""

    @property
    def mask(self) -> SubNetwork:
        """p_t: all that the step updates."""
        return self.update if self.updated_in_all is None else self.updated_in_all

    @property
    def every_pass(self) -> tuple[Pass, ...]:
        """All that ``backward`` runs: the passes, and those that a subclass has beside them, of
        which no criteria are measured.
        """
        return self.passes

    @property
    def batches(self) -> int:
        """How many mini-batches the passes run on."""
        return 1 + max((item.batch for item in self.every_pass), default=0)

    def backward(
        self, *losses: Callable[[], Tensor], scale: float | Tensor = 1.0
    ) -> dict[str, Tensor]:
        """Run every pass and add up the gradients in ``parameter.grad``.

        Parameters that are wholly outside the update get no gradient, nor does anything below the
        lowest layer of the others: that part of the backward is not computed.

        Args:
            losses: for each of the step's mini-batches (``batches`` of them, one for most plans),
                what computes the loss on it of the model as it is then active.
            scale: multiplies the gradients (a micro-batch's share under accumulation).

        Returns:
            Each network's loss in its first pass, by name, detached and unscaled.

        Raises:
            ValueError: a pass runs on a mini-batch whose loss is not given.
        """
        if len(losses) < self.batches:
            raise ValueError(
                f"the passes of this plan run on {self.batches} mini-batches: backward needs the "
                f"loss on each, got {len(losses)}"
            )
        found: dict[str, Tensor] = {}
        with _frozen(self.update):
            for item in self.passes:
                with item.perturbed(), item.subnet.activate():
                    value = losses[item.batch]()
                    if item.probe is None:
                        (value * (item.loss_weight * scale)).backward()
                    else:
                        item.probe(_gradients(value, item.subnet.model))
                found.setdefault(item.subnet.name, value.detach())
        return found

    def flops(self, *inputs: Any) -> int:
        """FLOPs (2 per multiply-add) of the forward and backward passes on inputs of these shapes,
        as ``SubNetwork.flops`` counts them: nothing is computed.
        """
        with _frozen(self.update):
            return sum(item.subnet.flops(*inputs, training=True) for item in self.every_pass)


@contextmanager
def _frozen(update: SubNetwork) -> Generator[None]:
    """Within it, what the update leaves wholly alone requires no gradient."""
    outside = [
        parameter
        for parameter in update.model.parameters()
        if parameter.requires_grad and update.mask_of(parameter) is None
    ]
    for parameter in outside:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in outside:
            parameter.requires_grad = True


def _gradients(loss: Tensor, model: nn.Module) -> list[Tensor | None]:
    """By parameter; None where the loss does not depend on it."""
    parameters = list(model.parameters())
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    found = dict(zip(wanted, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True))
    return [found.get(parameter) for parameter in parameters]


class Method:
    """A way to train sub-networks of one super-network.

    A subclass gives ``plan``; it overrides the hooks and the state if it has any. In a stock loop::

        plan = method.plan(step)
        plan.backward(lambda: criterion(model(x), y))
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        optimizer.zero_grad()

    Args:
        subnets: the networks that the method trains, the ones worth evaluating.
    """

    def __init__(self, subnets: Sequence[SubNetwork]) -> None:
        if not subnets:
            raise ValueError("a method needs at least one sub-network")
        names = [subnet.name for subnet in subnets]
        if len(set(names)) < len(names):
            raise ValueError(f"sub-networks need different names, got {names}")
        if any(subnet.model is not subnets[0].model for subnet in subnets):
            raise ValueError("the sub-networks belong to different models")
        self.subnets: dict[str, SubNetwork] = dict(zip(names, subnets, strict=True))

    @property
    def networks(self) -> Mapping[str, SubNetwork]:
        """The networks that passes run, by name, to count on what a pass costs. Of those that are
        drawn anew at each step, one stands for all.
        """
        return self.subnets

    @property
    def batches(self) -> int:
        """How many mini-batches a usual step runs on, whatever the method's state: what epochs are
        counted by. Single steps may want more (``Plan.batches``).
        """
        return 1

    def prepare(self, batches: Iterable[tuple[Any, Tensor]]) -> None:
        """Called before the first step, and, after ``load_state_dict``, where training resumes:
        what a method needs to know of the training data.

        It may replace parameters of the model: make the optimizer afterwards.

        Args:
            batches: ``(inputs, targets)`` of training data, without end, the same ones at each
                call.
        """

    def plan(self, step: int) -> Plan:
        """The plan of step ``step`` (0, 1, ...); a pure function of it and of the method's
        state.
        """
        raise NotImplementedError

    def after_backward(self, step: int, plan: Plan) -> Plan:
        """Called with the gradients in place; may return a plan with another update mask or step
        size.
        """
        return plan

    def after_step(self, step: int, plan: Plan, optimizer: MaskedOptimizer) -> None:
        """Called after the optimizer's update, with the gradients and the learning rate that it was
        made with still in place; ``plan.lr_scale`` has every factor of that rate. Where the method
        gives a parameter another shape, it has the optimizer's state follow.
        """

    def state_dict(self) -> dict[str, Any]:
        """What ``plan`` depends on beyond the step: numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; gives the model the structure that its weights had then, if
        the method changes it.
        """
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {sorted(state)}")


@dataclass(frozen=True)
class MethodConfig:
    """Options of a method; a subclass in each method's file, named ``Config``."""

    name: ClassVar[str]

    def build(self, model: nn.Module) -> Method:
        """The method for this model (adds what sub-networks need to it: make the optimizer
        afterwards).
        """
        raise NotImplementedError
