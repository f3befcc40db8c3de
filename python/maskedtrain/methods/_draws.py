"""What methods that draw a network at each step have in common."""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["scaled", "seeded"]


def seeded(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on the device, of the key alone."""
    seed = random.Random(" ".join(map(str, key))).getrandbits(63)
    return torch.Generator(device).manual_seed(seed)


@contextmanager
def scaled(factors: Mapping[nn.Module, tuple[float, float]]) -> Generator[None]:
    """Within it, these layers multiply their inputs and outputs.

    Their classes change, as in ``maskedtrain.layers.zeroed``: torch.compile guards on classes, and
    would miss hooks that come and go.
    """
    plain = [(module, type(module)) for module in factors]
    try:
        for module, kind in plain:
            module.__class__ = _scaled_class(kind, *factors[module])
        yield
    finally:
        for module, kind in plain:
            module.__class__ = kind


# One class for the same factors: a new one at each step would make torch.compile start over.
@cache
def _scaled_class(plain: type[nn.Module], before: float, after: float) -> type[nn.Module]:
    def forward(self: Any, input: Tensor) -> Tensor:
        output = plain.forward(self, input if before == 1 else input * before)
        return output if after == 1 else output * after

    return type(plain.__name__, (plain,), {"forward": forward})
