"""The super-network and its cores, as ATS and slimmable training share them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from maskedtrain.subnetwork import SubNetwork
from maskedtrain.surgery import lowrank

__all__ = ["CoreKind", "core_chain", "make_core"]

CoreKind = Literal["width", "lowrank", "part"]


def make_core(
    model: nn.Module, kind: CoreKind, ratio: float, *, round_to: int, name: str = "core"
) -> SubNetwork:
    """A core of the model: the first ``ratio`` of its widths, low-rank factors of rank ``ratio`` in
    the layers that its ``lowrank_targets`` name, or all but the parameters that its ``extension``
    names.
    """
    if kind == "width":
        return SubNetwork.width(model, ratio, name=name, round_to=round_to)
    if kind == "part":
        extension = _named(model, "extension", "core that is a part of it")
        return SubNetwork.full(model).without(extension, name=name)
    targets = _named(model, "lowrank_targets", "low-rank core")
    return lowrank(model, targets, ratio, name=name)


def _named(model: nn.Module, attribute: str, core: str) -> Sequence[str]:
    """The patterns of names that the model has for a kind of core."""
    patterns = getattr(model, attribute, None)
    if patterns is None:
        raise ValueError(f"{type(model).__name__} names no {attribute}: it has no {core}")
    return patterns


def core_chain(
    model: nn.Module, kind: CoreKind, ratios: Sequence[float], *, round_to: int
) -> list[SubNetwork]:
    """The super-network ``full``, then a core for each ratio: ``core``, ``core2``, ``core3`` ...

    There is one core that is a part, whatever the ratio.
    """
    if not ratios:
        raise ValueError("ratios must name at least one core")
    if any(not 0 < ratio < 1 for ratio in ratios) or len(set(ratios)) < len(ratios):
        raise ValueError(f"ratios must be different numbers in (0, 1), got {list(ratios)}")
    if kind == "part" and len(ratios) > 1:
        raise ValueError(f"a model has one core that is a part of it, got ratios {list(ratios)}")
    names = {ratio: f"core{i}" if i > 1 else "core" for i, ratio in enumerate(ratios, start=1)}
    # The largest first: the factors of a lower rank are part of its own.
    cores = {
        ratio: make_core(model, kind, ratio, round_to=round_to, name=names[ratio])
        for ratio in sorted(ratios, reverse=True)
    }
    return [SubNetwork.full(model), *(cores[ratio] for ratio in ratios)]
