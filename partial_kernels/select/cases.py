"""Rows that resemble each other and rows that do not; for speed, those of meProp."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from partial_kernels._core.contest import Bars, Contest
from partial_kernels._core.linear_cases import X_LAYOUTS, random_tensors
from partial_kernels._core.testing import Call
from partial_kernels.select.function import Per, topk_select

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

# T rows, N columns


def _special(x: Tensor) -> Tensor:
    """NaN of both signs, infinities, zeros of both signs and a subnormal, many times over."""
    values = x.new_tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, 1.0])
    return values[(x * 1000).long() % len(values)]


NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "ties": lambda x: x.mul(1.5).round().clamp(-3, 3),
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "relu-sparse": lambda x: torch.where(x > 1.9, x, 0),
    "scales": lambda x: x * 10.0 ** (x[..., :1] * 3).clamp(-6, 6),
    "heavy-tail": lambda x: x**7,
    "ascending": lambda x: x.abs().sort(-1).values,
    "special": _special,
}
"""What normal numbers are made into."""


@dataclass(frozen=True)
class Case:
    """Arguments of one call of ``topk_select``."""

    name: str
    shape: tuple[int, ...]
    k: int
    per: Per = "row"
    numbers: str = "normal"
    """A key of ``NUMBERS``."""
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    """A key of ``X_LAYOUTS``."""

    def make(self, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments for ``topk_select``; the same numbers on every device."""
        random = random_tensors(torch.float32, device, seed)

        def numbers(*shape: int) -> Tensor:
            return NUMBERS[self.numbers](random(*shape)).to(self.dtype)

        return {"x": X_LAYOUTS[self.layout](numbers, self.shape), "k": self.k, "per": self.per}


def exact(x: Tensor, k: int, per: Per) -> Tensor:
    """What ``topk_select`` must equal: rank by rank, in plain Python."""
    rows = x.reshape(-1, x.shape[-1]).abs().double()
    if per == "batch":
        rows = rows.sum(0, keepdim=True)

    def largest(row: list[float]) -> list[int]:
        def rank(i: int) -> tuple[bool, float, int]:
            return (not math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i)

        return sorted(sorted(range(len(row)), key=rank)[:k])

    listed: Any = cast("Any", rows).tolist()
    found = torch.tensor([largest(row) for row in listed], dtype=torch.int64)
    shape = (k,) if per == "batch" else (*x.shape[:-1], k)
    return found.reshape(shape)


def call(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """``topk_select``."""
    arguments = case.make(seed, device)
    return Call([arguments["x"]], lambda: [topk_select(**arguments, impl=impl)])


def check(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless exactly the right positions are found."""
    arguments = case.make(seed, device)
    found = topk_select(**arguments, impl=impl)
    expected = exact(**arguments)
    if found.dtype != torch.int64 or not torch.equal(found.cpu(), expected):
        raise AssertionError(f"{case.name}: got {found}, expected {expected}")


def flops(case: Case) -> int:
    """One comparison or addition for each number."""
    return math.prod(case.shape)


def bytes_moved(case: Case) -> int:
    """Bytes if x is read once."""
    found = case.k if case.per == "batch" else case.k * math.prod(case.shape[:-1])
    return case.dtype.itemsize * math.prod(case.shape) + 8 * found


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``."""
    names = "row-5%", "row-0.5%", "row-bf16", "batch-5%"
    chosen = [case for case in BENCH_CASES if case.name in names]
    meprop = Case("batch-meprop", (1024, 8192), 64, "batch", dtype=torch.bfloat16)
    smaller = (
        replace(case, shape=tuple(n // scale for n in case.shape), k=max(case.k // scale, 1))
        for case in (meprop, *chosen)
    )
    return [(case, {}) for case in smaller]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """Against torch's own selection, which sorts what it finds."""
    arguments = case.make(seed, device)
    x = arguments["x"]

    def ours() -> object:
        return [topk_select(**arguments, impl=impl)]

    def baseline() -> object:
        size = x.abs().sum(0) if case.per == "batch" else x.abs()
        return [size.topk(case.k).indices]

    return Contest(
        ours, {"abs().topk": baseline}, flops(case), bytes_moved(case), _BARS.get(case.name)
    )


_BASE = Case("", (9, 300), 20)
CASES = (
    *(replace(_BASE, name=f"row-{numbers}", numbers=numbers) for numbers in NUMBERS),
    *(
        replace(_BASE, name=f"batch-{numbers}", numbers=numbers, per="batch", k=37)
        for numbers in NUMBERS
    ),
    *(
        replace(_BASE, name=f"row-{numbers}-{str(dtype)[6:]}", numbers=numbers, dtype=dtype)
        for numbers in ("normal", "special", "ties")
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ),
    *(
        Case(f"{per}-{rows}x{columns}-{k}", (rows, columns), k, per)
        for per in ("row", "batch")
        for rows, columns in ((1, 1), (3, 17), (2, 64), (70, 5))
        for k in sorted({1, columns // 2 + 1, columns - 1, columns} - {0})
    ),
    Case("row-none", (3, 5), 0),
    Case("batch-none", (3, 5), 0, "batch"),
    Case("row-no-row", (0, 5), 2),
    Case("batch-no-row", (0, 5), 2, "batch"),
    Case("vector", (300,), 20),
    Case("3d", (2, 3, 40), 7),
    *(
        Case(f"{per}-{layout}", (2, 3, 40), 7, per, layout=layout)
        for per in ("row", "batch")
        for layout in ("permuted", "sliced", "expanded")
    ),
    Case("row-long", (1, 20_000), 300),
    Case("batch-bf16", (50, 300), 20, "batch", dtype=torch.bfloat16),
)

BENCH_CASES = (
    Case("row-5%", (4096, 2048), 102),
    Case("row-0.5%", (4096, 2048), 10),
    Case("row-narrow", (4096, 512), 26),
    *(
        Case(f"row-{numbers}", (4096, 2048), 102, numbers=numbers)
        for numbers in ("ties", "relu-sparse", "scales", "constant", "zero")
    ),
    Case("row-bf16", (4096, 2048), 102, dtype=torch.bfloat16),
    Case("batch-5%", (1024, 4096), 204, "batch"),
    Case("global-0.5%", (11_000_000,), 55_000),
)

_BARS = {
    "row-5%": 1 / 25,
    "row-0.5%": 1 / 10,
    "row-narrow": 1 / 10,
    "row-ties": 1 / 5,
    "row-relu-sparse": 1 / 5,
    "row-scales": 1 / 5,
    "row-constant": 1 / 2,
    "row-zero": 1 / 2,
}
