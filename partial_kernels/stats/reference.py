"""Squared norms and inner products of masked gradients, accumulated in fp64: the specification.

With g a gradient, h the other gradient and p their mask, one column per tensor::

    |p g|^2, |p h|^2, <p g, p h>, |g|^2

A tensor comes in pieces, whose columns are added up; a piece without h lies outside the mask and
counts in |g|^2 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from partial_kernels._core.ops import Op
from partial_kernels._core.regions import SELECTION, read

Selections = Sequence[Tensor | None]


def _fake(grads: Sequence[Tensor], *args: Any) -> Tensor:
    *_, count, _ = args
    return grads[0].new_empty((4, count), dtype=torch.float64)


STATS = Op(
    "masked_stats(Tensor[] grads, Tensor?[] other_grads, "
    f"{SELECTION}, int[] source, int count, str impl) -> Tensor",
    fake=_fake,
)


@STATS.backend("reference")
def stats_reference(
    grads: Sequence[Tensor],
    other_grads: Selections,
    rows: Selections,
    cols: Selections,
    elements: Selections,
    source: Sequence[int],
    count: int,
) -> Tensor:
    out = grads[0].new_zeros((4, count), dtype=torch.float64)
    for grad, other, i, *where in zip(
        grads, other_grads, source, rows, cols, elements, strict=True
    ):
        g = grad.double()
        out[3, i] += (g * g).sum()
        if other is not None:
            pg, ph = _inside(g, *where), _inside(other.double(), *where)
            out[:3, i] += torch.stack([(pg * pg).sum(), (ph * ph).sum(), (pg * ph).sum()])
    return out


def _inside(
    tensor: Tensor, rows: Tensor | None, cols: Tensor | None, elements: Tensor | None
) -> Tensor:
    """The selected elements, perhaps with zeros for the others."""
    if elements is not None and elements.dtype == torch.bool:
        # tensor[elements] would wait for the device to say how many there are.
        return torch.where(elements, tensor, 0)
    return read(tensor, rows, cols, elements)
