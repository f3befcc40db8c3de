"""Prefix, Index and Full: odd sizes for correctness, half and quarter widths for speed."""

from __future__ import annotations

import torch

from partial_kernels._core import linear_cases
from partial_kernels._core.contest import Contest
from partial_kernels._core.linear_cases import LinearCase as Case
from partial_kernels._core.linear_cases import bytes_moved, check, flops, variations
from partial_kernels.masks import Full, Index, Mask, Prefix

__all__ = ["BENCH_CASES", "CASES", "Case", "bytes_moved", "check", "contest", "flops"]

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


def contest(case: Case) -> Contest:
    """Against ``F.linear`` on a small contiguous weight that was gathered before."""
    return linear_cases.contest(case, bar=1.05 if isinstance(case.mask, Prefix) else 1.08)
