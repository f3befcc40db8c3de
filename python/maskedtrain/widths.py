"""The widths of a model's layers that sub-networks may cut, and how much of them is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from maskedtrain.patterns import matching_names
from partial_kernels import Index, Mask, Prefix

__all__ = ["Kept", "Ratios", "Width", "active_count", "region", "width_masks", "widths_of"]

Width = int | Tensor | None
"""Channels or neurons that are kept: the first so many, those at sorted int64 positions, or all."""

Kept = Callable[[str, int], Width]
"""``kept(name, total)``: what a sub-network keeps of a width."""


def widths_of(model: nn.Module) -> dict[str, int]:
    """The hidden widths that sub-networks of a model may cut, and how many neurons or channels each
    has.

    Raises:
        TypeError: the model has no ``width_masks(kept)``.
    """
    found: dict[str, int] = {}

    def note(name: str, total: int) -> None:
        found[name] = total

    width_masks(model, note)
    return found


def width_masks(model: nn.Module, kept: Kept) -> dict[str, Mask | None]:
    """What a model's ``width_masks(kept)`` gives; TypeError if it has none."""
    if not hasattr(model, "width_masks"):
        raise TypeError(
            f"{type(model).__name__} has no width_masks(kept); name the masks yourself: "
            "SubNetwork(model, {parameter name: mask}, name=...)"
        )
    return dict(model.width_masks(kept))  # pyright: ignore[reportCallIssue]


def region(rows: Width, cols: Width = None) -> Mask:
    """The mask of a layer's kept rows and columns."""
    if isinstance(rows, Tensor) or isinstance(cols, Tensor):
        ends = (torch.arange(n) if isinstance(n, int) else n for n in (rows, cols))
        return Index(*ends)
    return Prefix(rows, cols)


class Ratios:
    """``kept(name, total)`` from ratios by pattern of the name."""

    def __init__(self, ratios: Mapping[str, float], round_to: int) -> None:
        self.ratios = ratios
        self.round_to = round_to
        self.names: list[str] = []

    def __call__(self, name: str, total: int) -> int:
        self.names.append(name)
        matching = (ratio for pattern, ratio in self.ratios.items() if fnmatchcase(name, pattern))
        return active_count(total, next(matching, 1.0), self.round_to)

    def check_used(self) -> None:
        """Raise ValueError if a pattern matched no width."""
        matching_names("ratio", list(self.ratios), dict.fromkeys(self.names), "width")


def active_count(total: int, ratio: float, round_to: int = 16) -> int:
    """How many of ``total`` a width of ``ratio`` keeps: ``ratio * total``, to a multiple of
    ``round_to``.

    Odd counts make matrix products several times slower on GPUs. Where the multiple would leave
    nothing or, for a ratio under 1, everything, smaller multiples are tried: 8, 4, 2, 1 from 16.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if round_to < 1:
        raise ValueError(f"round_to must be >= 1, got {round_to}")
    if ratio == 1:
        return total
    multiple = round_to
    while multiple > 1:
        count = round(total * ratio / multiple) * multiple
        if 0 < count < total:
            return count
        multiple //= 2
    return max(1, round(total * ratio))
