"""Quadratics, on which sketched training has closed forms: minimisers, fixed points, bounds.

Sources: "MAST: Model-Agnostic Sparsified Training" (ICLR 2025, arXiv 2311.16086); "Towards a Better
Theoretical Understanding of Independent Subnetwork Training" (ICML 2024, arXiv 2306.16484), here
the IST paper. Points x may have leading dimensions: [..., d].
"""

# Shapes: d coordinates, n workers, N sketches of a finite set.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from maskedtrain.theory.sketches import Perm, Sketch

__all__ = [
    "Quadratic",
    "average",
    "dsgd_bound",
    "ist_expected_hessian",
    "ist_fixed_point",
    "ist_gradient",
    "ist_hessian",
    "ist_w_bar",
    "mast_objective",
    "preconditioned",
    "sketched_gradient",
]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """f(x) = 1/2 x^T L x - b^T x + c.

    Args:
        hessian: L, [d, d], symmetric and positive semi-definite.
        linear: b, [d], of L's dtype.
        constant: c.

    Raises:
        ValueError: other shapes or dtypes, or an L that is not symmetric or is indefinite.
    """

    hessian: Tensor
    linear: Tensor
    constant: float = 0.0

    def __post_init__(self) -> None:
        d = self.linear.shape[-1] if self.linear.ndim == 1 else 0
        if d == 0 or self.hessian.shape != (d, d):
            raise ValueError(
                "hessian and linear must be [d, d] and [d], "
                f"got {list(self.hessian.shape)} and {list(self.linear.shape)}"
            )
        if self.hessian.dtype != self.linear.dtype or not self.linear.is_floating_point():
            raise ValueError(
                "hessian and linear must have one floating dtype, "
                f"got {self.hessian.dtype} and {self.linear.dtype}"
            )
        if not torch.allclose(self.hessian, self.hessian.T):
            gap = (self.hessian - self.hessian.T).abs().max()
            raise ValueError(f"hessian must be symmetric, got L - L^T up to {gap:.3g}")
        if self.mu_f < -self._rounding:
            raise ValueError(
                f"hessian must be positive semi-definite, got an eigenvalue of {self.mu_f:.3g}"
            )

    @cached_property
    def _eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.hessian)

    @property
    def _rounding(self) -> float:
        """How far from 0 rounding may have moved an eigenvalue (the error of a backward stable
        solver).
        """
        return len(self.linear) * torch.finfo(self.linear.dtype).eps * abs(self.L_f)

    @property
    def L_f(self) -> float:
        """Smoothness: the largest eigenvalue of L."""
        return float(self._eigenvalues[-1])

    @property
    def mu_f(self) -> float:
        """Strong convexity: the smallest eigenvalue of L."""
        return float(self._eigenvalues[0])

    def value(self, x: Tensor) -> Tensor:
        """f(x): [..., d] -> [...]."""
        return (x * (x @ self.hessian / 2 - self.linear)).sum(-1) + self.constant

    def gradient(self, x: Tensor) -> Tensor:
        """L x - b: [..., d] -> [..., d]."""
        return x @ self.hessian - self.linear

    @property
    def minimiser(self) -> Tensor:
        """L^{-1} b, [d].

        Raises:
            ValueError: L is singular, and there is not one minimiser.
        """
        if self.mu_f <= self._rounding:
            raise ValueError(
                f"the minimiser needs a positive definite hessian, got an eigenvalue of "
                f"{self.mu_f:.3g}"
            )
        return torch.linalg.solve(self.hessian, self.linear)

    @property
    def infimum(self) -> float:
        """min f = c - 1/2 b^T L^{-1} b; L must be positive definite."""
        return self.constant - float(self.linear @ self.minimiser) / 2


def average(workers: Sequence[Quadratic]) -> Quadratic:
    """The mean (1/n) sum_i f_i."""
    if not workers:
        raise ValueError("the average needs at least one quadratic, got none")
    return Quadratic(
        torch.stack([f.hessian for f in workers]).mean(0),
        torch.stack([f.linear for f in workers]).mean(0),
        sum(f.constant for f in workers) / len(workers),
    )


def sketched_gradient(
    f: Quadratic, diagonal: Tensor, x: Tensor, shift: Tensor | float = 0.0
) -> Tensor:
    """The gradient of f_S: S grad f(v + S (x - v)), with S sampled once (MAST).

    Args:
        f: the quadratic.
        diagonal: S, [..., d].
        x: [..., d].
        shift: v, the pretrained point: [d] or a number.
    """
    return diagonal * f.gradient(shift + diagonal * (x - shift))


def mast_objective(f: Quadratic, sketch: Sketch | Tensor, shift: Tensor | float = 0.0) -> Quadratic:
    """MAST's objective f_D(x) = E_S f(v + S (x - v)), which is a quadratic again.

        f_D(x) = f(v) + grad f(v)^T E[S] (x - v) + 1/2 (x - v)^T E[S L S] (x - v)

    so its minimiser is v - E[S L S]^{-1} grad f(v) for an unbiased S, E[S L S]^{-1} b for v = 0.
    Of workers with their own sketches it is ``average`` of theirs.

    Args:
        f: the quadratic.
        sketch: the distribution of S; or the diagonals [N, d] of a finite set, S uniform on it.
        shift: v, the pretrained point: [d] or a number.
    """
    if isinstance(sketch, Sketch):
        hessian = sketch.expected(f.hessian)
        mean: Tensor | float = sketch.mean
    else:
        if sketch.ndim != 2 or len(sketch) == 0 or sketch.shape[1] != len(f.linear):
            raise ValueError(
                f"sketches must be [N, d] = [N, {len(f.linear)}], got {list(sketch.shape)}"
            )
        hessian = f.hessian * (sketch.T @ sketch / len(sketch))
        mean = sketch.mean(0)
    v = torch.zeros_like(f.linear) + shift
    gradient = mean * f.gradient(v)
    constant = f.value(v) - gradient @ v + v @ hessian @ v / 2
    return Quadratic(hessian, hessian @ v - gradient, float(constant))


def dsgd_bound(
    f: Quadratic,
    sketch: Sketch,
    x: Tensor,
    *,
    step_size: float,
    steps: int,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """What MAST proves of ``double_sketched_gd`` from x_0 = x, for t = 0..steps.

        E ||x_t - x_D||^2 <= (1 - gamma mu_D mu_f)^t ||x_0 - x_D||^2
                             + 2 gamma L_f L_S_max (f_D^inf - f^inf) / (mu_D mu_f)

    for gamma <= 1/(L_f L_S_max), x_D the minimiser of f_D. The second term is 0, and convergence
    exact, under interpolation: f_D^inf = f^inf (the pretrained point v minimises f).

    Args:
        f: the quadratic, positive definite.
        sketch: the distribution of S.
        x: [..., d].
        step_size: gamma.
        steps: the last t.
        shift: v.

    Returns:
        [..., steps + 1].

    Raises:
        ValueError: a step size that the theorem does not cover, or a singular Hessian.
    """
    constants, objective = sketch.constants, mast_objective(f, sketch, shift)
    gap = objective.infimum - f.infimum
    smoothness = f.L_f * constants.L_S_max
    convexity = f.mu_f * constants.mu_D
    if not 0 < step_size <= 1 / smoothness:
        raise ValueError(
            f"step_size must be in (0, 1/(L_f L_S_max)] = (0, {1 / smoothness:.6g}], "
            f"got {step_size}"
        )
    rate = (1 - step_size * convexity) ** torch.arange(steps + 1, dtype=x.dtype, device=x.device)
    distance = (x - objective.minimiser).square().sum(-1, keepdim=True)
    noise = 2 * step_size * smoothness * gap / convexity
    return rate * distance + noise


def ist_gradient(workers: Sequence[Quadratic], diagonals: Tensor, x: Tensor) -> Tensor:
    """What a step of independent subnet training follows: (1/n) sum_i C_i grad f_i(C_i x), that is
    B_bar x - (1/n) sum_i C_i b_i; C_i given as diagonals [..., n, d].
    """
    if diagonals.shape[-2] != len(workers):
        raise ValueError(f"{len(workers)} workers need as many sketches, got {diagonals.shape[-2]}")
    parts = [sketched_gradient(f, diagonals[..., i, :], x) for i, f in enumerate(workers)]
    return torch.stack(parts).mean(0)


def ist_hessian(workers: Sequence[Quadratic], diagonals: Tensor) -> Tensor:
    """B_bar = (1/n) sum_i C_i L_i C_i of one draw; C_i as diagonals [..., n, d] -> [..., d, d]."""
    hessians = torch.stack([f.hessian for f in workers])
    return (diagonals[..., :, None] * hessians * diagonals[..., None, :]).mean(-3)


def ist_expected_hessian(workers: Sequence[Quadratic], sketch: Perm) -> Tensor:
    """E[B_bar] = n Diag(L_bar) + n (q-1)/(d-1) (L_bar - Diag(L_bar)); n Diag(L_bar) for Perm-1."""
    return sketch.expected(average(workers).hessian)


def ist_fixed_point(workers: Sequence[Quadratic], sketch: Perm) -> Tensor:
    """Where E[x_t] of ``ist`` goes: E[B_bar]^{-1} (1/n) sum_i E[C_i] b_i.

    It is not the minimiser of the average unless b = 0: IST is gradient descent on MAST's objective
    with v = 0 in expectation. For ``preconditioned`` workers and Perm-1 with scale sqrt(n) it is
    (1/sqrt n) (1/n) sum_i D_i^{-1/2} b_i.
    """
    return mast_objective(average(workers), sketch).minimiser


def ist_w_bar(hessian: Tensor, expected_hessian: Tensor) -> Tensor:
    """W_bar = 1/2 E[L_bar B_bar + B_bar L_bar], for L_bar and E[B_bar].

    For b = 0 a step of size gamma changes f by -gamma x^T W_bar x + gamma^2/2 E[x^T B_bar L_bar
    B_bar x] in expectation, so the IST paper's descent theorem needs W_bar to be positive
    semi-definite. It is not always: L = [[a, c], [c, b]] with c > 2ab/(a+b).
    """
    product = hessian @ expected_hessian
    return (product + product.T) / 2


def preconditioned(workers: Sequence[Quadratic]) -> list[Quadratic]:
    """f_i(D_i^{-1/2} x) with D_i = Diag(L_i): Hessians with ones on the diagonal, b_i -> D_i^{-1/2}
    b_i. Sketches sqrt(n) P_i on these are the IST paper's sqrt(n) D_i^{-1/2} P_i on the f_i.
    """
    result: list[Quadratic] = []
    for f in workers:
        if not (f.hessian.diagonal() > 0).all():
            raise ValueError("preconditioning needs a positive diagonal of every hessian")
        scale = f.hessian.diagonal().rsqrt()
        hessian = f.hessian * (scale[:, None] * scale)
        result.append(Quadratic(hessian, f.linear * scale, f.constant))
    return result
