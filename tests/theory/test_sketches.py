"""Sketches against their definitions: all draws enumerated, and Monte Carlo with its confidence."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from maskedtrain.theory import Bernoulli, Perm, RandK, Sketch
from tests.theory.toolbox import assert_mean, random_quadratic, seeded, support

NEURONS = torch.tensor([0, 1, 2, 0, 1, 2, 2])

SMALL: dict[str, Sketch] = {
    "bernoulli": Bernoulli(4, 0.3),
    "bernoulli-vector": Bernoulli(4, (0.3, 1.0, 0.5, 0.9)),
    "bernoulli-neurons": Bernoulli(7, torch.tensor([0.4, 0.8, 0.6]), groups=NEURONS),
    "randk": RandK(5, 2),
    "randk-one": RandK(4, 1),
    "randk-all": RandK(3, 3),
    "randk-neurons": RandK(7, 2, groups=NEURONS),
    "perm-2": Perm(4, 2),
    "perm-1": Perm(4, 4),
    "perm-uneven": Perm(5, 2),
    "perm-uneven-3": Perm(5, 3),
    "perm-one-worker": Perm(3, 1),
    "perm-scaled": Perm(4, 2, scale=2**0.5),
    "perm-neurons": Perm(7, 2, groups=NEURONS),
    "one-coordinate": RandK(1, 1),
    "one-coordinate-perm": Perm(1, 1),
}

LARGE: dict[str, Sketch] = {
    "bernoulli": Bernoulli(24, torch.linspace(0.2, 1, 24)),
    "bernoulli-neurons": Bernoulli(24, 0.5, groups=torch.arange(24) % 7),
    "randk": RandK(24, 5),
    "randk-neurons": RandK(24, 3, groups=torch.arange(24) % 7),
    "perm": Perm(24, 6),
    "perm-uneven": Perm(24, 7),
}


def square_matrix(d: int, seed: int = 0) -> Tensor:
    """Not symmetric: the closed forms do not need it to be."""
    return torch.randn(d, d, generator=seeded(seed), dtype=torch.float64)


def sketched(diagonals: Tensor, matrix: Tensor) -> Tensor:
    """S M S for every diagonal, [..., d] -> [..., d, d]."""
    return diagonals[..., :, None] * matrix * diagonals[..., None, :]


@pytest.mark.parametrize("sketch", SMALL.values(), ids=SMALL)
def test_every_draw_is_as_frequent_as_it_should_be(sketch: Sketch) -> None:
    draws, probability = support(sketch)
    total = 20_000
    samples = sketch.sample(seeded(1), (total,))
    assert samples.shape == (total, *draws.shape[1:])
    possible = probability > 0
    same = torch.stack([(samples == draw).flatten(1).all(1) for draw in draws[possible]], dim=1)
    assert same.sum(1).eq(1).all(), "a draw that is not possible"
    assert_mean(same.double(), probability[possible])


@pytest.mark.parametrize("sketch", SMALL.values(), ids=SMALL)
def test_closed_forms_are_the_sums_over_all_draws(sketch: Sketch) -> None:
    draws, probability = support(sketch)
    matrix = square_matrix(sketch.d)
    for diagonals in (draws if draws.ndim == 3 else draws[:, None]).unbind(1):
        mean = probability @ diagonals
        torch.testing.assert_close(mean, torch.full_like(mean, sketch.mean))
        exact = torch.einsum("m,mjk->jk", probability, sketched(diagonals, matrix))
        torch.testing.assert_close(sketch.expected(matrix), exact)
        squares = probability @ diagonals.square()
        largest = diagonals[probability > 0].square().max()
        found = astuple(sketch.constants)
        assert found == pytest.approx((float(squares.max()), float(squares.min()), float(largest)))


@pytest.mark.parametrize("sketch", LARGE.values(), ids=LARGE)
def test_expected_is_the_mean_over_draws(sketch: Sketch) -> None:
    matrix, total = square_matrix(sketch.d), 10_000
    samples = sketch.sample(seeded(2), (total,))
    for diagonals in samples.unbind(1) if isinstance(sketch, Perm) else [samples]:
        assert_mean(diagonals, torch.ones(sketch.d, dtype=torch.float64))
        assert_mean(sketched(diagonals, matrix), sketch.expected(matrix))


def test_bernoulli_formulas() -> None:
    p, L = torch.tensor([0.5, 0.25, 1.0, 0.8]), square_matrix(4)
    expected = L + torch.diag((1 / p.double() - 1) * L.diagonal())
    torch.testing.assert_close(Bernoulli(4, p).expected(L), expected)
    constants = Bernoulli(4, p).constants
    assert (constants.L_D, constants.mu_D, constants.L_S_max) == (4.0, 1.0, 16.0)
    identity = Bernoulli(4, 1.0)
    assert torch.equal(identity.expected(L), L)
    assert torch.equal(identity.sample(seeded(0)), torch.ones(4, dtype=torch.float64))


def test_randk_formulas() -> None:
    d, K, L = 6, 4, square_matrix(6)
    a = d * (K - 1) / (K * (d - 1))
    expected = a * L + (d / K - a) * torch.diag(L.diagonal())
    torch.testing.assert_close(RandK(d, K).expected(L), expected)
    constants = RandK(d, K).constants
    assert (constants.L_D, constants.mu_D, constants.L_S_max) == (1.5, 1.5, 2.25)


@pytest.mark.parametrize(("n", "q"), [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_perm_formulas(n: int, q: int) -> None:
    d, L = 6, square_matrix(6)
    diagonal = torch.diag(L.diagonal())
    expected = n * diagonal + n * (q - 1) / (d - 1) * (L - diagonal)
    torch.testing.assert_close(Perm(d, n).expected(L), expected)
    constants = Perm(d, n).constants
    assert (constants.L_D, constants.mu_D, constants.L_S_max) == (n, n, n**2)


@given(d=st.integers(1, 12), data=st.data())
def test_workers_share_the_coordinates_out(d: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, d))
    diagonals = Perm(d, n).sample(seeded(data.draw(st.integers(0, 99))), (5,))
    assert set(diagonals.unique().tolist()) <= {0.0, float(n)}
    assert (diagonals.mean(-2) == 1).all()
    sizes = (diagonals > 0).sum(-1)
    assert sizes.min() == d // n and sizes.max() == -(-d // n)


@given(seed=st.integers(0, 999), data=st.data())
def test_smoothness_and_convexity_lie_between_the_constants(seed: int, data: st.DataObject) -> None:
    d = 6
    groups = data.draw(st.sampled_from([None, torch.tensor([0, 0, 1, 1, 2, 2])]))
    units = d if groups is None else 3
    p = data.draw(st.lists(st.floats(0.1, 1), min_size=units, max_size=units))
    sketch = data.draw(
        st.sampled_from(
            [
                Bernoulli(d, p, groups=groups),
                RandK(d, data.draw(st.integers(1, units)), groups=groups),
                Perm(d, data.draw(st.integers(1, units)), groups=groups),
            ]
        )
    )
    f, constants = random_quadratic(d, seed), sketch.constants
    expected = sketch.expected(f.hessian)
    eigenvalues = torch.linalg.eigvalsh(expected)
    # Relative: only rounding may take an eigenvalue past its bound.
    assert eigenvalues[-1] <= constants.L_D * f.L_f * (1 + 1e-12)
    assert eigenvalues[0] >= constants.mu_D * f.mu_f * (1 - 1e-12)
    # Jensen: noise of mean 0 adds curvature.
    assert torch.linalg.eigvalsh(expected - f.hessian)[0] >= -1e-12 * constants.L_D * f.L_f


@pytest.mark.parametrize("sketch", SMALL.values(), ids=SMALL)
def test_a_seed_keeps_the_same_units_in_every_dtype(sketch: Sketch) -> None:
    exact = sketch.sample(seeded(3), (2, 3))
    single = sketch.sample(seeded(3), (2, 3), dtype=torch.float32)
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert torch.equal(exact.float(), single)
    assert sketch.sample(seeded(3)).shape == exact.shape[2:]


def test_every_coordinate_alone_is_the_ungrouped_sketch() -> None:
    alone, L = torch.arange(5), square_matrix(5)
    pairs = [
        (Bernoulli(5, 0.5), Bernoulli(5, 0.5, groups=alone)),
        (RandK(5, 2), RandK(5, 2, groups=alone)),
        (Perm(5, 2), Perm(5, 2, groups=alone)),
    ]
    for plain, grouped in pairs:
        assert torch.equal(plain.sample(seeded(4), (9,)), grouped.sample(seeded(4), (9,)))
        assert torch.equal(plain.expected(L), grouped.expected(L))
        assert plain.constants == grouped.constants


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="d must be at least 1, got 0"):
        RandK(0, 1)
    with pytest.raises(ValueError, match=r"groups must be \[3\] int64, got \[2\] torch.int64"):
        Bernoulli(3, 0.5, groups=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"none left out, got \[0, 2\]"):
        Bernoulli(3, 0.5, groups=torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match=r"p must be a number or \[2\], got \[3\]"):
        Bernoulli(3, (0.5, 0.5, 0.5), groups=torch.tensor([0, 1, 1]))
    for p in (0.0, 1.5, float("nan"), (0.5, -0.1)):
        with pytest.raises(ValueError, match=r"p must be in \(0, 1\], got"):
            Bernoulli(2, p)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.3, got {k}"):
            RandK(3, k)
    for n in (0, 4):
        with pytest.raises(ValueError, match=rf"n must be in 1\.\.3, got {n}"):
            Perm(3, n)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        Perm(3, 3, scale=0.0)
    with pytest.raises(ValueError, match=r"matrix must be \[d, d\] = \[3, 3\], got \[3\]"):
        RandK(3, 2).expected(torch.ones(3))
