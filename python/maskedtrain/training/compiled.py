"""``torch.compile`` for a model of which several networks are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["compiled"]


def compiled(model: nn.Module, networks: int, shapes: int | None) -> Callable[..., Any]:
    """The model's forward pass through ``torch.compile``, with room for a graph of each network.

    Args:
        model: the super-network.
        networks: how many networks it will be active as.
        shapes: how many shapes inputs have, where they are few: each gets a graph of its own.
            Where None, the second graph of a network takes any.
    """
    forward = torch.compile(model, dynamic=None if shapes is None else False)
    config = torch._dynamo.config
    # Beyond its limit (8) dynamo would run the model as it is.
    limit = networks * max(config.recompile_limit, shapes or 0)

    def call(*arguments: Any) -> Any:
        with config.patch(recompile_limit=limit):
            return forward(*arguments)

    return call
