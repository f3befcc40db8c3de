"""Quadratics against automatic differentiation, and MAST's objective against its definition."""

from __future__ import annotations

import pytest
import torch

from maskedtrain.theory import (
    Bernoulli,
    Perm,
    Quadratic,
    RandK,
    Sketch,
    average,
    mast_objective,
    preconditioned,
    sketched_gradient,
)
from tests.theory.toolbox import random_point, random_quadratic, support

EYE = torch.eye(2, dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)


def test_value_and_gradient() -> None:
    f = random_quadratic(5, 0)
    points = torch.stack([random_point(5, seed) for seed in range(6)]).view(2, 3, 5)
    points.requires_grad_()
    values = f.value(points)
    by_hand = [x @ f.hessian @ x / 2 - f.linear @ x + f.constant for x in points.view(6, 5)]
    torch.testing.assert_close(values.flatten(), torch.stack(by_hand))
    (gradient,) = torch.autograd.grad(values.sum(), points)
    torch.testing.assert_close(f.gradient(points), gradient)


def test_minimiser_and_constants() -> None:
    f = random_quadratic(5, 1, mu=0.5, L=3.0)
    assert f.mu_f == pytest.approx(0.5) and f.L_f == pytest.approx(3.0)
    # Of a gradient of size 1, rounding.
    assert f.gradient(f.minimiser).abs().max() < 1e-14
    assert f.infimum == pytest.approx(float(f.value(f.minimiser)), rel=1e-14)


def test_average() -> None:
    workers = [random_quadratic(4, seed) for seed in range(3)]
    x = random_point(4, 0)
    mean = average(workers)
    torch.testing.assert_close(mean.value(x), torch.stack([f.value(x) for f in workers]).mean())
    torch.testing.assert_close(
        mean.gradient(x), torch.stack([f.gradient(x) for f in workers]).mean(0)
    )


@pytest.mark.parametrize("shift", [0.0, 1.5, random_point(5, 7)], ids=["0", "1.5", "vector"])
def test_sketched_gradient_is_the_gradient_of_the_sketched_function(
    shift: torch.Tensor | float,
) -> None:
    f, x = random_quadratic(5, 2), random_point(5, 3).requires_grad_()
    diagonal = torch.tensor([0.0, 2.5, 0.0, 2.5, 2.5], dtype=torch.float64)
    (expected,) = torch.autograd.grad(f.value(shift + diagonal * (x - shift)), x)
    actual = sketched_gradient(f, diagonal, x.detach(), shift)
    torch.testing.assert_close(actual, expected)
    assert (actual[diagonal == 0] == 0).all() and (actual[diagonal != 0] != 0).all()


@pytest.mark.parametrize(
    "sketch",
    [
        Bernoulli(5, (0.3, 0.5, 1.0, 0.8, 0.6)),
        Bernoulli(5, 0.4, groups=torch.tensor([0, 1, 0, 1, 2])),
        RandK(5, 2),
        RandK(5, 2, groups=torch.tensor([0, 1, 0, 1, 2])),
    ],
    ids=["bernoulli", "bernoulli-neurons", "randk", "randk-neurons"],
)
@pytest.mark.parametrize("shift", [0.0, random_point(5, 7)], ids=["0", "vector"])
def test_mast_objective_is_the_expectation(sketch: Sketch, shift: torch.Tensor | float) -> None:
    f, x = random_quadratic(5, 4), random_point(5, 5)
    diagonals, probability = support(sketch)
    objective = mast_objective(f, sketch, shift)
    value = probability @ f.value(shift + diagonals * (x - shift))
    torch.testing.assert_close(objective.value(x), value)
    gradient = probability @ sketched_gradient(f, diagonals, x, shift)
    torch.testing.assert_close(objective.gradient(x), gradient)
    # Jensen: sketching costs, at every x.
    assert objective.infimum > f.infimum and value > f.value(x)


@pytest.mark.parametrize("shift", [0.0, random_point(5, 7)], ids=["0", "vector"])
def test_mast_objective_of_a_finite_set(shift: torch.Tensor | float) -> None:
    f, x = random_quadratic(5, 4), random_point(5, 5)
    all_of_them, _ = support(RandK(5, 3))
    complete = mast_objective(f, all_of_them, shift)
    torch.testing.assert_close(complete.minimiser, mast_objective(f, RandK(5, 3), shift).minimiser)
    # Part of them has another mean than I.
    part = all_of_them[:4]
    objective = mast_objective(f, part, shift)
    assert (part.mean(0) - 1).abs().max() > 0.1
    torch.testing.assert_close(objective.value(x), f.value(shift + part * (x - shift)).mean())
    torch.testing.assert_close(objective.gradient(x), sketched_gradient(f, part, x, shift).mean(0))


def test_mast_objective_of_a_scaled_permutation() -> None:
    f, x, sketch = random_quadratic(4, 4), random_point(4, 5), Perm(4, 2, scale=2**0.5)
    draws, _ = support(sketch)
    torch.testing.assert_close(mast_objective(f, sketch).value(x), f.value(draws[:, 0] * x).mean())


def test_preconditioned_is_a_change_of_variables() -> None:
    workers = [random_quadratic(4, seed) for seed in range(2)]
    x = random_point(4, 6)
    for f, g in zip(workers, preconditioned(workers), strict=True):
        torch.testing.assert_close(g.hessian.diagonal(), torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(g.value(x), f.value(x / f.hessian.diagonal().sqrt()))


def test_singular_quadratics_have_no_one_minimiser() -> None:
    f = Quadratic(torch.ones(2, 2, dtype=torch.float64), ONES)
    assert f.L_f == pytest.approx(2.0) and f.mu_f == pytest.approx(0.0, abs=1e-15)
    with pytest.raises(ValueError, match="needs a positive definite hessian"):
        _ = f.minimiser
    # Sketching it makes it convex: [[1, 1], [1, 1]] + Diag(1, 1).
    objective = mast_objective(f, Bernoulli(2, 0.5))
    torch.testing.assert_close(objective.minimiser, ONES / 3)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[d, d\] and \[d\], got \[2, 2\] and \[3\]"):
        Quadratic(EYE, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"one floating dtype, got torch.float64 and torch\.f"):
        Quadratic(EYE, ONES.float())
    with pytest.raises(ValueError, match=r"symmetric, got L - L\^T up to 1"):
        Quadratic(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.ones(2))
    with pytest.raises(ValueError, match="semi-definite, got an eigenvalue of -1"):
        Quadratic(torch.diag(torch.tensor([1.0, -1.0])), torch.ones(2))
    with pytest.raises(ValueError, match="at least one quadratic"):
        average([])
    with pytest.raises(ValueError, match="positive diagonal"):
        preconditioned([Quadratic(torch.diag(torch.tensor([1.0, 0.0])), torch.ones(2))])
    with pytest.raises(ValueError, match=r"\[N, d\] = \[N, 2\], got \[2\]"):
        mast_objective(Quadratic(EYE, ONES), ONES)
