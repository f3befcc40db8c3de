"""The training loop: batch -> plan -> forward and backward -> optimizer -> method's hook."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from maskedtrain.methods.base import Method, Plan
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.theory.criteria import Measured, MeasuredStep, at_x, step_gradients
from maskedtrain.theory.smoothness import Smoothness, smoothness
from maskedtrain.training.compiled import compiled

__all__ = [
    "IGNORED",
    "Batch",
    "Evaluation",
    "NonFiniteError",
    "StepReport",
    "Trainer",
    "evaluate",
    "evaluation_mode",
    "seed_generators",
    "target_count",
    "training_mode",
]

Batch = tuple[Any, Tensor]
"""``(inputs, targets)``: a tensor, or a tuple of the model's arguments, and what it should say."""

IGNORED = -100
"""Targets that do not count, such as padding: the ``ignore_index`` of torch's losses."""

_ADVICE = "Try a lower learning rate, a warm-up or gradient clipping"


class NonFiniteError(RuntimeError):
    """A loss, or a weight, was NaN or infinite."""


@dataclass(frozen=True)
class StepReport:
    """What one step did: the count of steps with it, losses by sub-network, the learning rate of
    the update (with every factor), the gradient's norm before clipping, the plan that was run, and,
    where they were measured, the criteria of partial SGD by sub-network and the smoothness; alpha
    is 1 where it was not measured.
    """

    step: int
    losses: dict[str, Tensor]
    lr: float
    grad_norm: Tensor | None
    plan: Plan
    criteria: Mapping[str, Measured] = field(default_factory=dict[str, Measured])
    alpha: float = 1.0
    smoothness: Smoothness | None = None


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy (a fraction) of a sub-network over ``count`` targets."""

    loss: float
    accuracy: float
    count: int


class Trainer:
    """Trains the sub-networks of a model by a method. Any model, any loss, any batches.

    Args:
        model: the super-network, on its device.
        method: what each step trains, such as ``ATS([full, core])``.
        optimizer: one whose ``step`` takes a sub-network: ``MaskedSGD`` or ``MaskedAdamW``.
        loss_fn: ``loss_fn(model(inputs), targets)`` of batches ``(inputs, targets)``, the mean over
            the targets that are not -100; inputs that are a tuple are the model's arguments.
        scheduler: a torch scheduler, stepped once a step.
        autocast: dtype of the forward passes (``torch.bfloat16``), or None.
        clip_grad_norm: largest norm of the gradient.
        accumulate: mini-batches whose losses are averaged for one step, by number of targets.
        compile: run the training passes through ``torch.compile``.
        shapes: how many shapes batches have, where they are few: each is then compiled by itself.
            Where not given, what a network is compiled to second takes any.
        check_every: steps between checks that losses are finite. A check waits for the device;
            before a step it keeps a bad gradient from being applied, so 1 is right wherever that
            costs little.
        measure_every: steps between measurements of the criteria of partial SGD
            (``maskedtrain.theory.criteria``), on the step's first mini-batch before its update; 0
            for none. Each costs the step's passes once more and one of the whole network.
        measure_smoothness: estimate the smoothness L of the whole network's loss there, too
            (``maskedtrain.theory.smoothness``), by at most 20 products with the Hessian.
        alpha: "auto" multiplies the learning rate of every step by the step-size factor alpha of
            Theorem 1 of partial SGD, in [0, 1], measured (at the cost above, and once for both) on
            the step's first mini-batch; of a step of several passes it is that of their sum
            (``maskedtrain.theory.criteria.MeasuredStep``). Steps whose gradients are those of the
            whole network at its present weights have alpha = 1 and measure nothing. Momentum,
            moments and decay take part as with any learning rate: at alpha = 0 no parameter
            changes, and the optimizer's state goes on. "one" takes the learning rate as it is.

    Example:
        >>> optimizer = MaskedSGD(model.parameters(), lr=0.1)
        >>> trainer = Trainer(model, ATS([full, core]), optimizer, F.cross_entropy)
        >>> for report in trainer.steps(batches, until=1000): ...
        >>> trainer.evaluate(test_batches, core).accuracy
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: MaskedOptimizer,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        scheduler: LRScheduler | None = None,
        autocast: torch.dtype | None = None,
        clip_grad_norm: float | None = None,
        accumulate: int = 1,
        compile: bool = False,
        shapes: int | None = None,
        check_every: int = 1,
        measure_every: int = 0,
        measure_smoothness: bool = False,
        alpha: Literal["one", "auto"] = "one",
    ) -> None:
        if alpha not in ("one", "auto"):
            raise ValueError(f'alpha must be "one" or "auto", got {alpha!r}')
        if measure_every < 0:
            raise ValueError(f"measure_every must be >= 0, got {measure_every}")
        if accumulate < 1 or check_every < 1:
            raise ValueError(
                f"accumulate and check_every must be >= 1, got {accumulate} and {check_every}"
            )
        if shapes is not None and shapes < 1:
            raise ValueError(f"shapes must be >= 1, got {shapes}")
        self.model = model
        self.method = method
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.scheduler = scheduler
        self.autocast = autocast
        self.clip_grad_norm = clip_grad_norm
        self.accumulate = accumulate
        self.check_every = check_every
        self.measure_every = measure_every
        self.measure_smoothness = measure_smoothness
        self.alpha = alpha
        self.step = 0
        self.passes = dict.fromkeys(method.subnets, 0)
        self._losses: dict[str, Tensor] = {}
        self._forward = compiled(model, len(method.networks), shapes) if compile else model
        self._device = next(model.parameters()).device

    def steps(self, batches: Iterable[Batch], *, until: int) -> Iterator[StepReport]:
        """Train until ``until`` steps are done in all; yields after each.

        Raises:
            NonFiniteError, ValueError: as ``train_step``.
        """
        stream = iter(batches)
        while self.step < until:
            yield self.train_step(stream)

    def train_step(self, batches: Iterator[Batch]) -> StepReport:
        """One step, on the next ``accumulate`` batches for each of the mini-batches that the passes
        of the method's plan run on.

        Raises:
            NonFiniteError: a loss was not finite; with ``check_every=1`` no parameter and no state
                of the optimizer has changed (running statistics have, in the forward pass).
            ValueError: there are no more batches.
        """
        # To set what is set takes several times as long as to look.
        if not all(module.training for module in self.model.modules()):
            self.model.train()
        plan = self.method.plan(self.step)
        taken = [self._next(batches) for _ in range(plan.batches)]
        reporting = self.measure_every > 0 and self.step % self.measure_every == 0
        scaling = self.alpha == "auto" and not at_x(plan)
        gradients, measured = None, MeasuredStep({}, alpha=1.0)
        firsts = [partial(self._loss, part[0]) for part in taken]
        if reporting or scaling:
            gradients = step_gradients(self.model, plan, *firsts)
            measured = gradients.measured(plan.update)
        curved = None
        if reporting and self.measure_smoothness:
            # What is compiled can be differentiated once.
            curved = smoothness(
                self.model, partial(self._loss, taken[0][0], self.model), iterations=20
            )
        losses: dict[str, Tensor] = {}
        for share, *parts in zip(_shares(taken[0]), *taken, strict=True):
            found = plan.backward(*(partial(self._loss, part) for part in parts), scale=share)
            for name, loss in found.items():
                losses[name] = losses.get(name, 0) + loss * share
        self._losses = losses
        if self.step % self.check_every == 0:
            self._check_losses(self.step + 1)
        alpha = measured.alpha if scaling else 1.0
        if math.isnan(alpha):
            self.optimizer.zero_grad()
            raise NonFiniteError(f"alpha is nan at step {self.step + 1}. {_ADVICE}")
        ran, plan = plan, self.method.after_backward(self.step, plan)
        if gradients is not None and plan.mask is not ran.mask:
            # A mask that was drawn from the gradient.
            measured = gradients.measured(plan.mask)
        criteria = measured.passes if reporting else {}
        grad_norm = None
        if self.clip_grad_norm is not None:
            grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad_norm)
        plan = replace(plan, lr_scale=plan.lr_scale * alpha)
        lr = self.optimizer.param_groups[0]["lr"] * plan.lr_scale
        self.optimizer.step(plan.update, lr_scale=plan.lr_scale)
        self.method.after_step(self.step, plan, self.optimizer)
        self.optimizer.zero_grad()
        if self.scheduler is not None:
            self.scheduler.step()
        self.step += 1
        # A part of a network that is drawn for this step trains that network.
        drawn = self.method.subnets.keys().isdisjoint(losses)
        for name in (*losses, *(self.method.subnets if drawn else ())):
            self.passes[name] = self.passes.get(name, 0) + 1
        return StepReport(self.step, losses, lr, grad_norm, ran, criteria, alpha, curved)

    def _next(self, batches: Iterator[Batch]) -> list[Batch]:
        """The next ``accumulate`` batches."""
        taken = list(islice(batches, self.accumulate))
        if len(taken) < self.accumulate:
            raise ValueError(f"the batches ended after {self.step} steps")
        return taken

    def _loss(self, batch: Batch, forward: Callable[..., Any] | None = None) -> Tensor:
        inputs, targets = batch
        forward = forward or self._forward
        with torch.autocast(self._device.type, self.autocast, enabled=self.autocast is not None):
            return self.loss_fn(forward(*_arguments(inputs)), targets)

    def check(self) -> None:
        """Raise NonFiniteError if the last step's losses or the weights are not finite: worth
        asking before they are saved.
        """
        self._check_losses(self.step)
        for name, tensor in self.model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"{name} is not finite after step {self.step}. {_ADVICE}")

    def _check_losses(self, step: int) -> None:
        for name, loss in self._losses.items():
            if not torch.isfinite(loss):
                self.optimizer.zero_grad()
                raise NonFiniteError(
                    f"the loss of {name} is {loss.item()} at step {step}. {_ADVICE}"
                )

    def evaluate(self, batches: Iterable[Batch], subnet: SubNetwork) -> Evaluation:
        """Loss and accuracy of a sub-network, computed as the training passes are; see
        ``evaluate``.
        """
        return evaluate(self.model, subnet, batches, self.loss_fn, autocast=self.autocast)

    def state_dict(self) -> dict[str, Any]:
        """All that a bitwise continuation needs beside the model's weights and the batches'
        position.
        """
        return {
            "step": self.step,
            "passes": dict(self.passes),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "method": self.method.state_dict(),
            "rng": _rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; sets the global random number generators too."""
        self.step = state["step"]
        self.passes = dict(state["passes"])
        # First: it may say what the parameters' shapes are.
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        _set_rng_state(state["rng"])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    subnet: SubNetwork,
    batches: Iterable[Batch],
    loss_fn: Callable[[Any, Any], Tensor],
    *,
    autocast: torch.dtype | None = None,
) -> Evaluation:
    """Mean loss and accuracy (arg max of the output's last axis) of a sub-network.

    ``loss_fn`` is a mean over the targets that are not -100, of which batches may have different
    numbers. The model comes back as it was. Raises ValueError where there are no batches.
    """
    device = next(model.parameters()).device
    total = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluation_mode(model), subnet.activate():
        for inputs, targets in batches:
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                outputs = model(*_arguments(inputs))
                loss = loss_fn(outputs, targets)
            count = target_count(targets)
            # No output is -100: what does not count is not right.
            right = (outputs.argmax(-1) == targets).sum()
            total += torch.stack([loss.double() * count, right.double(), count.double()])
    loss, right, count = total.tolist()
    if not count:
        raise ValueError("there is nothing to evaluate on: no batches")
    return Evaluation(loss / count, right / count, round(count))


def _arguments(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def target_count(targets: Tensor) -> Tensor:
    """How many targets count: a tensor, so as not to wait for a device."""
    return (targets != IGNORED).sum()


def _shares(batches: Sequence[Batch]) -> Sequence[Any]:
    """Each batch's share of the targets of all."""
    if len(batches) == 1:
        return [1.0]
    counts = torch.stack([target_count(targets) for _, targets in batches])
    return (counts.double() / counts.sum()).unbind()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within it every module is in evaluation mode; each comes back to its own mode after it."""
    with _mode(model, training=False):
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within it every module is in training mode; each comes back to its own mode after it."""
    with _mode(model, training=True):
        yield


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    others = [module for module in model.modules() if module.training != training]
    model.train(training)
    try:
        yield
    finally:
        for module in others:
            module.training = not training


def seed_generators(seed: int) -> None:
    """Seed every global generator whose state a ``Trainer`` saves: torch's, numpy's, Python's."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what is saved
    random.seed(seed)


def _rng_state() -> dict[str, Any]:
    """The state of every global generator, in types that load without unpickling code."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is what is saved
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
