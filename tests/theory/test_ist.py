"""Independent subnet training on quadratics: expectations, the counter-example, fixed points."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskedtrain.theory import (
    Perm,
    Quadratic,
    average,
    ist,
    ist_expected_hessian,
    ist_fixed_point,
    ist_gradient,
    ist_hessian,
    ist_w_bar,
    preconditioned,
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

PERMS = {
    "perm-1": Perm(4, 4),
    "perm-2": Perm(4, 2),
    "uneven": Perm(5, 2),
    "neurons": Perm(6, 2, groups=torch.tensor([0, 1, 2, 2, 1, 0])),
}


def different_workers(d: int, n: int) -> list[Quadratic]:
    return [random_quadratic(d, seed, mu=0.5 + seed / 4) for seed in range(n)]


def same_workers(d: int, n: int, *, linear: bool = True) -> list[Quadratic]:
    f = random_quadratic(d, 3)
    return [f if linear else Quadratic(f.hessian, torch.zeros_like(f.linear))] * n


def smallest_eigenvalue(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[0])


def test_every_worker_steps_on_its_own_part_alone() -> None:
    d, n, step_size = 5, 2, 0.1
    workers, x = different_workers(d, n), random_point(d, 0)
    diagonals = Perm(d, n).sample(seeded(1))
    stepped = after(ist(workers, Perm(d, n), x, step_size=step_size, generator=seeded(1)), 1)
    for f, diagonal in zip(workers, diagonals, strict=True):
        # A network made of the part: its own weights n x, its own rows and columns of L.
        own = diagonal.nonzero().flatten()
        gradient = f.hessian[own][:, own] @ (n * x[own]) - f.linear[own]
        torch.testing.assert_close(stepped[own], x[own] - step_size * gradient)


@pytest.mark.parametrize("sketch", PERMS.values(), ids=PERMS)
def test_gradient_is_affine(sketch: Perm) -> None:
    workers, x = different_workers(sketch.d, sketch.n), random_point(sketch.d, 0)
    diagonals = sketch.sample(seeded(2), (7,))
    linear = torch.stack([f.linear for f in workers])
    expected = ist_hessian(workers, diagonals) @ x - (diagonals * linear).mean(-2)
    torch.testing.assert_close(ist_gradient(workers, diagonals, x), expected)


@pytest.mark.parametrize("sketch", PERMS.values(), ids=PERMS)
@pytest.mark.parametrize("make", [same_workers, different_workers], ids=["same", "different"])
def test_expected_hessian(sketch: Perm, make: type) -> None:
    workers = make(sketch.d, sketch.n)
    draws, probability = support(sketch)
    exact = torch.einsum("m,mjk->jk", probability, ist_hessian(workers, draws))
    expected = ist_expected_hessian(workers, sketch)
    torch.testing.assert_close(expected, exact)
    assert_mean(ist_hessian(workers, sketch.sample(seeded(3), (5000,))), expected)


@pytest.mark.parametrize(("n", "q"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_expected_hessian_formula(n: int, q: int) -> None:
    d, workers = 6, different_workers(6, n)
    mean = average(workers).hessian
    diagonal = torch.diag(mean.diagonal())
    expected = n * diagonal + n * (q - 1) / (d - 1) * (mean - diagonal)
    torch.testing.assert_close(ist_expected_hessian(workers, Perm(d, n)), expected)


def counter_example(a: float = 1.0, b: float = 4.0, c: float = 1.9) -> Quadratic:
    hessian = torch.tensor([[a, c], [c, b]], dtype=torch.float64)
    return Quadratic(hessian, torch.zeros(2, dtype=torch.float64))


def test_descent_fails_in_two_dimensions() -> None:
    f, sketch = counter_example(), Perm(2, 2)
    workers = [f, f]
    assert f.mu_f > 0
    expected = ist_expected_hessian(workers, sketch)
    torch.testing.assert_close(expected, torch.diag(torch.tensor([2.0, 8.0]).double()))
    values, vectors = torch.linalg.eigh(ist_w_bar(f.hessian, expected))
    assert values[0] < -0.5
    worst = vectors[:, 0]
    for step_size in torch.logspace(-6, 0, 13).tolist():
        loop = ist(workers, sketch, worst, step_size=step_size, generator=seeded(0))
        risen = float(f.value(after(loop, 1)) - f.value(worst))
        # To first order, -gamma x^T W_bar x; the second order only adds to it.
        assert risen >= -step_size * float(values[0]) * (1 - 1e-6) > 0
    # Nevertheless B_bar = 2 Diag(L) for every draw, so the iterates reach 0.
    loop = ist(workers, sketch, worst, step_size=0.2, generator=seeded(0))
    assert after(loop, 100).norm() < 1e-12


@given(a=st.floats(0.1, 10), b=st.floats(0.1, 10), factor=st.floats(0.01, 0.99))
def test_the_counter_example_begins_at_the_harmonic_mean(a: float, b: float, factor: float) -> None:
    harmonic, geometric = 2 * a * b / (a + b), (a * b) ** 0.5

    def smallest(c: float) -> float:
        f = counter_example(a, b, c)
        return smallest_eigenvalue(ist_w_bar(f.hessian, ist_expected_hessian([f, f], Perm(2, 2))))

    assert smallest(factor * harmonic) > 0
    # a = b leaves no room between the two means.
    above = harmonic + factor * (geometric - harmonic)
    if above > harmonic * (1 + 1e-6):
        assert smallest(above) < 0


def test_preconditioning_removes_the_counter_example() -> None:
    workers = preconditioned([counter_example()] * 2)
    f, sketch = workers[0], Perm(2, 2, scale=2**0.5)
    expected = ist_expected_hessian(workers, sketch)
    torch.testing.assert_close(expected, torch.eye(2, dtype=torch.float64))
    w_bar = ist_w_bar(f.hessian, expected)
    assert smallest_eigenvalue(w_bar) > 0.04
    angles = torch.linspace(0, torch.pi, 50, dtype=torch.float64)
    points = torch.stack([angles.cos(), angles.sin()], -1)
    for step_size in (0.01, 0.5, 1.0):
        loop = ist(workers, sketch, points, step_size=step_size, generator=seeded(0))
        # theta = 1, as B_bar L B_bar = L = W_bar.
        decrease = step_size / 2 * (points @ w_bar * points).sum(-1)
        assert (f.value(after(loop, 1)) <= f.value(points) - decrease + 1e-15).all()


@pytest.mark.parametrize("sketch", PERMS.values(), ids=PERMS)
def test_descent_of_the_preconditioned_form(sketch: Perm) -> None:
    """E f(x - gamma B_bar x) <= f(x) - gamma/2 x^T W_bar x for gamma <= 1/theta, where theta is
    such that E[B_bar L B_bar] <= theta W_bar.
    """
    workers = preconditioned(same_workers(sketch.d, sketch.n, linear=False))
    scaled = Perm(sketch.d, sketch.n, scale=sketch.n**0.5, groups=sketch.groups)
    f, x = workers[0], random_point(sketch.d, 4)
    draws, probability = support(scaled)
    hessians = ist_hessian(workers, draws)
    w_bar = ist_w_bar(f.hessian, ist_expected_hessian(workers, scaled))
    assert smallest_eigenvalue(w_bar) > 0
    second = torch.einsum("m,mij->ij", probability, hessians @ f.hessian @ hessians)
    theta = torch.linalg.eigvals(torch.linalg.solve(w_bar, second)).real.max()
    for step_size in (1 / theta, 0.1 / theta):
        stepped = x - step_size * ist_gradient(workers, draws, x)
        mean = float(probability @ f.value(stepped))
        assert mean <= float(f.value(x) - step_size / 2 * (x @ w_bar @ x))
    # And gamma > 2/theta is too long for some x.
    values, vectors = torch.linalg.eig(torch.linalg.solve(w_bar, second))
    x = vectors[:, values.real.argmax()].real
    stepped = x - 2.01 / theta * ist_gradient(workers, draws, x)
    assert float(probability @ f.value(stepped)) > float(f.value(x))


def test_homogeneous_preconditioned_fixed_point_is_not_the_minimiser() -> None:
    d, step_size = 4, 0.25
    original = same_workers(d, d)
    workers, sketch = preconditioned(original), Perm(d, d, scale=d**0.5)
    scaled_linear = original[0].linear / original[0].hessian.diagonal().sqrt()
    fixed = scaled_linear / d**0.5
    torch.testing.assert_close(ist_fixed_point(workers, sketch), fixed)
    assert (fixed - workers[0].minimiser).norm() > 0.1 * fixed.norm()
    # B_bar = I, so x_t = (1 - gamma)^t x_0 + (1 - (1 - gamma)^t) b~/sqrt(n), whatever is drawn.
    x = random_point(d, 5)
    points = trajectory(ist(workers, sketch, x, step_size=step_size, generator=seeded(6)), 20)
    decay = (1 - step_size) ** torch.arange(21, dtype=torch.float64)[:, None]
    torch.testing.assert_close(points, decay * x + (1 - decay) * fixed)
    # Without a linear term both are 0.
    for f in (Quadratic(w.hessian, torch.zeros_like(w.linear)) for w in workers[:1]):
        assert (ist_fixed_point([f] * d, sketch) == 0).all() and (f.minimiser == 0).all()


def heterogeneous(d: int, *, linear: bool = True) -> tuple[list[Quadratic], Perm]:
    workers = different_workers(d, d)
    if not linear:
        workers = [Quadratic(f.hessian, torch.zeros_like(f.linear)) for f in workers]
    return preconditioned(workers), Perm(d, d, scale=d**0.5)


def test_heterogeneous_perm_1_is_the_identity_for_every_draw() -> None:
    workers, sketch = heterogeneous(4)
    draws, _ = support(sketch)
    hessians = ist_hessian(workers, draws)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(hessians, identity.expand_as(hessians))
    # Unlike without preconditioning: there the draw matters.
    raw = ist_hessian(different_workers(4, 4), support(Perm(4, 4))[0])
    assert (raw - raw[0]).abs().max() > 0.1


def test_preconditioned_sketches_of_the_original_workers() -> None:
    """The paper's form: sketches C_i = sqrt(n) D_i^{-1/2} P_i on the f_i themselves."""
    original = different_workers(5, 2)
    scaled = Perm(5, 2, scale=2**0.5).sample(seeded(7))
    scales = torch.stack([f.hessian.diagonal().rsqrt() for f in original])
    x = random_point(5, 8)
    torch.testing.assert_close(
        ist_gradient(preconditioned(original), scaled, x),
        ist_gradient(original, scales * scaled, x),
    )


def test_one_step_convergence_without_linear_terms() -> None:
    workers, sketch = heterogeneous(6, linear=False)
    x = random_point(6, 9).expand(50, 6)
    loop = ist(workers, sketch, x, step_size=1.0, generator=seeded(10))
    # x - B_bar x with a diagonal of D^{-1/2} D D^{-1/2}: the rounding of three operations.
    assert (after(loop, 1).abs() <= 4 * torch.finfo(torch.float64).eps * x.abs()).all()


@pytest.mark.parametrize("step_size", [1.0, 0.4])
def test_heterogeneous_limit(step_size: float) -> None:
    d = 4
    original = different_workers(d, d)
    workers, sketch = heterogeneous(d)
    scaled = [f.linear / f.hessian.diagonal().sqrt() for f in original]
    limit = torch.stack(scaled).mean(0) / d**0.5
    torch.testing.assert_close(ist_fixed_point(workers, sketch), limit)
    x = random_point(d, 11)
    loop = ist(workers, sketch, x.expand(5000, d), step_size=step_size, generator=seeded(12))
    points = trajectory(loop, 6).movedim(1, 0)
    decay = (1 - step_size) ** torch.arange(7, dtype=torch.float64)[:, None]
    assert_mean(points, decay * x + (1 - decay) * limit)
    # In expectation only: every run keeps moving around it, away from the minimiser.
    assert (points[:, -1].std(0) > 0.05).all()
    assert (limit - average(original).minimiser).norm() > 0.1 * limit.norm()


@pytest.mark.parametrize("sketch", PERMS.values(), ids=PERMS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "preconditioned"])
def test_the_mean_goes_to_the_fixed_point(sketch: Perm, scaled: bool) -> None:
    workers = different_workers(sketch.d, sketch.n)
    if scaled:
        workers = preconditioned(workers)
        sketch = Perm(sketch.d, sketch.n, scale=sketch.n**0.5, groups=sketch.groups)
    goal = ist_fixed_point(workers, sketch)
    draws, probability = support(sketch)
    expected_gradient = probability @ ist_gradient(workers, draws, goal)
    assert expected_gradient.abs().max() < 1e-13
    step_size = 1 / float(torch.linalg.eigvalsh(ist_expected_hessian(workers, sketch))[-1])
    x = goal.expand(4000, sketch.d)
    points = after(ist(workers, sketch, x, step_size=step_size, generator=seeded(13)), 10)
    assert_mean(points, goal)
    assert standard_error(points).max() > 1e-4, "no randomness to average out"


def test_what_is_refused() -> None:
    workers, x = different_workers(4, 2), random_point(4, 0)
    with pytest.raises(ValueError, match="2 workers need as many sketches, got 4"):
        after(ist(workers, Perm(4, 4), x, step_size=0.1, generator=seeded(0)), 1)
