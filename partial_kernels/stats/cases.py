"""Cases of ``masked_stats``: every mask, dtype and layout; and what is timed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from partial_kernels._core.contest import Bars, Contest
from partial_kernels._core.region_cases import arranged, masks
from partial_kernels._core.testing import Call, normal, poisoned
from partial_kernels.masks import Element, Full, Mask, Prefix
from partial_kernels.stats.function import MaskedStats, masked_stats

# Without a complete type.
_foreach_norm: Any = cast("Any", torch)._foreach_norm

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


@dataclass(frozen=True)
class Case:
    """``tensors`` pairs of gradients of one shape, each with the same mask."""

    name: str
    shape: tuple[int, ...]
    mask: Mask | None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    """One of ``_core.region_cases.LAYOUTS``, of the gradients."""
    tensors: int = 1

    @property
    def kept(self) -> int:
        """Elements inside the mask, of one tensor."""
        return 0 if self.mask is None else self.mask.numel(self.shape)

    def inside(self, device: torch.device | str) -> Tensor:
        """The mask as a bool tensor."""
        if self.mask is None:
            return torch.zeros(self.shape, dtype=torch.bool, device=device)
        return self.mask.dense(self.shape, device)

    def make(self, seed: int = 0, device: torch.device | str = "cpu") -> dict[str, Any]:
        """Keyword arguments for ``masked_stats``; the same numbers on every device.

        Fixed-point numbers below 4 whose fp64 sums are exact in any order, while those in fp32 are
        not: results must equal the exact ones, and only fp64 arithmetic attains that.
        """
        generator = torch.Generator().manual_seed(seed)
        # Two bits are for the integer part.
        scale = 2.0 ** min(16, -1 - round(math.log2(torch.finfo(self.dtype).eps)))

        def tensors() -> list[Tensor]:
            values = normal((self.tensors, *self.shape), generator, device)
            values = (values.clamp(-3.9, 3.9) * scale).round() / scale
            return [arranged(value.to(self.dtype), self.layout) for value in values]

        return {
            "grads": tensors(),
            "other_grads": tensors(),
            "masks": [self.mask] * self.tensors,
        }


def dense_stats(case: Case, arguments: dict[str, Any]) -> MaskedStats:
    """What ``masked_stats`` must equal, from dense fp64 products with zeros outside the mask."""
    device = arguments["grads"][0].device
    g = torch.stack(arguments["grads"]).double().reshape(case.tensors, -1)
    h = torch.stack(arguments["other_grads"]).double().reshape(case.tensors, -1)
    inside = case.inside(device).reshape(-1)
    pg, ph = torch.where(inside, g, 0), torch.where(inside, h, 0)
    return MaskedStats(*(product.sum(1) for product in (pg * pg, ph * ph, pg * ph, g * g)))


def call(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """``masked_stats``."""
    arguments = case.make(seed, device)
    inputs = [*arguments["grads"], *arguments["other_grads"]]
    return Call(inputs, lambda: list(masked_stats(**arguments, impl=impl)))


def check(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless all four results are exact, and NaN off the mask is ignored."""
    arguments, poison = case.make(seed, device), case.make(seed, device)
    outside = ~case.inside(device)
    for grad in poison["other_grads"]:
        grad[outside] = math.nan
    expected = dense_stats(case, arguments)
    with poisoned():
        results = masked_stats(**poison, impl=impl)
        for grad in poison["grads"]:
            grad[outside] = math.nan
        masked = masked_stats(**poison, impl=impl)[:3]
    named = dict(zip(MaskedStats._fields, results, strict=True))
    named |= {f"{k} (NaN outside)": v for k, v in zip(MaskedStats._fields, masked, strict=False)}
    for name, result in named.items():
        exact = getattr(expected, name.split()[0])
        if result.dtype != torch.float64 or not torch.equal(result, exact):
            raise AssertionError(
                f"{case.name}: {name} must be {exact} in fp64, got {result} in {result.dtype}"
            )


def flops(case: Case) -> int:
    """FLOPs, 2 per multiply-add."""
    return 2 * case.tensors * (math.prod(case.shape) + 3 * case.kept)


def bytes_moved(case: Case) -> int:
    """Bytes if every element that counts moves once; the mask itself does not count."""
    return case.dtype.itemsize * case.tensors * (math.prod(case.shape) + case.kept)


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``."""
    return [(case, {}) for case in _bench_cases(1024 // scale)]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """All four sums against the norms of both lists alone.

    A mask by element is a third list to read, and its bar another.
    """
    arguments = case.make(seed, device)
    lists = [*arguments["grads"], *arguments["other_grads"]]

    def ours() -> object:
        return masked_stats(**arguments, impl=impl)

    def baseline() -> object:
        return torch.stack(_foreach_norm(lists)).view(2, -1).unbind()

    bar = 1.4 if isinstance(case.mask, Element) else 0.95
    return Contest(ours, {"_foreach_norm": baseline}, flops(case), bytes_moved(case), bar)


def _cases() -> tuple[Case, ...]:
    every_mask = [
        Case(f"{name}-{len(shape)}d", shape, mask)
        for shape in ((7,), (6, 5), (5, 4, 3, 3))
        for name, mask in {**masks(shape), "none": None}.items()
    ]
    kinds = [replace(case, tensors=3) for case in every_mask if len(case.shape) == 4]
    layouts = [
        replace(case, name=f"{case.name}-{layout}", layout=layout)
        for case in kinds
        for layout in ("permuted", "sliced", "channels_last")
    ]
    dtypes = [
        replace(case, name=f"{case.name}-{str(dtype)[6:]}", dtype=dtype)
        for case in kinds
        for dtype in (torch.bfloat16, torch.float16, torch.float64)
    ]
    edges = [
        Case("scalar", (), Full()),
        Case("scalar-prefix", (), Prefix()),
        Case("empty", (0, 3), Full()),
        Case("nothing", (4, 3), Prefix(0, 2)),
        Case("no-element", (4, 3), Element(torch.zeros(4, 3, dtype=torch.bool))),
        Case("long", (300, 257), Prefix(129, 133)),
    ]
    return (*every_mask, *layouts, *dtypes, *edges)


CASES = _cases()


def _bench_masks(width: int) -> dict[str, Mask]:
    random = torch.rand(width, width, generator=torch.Generator().manual_seed(width))
    return {
        "full": Full(),
        "prefix-half": Prefix(width // 2, width // 2),
        "element-50%": Element(random < 0.5),
    }


def _bench_cases(width: int) -> tuple[Case, ...]:
    masks = _bench_masks(width).items()
    return tuple(Case(name, (width, width), mask, tensors=40) for name, mask in masks)


BENCH_CASES = _bench_cases(1024)
