"""The super-network and its cores, as ATS and slimmable training share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from maskedtrain.subnetwork import SubNetwork
from maskedtrain.surgery import lowrank

__all__ = ["CoreKind", "core_chain", "make_core"]

CoreKind = Literal["width", "lowrank"]


def make_core(
    model: nn.Module, kind: CoreKind, ratio: float, *, round_to: int, name: str = "core"
) -> SubNetwork:
    """A core of the model: the first ``ratio`` of its widths, or low-rank factors of rank ``ratio``
    in the layers that its ``lowrank_targets`` name.
    """
    if kind == "width":
        return SubNetwork.width(model, ratio, name=name, round_to=round_to)
    targets = getattr(model, "lowrank_targets", None)
    if targets is None:
        raise ValueError(
            f"{type(model).__name__} names no lowrank_targets: it has no low-rank core"
        )
    return lowrank(model, targets, ratio, name=name)


def core_chain(
    model: nn.Module, kind: CoreKind, ratios: Sequence[float], *, round_to: int
) -> list[SubNetwork]:
    """The super-network ``full``, then a core for each ratio: ``core``, ``core2``, ``core3`` ..."""
    if not ratios:
        raise ValueError("ratios must name at least one core")
    if any(not 0 < ratio < 1 for ratio in ratios) or len(set(ratios)) < len(ratios):
        raise ValueError(f"ratios must be different numbers in (0, 1), got {list(ratios)}")
    names = {ratio: f"core{i}" if i > 1 else "core" for i, ratio in enumerate(ratios, start=1)}
    # The largest first: the factors of a lower rank are part of its own.
    cores = {
        ratio: make_core(model, kind, ratio, round_to=round_to, name=names[ratio])
        for ratio in sorted(ratios, reverse=True)
    }
    return [SubNetwork.full(model), *(cores[ratio] for ratio in ratios)]
