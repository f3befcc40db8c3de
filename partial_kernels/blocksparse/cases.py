"""Block masks: edges that cut blocks off, sizes from 1 up; for speed, 50 and 75 % zeros."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from partial_kernels._core import linear_cases
from partial_kernels._core.contest import Bars, Contest, Step
from partial_kernels._core.crossovers import Crossing, dtype_name
from partial_kernels._core.linear_cases import LinearCase as Case
from partial_kernels._core.linear_cases import bytes_moved, call, check, flops, variations
from partial_kernels.masks import Block

__all__ = [
    "BENCH_CASES",
    "CASES",
    "Case",
    "bytes_moved",
    "call",
    "check",
    "contest",
    "crossings",
    "flops",
    "gpu_cases",
]


def random_bitmap(rows: int, cols: int, share: float) -> Tensor:
    """Exactly this share of the blocks, rounded down."""
    generator = torch.Generator().manual_seed(0)
    bitmap = torch.zeros(rows * cols, dtype=torch.bool)
    bitmap[torch.randperm(rows * cols, generator=generator)[: int(share * rows * cols)]] = True
    return bitmap.view(rows, cols)


# An empty row of blocks, an empty column, and kept blocks that the edges cut off.
_RAGGED = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1], [0, 0, 1]], dtype=torch.bool)

CASES = (
    *variations("block", 13, 11, Block(_RAGGED, 4)),
    # Of the sizes that tensor cores take.
    *variations("block16", 61, 43, Block(_RAGGED, 16)),
    *(
        Case(
            f"block{size}-ragged-{name}",
            (9,),
            4 * size - 3,
            3 * size - 5,
            Block(_RAGGED, size),
            dtype,
        )
        for size in (16, 32, 64, 128)
        for name, dtype in {"fp32": torch.float32, "fp16": torch.float16}.items()
    ),
    Case("block16-none", (7,), 61, 43, Block(torch.zeros(4, 3, dtype=torch.bool), 16)),
    Case("block16-all", (7,), 61, 43, Block(torch.ones(4, 3, dtype=torch.bool), 16)),
    Case("block-none", (7,), 13, 11, Block(torch.zeros(4, 3, dtype=torch.bool), 4)),
    Case("block-all", (7,), 13, 11, Block(torch.ones(4, 3, dtype=torch.bool), 4)),
    Case("block-size-1", (7,), 4, 3, Block(_RAGGED, 1)),
    Case("block-beyond-edge", (7,), 13, 11, Block(torch.ones(1, 1, dtype=torch.bool), 32)),
    Case("block-permuted", (7,), 11, 13, Block(_RAGGED.mT, 4)),
    # Long sums.
    Case("block-long", (9,), 64, 4096, Block(random_bitmap(2, 128, 0.5), 32)),
    Case("block-long-of-few", (9,), 64, 4096, Block(random_bitmap(1, 3, 0.7), 1500)),
    Case("block-aligned", (64,), 96, 160, Block(random_bitmap(3, 5, 0.4), 32)),
    Case(
        "block-aligned-bf16",
        (64,),
        96,
        160,
        Block(random_bitmap(3, 5, 0.4), 32),
        dtype=torch.bfloat16,
    ),
)

BENCH_CASES = tuple(
    Case(
        f"block{size}-{zeros}-zeros",
        (4096,),
        2048,
        2048,
        Block(random_bitmap(2048 // size, 2048 // size, 1 - zeros), size),
        bias=False,
    )
    for size in (32, 64)
    for zeros in (0.75, 0.5)
)


_PROMISED = {(128, 0.25): 1 / 2.2, (64, 0.2): 1 / 1.6, (32, 0.1): 1 / 1.2}


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``, and what is promised there; densities
    without a promise show where the dense product becomes faster.
    """

    def case(size: int, density: float) -> Case:
        blocks, small = 4096 // size, max(size // scale, 1)
        mask, width = Block(random_bitmap(blocks, blocks, density), small), blocks * small
        name = f"block{size}-{density}"
        return Case(name, (8192 // scale,), width, width, mask, torch.bfloat16, bias=False)

    sizes = {128: (0.1, 0.4, 0.6), 64: (0.1, 0.4, 0.6), 32: (0.05, 0.2, 0.4), 16: (0.05, 0.1)}
    others = [(size, density) for size, densities in sizes.items() for density in densities]
    promised: list[tuple[Case, Bars]] = [
        (case(*key), {"F.linear": bar}) for key, bar in _PROMISED.items()
    ]
    return [*promised, *((case(*key), {}) for key in others)]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """Against the dense layer, of whose time it may take 1.2 times the share of active blocks."""
    share = case.mask.numel(case.shape) / (case.outputs * case.inputs)
    return linear_cases.contest(case, 1.2 * share, device=device, impl=impl, seed=seed)


def crossings(device: str, scale: int = 1) -> list[Crossing]:
    """Where the dense layer becomes faster, by size of the blocks and dtype; sizes divided by
    ``scale``.
    """
    gpu = device == "cuda"
    backend = "triton" if gpu else "native"
    width, tokens = (4096 // scale, 8192 // scale) if gpu else (1024 // scale, 1024 // scale)

    def steps(size: int, dtype: torch.dtype, density: float) -> tuple[Step, Step]:
        blocks = width // size
        mask = Block(random_bitmap(blocks, blocks, density), size)
        case = Case("", (tokens,), width, width, mask, dtype, bias=False)
        ours, dense = (
            contest(case, device=device, impl=impl).ours for impl in (backend, "reference")
        )
        return ours, dense

    return [
        Crossing(
            f"blocksparse {backend} {size} {dtype_name(dtype)}",
            (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0),
            partial(steps, size, dtype),
        )
        for size in ((16, 32, 64, 128) if gpu else (8, 16, 32, 64, 128))
        if size <= width
        for dtype in ((torch.bfloat16, torch.float16, torch.float32) if gpu else (torch.float32,))
    ]
