"""Where the largest elements of several tensors are, as masks and as a sub-network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from maskedtrain.subnetwork import SubNetwork
from partial_kernels import Mask, Packed, topk_select

__all__ = ["largest", "only"]


@torch.no_grad()
def largest(tensors: Sequence[Tensor], count: int) -> list[Packed]:
    """Where the ``count`` largest magnitudes of all the tensors are (at most all), in each; of
    equal ones the first.
    """
    if not tensors:
        return []
    values = torch.cat([tensor.flatten() for tensor in tensors])
    index = topk_select(values, min(count, len(values)))
    starts = [0, *accumulate(tensor.numel() for tensor in tensors)]
    # One question to the device for all.
    bounds = torch.searchsorted(index, torch.tensor(starts, device=index.device)).tolist()
    return [
        Packed(index[first:last] - start)
        for (first, last), start in zip(pairwise(bounds), starts, strict=False)
    ]


def only(model: nn.Module, masks: Mapping[nn.Parameter, Mask | None], name: str) -> SubNetwork:
    """The sub-network of these parameters' masks, of nothing else."""
    # All of a tied parameter's names need the same mask.
    names = model.named_parameters(remove_duplicate=False)
    return SubNetwork(model, {n: masks.get(parameter) for n, parameter in names}, name=name)
