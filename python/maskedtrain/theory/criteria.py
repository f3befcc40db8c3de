"""The quantities that partial SGD's convergence rests on, measured on gradients.

With g the gradient of f at x, g~ that at the perturbed point x~ = x + dx, and p the mask of the
update::

    alpha   = min(1, <p g, p g~> / |p g~|^2)        the step-size factor
    c_norm  = |g| / |p g|                            what the mask loses
    c_sim   = |p g| / |p g~|                         how far the perturbation scales the gradient
    c_align = |p g| |p g~| / <p g, p g~>             how far it turns it
    q       = c_norm max(c_sim, c_align)             what the number of steps grows with, squared
    drift   = |dx| / max(|p g|, |p g~|)              below 1 / (2 L): Assumption 3

Source: Theorem 1, Assumption 3 and the criteria of section 3 of "Masked Training of Neural Networks
with Partial Gradients" (AISTATS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain.methods.base import Pass, Plan
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Mask

__all__ = ["Criteria", "Measured", "criteria", "measure", "measure_plan"]


@dataclass(frozen=True)
class Criteria:
    """Squared norms and the inner product that the quantities are made of."""

    masked_sq: float
    """``|p g|^2``"""
    other_masked_sq: float
    """``|p g~|^2``"""
    inner: float
    """``<p g, p g~>``"""
    sq: float
    """``|g|^2``"""
    displacement_sq: float = 0.0
    """``|dx|^2``"""

    @property
    def alpha(self) -> float:
        """``min(1, <p g, p g~> / |p g~|^2)``, in [0, 1]: 0 where g~ points the wrong way."""
        return min(max(_ratio(self.inner, self.other_masked_sq), 0.0), 1.0)

    @property
    def c_norm(self) -> float:
        """``|g| / |p g|``, >= 1."""
        return _ratio(math.sqrt(self.sq), math.sqrt(self.masked_sq))

    @property
    def c_sim(self) -> float:
        """``|p g| / |p g~|``."""
        return _ratio(math.sqrt(self.masked_sq), math.sqrt(self.other_masked_sq))

    @property
    def c_align(self) -> float:
        """``|p g| |p g~| / <p g, p g~>``, >= 1: one by the cosine; infinite where it is not
        positive.
        """
        return _ratio(math.sqrt(self.masked_sq * self.other_masked_sq), max(self.inner, 0.0))

    @property
    def q(self) -> float:
        """``c_norm max(c_sim, c_align)``, which is ``|g| / (alpha |p g~|)``."""
        return self.c_norm * max(self.c_sim, self.c_align)

    @property
    def drift(self) -> float:
        """``|dx| / max(|p g|, |p g~|)``."""
        largest = max(self.masked_sq, self.other_masked_sq)
        return _ratio(math.sqrt(self.displacement_sq), math.sqrt(largest))

    def assumption3(self, smoothness: float) -> bool:
        """Whether ``drift < 1 / (2 L)``, for gradients that are L-Lipschitz."""
        return self.drift < 1 / (2 * smoothness)

    def quantities(self) -> dict[str, float]:
        """All of them but Assumption 3's verdict, by name."""
        names = ("alpha", "c_norm", "c_sim", "c_align", "q", "drift")
        return {name: getattr(self, name) for name in names}

    def __add__(self, other: Criteria) -> Criteria:
        """Of two sets of parameters together."""
        return Criteria(
            self.masked_sq + other.masked_sq,
            self.other_masked_sq + other.other_masked_sq,
            self.inner + other.inner,
            self.sq + other.sq,
            self.displacement_sq + other.displacement_sq,
        )


@dataclass(frozen=True)
class Measured:
    """Criteria of one pass: of the whole model, and of each parameter by name."""

    whole: Criteria
    by_parameter: Mapping[str, Criteria]


def criteria(
    grads: Sequence[Tensor],
    other_grads: Sequence[Tensor | None],
    masks: Sequence[Mask | None],
    displacement_sq: Sequence[float] | None = None,
) -> list[Criteria]:
    """Criteria of each tensor; their sum is that of all.

    Args:
        grads: g.
        other_grads: g~; not read where the mask is None.
        masks: p; None keeps nothing.
        displacement_sq: ``|dx|^2`` of each; 0 where not given.

    Raises:
        ValueError, TypeError: the lists do not fit together, as ``partial_kernels.masked_stats``.
    """
    moved = displacement_sq or [0.0] * len(grads)
    if len(moved) != len(grads):
        raise ValueError(
            f"displacement_sq must have one entry per gradient, {len(grads)}, got {len(moved)}"
        )
    # One transfer for all.
    sums = torch.stack(pk.masked_stats(grads, other_grads, masks))
    columns: list[list[float]] = cast("Any", sums.T).tolist()
    return [
        Criteria(masked, other, inner, whole, sq)
        for (masked, other, inner, whole), sq in zip(columns, moved, strict=True)
    ]


def measure(
    model: nn.Module,
    item: Pass,
    loss: Callable[[], Tensor],
    *,
    update: SubNetwork | None = None,
) -> Measured:
    """Criteria of one pass of a plan, on the data that ``loss`` computes with.

    Costs the forward and backward of the pass and those of the whole model at x. Gradients that the
    parameters hold, and the state of modules (running statistics) and of random number generators,
    come back as they were; both gradients are of the same random numbers (dropout).

    Args:
        model: the super-network.
        item: its sub-network and perturbation make x~.
        loss: computes the loss of the model as it is then active.
        update: p; the pass's own sub-network where not given.
    """
    update = item.subnet if update is None else update
    full = SubNetwork.full(model)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with _undone(model, named.values()) as again:
        g = _gradients(named, Pass(full), loss)
        again()
        other = _gradients(named, item, loss)
    moved = [_moved(parameter, item, full) for parameter in named.values()]
    if item.perturbed is not nullcontext:
        moved = _moved_further(list(named.values()), item, full)
    masks = [update.mask_of(parameter) for parameter in named.values()]
    found = criteria(g, other, masks, moved)
    whole = sum(found, start=Criteria(0.0, 0.0, 0.0, 0.0))
    return Measured(whole, dict(zip(named, found, strict=True)))


def measure_plan(
    model: nn.Module,
    plan: Plan,
    loss: Callable[[], Tensor],
    *,
    fresh: Callable[[], Tensor] | None = None,
) -> dict[str, Measured]:
    """Criteria of every pass of a plan that is part of its update, by the name of its network.

    As ``measure``; passes that say where to go (``Pass.probe``) are run first. Losses as for
    ``Plan.backward``.
    """
    found: dict[str, Measured] = {}
    with _undone(model, model.parameters()):
        for item in plan.passes:
            if item.probe is None:
                found.setdefault(item.subnet.name, measure(model, item, loss, update=plan.update))
                continue
            one = replace(plan, passes=(item,))
            one.backward(loss, fresh=fresh)
    return found


def _gradients(
    named: Mapping[str, nn.Parameter], item: Pass, loss: Callable[[], Tensor]
) -> list[Tensor]:
    """The gradients of one pass; zeros of what it does not reach."""
    for parameter in named.values():
        parameter.grad = None
    with item.perturbed(), item.subnet.activate(), torch.enable_grad():
        loss().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in named.values()]


def _moved(parameter: nn.Parameter, item: Pass, full: SubNetwork) -> float:
    """``|dx|^2`` of a parameter where the pass runs a sub-network: what it leaves out."""
    if full.mask_of(parameter) is None:
        # A norm that another sub-network has for itself: there is no x.
        return 0.0
    values, mask = parameter.detach(), item.subnet.mask_of(parameter)
    kept, _, _, whole = pk.masked_stats([values], [values], [mask])
    return max(float(whole - kept), 0.0)


def _moved_further(parameters: list[nn.Parameter], item: Pass, full: SubNetwork) -> list[float]:
    """The same where the pass perturbs the parameters besides."""
    before = [parameter.detach().clone() for parameter in parameters]
    squares: list[float] = []
    with item.perturbed():
        for parameter, x in zip(parameters, before, strict=True):
            mask = item.subnet.mask_of(parameter)
            if full.mask_of(parameter) is None:
                squares.append(0.0)
                continue
            inside = (
                mask.dense(x.shape, x.device)
                if mask is not None
                else x.new_zeros((), dtype=torch.bool)
            )
            point = torch.where(inside, parameter.detach(), torch.zeros_like(x))
            squares.append(float((point.double() - x.double()).square().sum()))
    return squares


@contextmanager
def _undone(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Generator[Callable[[], None]]:
    """After it gradients, buffers and random number generators are as they were; so are the latter
    two when what it gives is called.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in parameters if p.is_cuda}
    state, states = torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices}

    def again() -> None:
        for buffer, held in buffers:
            buffer.detach().copy_(held)
        torch.set_rng_state(state)
        for device, on_device in states.items():
            torch.cuda.set_rng_state(on_device, device)

    try:
        yield again
    finally:
        again()
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


def _ratio(a: float, b: float) -> float:
    """a / b; 1 where both are 0, as if nothing were lost."""
    if b == 0:
        return 1.0 if a == 0 else math.inf
    return a / b
