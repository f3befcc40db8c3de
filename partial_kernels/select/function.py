"""``topk_select``: where the largest magnitudes are."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from partial_kernels.select.reference import SELECT

__all__ = ["Per", "topk_select"]

Per = Literal["row", "batch"]


def topk_select(x: Tensor, k: int, *, per: Per = "row", impl: str = "auto") -> Tensor:
    """Positions of the k largest magnitudes, ascending: of each row, or of whole columns.

    Exact, and the same from every backend and for every number of threads: NaN counts as larger
    than infinity, and of equal magnitudes those that come first are taken. Autograd records
    nothing.

    Args:
        x: ``[..., N]``, floating point.
        k: 0 to N.
        per: "row": the k largest ``|x|`` of each row. "batch": the k columns whose ``|x|``, summed
            in fp64 over all rows, are largest.
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments.

    Returns:
        int64, ``[..., k]`` for "row", ``[k]`` for "batch".

    Raises:
        ValueError: ``x``, ``k`` or ``per`` is none of these.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.

    Source: meProp, "meProp: Sparsified Back Propagation for Accelerated Deep Learning with Reduced
    Overfitting" (ICML 2017), section 3.
    """
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(
            f"x must be [..., N] and floating point, got {x.dtype} of shape {list(x.shape)}"
        )
    columns = x.shape[-1]
    if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= columns:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"k must be an int from 0 to the number of columns, {columns}, got {k!r}")
    if per not in ("row", "batch"):
        raise ValueError(f'per must be "row" or "batch", got {per!r}')
    by_column = per == "batch"
    with torch.no_grad():
        index = SELECT(x.reshape(math.prod(x.shape[:-1]), columns), k, by_column, impl)
    return index if by_column else index.reshape(*x.shape[:-1], k)
