"""``MAST`` on linear models with squared loss, where f is a quadratic: against closed forms, the
bound and the loops of ``maskedtrain.theory``.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedtrain import Trainer
from maskedtrain.methods.mast import MAST, BernoulliSketch, NetworkSketch, RandKSketch
from maskedtrain.optim import MaskedSGD
from maskedtrain.theory import (
    Bernoulli,
    Quadratic,
    RandK,
    Sketch,
    dsgd_bound,
    iterations,
    l_svrdsg,
    mast_objective,
    s_page,
    sketched_gradient,
)

D, N = 4, 12
RIDGE = 0.1
CASES: dict[str, tuple[NetworkSketch, Sketch]] = {
    "bernoulli": (BernoulliSketch(0.6), Bernoulli(D, 0.6)),
    "rand-k": (RandKSketch(2), RandK(D, 2)),
    "rand-k-share": (RandKSketch(0.75), RandK(D, 3)),
}
SHIFTS = ("zero", "pretrained")


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Regression:
    """Ridge regression, f(w) = |A w - y|^2 / (2 N) + ridge/2 |w|^2, as a linear layer and as a
    ``Quadratic``.

    A has orthonormal columns, stretched a little: condition numbers are small.
    """

    def __init__(self, seed: int = 0, *, target: Tensor | None = None) -> None:
        basis, _ = torch.linalg.qr(normal(N, D, seed=seed))
        mixing, _ = torch.linalg.qr(normal(D, D, seed=seed + 1))
        stretch = torch.linspace(1, 1.2, D, dtype=torch.float64)
        self.A = N**0.5 * basis @ torch.diag(stretch) @ mixing
        self.ridge = RIDGE if target is None else 0.0
        signal = normal(D, seed=seed + 2) if target is None else target
        noise = normal(N, seed=seed + 3) if target is None else 0.0
        self.y = self.A @ signal + noise
        hessian = self.A.T @ self.A / N + self.ridge * torch.eye(D, dtype=torch.float64)
        self.f = Quadratic(hessian, self.A.T @ self.y / N, float(self.y.square().mean() / 2))

    def model(self, w: Tensor | None = None) -> nn.Linear:
        model = nn.Linear(D, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.copy_(normal(D, seed=7) if w is None else w)
        return model

    def loss(self, model: nn.Linear) -> Callable[[], Tensor]:
        def value() -> Tensor:
            error = (model(self.A).flatten() - self.y).square().mean() / 2
            return error + self.ridge / 2 * model.weight.square().sum()

        return value


def squared_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.flatten() - targets).square().mean() / 2


def diagonal(method: MAST, step: int, worker: int = 0) -> Tensor:
    [parameter] = method.model.parameters()
    return method.draw(step, worker).diagonal(parameter).flatten()


def step_once(method: MAST, step: int, loss: Callable[[], Tensor], optimizer: Any) -> None:
    """One step of a stock loop on the full data."""
    plan = method.plan(step)
    plan.backward(*repeat(loss, plan.batches))
    plan = method.after_backward(step, plan)
    optimizer.step(plan.update, lr_scale=plan.lr_scale)
    optimizer.zero_grad()


def every_draw(method: MAST, sketch: Sketch) -> list[tuple[float, int]]:
    """A step at which each S is drawn, and the probability of that S, from its definition."""

    def chance(kept: tuple[bool, ...]) -> float:
        if isinstance(sketch, RandK):
            return 1 / comb(D, sketch.k) if sum(kept) == sketch.k else float("nan")
        assert isinstance(sketch, Bernoulli)
        p = float(sketch.p)  # pyright: ignore[reportArgumentType]
        return p ** sum(kept) * (1 - p) ** (D - sum(kept))

    steps: dict[tuple[bool, ...], int] = {}
    for step in range(2000):
        steps.setdefault(tuple((diagonal(method, step) != 0).tolist()), step)
        found = [(chance(kept), first) for kept, first in steps.items()]
        if abs(sum(probability for probability, _ in found) - 1) < 1e-12:
            return found
    raise AssertionError(f"{len(steps)} draws only")


# f_D and its minimiser


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("case", CASES)
def test_the_expected_gradient_is_that_of_the_mast_objective(case: str, shift: Any) -> None:
    """Over every S, exactly."""
    problem, (sketch, vector_sketch) = Regression(), CASES[case]
    model = problem.model()
    method = MAST(model, sketch, shift=shift)
    v = model.weight.detach().clone().flatten() if shift == "pretrained" else 0.0
    objective = mast_objective(problem.f, vector_sketch, v)
    for x in (normal(D, seed=9), objective.minimiser):
        with torch.no_grad():
            model.weight.copy_(x)
        mean, second = torch.zeros(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
        for probability, step in every_draw(method, vector_sketch):
            method.plan(step).backward(problem.loss(model))
            assert model.weight.grad is not None
            found = model.weight.grad.flatten()
            exact = sketched_gradient(problem.f, diagonal(method, step), x, v)
            torch.testing.assert_close(found, exact)
            mean += probability * found
            second += probability * diagonal(method, step)
            model.weight.grad = None
        torch.testing.assert_close(second, torch.ones(D, dtype=torch.float64))
        # Sums of numbers below 10 that cancel.
        torch.testing.assert_close(mean, objective.gradient(x), atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_minimisers_in_closed_form(case: str) -> None:
    """Where the expected gradient vanishes around 0, of the papers' formulas."""
    L, b = Regression().f.hessian, Regression().f.linear
    _, sketch = CASES[case]
    diag = torch.diag(L.diagonal())
    if isinstance(sketch, RandK):
        a = D * (sketch.k - 1) / (sketch.k * (D - 1))
        hessian = a * L + (D / sketch.k - a) * diag
    else:
        hessian = L + (1 / 0.6 - 1) * diag
    expected = torch.linalg.solve(hessian, b)
    torch.testing.assert_close(mast_objective(Regression().f, sketch).minimiser, expected)


@pytest.mark.parametrize("case", ["bernoulli", "rand-k"])
def test_the_bound_holds_along_runs(case: str) -> None:
    """E |x_t - x_D|^2 is within the theorem's bound at its largest step size: exactly at t = 1, of
    30 runs afterwards, whose mean is five standard errors away from it in the end.
    """
    problem, (sketch, vector_sketch), steps, runs = Regression(), CASES[case], 20, 30
    step_size = 1 / (problem.f.L_f * vector_sketch.constants.L_S_max)
    start = 2 * normal(D, seed=4)
    goal = mast_objective(problem.f, vector_sketch).minimiser
    bound = dsgd_bound(problem.f, vector_sketch, start, step_size=step_size, steps=steps)

    def distances(method: MAST, steps: list[int]) -> list[Tensor]:
        """|x_t - x_D|^2 after each of these steps."""
        [weight], found = method.model.parameters(), []
        optimizer, loss = MaskedSGD([weight], lr=step_size), problem.loss(method.model)
        for step in steps:
            step_once(method, step, loss, optimizer)
            found.append((weight.detach().flatten() - goal).square().sum())
        return found

    first = MAST(problem.model(), sketch)
    one = 0.0
    for probability, step in every_draw(first, vector_sketch):
        one += probability * float(*distances(MAST(problem.model(start), sketch), [step]))
    assert one <= bound[1]
    found = torch.tensor(
        [
            distances(MAST(problem.model(start), sketch, seed=run), list(range(steps)))
            for run in range(runs)
        ]
    )
    mean, error = found.mean(0), found.std(0) / runs**0.5
    assert (mean - 5 * error <= bound[1:]).all()
    assert mean[-1] + 5 * error[-1] <= bound[-1] < bound[0] / 2
    assert error[-1] > 0


def end_of_run(problem: Regression, v: Tensor, sketch: NetworkSketch, step_size: float) -> Tensor:
    """x_150 in a Trainer, around v, from elsewhere."""
    model = problem.model()
    method = MAST(model, sketch, shift={"weight": v[None]})
    optimizer = MaskedSGD(model.parameters(), lr=step_size)
    trainer = Trainer(model, method, optimizer, squared_loss)
    for _ in trainer.steps(repeat((problem.A, problem.y)), until=150):
        pass
    return model.weight.detach().flatten()


@pytest.mark.parametrize("case", CASES)
def test_interpolation_makes_convergence_exact(case: str) -> None:
    best, (sketch, vector_sketch) = normal(D, seed=5), CASES[case]
    problem = Regression(target=best)
    step_size = 1 / (problem.f.L_f * vector_sketch.constants.L_S_max)
    reached = end_of_run(problem, best, sketch, step_size)
    assert (reached - best).norm() < 1e-9
    # Around another v the minimiser is another, and the iterates keep moving about it.
    goal = mast_objective(problem.f, vector_sketch, best + 1).minimiser
    assert (end_of_run(problem, best + 1, sketch, step_size) - goal).norm() > 1e-3


# Workers


@pytest.mark.parametrize("shift", SHIFTS)
def test_workers_have_their_own_data_and_sketches(shift: Any) -> None:
    problems = [Regression(seed) for seed in (0, 10, 20)]
    sketches = [BernoulliSketch(0.5), RandKSketch(3), BernoulliSketch(0.9)]
    model = problems[0].model()
    method = MAST(model, sketches, shift=shift)
    v = model.weight.detach().clone().flatten() if shift == "pretrained" else 0.0
    x = normal(D, seed=6)
    with torch.no_grad():
        model.weight.copy_(x)
    for step in range(5):
        plan = method.plan(step)
        assert plan.batches == 3
        plan.backward(*(problem.loss(model) for problem in problems))
        diagonals = [diagonal(method, step, worker) for worker in range(3)]
        exact = torch.stack(
            [sketched_gradient(p.f, S, x, v) for p, S in zip(problems, diagonals, strict=True)]
        ).mean(0)
        assert model.weight.grad is not None
        torch.testing.assert_close(model.weight.grad.flatten(), exact)
        mask = plan.update.mask_of(model.weight)
        assert mask is not None
        union = torch.stack(diagonals).any(0)
        assert torch.equal(mask.dense(model.weight.shape).flatten(), union)
        model.weight.grad = None
    supports = torch.stack([diagonal(method, 0, worker) for worker in range(3)])
    assert len(supports.unique(dim=0)) > 1


# Variance reduction


def set_of(method: MAST) -> Tensor:
    """The method's sketches, [N, d]."""
    [parameter] = method.model.parameters()
    assert method.sketches is not None
    members: list[Tensor] = []
    for number in range(method.sketches):
        with torch.no_grad():
            parameter.fill_(1.0)
        with method.sketched(number):
            members.append(parameter.detach().flatten().clone())
    return torch.stack(members)


class Scripted:
    """The draws of a method in the place of those of ``theory.iterations``."""

    def __init__(self, method: MAST, ahead: int) -> None:
        # s_page draws at the end of a step what the next one uses.
        self.method, self.ahead, self.steps = method, ahead, 0
        self.fresh = 0

    def diagonals(self, draws: Any) -> Tensor:
        [parameter] = self.method.model.parameters()
        return torch.stack([draw.diagonal(parameter).flatten() for draw in draws])

    def pick(self, sketches: Tensor, size: tuple[int, ...], generator: Any) -> Tensor:
        count = size[0] if size else 1
        found = self.diagonals(self.method._draws(self.steps + self.ahead, count))
        return found if size else found[0]

    def coin(self, x: Tensor, probability: float, generator: Any) -> Tensor:
        heads = self.method._fresh(self.steps + self.ahead)
        self.steps += 1
        self.fresh += heads
        return torch.tensor([heads])

    def mean(self, f: Quadratic, sketches: Any, x: Any, count: int, _: Any, shift: Any) -> Tensor:
        chosen = self.diagonals(self.method._anchor_draws(self.steps))
        assert len(chosen) == count
        return sketched_gradient(f, chosen, x, shift).mean(0)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("algorithm", ["l-svrdsg", "s-page"])
def test_iterates_are_those_of_the_theory(
    algorithm: Any, shift: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same draws, on the full data, to rounding."""
    problem, x0, steps = Regression(), normal(D, seed=3), 25
    options: dict[str, Any] = {"sketches": 6, "anchor_size": 3, "probability": 0.3}
    if algorithm == "s-page":
        options["differences"] = 2
    model = problem.model(x0 + 1)
    method = MAST(model, BernoulliSketch(0.7), shift=shift, algorithm=algorithm, **options)
    v: Any = x0 + 1 if shift == "pretrained" else 0.0
    script = Scripted(method, int(algorithm == "s-page"))
    monkeypatch.setattr(iterations, "_pick", script.pick)
    monkeypatch.setattr(iterations, "_coin", script.coin)
    monkeypatch.setattr(iterations, "_mean_gradient", script.mean)
    common: dict[str, Any] = {"step_size": 0.1, "generator": torch.Generator(), "shift": v}
    common |= {"probability": 0.3, "anchor_size": 3}
    # Of all members, which for Bernoulli sketches may be equal.
    members = script.diagonals(method._workers[0].draw(method.seed, "set", j, 0) for j in range(6))
    theory = (
        l_svrdsg(problem.f, members, x0, **common)
        if algorithm == "l-svrdsg"
        else s_page(problem.f, members, x0, batch=2, **common)
    )
    with torch.no_grad():
        model.weight.copy_(x0)
    optimizer = MaskedSGD(model.parameters(), lr=0.1)
    for step in range(steps):
        expected = next(theory)
        torch.testing.assert_close(
            model.weight.detach().flatten(), expected, rtol=1e-11, atol=1e-12
        )
        step_once(method, step, problem.loss(model), optimizer)
    assert 0 < script.fresh < steps - 1, "both kinds of steps"


@pytest.mark.parametrize("algorithm", ["l-svrdsg", "s-page"])
def test_variance_reduction_is_exact_with_all_sketches_in_the_anchor(algorithm: Any) -> None:
    problem = Regression(target=normal(D, seed=5))

    def distance(algorithm: Any, **options: Any) -> float:
        model, sketch = problem.model(), BernoulliSketch(0.8)
        method = MAST(model, sketch, algorithm=algorithm, sketches=5, probability=0.5, **options)
        goal = mast_objective(problem.f, set_of(method)).minimiser
        optimizer = MaskedSGD(model.parameters(), lr=0.2)
        trainer = Trainer(model, method, optimizer, squared_loss)
        for _ in trainer.steps(repeat((problem.A, problem.y)), until=150):
            pass
        return float((model.weight.detach().flatten() - goal).norm())

    assert distance(algorithm, anchor_size=5) < 1e-8
    # Of one sketch a step, and of anchors of fewer sketches, a neighbourhood is left.
    assert distance("sgd") > 1e-3
    assert distance(algorithm, anchor_size=2) > 1e-3


@pytest.mark.parametrize("algorithm", ["sgd", "l-svrdsg", "s-page"])
def test_micro_batches_add_up_to_the_batch(algorithm: Any) -> None:
    """Also for the gradients that are kept: anchors, and those that recursion starts from."""
    first, second = Regression(0), Regression(30)
    options = {} if algorithm == "sgd" else {"sketches": 4, "anchor_size": 2, "probability": 0.3}

    def run(parts: int) -> Tensor:
        model = first.model()
        method = MAST(model, BernoulliSketch(0.7), algorithm=algorithm, **options)
        optimizer = MaskedSGD(model.parameters(), lr=0.05)
        losses = first.loss(model), second.loss(model)
        for step in range(10):
            plan = method.plan(step)
            if parts == 1:
                plan.backward(*repeat(lambda: sum(loss() for loss in losses) / 2, plan.batches))
            else:
                for loss in losses:
                    plan.backward(*repeat(loss, plan.batches), scale=0.5)
            plan = method.after_backward(step, plan)
            optimizer.step(plan.update)
            optimizer.zero_grad()
        return model.weight.detach()

    torch.testing.assert_close(run(1), run(2))
