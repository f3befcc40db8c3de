"""The chain of nested widths that ATS and slimmable training share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from maskedtrain.subnetwork import SubNetwork

__all__ = ["width_chain"]


def width_chain(model: nn.Module, ratios: Sequence[float], round_to: int) -> list[SubNetwork]:
    """The super-network ``full``, then a width core for each ratio: ``core``, ``core2``, ``core3``
    ...
    """
    if not ratios:
        raise ValueError("ratios must name at least one width")
    if any(not 0 < ratio < 1 for ratio in ratios) or len(set(ratios)) < len(ratios):
        raise ValueError(f"ratios must be different numbers in (0, 1), got {list(ratios)}")
    cores = [
        SubNetwork.width(model, ratio, name=f"core{i}" if i > 1 else "core", round_to=round_to)
        for i, ratio in enumerate(ratios, start=1)
    ]
    return [SubNetwork.full(model), *cores]
