"""Which layers are timed: every kind of mask, at densities where it should pay and where not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch

from maskedtrain.benchmark.layers import LayerCase
from partial_kernels._core.linear_cases import LinearCase
from partial_kernels.blocksparse.cases import random_bitmap
from partial_kernels.lfc.cases import Case as LFCCase
from partial_kernels.masks import Block, Element, Index, Mask, Prefix
from partial_kernels.packed.cases import Case as PackedCase
from partial_kernels.topk.cases import Case as TopKCase

__all__ = ["PAPER_SPEEDUPS", "PAPER_WIDTH", "Size", "default_sizes", "layer_cases", "meprop_sweep"]

# O outputs, I inputs, K rank

PAPER_WIDTH = 8192
PAPER_SPEEDUPS = {8: 36.8, 16: 33.6, 32: 27.5, 64: 21.4, 128: 14.5, 256: 8.0, 512: 4.4}
"""By k, how many times as fast as the dense backward meProp's was on a GPU of 2017: h = 8192,
mini-batches of 1024 (Sun et al., ICML 2017)."""


@dataclass(frozen=True)
class Size:
    """A weight ``[outputs, inputs]`` and how many tokens go through it."""

    outputs: int
    inputs: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """``OxI:T``; ValueError for anything else."""
        found = re.fullmatch(r"(\d+)x(\d+):(\d+)", text)
        if found is None:
            raise ValueError(
                f"--shapes must be OUTPUTSxINPUTS:TOKENS such as 512x2048:8192, got {text!r}"
            )
        size = cls(*map(int, found.groups()))
        if min(size.outputs, size.inputs) < SMALLEST or size.tokens < 1:
            raise ValueError(
                f"--shapes must have {SMALLEST} outputs and inputs at least and a token, "
                f"got {text!r}"
            )
        return size

    def __str__(self) -> str:
        return f"{self.outputs}x{self.inputs}:{self.tokens}"


# A side of two blocks.
SMALLEST = 128


def default_sizes(device: torch.device, *, quick: bool) -> list[Size]:
    """Layers that the device needs some tens of milliseconds for, on a CPU."""
    if device.type == "cuda":
        sizes = [Size(4096, 4096, 8192), Size(1024, 4096, 16384)]
        return sizes[:1] if quick else sizes
    return [Size(768, 768, 1024)] if quick else [Size(1024, 1024, 2048), Size(512, 2048, 4096)]


def layer_cases(
    size: Size, dtype: torch.dtype, families: Sequence[str], *, quick: bool
) -> list[LayerCase]:
    """The rows of one size; kinds take turns, so that a run that is cut short has some of each.

    ``families`` are kernel families; "optim" is the optimizer stage of every mask.
    """
    by_kind: dict[str, list[LayerCase]] = {}
    for case in _all(size, dtype, quick):
        if case.family not in families:
            if "optim" not in families or "optimizer" not in case.stages:
                continue
            case = case.only("optimizer")
        by_kind.setdefault(case.kind, []).append(case)
    return [case for turn in zip_longest(*by_kind.values()) for case in turn if case is not None]


def _all(size: Size, dtype: torch.dtype, quick: bool) -> Iterator[LayerCase]:
    O, I = size.outputs, size.inputs

    options: dict[str, Any] = {"dtype": dtype, "bias": False}

    def linear(kind: str, share: float, family: str, mask: Mask) -> LayerCase:
        density = mask.numel((O, I)) / (O * I)
        case = LinearCase("", (size.tokens,), O, I, mask, **options)
        return LayerCase(kind, f"{kind} {percent(share)}", density, family, case)

    for side in (1 / 4, 1 / 2, 3 / 4) if quick else (1 / 8, 1 / 4, 1 / 2, 3 / 4, 15 / 16):
        rows, cols = _rounded(side * O), _rounded(side * I)
        yield linear("Prefix", side**2, "submatrix", Prefix(rows, cols))
        yield linear("Index", side**2, "submatrix", Index(_some(O, rows), _some(I, cols)))
    for share in (1 / 8, 1 / 2, 7 / 8) if quick else (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0):
        for block in (32, 64):
            bitmap = random_bitmap(-(-O // block), -(-I // block), share)
            yield linear(f"Block {block}", share, "blocksparse", Block(bitmap, block))
    for share in (0.05, 0.5) if quick else (0.005, 0.05, 0.5):
        random = torch.rand(O, I, generator=torch.Generator().manual_seed(0))
        yield linear("Element", share, "element", Element(random < share))
    for share in (0.005,) if quick else (0.005, 0.05):
        case = PackedCase("", (size.tokens,), O, I, share, **options)
        density = case.kept / (O * I)
        yield LayerCase("Packed", f"Packed {percent(share)}", density, "packed", case)
    for share in (1 / 32, 1 / 8) if quick else (1 / 32, 1 / 16, 1 / 8, 1 / 4):
        for kind, core in {"LFC core": True, "LFC super": False}.items():
            K = max(1, round(share * min(O, I)))
            case = LFCCase("", (size.tokens,), O, I, K, core, **options)
            density = K * (O + I) / (O * I) if core else 1.0
            if core or not quick or share == 1 / 32:
                yield LayerCase(kind, f"{kind} 1/{1 / share:g}", density, "lfc", case)
    for share in (1 / 64, 1 / 16) if quick else (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8):
        for per in ("batch", "row"):
            k = max(1, round(share * O))
            case = TopKCase("", (size.tokens,), O, I, k, per, **options)
            kind, label = f"top-k {per}", f"top-k {per} 1/{1 / share:g}"
            # Its forward and its update are the dense layer's.
            yield LayerCase(kind, label, k / O, "topk", case, ("backward", "step"))


def meprop_sweep(device: torch.device, dtype: torch.dtype, *, quick: bool) -> list[LayerCase]:
    """The backward of meProp by batch at the paper's shares k / h, of a smaller h on a CPU."""
    if device.type == "cuda":
        width, tokens = PAPER_WIDTH, 1024
    else:
        width, tokens = (2048, 512) if quick else (4096, 1024)
    ks = [k * width // PAPER_WIDTH for k in PAPER_SPEEDUPS]
    return [
        LayerCase(
            "meProp",
            f"meProp h={width} k={k}",
            k / width,
            "topk",
            TopKCase("", (tokens,), width, width, k, "batch", "rows", dtype=dtype, bias=False),
            ("backward",),
        )
        for k in ks
    ]


def percent(share: float) -> str:
    """0.0625 -> "6.25 %"."""
    return f"{100 * share:.3g} %"


def _rounded(count: float) -> int:
    """To what hardware likes, as the package's own widths."""
    return max(16, round(count / 16) * 16)


def _some(total: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(total)
    return torch.randperm(total, generator=generator)[: min(count, total)].sort().values
