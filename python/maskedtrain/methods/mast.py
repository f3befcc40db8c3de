"""MAST: training for the mean loss of randomly sparsified networks."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maskedtrain.methods._draws import seeded
from maskedtrain.methods._sketched_plans import CorrectedPlan, sketched_passes
from maskedtrain.methods._sketching import (
    BernoulliSketch,
    Draw,
    NetworkSketch,
    RandKSketch,
    Sketcher,
    Unit,
)
from maskedtrain.methods.base import Method, MethodConfig, Plan
from maskedtrain.subnetwork import SubNetwork

__all__ = [
    "MAST",
    "Algorithm",
    "BernoulliSketch",
    "Config",
    "Draw",
    "NetworkSketch",
    "RandKSketch",
    "Shift",
]

Algorithm = Literal["sgd", "l-svrdsg", "s-page"]

Shift = Literal["zero", "pretrained"]


class MAST(Method):
    """Minimise the mean loss over random sketches of the network, not the loss of the network::

        min f_D(x) = E_S f(v + S (x - v)),      g = S grad f(v + S (x - v)),      E[S] = I

    S is diagonal: p_t is its support, and dx_t = (S - I)(x - v). With "sgd" a step draws one S for
    its mini-batch and updates the support; the rest is left alone, momentum and decay included.
    With several sketches step t has as many workers, each with a mini-batch and an S of its own,
    and the update is the mean of their gradients, on the union of their supports.

    The two other algorithms take sketches from a set of N draws (f_D is the mean over these) and
    correct for the choice; they update everything. With B a set of b different members::

        l-svrdsg   g_t = grad f_S(x_t) - grad f_S(w) + (1/b) sum_B grad f_{S_j}(w),
                   w = x_t and B renewed for the steps to come, with probability p
        s-page     g_t = (1/b) sum_B grad f_{S_j}(x_t)         with probability p and at first, else
                   g_{t-1} + (1/c) sum of c random S of (grad f_S(x_t) - grad f_S(x_{t-1}))

    On mini-batches both gradients of a difference are of the same one; of several sketches each is
    of a mini-batch of its own (numbers 0.. of the step), so that a new anchor sees b of them, once:
    it is right for the data as for the sketches in expectation alone. On the full data (the same
    mini-batch each time) the iterates are the algorithms'. Call ``after_backward`` before the
    optimizer's step: what a step keeps for the next is added there.

    Losses are those of sketched networks and are called "mast" ("anchor" at w or at x_{t-1}).
    ``subnets["full"]`` is x itself; ``sketched`` is what is trained for. A loss that reads
    parameters, such as a ridge, sees ``v + S (x - v)``, except where neuron sketches around 0 run
    the kept neurons alone: there it sees x.

    Each gradient in the formulas costs a forward and backward of the whole network, with neuron
    sketches around 0 of the kept neurons alone, and, but for these, holds a copy of the parameters
    while it is computed. A v other than 0 is kept as a copy more, and for variance reduction one of
    x and one of the gradient.

    Args:
        model: the network.
        sketch: the distribution of S, ``BernoulliSketch`` or ``RandKSketch``; or one for each
            worker ("sgd").
        shift: v: "zero"; "pretrained", the parameters as they are now; or by name of every
            parameter.
        algorithm: "sgd", "l-svrdsg" or "s-page".
        sketches: N, the size of the set; None draws anew at each step ("sgd").
        anchor_size: b, 1..N; None is N.
        probability: p, in (0, 1]; None is 1/b, with which anchors cost what the steps between cost.
        differences: c, >= 1 ("s-page").
        seed: of the draws, which depend on it and on the step alone.

    Raises:
        ValueError: an option is out of range, a pattern matches nothing, or v does not fit.
        TypeError: the model has no widths of neurons, or they are of layers that cannot be scaled.

    Source: "MAST: Model-Agnostic Sparsified Training" (ICLR 2025, arXiv 2311.16086).

    Example:
        >>> method = MAST(model, BernoulliSketch(0.5, unit="neuron"), shift="pretrained")
        >>> for report in Trainer(model, method, optimizer, loss_fn).steps(batches, until=1000): ...
        >>> with method.sketched(0) as network:
        ...     evaluate(model, network, test_batches, loss_fn)
    """

    def __init__(
        self,
        model: nn.Module,
        sketch: NetworkSketch | Sequence[NetworkSketch],
        *,
        shift: Shift | Mapping[str, Tensor] = "zero",
        algorithm: Algorithm = "sgd",
        sketches: int | None = None,
        anchor_size: int | None = None,
        probability: float | None = None,
        differences: int = 1,
        seed: int = 0,
    ) -> None:
        workers = [sketch] if isinstance(sketch, NetworkSketch) else list(sketch)
        _check(algorithm, len(workers), sketches, anchor_size, probability, differences)
        self._full = SubNetwork.full(model)
        super().__init__([self._full])
        self.model, self.algorithm, self.seed = model, algorithm, seed
        self.sketches, self.differences = sketches, differences
        self.anchor_size = (sketches or 1) if anchor_size is None else anchor_size
        self.probability = 1 / self.anchor_size if probability is None else probability
        self._named = {
            name: parameter
            for name, parameter in model.named_parameters()
            if self._full.mask_of(parameter) is not None
        }
        self._shift = self._shift_of(shift)
        self._workers = [Sketcher(model, one, self._shift, name="mast") for one in workers]
        self._typical = self._workers[0].typical()
        # w and its gradient; x_{t-1} and g_{t-1}.
        self._point: dict[nn.Parameter, Tensor] | None = None
        self._gradient: dict[nn.Parameter, Tensor] | None = None

    def _shift_of(self, shift: Shift | Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor] | None:
        if not isinstance(shift, Mapping):
            if shift not in ("zero", "pretrained"):
                raise ValueError(f'shift must be "zero", "pretrained" or tensors, got {shift!r}')
            return self._copies() if shift == "pretrained" else None
        return self._by_parameter(shift, "shift", missing=False)

    @property
    def networks(self) -> Mapping[str, SubNetwork]:
        anchor = SubNetwork(self.model, self._typical.masks, name="anchor")
        more = {} if self.algorithm == "sgd" else {"anchor": anchor}
        return {**self.subnets, "mast": self._typical, **more}

    @property
    def batches(self) -> int:
        # Those of anchors are left out: their number is drawn.
        return self.differences if self.algorithm == "s-page" else len(self._workers)

    # Draws

    def draw(self, step: int, worker: int = 0) -> Draw:
        """The S of a step and worker; of the difference, for "l-svrdsg"; the first, for
        "s-page".
        """
        return self._draws(step, 1, worker)[0]

    @contextmanager
    def sketched(self, number: int, worker: int = 0) -> Generator[SubNetwork]:
        """Within it the parameters are ``v + S (x - v)``: evaluate the network it gives, or extract
        that (of neuron sketches around 0, the kept neurons alone).

        Args:
            number: of S among draws that no step uses, any; of the set where there is one, 0..N-1.
            worker: whose distribution it is of.

        Raises:
            ValueError: there is no such sketch or worker.
        """
        if not 0 <= worker < len(self._workers):
            raise ValueError(f"worker must be in 0..{len(self._workers) - 1}, got {worker}")
        if self.sketches is not None and not 0 <= number < self.sketches:
            raise ValueError(f"number must be in 0..{self.sketches - 1}, got {number}")
        kind = "evaluation" if self.sketches is None else "set"
        draw = self._workers[worker].draw(self.seed, kind, number, worker)
        # Not by scaled layers: weights that are extracted are to be the sketched ones.
        with replace(draw, factors=None).at():
            yield draw.network("mast")

    def _draws(self, step: int, count: int, worker: int = 0) -> list[Draw]:
        """Independent draws; of the set where there is one."""
        draw = partial(self._workers[worker].draw, self.seed)
        if self.sketches is None:
            return [draw("step", step, i, worker) for i in range(count)]
        generator = seeded("cpu", self.seed, "step", step, worker)
        picked = torch.randint(self.sketches, (count,), generator=generator)
        return [draw("set", int(j), worker) for j in picked]

    def _anchor_draws(self, step: int) -> list[Draw]:
        """b different members of the set."""
        generator = seeded("cpu", self.seed, "anchor", step)
        order = torch.randperm(self.sketches or 1, generator=generator)
        draw = partial(self._workers[0].draw, self.seed, "set")
        return [draw(int(j), 0) for j in order[: self.anchor_size]]

    def _fresh(self, step: int) -> bool:
        """True with probability p."""
        generator = seeded("cpu", self.seed, "fresh", step)
        number = torch.rand((), generator=generator, dtype=torch.float64)
        return float(number) < self.probability

    # Plans

    def plan(self, step: int) -> Plan:
        if self.algorithm == "sgd":
            draws = [self.draw(step, worker) for worker in range(len(self._workers))]
            supports = [draw.support for draw in draws]
            update = supports[0] if len(draws) == 1 else SubNetwork.union(*supports, name="mast")
            return Plan(sketched_passes(draws, 1.0), update)
        if self.algorithm == "l-svrdsg":
            draws = self._draws(step, 1)
            anchor = self._anchor_draws(step) if self._gradient is None else []
            return CorrectedPlan(
                sketched_passes(draws, 1.0),
                self._full,
                minus=sketched_passes(draws, -1.0, "anchor", self._point),
                anchor=sketched_passes(anchor, 1.0, "anchor", self._point),
            )
        if self._gradient is None or self._fresh(step):
            return CorrectedPlan(sketched_passes(self._anchor_draws(step), 1.0), self._full)
        draws = self._draws(step, self.differences)
        minus = sketched_passes(draws, -1.0, "anchor", self._point)
        return CorrectedPlan(sketched_passes(draws, 1.0), self._full, minus=minus)

    def after_backward(self, step: int, plan: Plan) -> Plan:
        if not isinstance(plan, CorrectedPlan):
            return plan
        if self.algorithm == "l-svrdsg":
            if plan.anchor:
                self._gradient = dict(plan.gathered)
            self._add_gradient()
            fresh = self._fresh(step)
            if fresh:
                # That of the new w is part of the next step.
                self._gradient = None
            if fresh or self._point is None:
                self._point = self._copies()
        else:
            if plan.minus:
                self._add_gradient()
            # The optimizer may clip what the parameters hold.
            self._gradient = {
                p: p.grad.detach().clone() for p in self._named.values() if p.grad is not None
            }
            self._point = self._copies()
        return plan

    def _add_gradient(self) -> None:
        """Add what is kept of past steps to the gradients."""
        for parameter, gradient in (self._gradient or {}).items():
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.add_(gradient)

    # State

    def _copies(self) -> dict[nn.Parameter, Tensor]:
        return {parameter: parameter.detach().clone() for parameter in self._named.values()}

    def state_dict(self) -> dict[str, Any]:
        held = {"shift": self._shift, "point": self._point, "gradient": self._gradient}
        return {
            kind: {name: held_of[p] for name, p in self._named.items() if p in held_of}
            for kind, held_of in held.items()
            if held_of is not None
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known = {"shift"} if self._shift is not None else set[str]()
        further = set[str]() if self.algorithm == "sgd" else {"point", "gradient"}
        if not known <= set(state) <= known | further:
            raise ValueError(
                f"the state must hold {sorted(known)} and may hold {sorted(further)}, "
                f"got {sorted(state)}"
            )
        held = {
            kind: self._by_parameter(values, kind, missing=kind == "gradient")
            for kind, values in state.items()
        }
        if self._shift is not None:
            # The sketchers hold it, too.
            self._shift.update(held["shift"])
        self._point, self._gradient = held.get("point"), held.get("gradient")

    def _by_parameter(
        self, values: Mapping[str, Tensor], what: str, *, missing: bool
    ) -> dict[nn.Parameter, Tensor]:
        """Copies of values by name; ValueError if they do not fit."""
        absent = self._named.keys() - values.keys()
        if values.keys() - self._named.keys() or (absent and not missing):
            raise ValueError(
                f"the {what} must be by the names of parameters, {', '.join(self._named)}, "
                f"got {', '.join(values) or 'none'}"
            )
        for name, tensor in values.items():
            wanted = self._named[name]
            if tensor.shape != wanted.shape:
                raise ValueError(
                    f"the {what} of {name} must have shape {list(wanted.shape)}, "
                    f"got {list(tensor.shape)}"
                )
        return {
            self._named[name]: tensor.detach().to(self._named[name], copy=True)
            for name, tensor in values.items()
        }


def _check(
    algorithm: str,
    workers: int,
    sketches: int | None,
    anchor_size: int | None,
    probability: float | None,
    differences: int,
) -> None:
    """Raise ValueError if an option is out of range."""
    if algorithm not in ("sgd", "l-svrdsg", "s-page"):
        raise ValueError(f'algorithm must be "sgd", "l-svrdsg" or "s-page", got {algorithm!r}')
    if workers < 1:
        raise ValueError("there must be a sketch for each worker, got none")
    if sketches is not None and sketches < 1:
        raise ValueError(f"sketches must be >= 1, got {sketches}")
    if differences < 1:
        raise ValueError(f"differences must be >= 1, got {differences}")
    if algorithm == "sgd":
        return
    if workers > 1:
        raise ValueError(f'{algorithm} is of one worker, "sgd" of several; got {workers} sketches')
    if sketches is None:
        raise ValueError(f"{algorithm} needs sketches, the size of the set to draw from")
    if anchor_size is not None and not 1 <= anchor_size <= sketches:
        raise ValueError(f"anchor_size must be in 1..{sketches}, got {anchor_size}")
    if probability is not None and not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], got {probability}")


@dataclass(frozen=True)
class Config(MethodConfig):
    """MAST: training for the mean loss of randomly sparsified networks."""

    name = "mast"

    sketch: Literal["bernoulli", "rand-k"] = "bernoulli"
    """Keep each unit with a probability, or a random set of so many."""
    keep: tuple[float, ...] = (0.9,)
    """The probability (bernoulli) or the share that is kept (rand-k); one for each worker."""
    unit: Unit = "element"
    """Keep or drop single elements of the parameters, or neurons."""
    only: tuple[str, ...] = ("*",)
    """Patterns of the parameters (elements) or widths (neurons) that are sketched."""
    shift: Shift = "zero"
    """Around 0, or around the weights that training starts from."""
    algorithm: Algorithm = "sgd"
    """One sketch a step, or variance reduction over a set of sketches."""
    sketches: int | None = None
    """Size of the set; sgd needs none."""
    anchor_size: int | None = None
    """Sketches of an anchor's gradient; all where not given."""
    probability: float | None = None
    """Of a new anchor at a step; 1 / anchor_size where not given."""
    differences: int = 1
    """Sketches of a step of s-page that renews no anchor."""
    draw_seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        self._sketches()
        _check(
            self.algorithm,
            len(self.keep),
            self.sketches,
            self.anchor_size,
            self.probability,
            self.differences,
        )

    def _sketches(self) -> list[NetworkSketch]:
        kind = {"bernoulli": BernoulliSketch, "rand-k": RandKSketch}[self.sketch]
        return [kind(float(keep), unit=self.unit, only=self.only) for keep in self.keep]

    def build(self, model: nn.Module) -> MAST:
        return MAST(
            model,
            self._sketches(),
            shift=self.shift,
            algorithm=self.algorithm,
            sketches=self.sketches,
            anchor_size=self.anchor_size,
            probability=self.probability,
            differences=self.differences,
            seed=self.draw_seed,
        )
