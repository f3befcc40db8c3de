"""``Sum``: networks whose outputs add up, of which a sub-network may leave some out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule
from partial_kernels import Mask

__all__ = ["Sum"]


class Sum(MaskedModule):
    """``y = first(x) + second(x) + ...``: branches that get the same arguments.

    A sub-network that has every parameter of a branch outside leaves the branch out: it is not
    called, costs nothing and keeps its buffers (running statistics), and no extracted module has
    it. A branch without parameters always runs. Within a branch sub-networks are what they are
    elsewhere.

    The sum of any two networks is a super-network for ATS, with one of them as its core; in the
    place of a layer it is a layer-wise sum (see ``maskedtrain.layerwise_sum``).

    Args:
        branches: modules that give tensors of the same shape, called "0", "1", ... as in
            ``nn.Sequential``.
        named: further ones, called as they are named here.

    Source: section 3.4 of "Masked Training of Neural Networks with Partial Gradients" (AISTATS
    2022).

    Example:
        >>> model = Sum(deep=resnet, wide=nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)))
        >>> full = SubNetwork.full(model)
        >>> method = ATS([full, full.without(["wide.*"], name="core")])
    """

    def __init__(self, *branches: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        if not branches and not named:
            raise ValueError("a sum needs at least one branch")
        for name, branch in {**{str(i): b for i, b in enumerate(branches)}, **named}.items():
            self.add_module(name, branch)

    @property
    def branches(self) -> dict[str, nn.Module]:
        """The branches by name."""
        return {name: branch for name, branch in self._modules.items() if branch is not None}

    def droppable(self) -> dict[str, nn.Module]:
        return self.branches

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        kept = self._kept(self.active.masks if self.active else {})
        return reduce(_add, (branch(*args, **kwargs) for branch in kept.values()))

    def _kept(self, masks: Mapping[str, Mask | None]) -> dict[str, nn.Module]:
        kept = {name: branch for name, branch in self.branches.items() if name not in masks}
        if not kept:
            raise ValueError(f"the sub-network leaves out every branch: {', '.join(self.branches)}")
        return kept

    def plain(self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier) -> nn.Module:
        kept = {name: copier.module(branch) for name, branch in self._kept(masks).items()}
        if len(kept) == 1:
            return next(iter(kept.values()))
        plain = Sum(**kept)
        plain.training = self.training
        return plain


def _add(first: Tensor, second: Tensor) -> Tensor:
    # Broadcasting would hide a mistake.
    if first.shape != second.shape:
        raise ValueError(
            f"branches must give tensors of one shape, got {list(first.shape)} and "
            f"{list(second.shape)}"
        )
    return first + second
