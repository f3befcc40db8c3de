"""Small quadratics, every draw of a sketch with its probability, and means with their
confidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice, product
from math import comb

import torch
from torch import Generator, Tensor

from maskedtrain.theory import Bernoulli, Perm, Quadratic, RandK, Sketch


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def random_quadratic(d: int, seed: int, *, mu: float = 1.0, L: float = 4.0) -> Quadratic:
    """Eigenvalues from mu to L in a random basis, a random b and c."""
    generator = seeded(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    hessian = basis @ torch.diag(torch.linspace(mu, L, d, dtype=torch.float64)) @ basis.T
    linear = torch.randn(d, generator=generator, dtype=torch.float64)
    return Quadratic((hessian + hessian.T) / 2, linear, 0.7)


def random_point(d: int, seed: int) -> Tensor:
    return torch.randn(d, generator=seeded(seed), dtype=torch.float64)


def support(sketch: Sketch) -> tuple[Tensor, Tensor]:
    """Every draw, [M, d] or [M, n, d], and its probability [M], from the definitions."""
    draws: list[list[float] | list[list[float]]] = []
    probabilities: list[float] = []
    units = range(sketch.units)
    if isinstance(sketch, Bernoulli):
        p = sketch.probabilities.tolist()
        for kept in product((False, True), repeat=sketch.units):
            draws.append([1 / p[u] if kept[u] else 0.0 for u in units])
            chances = [p[u] if kept[u] else 1 - p[u] for u in units]
            probabilities.append(float(torch.tensor(chances, dtype=torch.float64).prod()))
    elif isinstance(sketch, RandK):
        for chosen in combinations(units, sketch.k):
            draws.append([sketch.units / sketch.k if u in chosen else 0.0 for u in units])
            probabilities.append(1 / comb(sketch.units, sketch.k))
    else:
        assert isinstance(sketch, Perm)
        scale = sketch.n if sketch.scale is None else sketch.scale
        for owner in product(range(sketch.n), repeat=sketch.units):
            sizes = [owner.count(i) for i in range(sketch.n)]
            if max(sizes) - min(sizes) <= 1:
                rows = [[scale if owner[u] == i else 0.0 for u in units] for i in range(sketch.n)]
                draws.append(rows)
        probabilities = [1 / len(draws)] * len(draws)
    diagonals = torch.tensor(draws, dtype=torch.float64)
    if sketch.groups is not None:
        diagonals = diagonals[..., sketch.groups]
    return diagonals, torch.tensor(probabilities, dtype=torch.float64)


def standard_error(samples: Tensor) -> Tensor:
    """Of the mean over the first dimension."""
    return samples.std(0) / len(samples) ** 0.5


def assert_mean(samples: Tensor, expected: Tensor, *, sigmas: float = 5.0) -> None:
    """The mean over the first dimension is what is expected, element by element, within
    ``sigmas`` of its standard errors, which the samples themselves give.

    Five: a right formula fails once in two million elements. Seeds are fixed, so it never flickers.
    """
    # Where nothing varies, rounding remains, of a few operations on numbers below 100.
    rounding = 1e-12 * (1 + expected.abs())
    miss = (samples.mean(0) - expected).abs() - sigmas * standard_error(samples) - rounding
    assert (miss <= 0).all(), f"off by {miss.max():.3g} more than chance allows"


def after(iterates: Iterator[Tensor], steps: int) -> Tensor:
    """x_steps."""
    return next(islice(iterates, steps, None))


def trajectory(iterates: Iterator[Tensor], steps: int) -> Tensor:
    """x_0..x_steps, [steps + 1, ..., d]."""
    return torch.stack(list(islice(iterates, steps + 1)))
