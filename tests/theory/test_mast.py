"""MAST: minimisers in closed form, and what its theorems promise of the methods, along runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Generator, Tensor

from maskedtrain.theory import (
    Bernoulli,
    Perm,
    Quadratic,
    RandK,
    Sketch,
    average,
    distributed_double_sketched_gd,
    double_sketched_gd,
    double_sketched_sgd,
    dsgd_bound,
    l_svrdsg,
    mast_objective,
    s_page,
    sketched_gradient,
)
from tests.theory.toolbox import (
    after,
    assert_mean,
    random_point,
    random_quadratic,
    seeded,
    standard_error,
    support,
    trajectory,
)

D = 5
PAIRS = torch.tensor([0, 1, 0, 1, 2])
SKETCHES: dict[str, Sketch] = {
    "bernoulli": Bernoulli(D, 0.7),
    "bernoulli-vector": Bernoulli(D, (0.5, 0.6, 1.0, 0.9, 0.7)),
    "bernoulli-neurons": Bernoulli(D, 0.7, groups=PAIRS),
    "randk": RandK(D, 3),
    "randk-neurons": RandK(D, 2, groups=PAIRS),
}
SHIFTS = {"origin": 0.0, "pretrained": random_point(D, 11)}
FINITE, _ = support(RandK(D, 3))
"""All ten draws, equally likely: its MAST objective is Rand-3's."""


def largest_step(f: Quadratic, sketch: Sketch) -> float:
    return 1 / (f.L_f * sketch.constants.L_S_max)


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_bernoulli_minimiser(p: float) -> None:
    f = random_quadratic(D, 0)
    hessian = f.hessian + (1 / p - 1) * torch.diag(f.hessian.diagonal())
    expected = torch.linalg.inv(hessian) @ f.linear
    torch.testing.assert_close(mast_objective(f, Bernoulli(D, p)).minimiser, expected)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_randk_minimiser(k: int) -> None:
    f = random_quadratic(D, 0)
    a = D * (k - 1) / (k * (D - 1))
    hessian = a * f.hessian + (D / k - a) * torch.diag(f.hessian.diagonal())
    expected = torch.linalg.inv(hessian) @ f.linear
    torch.testing.assert_close(mast_objective(f, RandK(D, k)).minimiser, expected)


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_minimiser_around_a_pretrained_point(sketch: Sketch) -> None:
    f, v = random_quadratic(D, 1), random_point(D, 11)
    expected = v - torch.linalg.inv(sketch.expected(f.hessian)) @ f.gradient(v)
    torch.testing.assert_close(mast_objective(f, sketch, v).minimiser, expected)
    # A pretrained point that is the minimiser stays it.
    best = f.minimiser
    torch.testing.assert_close(mast_objective(f, sketch, best).minimiser, best)


def _workers() -> list[Quadratic]:
    return [random_quadratic(D, seed, mu=0.5 + seed) for seed in range(3)]


_OWN: list[Sketch] = [Bernoulli(D, 0.7), RandK(D, 3), Bernoulli(D, 0.8, groups=PAIRS)]
Loop = Callable[[Tensor, Tensor | float, Generator], Iterator[Tensor]]

LOOPS: dict[str, Loop] = {
    "gd": lambda x, v, generator: double_sketched_gd(
        average(_workers()), RandK(D, 3), x, step_size=0.05, generator=generator, shift=v
    ),
    "sgd": lambda x, v, generator: double_sketched_sgd(
        _workers(), RandK(D, 3), x, step_size=0.05, generator=generator, shift=v
    ),
    "l-svrdsg": lambda x, v, generator: l_svrdsg(
        average(_workers()),
        FINITE,
        x,
        step_size=0.05,
        probability=0.3,
        anchor_size=4,
        generator=generator,
        shift=v,
    ),
    "s-page": lambda x, v, generator: s_page(
        average(_workers()),
        FINITE,
        x,
        step_size=0.05,
        probability=0.3,
        anchor_size=4,
        batch=2,
        generator=generator,
        shift=v,
    ),
    "distributed": lambda x, v, generator: distributed_double_sketched_gd(
        _workers(), _OWN, x, step_size=0.05, generator=generator, shift=v
    ),
}


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("name", LOOPS)
def test_on_average_every_method_is_gradient_descent_on_the_mast_objective(
    name: str, shift: Tensor | float
) -> None:
    runs, steps = 4000, 8
    if name == "distributed":
        parts = zip(_workers(), _OWN, strict=True)
        objective = average([mast_objective(f, sketch, shift) for f, sketch in parts])
    else:
        objective = mast_objective(average(_workers()), RandK(D, 3), shift)
    x = random_point(D, 5)
    points = trajectory(LOOPS[name](x.expand(runs, D), shift, seeded(6)), steps)
    # The gradient is affine, so E[x_t] obeys the same recursion as gradient descent.
    expected = [x]
    for _ in range(steps):
        expected.append(expected[-1] - 0.05 * objective.gradient(expected[-1]))
    assert_mean(points.movedim(1, 0), torch.stack(expected))
    assert standard_error(points[-1]).max() > 1e-4, "no randomness to average out"


@pytest.mark.parametrize("shift", SHIFTS.values(), ids=SHIFTS)
@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_dsgd_bound_holds_along_runs(
    sketch: Sketch, shift: Tensor | float, fraction: float
) -> None:
    f, x, runs, steps = random_quadratic(D, 2, L=3.0), 3 * random_point(D, 3), 500, 500
    step_size = fraction * largest_step(f, sketch)
    bound = dsgd_bound(f, sketch, x, step_size=step_size, steps=steps, shift=shift)
    loop = double_sketched_gd(
        f, sketch, x.expand(runs, D), step_size=step_size, generator=seeded(8), shift=shift
    )
    objective = mast_objective(f, sketch, shift)
    distance = (trajectory(loop, steps) - objective.minimiser).square().sum(-1).T
    mean, error = distance.mean(0), standard_error(distance)
    # At t = 0 only the noise term separates the two.
    assert (mean + 5 * error <= bound).all()
    # And its noise term is needed: the bound without it is violated.
    noise = bound[0] - distance[0, 0]
    assert (mean - 5 * error > bound - noise)[-1]


def test_dsgd_bound_by_hand() -> None:
    # f = x^2 - x, p = 1/2: L_f = mu_f = 2, L_S_max = 4, mu_D = 2; f_D = 2 x^2 - x.
    f = Quadratic(torch.full((1, 1), 2.0), torch.ones(1))
    bound = dsgd_bound(f, Bernoulli(1, 0.5), torch.tensor([1.25]), step_size=0.125, steps=2)
    noise = 2 * 0.125 * 2 * 4 * (-1 / 8 + 1 / 4) / 4
    expected = torch.tensor([1.0, 0.5, 0.25]) + noise
    torch.testing.assert_close(bound, expected)
    with pytest.raises(ValueError, match=r"\(0, 1/\(L_f L_S_max\)\] = \(0, 0.125\], got 0.126"):
        dsgd_bound(f, Bernoulli(1, 0.5), torch.ones(1), step_size=0.126, steps=2)


def test_dsgd_bound_is_attained() -> None:
    """L = l I, interpolation and the largest step: each step takes off exactly what it may."""
    p, v, x = 0.6, random_point(D, 11), random_point(D, 3)
    f, sketch = Quadratic(3 * torch.eye(D, dtype=torch.float64), 3 * v), Bernoulli(D, p)
    step_size = largest_step(f, sketch)
    diagonals, probability = support(sketch)
    stepped = x - step_size * sketched_gradient(f, diagonals, x, v)
    distance = probability @ (stepped - v).square().sum(-1)
    bound = dsgd_bound(f, sketch, x, step_size=step_size, steps=1, shift=v)
    torch.testing.assert_close(bound, torch.stack([(x - v).square().sum(), distance]))
    torch.testing.assert_close(distance, (1 - p) * (x - v).square().sum())


@pytest.mark.parametrize("sketch", SKETCHES.values(), ids=SKETCHES)
def test_interpolation_makes_convergence_exact(sketch: Sketch) -> None:
    f, x = random_quadratic(D, 2, L=3.0), random_point(D, 3).expand(20, D)
    step_size = largest_step(f, sketch)

    def distance(shift: Tensor | float) -> Tensor:
        loop = double_sketched_gd(
            f, sketch, x, step_size=step_size, generator=seeded(9), shift=shift
        )
        goal = mast_objective(f, sketch, shift).minimiser
        return (after(loop, 600) - goal).norm(dim=-1)

    # Around f's own minimiser every sketched f has that minimiser; the iterates end at rounding.
    assert distance(f.minimiser).max() < 1e-13
    bound = dsgd_bound(f, sketch, x[0], step_size=step_size, steps=600, shift=f.minimiser)
    assert abs(bound[-1]) < 1e-13
    # Around another point they keep moving.
    assert distance(f.minimiser + 1).min() > 1e-3


def test_interpolation_of_random_components() -> None:
    best, x = random_point(D, 12), random_point(D, 3).expand(20, D)
    components = [Quadratic(f.hessian, f.hessian @ best) for f in _workers()]

    def distance(components: list[Quadratic]) -> Tensor:
        loop = double_sketched_sgd(
            components, RandK(D, 3), x, step_size=0.05, generator=seeded(10), shift=best
        )
        goal = mast_objective(average(components), RandK(D, 3), best).minimiser
        return (after(loop, 1500) - goal).norm(dim=-1)

    assert distance(components).max() < 1e-13
    assert distance(_workers()).min() > 1e-3


def test_workers_divide_the_variance() -> None:
    sketch, f, x = RandK(D, 3), random_quadratic(D, 2), random_point(D, 3)
    mean = mast_objective(f, sketch).gradient(x)
    variance = (sketched_gradient(f, FINITE, x) - mean).square().sum(-1).mean()
    for n in (1, 2, 5):
        loop = distributed_double_sketched_gd(
            [f] * n, [sketch] * n, x.expand(5000, D), step_size=0.1, generator=seeded(13)
        )
        moved = (after(loop, 1) - (x - 0.1 * mean)).square().sum(-1)
        assert_mean(moved, 0.1**2 * variance / n)


def _distances(loop: Iterator[Tensor], goal: Tensor, steps: int) -> Tensor:
    """||x_t - goal||^2: [runs, steps + 1]."""
    return (trajectory(loop, steps) - goal).square().sum(-1).T


def test_l_svrdsg_is_exact_with_all_sketches_in_the_anchor() -> None:
    f, x, p = random_quadratic(D, 2, L=3.0), random_point(D, 3).expand(200, D), 0.2
    objective = mast_objective(f, FINITE)
    goal, step_size = objective.minimiser, largest_step(f, RandK(D, 3)) / 6

    def distances(anchor_size: int, steps: int) -> Tensor:
        loop = l_svrdsg(
            f,
            FINITE,
            x,
            step_size=step_size,
            probability=p,
            anchor_size=anchor_size,
            generator=seeded(14),
        )
        return _distances(loop, goal, steps)

    full = distances(len(FINITE), 1200)
    assert full[:, -1].max() < 1e-20
    # Rate of loopless SVRG (Kovalev, Horvath, Richtarik 2020) for gamma = 1/(6L):
    # E ||x_t - x*||^2 <= max(1 - gamma mu, 1 - p/2)^t (||x_0 - x*||^2 + D_0).
    spread = sketched_gradient(f, FINITE, x[0]) - sketched_gradient(f, FINITE, goal)
    start = full[0, 0] + 4 * step_size**2 / p * spread.square().sum(-1).mean()
    rate = max(1 - step_size * objective.mu_f, 1 - p / 2)
    bound = start * rate ** torch.arange(full.shape[1], dtype=torch.float64)
    # Rounding ends the descent at squares of about 1e-32.
    assert (full.mean(0) + 5 * standard_error(full) <= bound + 1e-30).all()
    # Fewer sketches leave a neighbourhood, the larger the fewer they are.
    nine, one = (distances(size, 1200)[:, -300:].mean() for size in (9, 1))
    assert one > 10 * nine > 1e-4


def test_s_page_converges_at_its_rate() -> None:
    f, x, p, batch = random_quadratic(D, 2, L=3.0), random_point(D, 3).expand(200, D), 0.2, 2
    objective = mast_objective(f, FINITE)
    # PAGE under the Polyak-Lojasiewicz condition (Li et al., ICML 2021): for
    # gamma <= min(1/(L (1 + sqrt(2 (1-p)/(p b')))), p/(2 mu)), E[f(x_t) - f*] <= (1-gamma mu)^t ...
    slower = 1 + (2 * (1 - p) / (p * batch)) ** 0.5
    step_size = min(largest_step(f, RandK(D, 3)) / slower, p / (2 * objective.mu_f))

    def points(anchor_size: int, steps: int) -> Tensor:
        loop = s_page(
            f,
            FINITE,
            x,
            step_size=step_size,
            probability=p,
            anchor_size=anchor_size,
            batch=batch,
            generator=seeded(15),
        )
        return trajectory(loop, steps)

    steps = 1000
    full = points(len(FINITE), steps)
    assert (full[-1] - objective.minimiser).norm(dim=-1).max() < 1e-13
    gap = (objective.value(full) - objective.infimum).T
    rate = (1 - step_size * objective.mu_f) ** torch.arange(steps + 1, dtype=torch.float64)
    # Values of size 1 carry rounding of 1e-15.
    assert (gap.mean(0) + 5 * standard_error(gap) <= gap[0, 0] * rate + 1e-14).all()
    part = points(3, steps)
    assert (part[-1] - objective.minimiser).norm(dim=-1).median() > 1e-2


@pytest.mark.parametrize("batch", [1, 4])
def test_s_page_divides_the_variance_by_its_batch(batch: int) -> None:
    f, x, p, step_size = random_quadratic(D, 2), random_point(D, 3), 0.3, 0.1
    loop = s_page(
        f,
        FINITE,
        x.expand(5000, D),
        step_size=step_size,
        probability=p,
        anchor_size=len(FINITE),
        batch=batch,
        generator=seeded(16),
    )
    points = trajectory(loop, 2)
    objective = mast_objective(f, FINITE)
    # The first step is exact; the second is, too, where the anchor is renewed.
    first = x - step_size * objective.gradient(x)
    torch.testing.assert_close(points[1], first.expand(5000, D))
    change = sketched_gradient(f, FINITE, first) - sketched_gradient(f, FINITE, x)
    variance = (change - change.mean(0)).square().sum(-1).mean() / batch
    moved = (points[2] - (first - step_size * objective.gradient(first))).square().sum(-1)
    assert_mean(moved, step_size**2 * (1 - p) * variance)


def test_every_draw_is_its_own_with_the_same_seed() -> None:
    x = random_point(D, 5)
    for name, loop in LOOPS.items():
        first, again = (after(loop(x, 0.0, seeded(1)), 5) for _ in range(2))
        assert torch.equal(first, again), name
        runs = after(loop(x.expand(2, 3, D), 0.0, seeded(1)), 5)
        assert runs.shape == (2, 3, D) and len(runs.view(6, D).unique(dim=0)) == 6, name


def test_what_is_refused() -> None:
    f, x, generator = random_quadratic(D, 0), random_point(D, 0), seeded(0)
    common = {"step_size": 0.1, "generator": generator}
    anchored = {**common, "anchor_size": 3, "probability": 0.5}
    refused: list[tuple[str, Iterator[Tensor]]] = [
        ("2 workers, 1", distributed_double_sketched_gd([f, f], [RandK(D, 1)], x, **common)),
        ("at least one component", double_sketched_sgd([], RandK(D, 1), x, **common)),
        ("in 1..10, got 11", l_svrdsg(f, FINITE, x, **{**anchored, "anchor_size": 11})),
        ("in 1..10, got 0", s_page(f, FINITE, x, **{**anchored, "anchor_size": 0})),
        (r"\(0, 1\], got 0", l_svrdsg(f, FINITE, x, **{**anchored, "probability": 0.0})),
        (r"\[N, 5\], got \[5\]", s_page(f, FINITE[0], x, **anchored)),
        ("batch must be at least 1", s_page(f, FINITE, x, batch=0, **anchored)),
    ]
    for message, loop in refused:
        with pytest.raises(ValueError, match=message):
            next(loop)
    for loop in (
        double_sketched_gd(f, Perm(D, 2), x, **common),
        double_sketched_sgd([f], Perm(D, 2), x, **common),
    ):
        with pytest.raises(TypeError, match="use ist"):
            next(loop)
