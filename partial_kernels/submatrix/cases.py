"""Prefix, Index and Full: odd sizes for correctness, half and quarter widths for speed."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from partial_kernels._core import linear_cases
from partial_kernels._core.contest import Bars, Contest
from partial_kernels._core.linear_cases import LinearCase as Case
from partial_kernels._core.linear_cases import bytes_moved, call, check, flops, variations
from partial_kernels.masks import Full, Index, Mask, Prefix

__all__ = [
    "BENCH_CASES",
    "CASES",
    "Case",
    "bytes_moved",
    "call",
    "check",
    "contest",
    "flops",
    "gpu_cases",
]

_SELECTIONS: dict[str, Mask] = {
    "prefix-rows": Prefix(rows=5),
    "prefix-cols": Prefix(cols=4),
    "prefix-one-row": Prefix(1, 4),
    "prefix-one-col": Prefix(5, 1),
    "prefix-no-row": Prefix(0, 4),
    "prefix-no-col": Prefix(5, 0),
    "prefix-nothing": Prefix(0, 0),
    "prefix-whole": Prefix(13, 11),
    "prefix-none": Prefix(),
    "index-rows": Index(rows=[2, 3, 12]),
    "index-cols": Index(cols=[0, 5, 10]),
    "index-one-row": Index([12], [0, 5, 10]),
    "index-one-col": Index([2, 3, 12], [10]),
    "index-no-row": Index([], [0, 5]),
    "index-no-col": Index([2, 3], []),
    "index-whole": Index(range(13), range(11)),
    "index-none": Index(),
}

CASES = (
    *variations("full", 13, 11, Full()),
    *variations("prefix", 13, 11, Prefix(5, 4)),
    *variations("index", 13, 11, Index([0, 2, 3, 9, 12], [1, 2, 7, 10])),
    *(Case(name, (7,), 13, 11, mask) for name, mask in _SELECTIONS.items()),
    # Sizes that vector units and tensor cores like, and long sums.
    Case("prefix-aligned", (64,), 80, 160, Prefix(32, 128)),
    Case("prefix-aligned-bf16", (64,), 80, 160, Prefix(32, 128), dtype=torch.bfloat16),
    Case("index-aligned", (64,), 80, 160, Index(range(16, 48), range(0, 160, 2))),
    Case(
        "index-aligned-bf16",
        (64,),
        80,
        160,
        Index(range(16, 48), range(0, 160, 2)),
        dtype=torch.bfloat16,
    ),
    Case("matrix-1x1", (3,), 1, 1, Prefix(1, 1)),
)


def _scattered(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(size, generator=generator)[:count].sort().values


_WIDTH = 2048

BENCH_CASES = tuple(
    Case(f"{kind}-{ratio}", (4096,), _WIDTH, _WIDTH, mask, bias=False)
    for ratio in (0.25, 0.5)
    for kind, mask in {
        "prefix": Prefix(int(ratio * _WIDTH), int(ratio * _WIDTH)),
        "index": Index(*[_scattered(int(ratio * _WIDTH), _WIDTH)] * 2),
    }.items()
)


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``, and what is promised there."""
    width = 4096 // scale
    base = Case("", (8192 // scale,), width, width, Full(), torch.bfloat16, bias=False)
    bars = {"gather, F.linear": 1.0, "F.linear": 1.03}
    return [
        (replace(base, name=f"{kind}-{ratio}", mask=mask), bars)
        for ratio in (0.5, 0.25, 0.75)
        for kind, mask in {
            "index": Index(*[_scattered(int(ratio * width), width)] * 2),
            "prefix": Prefix(int(ratio * width), int(ratio * width)),
        }.items()
    ]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """Against ``F.linear`` on a small contiguous weight that was gathered before; and against all
    that ours does, by hand: gathered in every step, a gradient of the whole weight's shape.
    """
    bar = 1.05 if isinstance(case.mask, Prefix) else 1.08
    made = linear_cases.contest(case, bar, device=device, impl=impl, seed=seed)
    arguments, dy = case.make(seed, device), case.dy(seed + 1, device)
    x, weight = arguments["x"], arguments["weight"]
    rows, cols = linear_cases.kept_indices(case.mask, weight)

    def gathering() -> object:
        small = case.mask.restrict(weight)
        y, dx, dsmall = F.linear(x, small), dy @ small, dy.mT @ x
        dweight = torch.zeros_like(weight)
        if isinstance(case.mask, Prefix):
            case.mask.restrict(dweight).copy_(dsmall)
        else:
            dweight[rows[:, None], cols] = dsmall
        return dx, dweight, y

    return replace(made, baselines={**made.baselines, "gather, F.linear": gathering})
