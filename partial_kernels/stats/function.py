"""``masked_stats``: what the criteria of partial SGD are made of, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from partial_kernels._core.regions import EVERYTHING, selection
from partial_kernels.masks import Difference, Full, Mask, Prefix
from partial_kernels.stats.reference import STATS

__all__ = ["MaskedStats", "masked_stats"]


class MaskedStats(NamedTuple):
    """Per tensor, fp64 ``[n]``: p is its mask, g and g~ its two gradients."""

    masked_sq: Tensor
    """``|p g|^2``"""
    other_masked_sq: Tensor
    """``|p g~|^2``"""
    inner: Tensor
    """``<p g, p g~>``"""
    sq: Tensor
    """``|g|^2``"""


def masked_stats(
    grads: Sequence[Tensor],
    other_grads: Sequence[Tensor | None],
    masks: Sequence[Mask | None],
    *,
    impl: str = "auto",
) -> MaskedStats:
    """Squared norms and inner product of masked gradients: ``|pg|^2, |pg~|^2, <pg, pg~>, |g|^2``.

    Sums over a model are sums over the result. Elements outside a mask count in ``sq`` alone,
    whatever they hold. Accumulated in fp64; deterministic for one backend and thread count. Nothing
    waits for the device the gradients and masks are on; nothing is recorded by autograd.

    Args:
        grads: g, n floating-point tensors of any shapes and strides, on one device.
        other_grads: g~, of the same shapes; an entry whose mask is None is not read and may be
            None.
        masks: p; None keeps nothing of the tensor.
        impl: a backend by name (it runs or raises), or "auto": the fastest known for these
            arguments.

    Raises:
        ValueError, TypeError: the lists do not fit together.
        RuntimeError: the backend named by ``impl`` cannot run these arguments; the message says
            why.

    Source: the quantities of Theorem 1 of "Masked Training of Neural Networks with Partial
    Gradients" (AISTATS 2022).
    """
    _check(grads, other_grads, masks)
    if not grads:
        return MaskedStats(*torch.zeros(4, 0, dtype=torch.float64))
    with torch.no_grad():
        pieces = [
            (i, *piece)
            for i, (grad, other, mask) in enumerate(zip(grads, other_grads, masks, strict=True))
            for piece in _pieces(grad, other, mask)
        ]
        source, g, h, *selections = (list(column) for column in zip(*pieces, strict=True))
        return MaskedStats(*STATS(g, h, *selections, source, len(grads), impl))


def _pieces(grad: Tensor, other: Tensor | None, mask: Mask | None) -> list[tuple[Any, ...]]:
    """``(g, h, rows, cols, elements)`` of each piece of one tensor; h is None outside the mask."""
    if mask is None:
        return [(grad, None, *EVERYTHING)]
    if isinstance(mask, Prefix):
        outside = Difference(Full(), mask).views(grad) or []
        inside = (mask.restrict(grad), mask.restrict(cast(Tensor, other)), *EVERYTHING)
        return [inside, *((view, None, *EVERYTHING) for view in outside)]
    return [(grad, other, *selection(mask, grad))]


def _check(
    grads: Sequence[Tensor], other_grads: Sequence[Tensor | None], masks: Sequence[Mask | None]
) -> None:
    for name, given in (("other_grads", other_grads), ("masks", masks)):
        if len(given) != len(grads):
            raise ValueError(
                f"{name} must have one entry per gradient, {len(grads)}, got {len(given)}"
            )
    for i, (grad, other, mask) in enumerate(zip(grads, other_grads, masks, strict=True)):
        _check_grad(f"grads[{i}]", grad, grads[0].device)
        if mask is None:
            continue
        if not isinstance(mask, Mask):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"masks[{i}] must be a Mask or None, got {type(mask).__name__}")
        mask.check(grad.shape)
        _check_grad(f"other_grads[{i}]", other, grad.device)
        if cast(Tensor, other).shape != grad.shape:
            raise ValueError(
                f"other_grads[{i}] must have grads[{i}]'s shape {list(grad.shape)}, "
                f"got {list(cast(Tensor, other).shape)}"
            )


def _check_grad(name: str, grad: Tensor | None, device: torch.device) -> None:
    if not isinstance(grad, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(grad).__name__}")
    if grad.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided), got {grad.layout}")
    if not grad.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {grad.dtype}")
    if grad.device != device:
        raise ValueError(f"{name} must be on the device of grads[0], {device}, got {grad.device}")
