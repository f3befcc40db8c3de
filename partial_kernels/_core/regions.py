"""How ops over lists of tensors are told which elements of each tensor they work on.

A mask made of boxes (Full, Prefix, what one of them adds to another) becomes strided views, every
element of which takes part. For any other mask an op gets the whole tensor and one of three
selections: ``rows`` and/or ``cols`` (int64, the indices kept of dimensions 0 and 1), ``elements``
of dtype bool (the tensor's shape, True inside) or ``elements`` of dtype int64 (flat positions in
row-major order).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from partial_kernels._core.derived import derived
from partial_kernels.masks import Full, Index, Mask, Packed

__all__ = ["EVERYTHING", "SELECTION", "Selection", "read", "regions", "selection", "split", "write"]

Selection = tuple[Tensor | None, Tensor | None, Tensor | None]

SELECTION = "Tensor?[] rows, Tensor?[] cols, Tensor?[] elements"
"""The selections of a list of tensors, in an op's schema."""

EVERYTHING: Selection = (None, None, None)


def regions(mask: Mask, tensors: Sequence[Tensor]) -> list[tuple[list[Tensor], Selection]]:
    """``(pieces, selection)``, one piece of each tensor, that together hold the mask's elements.

    The tensors have one shape and live on one device.
    """
    first, *others = tensors
    if isinstance(mask, Full) or (of_first := mask.views(first)) is None:
        return [(list(tensors), selection(mask, first))]
    views = [of_first, *(mask.views(tensor) for tensor in others)]
    return [(list(pieces), EVERYTHING) for pieces in zip(*views, strict=True)]  # pyright: ignore[reportArgumentType]


def selection(mask: Mask, tensor: Tensor) -> Selection:
    """The mask's elements as a selection from the whole tensor, on its device."""
    if isinstance(mask, Full):
        return EVERYTHING
    if isinstance(mask, Index):
        return mask.on(tensor.device, "rows"), mask.on(tensor.device, "cols"), None
    if isinstance(mask, Packed):
        return None, None, mask.on(tensor.device, "index")
    return None, None, mask.laid_out(tensor.shape, tensor.device)


def split(
    masks: Sequence[Mask], *lists: Sequence[Tensor]
) -> tuple[list[int], list[list[Tensor]], tuple[list[Tensor | None], ...]]:
    """The regions of every tensor of the lists, as the arguments of one op.

    Returns ``source, pieces, selections``: piece j of each list comes from its entry ``source[j]``.
    """
    source: list[int] = []
    pieces: list[list[Tensor]] = [[] for _ in lists]
    selections: tuple[list[Tensor | None], ...] = ([], [], [])
    for i, mask in enumerate(masks):
        for tensors, selected in regions(mask, [tensors[i] for tensors in lists]):
            source.append(i)
            for column, piece in zip(pieces, tensors, strict=True):
                column.append(piece)
            for column, index in zip(selections, selected, strict=True):
                column.append(index)
    return source, pieces, selections


def _countable(elements: Tensor | None) -> Tensor | None:
    """On a device, a mask as positions: else every use would wait to learn how many there are."""
    if elements is None or elements.dtype != torch.bool or elements.is_cpu:
        return elements
    return derived(elements, "positions", lambda: elements.flatten().nonzero().flatten())


def read(
    tensor: Tensor, rows: Tensor | None, cols: Tensor | None, elements: Tensor | None
) -> Tensor:
    """The selected elements: the tensor itself where all of it is, else a copy."""
    elements = _countable(elements)
    if elements is not None:
        return tensor[elements] if elements.dtype == torch.bool else tensor.take(elements)
    if rows is not None:
        tensor = tensor.index_select(0, rows)
    return tensor if cols is None else tensor.index_select(1, cols)


def write(
    tensor: Tensor,
    values: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    elements: Tensor | None,
) -> None:
    """Store what ``read`` gave, after changes, and nothing else."""
    if values is tensor:
        return
    elements = _countable(elements)
    values = values.to(tensor.dtype)
    if elements is not None and elements.dtype == torch.bool:
        tensor[elements] = values
    elif elements is not None:
        # Tensor.put_ would do, but has no deterministic form.
        vector = tensor.view(1) if tensor.ndim == 0 else tensor
        vector[torch.unravel_index(elements, vector.shape)] = values
    elif rows is not None and cols is not None:
        tensor[rows[:, None], cols] = values
    elif rows is not None:
        tensor.index_copy_(0, rows, values)
    elif cols is not None:
        tensor.index_copy_(1, cols, values)
    else:
        tensor.copy_(values)
