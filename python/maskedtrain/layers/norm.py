"""``SwitchNorm``: batch norm that follows the sub-network's channels, with statistics of its own if
asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain.layers.base import Copier, MaskedModule
from partial_kernels import Full, Index, Mask

__all__ = ["SwitchNorm"]


class SwitchNorm(MaskedModule, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` for a network trained at several widths.

    Without an active sub-network it is ``nn.BatchNorm2d``, bit for bit, with the same
    ``state_dict`` keys. ``add_branch("core", mask)`` gives the sub-network named ``core`` a batch
    norm of its own, over the channels the mask keeps: weight, bias and running statistics apart
    from every other's, as ATS and slimmable training need (one width's statistics are wrong for
    another). A sub-network without a branch uses the part of the weight, bias and running
    statistics that its mask of ``weight`` keeps.

    Args: those of ``nn.BatchNorm2d``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.branches = nn.ModuleDict()

    def add_branch(self, subnet: str, mask: Mask) -> None:
        """Give a sub-network its own batch norm over the kept channels, starting as a copy of this
        one.

        Call it before the optimizer is made: the branch has parameters of its own.
        """
        if subnet in self.branches:
            raise ValueError(f"there is a branch {subnet!r} already")
        if not re.fullmatch(r"\w[\w-]*", subnet):
            raise ValueError(f"a sub-network with its own norm needs a plain name, got {subnet!r}")
        if hasattr(self.branches, subnet):
            raise ValueError(f"{subnet!r} is a name that nn.ModuleDict uses; name it otherwise")
        if not mask.compact:
            raise ValueError(f"a branch is over channels (Full, Prefix, Index), got {mask}")
        mask.check((self.num_features,))
        self.branches[subnet] = _plain_norm(self, Copier(share=False), mask, mask)

    def foreign_parameters(self, subnet: str) -> Iterable[str]:
        if subnet in self.branches:
            yield from (name for name, _ in self.named_parameters(recurse=False))
        for other, branch in self.branches.items():
            if other != subnet:
                yield from (f"branches.{other}.{name}" for name, _ in branch.named_parameters())

    def forward(self, input: Tensor) -> Tensor:
        if self.active is None:
            return super().forward(input)
        if self.active.subnet in self.branches:
            return self.branches[self.active.subnet](input)
        return self._forward_part(input)

    def _forward_part(self, input: Tensor) -> Tensor:
        """Batch norm over the channels that the mask of ``weight`` keeps."""
        self._check_input_dim(input)
        mask = self._channels()
        updates = self.training and self.track_running_stats
        stats = (self.running_mean, self.running_var)
        if self.training and not updates:
            stats = (None, None)
        mean, var = (None if stat is None else mask.restrict(stat) for stat in stats)
        factor = 0.0 if self.momentum is None else self.momentum
        if updates and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        use_batch = self.training or mean is None
        weight, bias = self.part("weight"), self.part("bias")
        if weight is None and self.affine:
            # To batch_norm no weight is a weight of 1.
            weight = torch.zeros_like(self.weight)
        y = F.batch_norm(input, mean, var, weight, bias, use_batch, factor, self.eps)
        rows = mask.on(input.device, "rows") if updates and isinstance(mask, Index) else None
        if rows is not None:
            # A Prefix part is a view, updated in place; an Index part is a copy to be put back.
            for stat, part in zip(stats, (mean, var), strict=True):
                if stat is not None and part is not None:
                    stat.index_copy_(0, rows, part)
        return y

    def _channels(self) -> Mask:
        """The mask of the running statistics: that of ``weight`` if it is compact, else all
        channels.
        """
        return _compact(self.active.masks.get("weight") if self.active else None)

    def plain(
        self, masks: Mapping[str, Mask | None], subnet: str, copier: Copier
    ) -> nn.BatchNorm2d:
        if subnet in self.branches:
            branch = cast(nn.BatchNorm2d, self.branches[subnet])
            return _plain_norm(branch, copier, Full(), Full())
        return _plain_norm(self, copier, masks.get("weight"), masks.get("bias"))


def _compact(mask: Mask | None) -> Mask:
    return mask if mask is not None and mask.compact else Full()


def _plain_norm(
    norm: nn.BatchNorm2d, copier: Copier, weight: Mask | None, bias: Mask | None
) -> nn.BatchNorm2d:
    """A plain batch norm over the channels that ``weight`` keeps, with the values of ``norm``."""
    channels = _compact(weight)
    kept = channels.restricted_shape((norm.num_features,))[0]
    plain = nn.BatchNorm2d(
        kept, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    if norm.affine:
        plain.weight = copier.parameter(norm.weight, weight)
        plain.bias = copier.bias(norm.bias, bias)  # pyright: ignore[reportAttributeAccessIssue]
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(plain, name, copier.tensor(buffer, channels if buffer.ndim else Full()))
    return plain.train(norm.training)
