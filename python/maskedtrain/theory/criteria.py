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
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import partial_kernels as pk
from maskedtrain.methods.base import Pass, Plan
from maskedtrain.subnetwork import SubNetwork
from maskedtrain.theory._quantities import Criteria, criteria

__all__ = [
    "Criteria",
    "Loss",
    "Measured",
    "MeasuredStep",
    "StepGradients",
    "at_x",
    "criteria",
    "measure",
    "measure_plan",
    "measure_step",
    "step_gradients",
    "undone",
]

Loss = Callable[[], Tensor] | Sequence[tuple[Callable[[], Tensor], float]]
"""What computes the loss on one batch; or several such with the weight of each in their mean: how
many targets it has, for losses that are a mean over these. One batch's graph is held at a time."""


@dataclass(frozen=True)
class Measured:
    """Criteria of one pass: of the whole model, and of each parameter by name."""

    whole: Criteria
    by_parameter: Mapping[str, Criteria]

    def by_layer(self) -> dict[str, Criteria]:
        """Criteria of each module's own parameters, by the module's name; what they are made of
        adds up to the whole.
        """
        found: dict[str, Criteria] = {}
        for name, one in self.by_parameter.items():
            layer = name.rpartition(".")[0]
            found[layer] = found[layer] + one if layer in found else one
        return found


@dataclass(frozen=True)
class MeasuredStep:
    """Criteria of the passes that make a step's update, by the name of their network, and the
    step-size factor of all together.
    """

    passes: Mapping[str, Measured]
    alpha: float
    """Theorem 1's, with the passes' gradients added up by their loss weights w, and their networks'
    masks p_i: ``sum w_i p_i grad f(x~_i)`` against ``sum w_i p_i grad f(x)``. That of the one pass
    where there is one, and 1 where every pass is at x."""


@dataclass(frozen=True)
class StepGradients:
    """Gradients of a plan's passes: what a step's criteria are made of, whatever its mask."""

    model: nn.Module
    passes: Sequence[Pass]
    at_x: Sequence[Tensor]
    """g, by parameter."""
    perturbed: Sequence[Sequence[Tensor]]
    """g~ of each pass."""
    displacement_sq: Sequence[Sequence[float]]
    """``|dx|^2`` of each pass."""

    def measured(self, update: SubNetwork) -> MeasuredStep:
        """The criteria with ``update`` for the mask p."""
        named = _trained(self.model)
        masks = [update.mask_of(parameter) for parameter in named.values()]
        found: dict[str, Measured] = {}
        total, reference = ([torch.zeros_like(g) for g in self.at_x] for _ in range(2))
        parts = zip(self.passes, self.perturbed, self.displacement_sq, strict=True)
        for item, others, moved in parts:
            by_parameter = criteria(self.at_x, others, masks, moved)
            measured = Measured(_sum(by_parameter), dict(zip(named, by_parameter, strict=True)))
            found.setdefault(item.subnet.name, measured)
            for i, (parameter, g) in enumerate(zip(named.values(), self.at_x, strict=True)):
                if (mask := item.subnet.mask_of(parameter)) is not None:
                    inside = mask.dense(g.shape, g.device)
                    total[i].add_(others[i], alpha=item.loss_weight)
                    reference[i].add_(torch.where(inside, g, 0), alpha=item.loss_weight)
        return MeasuredStep(found, _sum(criteria(reference, total, masks)).alpha)


def measure(
    model: nn.Module, item: Pass, loss: Loss, *, update: SubNetwork | None = None
) -> Measured:
    """Criteria of one pass of a plan, on the data that ``loss`` computes with.

    Costs the forward and backward of the pass and those of the whole model at x, on each batch of
    the loss, and the memory of both gradients and of one batch's graph, however many batches there
    are. Gradients that the parameters hold, and the state of modules (running statistics) and of
    random number generators, come back as they were; both gradients are of the same random numbers
    (dropout), batch by batch. Modules stay in their mode: dropout and batch norms are those of
    training where the model trains.

    Args:
        model: the super-network.
        item: its sub-network and perturbation make x~.
        loss: computes the loss of the model as it is then active; several batches with their
            weights for the gradients of their mean, such as that over the full data.
        update: p; the pass's own sub-network where not given.

    Raises:
        ValueError: there are no batches, or their weights are negative, not finite or all 0.

    Example:
        >>> full = [(lambda x=x, y=y: F.cross_entropy(model(x), y), len(y)) for x, y in batches]
        >>> measure(model, Pass(core), full).whole.c_norm
    """
    update = item.subnet if update is None else update
    with undone(model, _trained(model).values()):
        g, other = _gradients(model, [Pass(SubNetwork.full(model)), item], loss)
        moved = _displacement(model, item)
    return (
        StepGradients(model, [item], g, [other], [moved]).measured(update).passes[item.subnet.name]
    )


def measure_plan(model: nn.Module, plan: Plan, *losses: Loss) -> Mapping[str, Measured]:
    """Criteria of every pass of a plan that is part of its update, by the name of its network; see
    ``measure_step``.
    """
    return measure_step(model, plan, *losses).passes


def measure_step(model: nn.Module, plan: Plan, *losses: Loss) -> MeasuredStep:
    """Criteria of a plan's passes with its update for the mask, and its step-size factor; costs and
    errors are those of ``step_gradients``.
    """
    return step_gradients(model, plan, *losses).measured(plan.update)


def step_gradients(model: nn.Module, plan: Plan, *losses: Loss) -> StepGradients:
    """The gradients that the criteria of a plan's passes are made of.

    Costs the plan's forward and backward passes and one of the whole model at x, and the memory of
    a gradient of each and of their sum. As ``measure`` otherwise; passes that say where to go
    (``Pass.probe``) are run first, and all others draw the same random numbers and run on the first
    mini-batch. Losses as for ``Plan.backward``, each of one batch or of several.

    Raises:
        ValueError: as ``measure``, or a pass runs on a mini-batch whose loss is not given.
    """
    if len(losses) < plan.batches:
        raise ValueError(
            f"the passes of this plan run on {plan.batches} mini-batches: measuring needs the loss "
            f"on each, got {len(losses)}"
        )
    parts = [item for item in plan.passes if item.probe is None]
    with undone(model, model.parameters()):
        for item in plan.passes:
            if item.probe is not None:
                item.probe(_probed(model, plan, item, losses[item.batch]))
        g, *others = _gradients(model, [Pass(SubNetwork.full(model)), *parts], losses[0])
        moved = [_displacement(model, item) for item in parts]
    return StepGradients(model, parts, g, others, moved)


def at_x(plan: Plan) -> bool:
    """Whether every gradient of a plan's update is that of the whole model at x: alpha is 1 then,
    whatever the masks.
    """
    full = SubNetwork.full(plan.update.model)
    return all(
        item.probe is not None or (item.perturbed is nullcontext and full.issubset(item.subnet))
        for item in plan.passes
    )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _displacement(model: nn.Module, item: Pass) -> list[float]:
    """``|dx|^2`` of each parameter in a pass."""
    parameters, full = list(_trained(model).values()), SubNetwork.full(model)
    if item.perturbed is nullcontext:
        return [_moved(parameter, item, full) for parameter in parameters]
    return _moved_further(parameters, item, full)


def _sum(found: Iterable[Criteria]) -> Criteria:
    return sum(found, start=Criteria(0.0, 0.0, 0.0, 0.0))


def _shares(loss: Loss) -> list[tuple[Callable[[], Tensor], float]]:
    """Each batch's loss, and its share of the mean."""
    if callable(loss):
        return [(loss, 1.0)]
    weights = [weight for _, weight in loss]
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise ValueError(f"weights of batches must be >= 0, finite and not all 0, got {weights}")
    total = math.fsum(weights)
    return [(one, weight / total) for one, weight in loss]


def _gradients(model: nn.Module, passes: Sequence[Pass], loss: Loss) -> list[list[Tensor]]:
    """The gradients of each pass; zeros of what it does not reach. On each batch all passes draw
    the same random numbers.
    """
    parameters = list(_trained(model).values())
    found: list[list[Tensor | None]] = [[None] * len(parameters) for _ in passes]
    for one, share in _shares(loss):
        again = _as_now(model)
        for item, so_far in zip(passes, found, strict=True):
            again()
            for parameter, gradient in zip(parameters, so_far, strict=True):
                parameter.grad = gradient
            with item.perturbed(), item.subnet.activate(), torch.enable_grad():
                (one() * share).backward()
            so_far[:] = [parameter.grad for parameter in parameters]
    return [
        [
            torch.zeros_like(parameter) if gradient is None else gradient.detach()
            for parameter, gradient in zip(parameters, so_far, strict=True)
        ]
        for so_far in found
    ]


def _probed(model: nn.Module, plan: Plan, item: Pass, loss: Loss) -> list[Tensor | None]:
    """The gradients that a pass of a plan hands to its probe, by parameter."""
    (found,) = _gradients(model, [item], loss)
    known = dict(zip(_trained(model).values(), found, strict=True))
    return [
        None if plan.update.mask_of(parameter) is None else known.get(parameter)
        for parameter in model.parameters()
    ]


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
def undone(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """After it gradients, buffers and random number generators are as they were."""
    grads = [(parameter, parameter.grad) for parameter in parameters]
    again = _as_now(model)
    try:
        yield
    finally:
        again()
        for parameter, grad in grads:
            parameter.grad = grad


def _as_now(model: nn.Module) -> Callable[[], None]:
    """What makes buffers and random number generators what they are now."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    state, states = torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in devices}

    def again() -> None:
        for buffer, held in buffers:
            buffer.detach().copy_(held)
        torch.set_rng_state(state)
        for device, on_device in states.items():
            torch.cuda.set_rng_state(on_device, device)

    return again
