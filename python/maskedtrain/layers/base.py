"""What layers that know about sub-networks have in common."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partial_kernels import Full, Index, Mask, Prefix

__all__ = ["Active", "MaskedModule", "row_mask"]


@dataclass(frozen=True)
class Active:
    """The sub-network a module computes with: its name and the mask of each of the module's
    parameters; with None those of its ``droppable()`` children that are left out.

    ``implied`` are the names of parameters whose mask is the one that the module implies for them.
    """

    subnet: str
    masks: Mapping[str, Mask | None]
    implied: frozenset[str]


class MaskedModule(nn.Module):
    """A module that computes with the active sub-network's part of its parameters alone.

    ``SubNetwork.activate()`` sets ``active``; with None the module is its plain ``torch.nn``
    parent.
    """

    active: Active | None = None

    def implied_masks(self, masks: Mapping[str, Mask | None]) -> dict[str, Mask | None]:
        """Masks that follow from those of other parameters: a bias follows its weight's rows."""
        if getattr(self, "bias", None) is None:
            return {}
        return {"bias": row_mask(masks.get("weight", Full()))}

    def foreign_parameters(self, subnet: str) -> Iterable[str]:
        """Names of this module's parameters that belong to other sub-networks alone."""
        return ()

    def part(self, name: str) -> Tensor | None:
        """A parameter as the active sub-network sees it; None where it does not exist or is
        outside.
        """
        tensor = getattr(self, name)
        if tensor is None or self.active is None:
            return tensor
        mask = self.active.masks[name]
        return None if mask is None else mask.restrict(tensor)

    def droppable(self) -> Mapping[str, nn.Module]:
        """Children by name that are not called where a sub-network has nothing of them; its
        ``active.masks`` then have None by that name.
        """
        return {}

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Module:
        """The ``torch.nn`` module that computes what this one does with the sub-network active."""
        raise NotImplementedError


class Copier:
    """Makes the tensors of an extracted module: copies, or views onto the super-network's storage.

    A parameter gets one copy, so that tied ones stay tied. ``memo`` is ``copy.deepcopy``'s: what
    takes the place of a module or tensor, by its id.
    """

    def __init__(self, *, share: bool) -> None:
        self.share = share
        self.memo: dict[int, Any] = {}
        self._made: dict[tuple[int, Mask | None], nn.Parameter] = {}

    def tensor(self, source: Tensor, mask: Mask | None) -> Tensor:
        """The part of a tensor that the mask keeps; zeros for None."""
        source = source.detach()
        if mask is None:
            return torch.zeros_like(source)
        part = mask.restrict(source)
        return part if self.share else part.clone()

    def parameter(self, source: Tensor, mask: Mask | None) -> nn.Parameter:
        """The part of a parameter that the mask keeps; what is outside is not trained."""
        key = (id(source), mask)
        if key not in self._made:
            trained = source.requires_grad and mask is not None
            self._made[key] = nn.Parameter(self.tensor(source, mask), trained)
        return self._made[key]

    def module(self, source: nn.Module) -> nn.Module:
        """The module, with what takes the place of all that is in the memo."""
        return copy.deepcopy(source, self.memo)

    def bias(self, source: Tensor | None, mask: Mask | None) -> nn.Parameter | None:
        """As ``parameter``, but None where it does not exist or is outside."""
        return None if source is None or mask is None else self.parameter(source, mask)


def row_mask(mask: Mask | None) -> Mask | None:
    """The mask of a vector that follows the rows of a parameter with this mask."""
    if isinstance(mask, Prefix):
        return Full() if mask.rows is None else Prefix(mask.rows)
    if isinstance(mask, Index):
        return Full() if mask.rows is None else Index(mask.rows)
    return None if mask is None else Full()
