"""The quantities of ``maskedtrain.theory.criteria``, of given gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import partial_kernels as pk
from partial_kernels import Mask

__all__ = ["Criteria", "criteria"]


@dataclass(frozen=True)
class Criteria:
    """Squared norms and the inner product that the quantities are made of."""

    masked_sq: float
    """``|p g|^2``"""
    other_masked_sq: float
    """``|p g~|^2``"""
    inner: float
    """``<p g, p g~>``"""
    sq: float
    """``|g|^2``"""
    displacement_sq: float = 0.0
    """``|dx|^2``"""

    @property
    def alpha(self) -> float:
        """``min(1, <p g, p g~> / |p g~|^2)``, in [0, 1]: 0 where g~ points the wrong way."""
        return min(max(_ratio(self.inner, self.other_masked_sq), 0.0), 1.0)

    @property
    def c_norm(self) -> float:
        """``|g| / |p g|``, >= 1."""
        return _ratio(math.sqrt(self.sq), math.sqrt(self.masked_sq))

    @property
    def c_sim(self) -> float:
        """``|p g| / |p g~|``."""
        return _ratio(math.sqrt(self.masked_sq), math.sqrt(self.other_masked_sq))

    @property
    def c_align(self) -> float:
        """``|p g| |p g~| / <p g, p g~>``, >= 1: one by the cosine; infinite where it is not
        positive.
        """
        return _ratio(math.sqrt(self.masked_sq * self.other_masked_sq), max(self.inner, 0.0))

    @property
    def q(self) -> float:
        """``c_norm max(c_sim, c_align)``, which is ``|g| / (alpha |p g~|)``."""
        return self.c_norm * max(self.c_sim, self.c_align)

    @property
    def drift(self) -> float:
        """``|dx| / max(|p g|, |p g~|)``."""
        largest = max(self.masked_sq, self.other_masked_sq)
        return _ratio(math.sqrt(self.displacement_sq), math.sqrt(largest))

    def assumption3(self, smoothness: float) -> bool:
        """Whether ``drift < 1 / (2 L)``, for gradients that are L-Lipschitz."""
        return self.drift < 1 / (2 * smoothness)

    def quantities(self) -> dict[str, float]:
        """All of them but Assumption 3's verdict, by name."""
        names = ("alpha", "c_norm", "c_sim", "c_align", "q", "drift")
        return {name: getattr(self, name) for name in names}

    def __add__(self, other: Criteria) -> Criteria:
        """Of two sets of parameters together."""
        return Criteria(
            self.masked_sq + other.masked_sq,
            self.other_masked_sq + other.other_masked_sq,
            self.inner + other.inner,
            self.sq + other.sq,
            self.displacement_sq + other.displacement_sq,
        )


def criteria(
    grads: Sequence[Tensor],
    other_grads: Sequence[Tensor | None],
    masks: Sequence[Mask | None],
    displacement_sq: Sequence[float] | None = None,
) -> list[Criteria]:
    """Criteria of each tensor; their sum is that of all.

    Args:
        grads: g.
        other_grads: g~; not read where the mask is None.
        masks: p; None keeps nothing.
        displacement_sq: ``|dx|^2`` of each; 0 where not given.

    Raises:
        ValueError, TypeError: the lists do not fit together, as ``partial_kernels.masked_stats``.
    """
    moved = displacement_sq or [0.0] * len(grads)
    if len(moved) != len(grads):
        raise ValueError(
            f"displacement_sq must have one entry per gradient, {len(grads)}, got {len(moved)}"
        )
    # One transfer for all.
    sums = torch.stack(pk.masked_stats(grads, other_grads, masks))
    columns: list[list[float]] = cast("Any", sums.T).tolist()
    return [
        Criteria(masked, other, inner, whole, sq)
        for (masked, other, inner, whole), sq in zip(columns, moved, strict=True)
    ]


def _ratio(a: float, b: float) -> float:
    """a / b; 1 where both are 0, as if nothing were lost."""
    if b == 0:
        return 1.0 if a == 0 else math.inf
    return a / b
