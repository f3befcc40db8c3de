"""Random diagonal sketches: which coordinates a random sub-network keeps, and how they are scaled.

A sketch is a random matrix S of R^d with E[S] = I. Those of this file are diagonal, so a draw is a
vector of d numbers, and they act on *units*: single coordinates, or groups of coordinates that are
kept or dropped together (a neuron: its row of the producing weight, its column of the consuming
one, its bias). Everything a quadratic needs to know of a sketch is then two numbers per pair of
units, E[s_u s_u] and E[s_u s_w], which is why E[S M S] has a closed form.

Sources: "MAST: Model-Agnostic Sparsified Training" (ICLR 2025, arXiv 2311.16086) for sketches and
their constants; "Towards a Better Theoretical Understanding of Independent Subnetwork Training"
(ICML 2024, arXiv 2306.16484) for permutations.
"""

# Shapes: d coordinates, U units (U = d without groups), n workers.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

__all__ = ["Bernoulli", "Perm", "RandK", "Sketch", "SketchConstants"]


@dataclass(frozen=True)
class SketchConstants:
    """What convergence rates need to know of a sketch (MAST's names).

    ``L_D`` = lambda_max(E[S^2]), ``mu_D`` = lambda_min(E[S^2]), ``L_S_max`` = max over the draws of
    lambda_max(S^2). If f is L_f-smooth and mu_f-strongly convex, x -> E f(v + S(x - v)) is
    L_D L_f-smooth and mu_D mu_f-strongly convex, and every x -> f(v + S(x - v)) is
    L_S_max L_f-smooth.
    """

    L_D: float
    mu_D: float
    L_S_max: float


@dataclass(frozen=True, eq=False)
class Sketch:
    """A distribution of random diagonal matrices over R^d; a subclass says which.

    Args:
        d: number of coordinates.
        groups: [d] int64, the unit 0..U-1 that each coordinate belongs to (every unit must have
            one); None makes every coordinate a unit.

    Raises:
        ValueError: no coordinates, or groups that are not as above.
    """

    d: int
    groups: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.d < 1:
            raise ValueError(f"d must be at least 1, got {self.d}")
        if self.groups is None:
            return
        if self.groups.shape != (self.d,) or self.groups.dtype != torch.int64:
            raise ValueError(
                f"groups must be [{self.d}] int64, got {list(self.groups.shape)} "
                f"{self.groups.dtype}"
            )
        found = self.groups.unique()
        if not torch.equal(found, torch.arange(len(found), device=found.device)):
            raise ValueError(f"groups must be 0..U-1, none left out, got {found.tolist()}")

    @property
    def units(self) -> int:
        """How many units are kept or dropped (U)."""
        return self.d if self.groups is None else int(self.groups.max()) + 1

    @property
    def mean(self) -> float:
        """The factor m of E[S] = m I: 1, unless a scale was asked for that is not unbiased."""
        return 1.0

    @property
    def constants(self) -> SketchConstants:
        """L_D, mu_D and L_S_max, in closed form."""
        second = self._second_moments()
        return SketchConstants(float(second.max()), float(second.min()), self._largest_square())

    def sample(
        self,
        generator: Generator,
        size: Sequence[int] = (),
        *,
        dtype: torch.dtype = torch.float64,
    ) -> Tensor:
        """Diagonals of independent draws.

        Args:
            generator: the source of randomness; the draws are on its device.
            size: how many draws, () for one.
            dtype: of the result. Units are chosen in fp64 whatever it is, so that the same seed
                keeps the same units in every dtype.

        Returns:
            [*size, d]; a ``Perm`` gives one diagonal for each worker, [*size, n, d].
        """
        scales_U = self._draw(generator, tuple(size)).to(dtype)
        if self.groups is None:
            return scales_U
        return scales_U[..., self.groups.to(scales_U.device)]

    def expected(self, matrix: Tensor) -> Tensor:
        """E[S M S] in closed form.

        Entry (j, k) is M_jk E[s_j s_k]: E[s_u^2] where both coordinates belong to the same unit u,
        E[s_u s_w], the same for every pair u != w, elsewhere.

        Args:
            matrix: M, [d, d].

        Raises:
            ValueError: M of another shape.
        """
        if matrix.shape != (self.d, self.d):
            raise ValueError(
                f"matrix must be [d, d] = [{self.d}, {self.d}], got {list(matrix.shape)}"
            )
        units = torch.arange(self.d) if self.groups is None else self.groups
        units = units.to(matrix.device)
        within_d = self._second_moments().to(matrix)[units]
        same_dd = units[:, None] == units
        return matrix * torch.where(same_dd, within_d[:, None], self._cross_moment())

    def _draw(self, generator: Generator, size: tuple[int, ...]) -> Tensor:
        """Scales of the units, [*size, U]."""
        raise NotImplementedError

    def _second_moments(self) -> Tensor:
        """E[s_u^2], [U]."""
        raise NotImplementedError

    def _cross_moment(self) -> float:
        """E[s_u s_w] for u != w."""
        raise NotImplementedError

    def _largest_square(self) -> float:
        """The largest s_u^2 over units and draws."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Bernoulli(Sketch):
    """Every unit is kept with its own probability, independently of the others.

        S = Diag(eta_u / p_u),  eta_u ~ Bernoulli(p_u);    E[S M S] = M + Diag((1/p_j - 1) M_jj)
        L_D = 1/min p,  mu_D = 1/max p,  L_S_max = 1/min p^2

    (E[S M S] without groups; with them each unit's diagonal block takes Diag's part.) With groups
    of a layer's neurons it is inverted dropout on that layer.

    Args:
        d: number of coordinates.
        p: probability of being kept, in (0, 1]: one for all units, or [U].
        groups: as in ``Sketch``.

    Raises:
        ValueError: probabilities outside (0, 1], or not one per unit.
    """

    p: float | Sequence[float] | Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        given = torch.as_tensor(self.p)
        if given.ndim > 0 and given.shape != (self.units,):
            raise ValueError(f"p must be a number or [{self.units}], got {list(given.shape)}")
        # Written so that NaN is refused, too.
        if not ((given > 0) & (given <= 1)).all():
            raise ValueError(f"p must be in (0, 1], got {given.tolist()}")

    @property
    def probabilities(self) -> Tensor:
        """[U] fp64."""
        return torch.as_tensor(self.p, dtype=torch.float64).cpu().expand(self.units)

    def _draw(self, generator: Generator, size: tuple[int, ...]) -> Tensor:
        p_U = self.probabilities.to(generator.device)
        return (_uniform((*size, self.units), generator) < p_U) / p_U

    def _second_moments(self) -> Tensor:
        return 1 / self.probabilities

    def _cross_moment(self) -> float:
        return 1.0

    def _largest_square(self) -> float:
        return float(self.probabilities.min()) ** -2


@dataclass(frozen=True, eq=False)
class RandK(Sketch):
    """A uniformly random set J of K units is kept.

        S = (U/K) sum_{u in J} e_u e_u^T
        E[S M S] = a M + (U/K - a) Diag(M),   a = U (K - 1) / (K (U - 1))
        L_D = mu_D = U/K,  L_S_max = (U/K)^2

    (U = d without groups; with them Diag stands for the units' diagonal blocks.)

    Args:
        d: number of coordinates.
        k: number of units kept, 1..U.
        groups: as in ``Sketch``.

    Raises:
        ValueError: k outside 1..U.
    """

    k: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.units:
            raise ValueError(f"k must be in 1..{self.units}, got {self.k}")

    def _draw(self, generator: Generator, size: tuple[int, ...]) -> Tensor:
        # A random permutation of 0..U-1 puts the numbers below K in a uniformly random set of
        # places.
        kept_U = _permutation((*size, self.units), generator) < self.k
        return kept_U * torch.tensor(self.units / self.k, dtype=torch.float64)

    def _second_moments(self) -> Tensor:
        return torch.full((self.units,), self.units / self.k, dtype=torch.float64)

    def _cross_moment(self) -> float:
        # With one unit there is no pair, and the value is never used.
        pairs = max(self.units - 1, 1)
        return self.units * (self.k - 1) / (self.k * pairs)

    def _largest_square(self) -> float:
        return (self.units / self.k) ** 2


@dataclass(frozen=True, eq=False)
class Perm(Sketch):
    """Perm-q, the sketches of independent subnet training: units are dealt out to n workers.

        C_i = n sum_{u in block i of a random permutation} e_u e_u^T,     (1/n) sum_i C_i = I
        E[C_i M C_i] = n Diag(M) + n kappa (M - Diag(M)),   kappa = (q - 1) / (U - 1),  U = n q
        L_D = mu_D = n,  L_S_max = n^2    of every C_i

    n need not divide U. With U = n q + r, the r units left over go to r random workers; so every
    worker is the same in distribution, E[C_i] = I, and kappa = q (U + r - n) / (U (U - 1)).
    Perm-1 is n = U: one coordinate each, kappa = 0.

    Args:
        d: number of coordinates.
        n: number of workers, 1..U.
        scale: what stands in the place of n before the sum; sqrt(n) is the preconditioned form's,
            whose E[C_i] is I / sqrt(n). Moments and constants follow it.
        groups: as in ``Sketch``.

    Raises:
        ValueError: n outside 1..U (a worker would have nothing to train), scale not positive.
    """

    n: int
    scale: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.n <= self.units:
            raise ValueError(f"n must be in 1..{self.units}, got {self.n}")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")

    @property
    def mean(self) -> float:
        """scale / n."""
        return self._scale / self.n

    @property
    def _scale(self) -> float:
        return float(self.n) if self.scale is None else self.scale

    def _draw(self, generator: Generator, size: tuple[int, ...]) -> Tensor:
        place_U = _permutation((*size, self.units), generator)
        # Places are dealt out in turn; which worker is the first (and gets a unit more if n does
        # not divide U) is random.
        turn_n = _permutation((*size, self.n), generator)
        owner_U = turn_n.gather(-1, place_U % self.n)
        kept_nU = owner_U[..., None, :] == torch.arange(self.n, device=owner_U.device)[:, None]
        return kept_nU * torch.tensor(self._scale, dtype=torch.float64)

    def _second_moments(self) -> Tensor:
        return torch.full((self.units,), self._scale**2 / self.n, dtype=torch.float64)

    def _cross_moment(self) -> float:
        q, r = divmod(self.units, self.n)
        # With one unit there is no pair, and the value is never used.
        pairs = self.units * max(self.units - 1, 1)
        return self._scale**2 / self.n * q * (self.units + r - self.n) / pairs

    def _largest_square(self) -> float:
        return self._scale**2


def _uniform(size: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64, device=generator.device)


def _permutation(size: tuple[int, ...], generator: Generator) -> Tensor:
    """Independent uniformly random permutations of 0..size[-1]-1."""
    return _uniform(size, generator).argsort(-1)
