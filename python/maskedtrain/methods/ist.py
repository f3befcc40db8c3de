"""Independent subnet training (IST): n workers train disjoint parts of one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import nn

from maskedtrain.methods._dealing import Dealer
from maskedtrain.methods._drift import Drift
from maskedtrain.methods._replicas import Replicas
from maskedtrain.methods.base import Method, MethodConfig, Pass, Plan
from maskedtrain.methods.largest import only
from maskedtrain.optim.base import MaskedOptimizer
from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Element, Full, Mask

__all__ = ["IST", "Config"]


class IST(Method):
    """Deal the network out to n workers, let each train its part for some steps, deal anew.

    In round r the neurons of every hidden width are shuffled by ``(seed, r)`` and dealt out: a
    worker's network has the rows of its neurons in the layers that make them and their columns in
    the layers that take them, so that between two widths it has ``(h / n)^2``, and what lies in no
    worker's part rests until it does. Inputs and outputs are not split. Residual blocks are dealt
    out in their place where the model names some (``ResNet``: those of the third stage with the
    identity as skip connection); a worker skips those that it does not have.

    A step is one local step of every worker, each on a mini-batch of its own (``plan.batches`` is
    n). Parts are disjoint: one update of their union is n independent ones, and the same as the
    workers' steps one after the other, p_t = p_1, ..., p_n, p_1, ... with dx_t = -(1 - p_t) x_t.

    What every worker has (biases of the output, attention, embeddings, norms of the stream) is
    replicated: each worker trains a copy with an optimizer's state of its own, and the model holds
    the mean of the copies after every step, as it does that of running statistics. When a round
    ends the mean becomes every worker's; weights alone travel, so that the optimizer's state starts
    afresh, that of the parts too. With ``local_steps=1`` and plain SGD what is shared is trained by
    synchronous data-parallel SGD.

    A round ends after ``local_steps``, or as soon as Assumption 3 does not hold for a worker i::

        |dx_i| / max(|p_i g(x)|, |p_i g(x~)|) >= 1 / (2 L)

    with L ``smoothness``, dx_i what the others have moved since the round began,
    ``|dx_i|^2 = sum_{j != i} |Delta_j|^2`` (each with its copy of what is shared), and for the
    gradients those of i in the round's first step and in the present one, before clipping. It is
    checked after every step; workers would have to exchange norms alone. (The paper's text has the
    norm of the others' weights for dx_i, which hardly changes within a round.)

    Losses are called "worker0", "worker1" ... A stock loop needs all of the hooks::

        plan = method.plan(step)
        plan.backward(*(partial(loss_on, batch) for batch in next_n_batches))
        plan = method.after_backward(step, plan)
        optimizer.step(plan.update, lr_scale=plan.lr_scale)
        method.after_step(step, plan, optimizer)
        optimizer.zero_grad()

    Between the second and the third gradients may be clipped: by the norm of all workers' together,
    with the mean of what is shared.

    ``parts`` are the workers' networks in the present ``round``, of which ``local_step`` steps are
    done. ``drifts`` holds the left side of Assumption 3 for each worker after the last step.
    ``bytes_sent`` is what n processes would have sent: at the end of a round the elements of their
    parts once each and those of what is shared in a ring, 2 (n - 1) times; norms at every step.

    A step costs the workers' forward and backward. Memory: for what is shared n copies with their
    gradients and optimizer's states; with ``smoothness`` a copy of the weights besides.

    Args:
        model: one with ``width_masks(kept)`` or with blocks that can be left out, such as the
            models of ``maskedtrain.models``.
        workers: n, >= 2.
        local_steps: most steps of a round, >= 1; None is no bound.
        smoothness: L, > 0, such as ``maskedtrain.theory.smoothness`` measures; None does not ask
            for Assumption 3.
        seed: of the deals.
        widths, blocks: patterns (``fnmatch``) of the widths of neurons, and of the blocks, that are
            dealt out. Where neither is given: the blocks that the model names as ``ist_blocks``, or
            else all widths. Attention's query and key dimensions are no width of neurons.

    Raises:
        ValueError: an option is out of range, neither bound of a round is given, a pattern matches
            nothing, or a width has fewer neurons than there are workers.
        TypeError: the model has no ``width_masks(kept)``.

    Source: Yuan et al., "Distributed Learning of Deep Neural Networks using Independent Subnet
    Training" (arXiv 1910.02120); Dun et al., "ResIST" (UAI 2022), for blocks; "Model-Parallel
    Training" and Assumption 3 in section 3 of "Masked Training of Neural Networks with Partial
    Gradients" (AISTATS 2022).

    Example:
        >>> method = IST(MLP(784, (4096, 4096), 10), workers=4, local_steps=10)
        >>> trainer = Trainer(method.model, method, optimizer, F.cross_entropy)
    """

    def __init__(
        self,
        model: nn.Module,
        workers: int,
        *,
        local_steps: int | None = None,
        smoothness: float | None = None,
        seed: int = 0,
        widths: Sequence[str] = (),
        blocks: Sequence[str] = (),
    ) -> None:
        _check(workers, local_steps, smoothness)
        super().__init__([SubNetwork.full(model)])
        self.model, self.workers = model, workers
        self.local_steps, self.smoothness = local_steps, smoothness
        self.bytes_sent = 0
        self.drifts: tuple[float, ...] = ()
        self._dealer = Dealer(model, workers, widths=widths, blocks=blocks, seed=seed)
        # What is dealt out is so in every round; only the hands change.
        parts, trained = self._dealer.parts(0), [p for p in model.parameters() if p.requires_grad]
        shared = [p for p in trained if all(_whole(part, p) for part in parts)]
        held = {p for p in trained if any(part.mask_of(p) is not None for part in parts)}
        self._dealt = [p for p in trained if p in held.difference(shared)]
        self._replicas = Replicas(model, workers, shared, self._shared_buffers(parts))
        self._ready = False
        self._deal(0)

    @property
    def networks(self) -> Mapping[str, SubNetwork]:
        """The workers' parts in this round: in others the same costs are in other hands."""
        return {part.name: part for part in self.parts}

    @property
    def batches(self) -> int:
        return self.workers

    def _deal(self, round: int) -> None:
        """Begin a round: everything here depends on the seed and the round alone."""
        self.round, self.local_step = round, 0
        self.parts = self._dealer.parts(round)
        unions: dict[nn.Parameter, Mask | None] = {p: _union(self.parts, p) for p in self._dealt}
        shared = dict.fromkeys(self._replicas.parameters, Full())
        passes = tuple(
            Pass(part, perturbed=self._as_worker(worker), batch=worker)
            for worker, part in enumerate(self.parts)
        )
        self._plan = Plan(passes, update=only(self.model, {**unions, **shared}, "parts"))
        self._update = only(self.model, unions, "dealt")
        self._drift = Drift(self.parts, self._dealt, self._replicas)

    def _as_worker(self, worker: int) -> Callable[[], AbstractContextManager[None]]:
        if self._replicas.empty:
            return nullcontext
        return partial(self._replicas.as_worker, worker)

    def plan(self, step: int) -> Plan:
        return self._plan

    def after_backward(self, step: int, plan: Plan) -> Plan:
        if self.smoothness is not None:
            self._drift.note_gradients()
        self._replicas.average_gradients()
        self._ready = True
        # What is shared is updated afterwards, for each worker.
        return replace(plan, update=self._update, updated_in_all=plan.mask)

    def after_step(self, step: int, plan: Plan, optimizer: MaskedOptimizer) -> None:
        if not self._ready:
            raise RuntimeError(
                "IST needs plan = method.after_backward(step, plan) before the optimizer's step"
            )
        if any(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError("IST swaps the optimizer's state: capturable=True must be False")
        self._ready = False
        self._replicas.step(optimizer, plan.lr_scale)
        self.local_step += 1
        ended = self.local_step == self.local_steps
        if self.smoothness is not None:
            self.drifts = self._drift.measured()
            self.bytes_sent += self.workers * (self.workers - 1) * _NORM_BYTES
            ended = ended or max(self.drifts) >= 1 / (2 * self.smoothness)
        if ended:
            self.synchronise(optimizer)

    def synchronise(self, optimizer: MaskedOptimizer) -> None:
        """End the round here: the mean becomes every worker's, the optimizer's state of all of the
        model's parameters starts afresh, and parts are dealt anew.
        """
        self.bytes_sent += self._round_bytes()
        self._replicas.restart()
        for parameter in self.model.parameters():
            optimizer.state.pop(parameter, None)
        self._deal(self.round + 1)

    def _round_bytes(self) -> int:
        dealt = sum(
            mask.numel(parameter.shape) * parameter.element_size()
            for part in self.parts
            for parameter in self._dealt
            if (mask := part.mask_of(parameter)) is not None
        )
        tensors = (*self._replicas.parameters, *self._replicas.buffers)
        shared = sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())
        return dealt + 2 * (self.workers - 1) * shared

    def _shared_buffers(self, parts: Sequence[SubNetwork]) -> list[str]:
        """Names of the buffers that the passes of several workers write: running statistics."""
        blocks = [self.model.get_submodule(name) for name in self._dealer.blocks]
        dealt = {module for block in blocks for module in block.modules()}
        found: list[str] = []
        for prefix, module in self.model.named_modules():
            own = list(module.parameters(recurse=False))
            cut = any(not _whole(part, parameter) for part in parts for parameter in own)
            for name, buffer in module.named_buffers(prefix, recurse=False):
                # Of dealt channels each worker has its own; the count of batches is one for all.
                if module not in dealt and not (cut and buffer.ndim):
                    found.append(name)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "local_step": self.local_step,
            "bytes_sent": self.bytes_sent,
            "replicas": self._replicas.state_dict(),
            "drift": self._drift.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        expected = {"round", "local_step", "bytes_sent", "replicas", "drift"}
        if set(state) != expected:
            raise ValueError(f"the state must hold {sorted(expected)}, got {sorted(state)}")
        drift = Drift((), (), self._replicas)
        drift.load_state_dict(state["drift"])
        self._replicas.load_state_dict(state["replicas"])
        self._deal(state["round"])
        self._drift.load_state_dict(state["drift"])
        self.local_step, self.bytes_sent = state["local_step"], state["bytes_sent"]


_NORM_BYTES = 8


def _check(workers: int, local_steps: int | None, smoothness: float | None) -> None:
    """Raise ValueError if an option is out of range."""
    if workers < 2:
        raise ValueError(f"workers must be >= 2, got {workers}")
    if local_steps is None and smoothness is None:
        raise ValueError("a round needs local_steps, smoothness or both, got neither")
    if local_steps is not None and local_steps < 1:
        raise ValueError(f"local_steps must be >= 1, got {local_steps}")
    if smoothness is not None and not 0 < smoothness < math.inf:
        raise ValueError(f"smoothness must be > 0 and finite, got {smoothness}")


def _whole(part: SubNetwork, parameter: nn.Parameter) -> bool:
    """Whether the part has all of the parameter."""
    mask = part.mask_of(parameter)
    return mask is not None and mask.numel(parameter.shape) == parameter.numel()


def _union(parts: Sequence[SubNetwork], parameter: nn.Parameter) -> Mask:
    """The elements that some part has."""
    masks = [mask for part in parts if (mask := part.mask_of(parameter)) is not None]
    shape, device = parameter.shape, parameter.device
    inside = reduce(torch.logical_or, (mask.dense(shape, device) for mask in masks))
    return Full() if inside.all() else Element(inside)


@dataclass(frozen=True)
class Config(MethodConfig):
    """Independent subnet training: workers, simulated in one process, train disjoint parts."""

    name = "ist"

    workers: int = 2
    """Parts of the network that are trained at once, each on a mini-batch of its own."""
    local_steps: int | None = 10
    """Steps from one deal to the next, at most; None leaves it to smoothness."""
    smoothness: float | None = None
    """L of Assumption 3: deal anew as soon as it is violated."""
    deal_seed: int = 0
    """Of the deals."""
    widths: tuple[str, ...] = ()
    """Patterns of the widths whose neurons are dealt out; where neither these nor blocks are given,
    the blocks that the model names, or all widths."""
    blocks: tuple[str, ...] = ()
    """Patterns of the residual blocks that are dealt out."""

    def __post_init__(self) -> None:
        _check(self.workers, self.local_steps, self.smoothness)

    def build(self, model: nn.Module) -> IST:
        return IST(
            model,
            self.workers,
            local_steps=self.local_steps,
            smoothness=self.smoothness,
            seed=self.deal_seed,
            widths=self.widths,
            blocks=self.blocks,
        )
