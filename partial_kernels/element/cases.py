"""Element and Packed masks, from empty to full; for speed, the densities of fixed sparse masks."""

from __future__ import annotations

import torch
from torch import Tensor

from partial_kernels._core.linear_cases import LinearCase as Case
from partial_kernels._core.linear_cases import (
    bytes_moved,
    call,
    check,
    contest,
    flops,
    variations,
)
from partial_kernels.masks import Element, Packed

__all__ = ["BENCH_CASES", "CASES", "Case", "bytes_moved", "call", "check", "contest", "flops"]


def _random_mask(outputs: int, inputs: int, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(outputs, inputs, generator=generator) < density


_CORNERS = torch.zeros(13, 11, dtype=torch.bool)
_CORNERS[0, 0] = _CORNERS[12, 10] = True

_MASKS = {
    "none": torch.zeros(13, 11, dtype=torch.bool),
    "all": torch.ones(13, 11, dtype=torch.bool),
    "corners": _CORNERS,
    "permuted": _random_mask(11, 13, 0.5).mT,
    "sliced": _random_mask(13, 22, 0.5)[:, ::2],
}

CASES = (
    *variations("element", 13, 11, Element(_random_mask(13, 11, 0.4))),
    *variations("packed", 13, 11, Packed([0, 1, 12, 54, 100, 142])),
    *(Case(f"element-{name}", (7,), 13, 11, Element(mask)) for name, mask in _MASKS.items()),
    Case("packed-none", (7,), 13, 11, Packed([])),
    Case("packed-all", (7,), 13, 11, Packed(range(13 * 11))),
    Case("element-aligned", (64,), 80, 160, Element(_random_mask(80, 160, 0.05))),
    Case(
        "element-aligned-bf16",
        (64,),
        80,
        160,
        Element(_random_mask(80, 160, 0.05)),
        dtype=torch.bfloat16,
    ),
)

BENCH_CASES = tuple(
    Case(
        f"element-{density}",
        (4096,),
        2048,
        2048,
        Element(_random_mask(2048, 2048, density)),
        bias=False,
    )
    for density in (0.005, 0.05, 0.5)
)
