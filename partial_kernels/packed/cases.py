"""Packed elements of every number: odd sizes for correctness, the densities of fixed sparse masks
for speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.contest import Bars, Contest, backward
from partial_kernels._core.linear_cases import (
    WEIGHT_LAYOUTS,
    X_LAYOUTS,
    call_with_gradients,
    doubled,
    magnitudes_of_few,
    random_tensors,
    results,
)
from partial_kernels._core.testing import Call, assert_within_budget, poisoned
from partial_kernels.packed.function import packed_linear

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

# T tokens, O outputs, I inputs, N trained elements


@dataclass(frozen=True)
class Case:
    """Arguments of one call of ``packed_linear``, by shape and layout."""

    name: str
    batch: tuple[int, ...]
    """Leading dimensions of x."""
    outputs: int
    inputs: int
    index: Sequence[int] | float
    """Flat positions, or the share of the weight that random ones are."""
    dtype: torch.dtype = torch.float32
    bias: bool = True
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"

    @property
    def tokens(self) -> int:
        return math.prod(self.batch)

    @property
    def kept(self) -> int:
        """N."""
        if isinstance(self.index, Sequence):
            return len(self.index)
        return round(self.index * self.outputs * self.inputs)

    def positions(self) -> Tensor:
        if isinstance(self.index, Sequence):
            return torch.tensor(self.index, dtype=torch.int64)
        return _random_positions(self.kept, self.outputs * self.inputs)

    def make(
        self, seed: int = 0, device: torch.device | str = "cpu", *, requires_grad: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments for ``packed_linear``; the same numbers on every device."""
        random = random_tensors(self.dtype, device, seed)
        layout = WEIGHT_LAYOUTS[self.weight_layout]
        leaves = {
            "x": X_LAYOUTS[self.x_layout](random, (*self.batch, self.inputs)),
            "values": random(self.kept),
        }
        if self.bias:
            leaves["bias"] = random(self.outputs)
        return {
            **{name: leaf.requires_grad_(requires_grad) for name, leaf in leaves.items()},
            "weight": layout(random, (self.outputs, self.inputs)),
            "index": self.positions().to(device),
        }

    def dy(self, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
        random = random_tensors(self.dtype, device, seed)
        return X_LAYOUTS[self.x_layout](random, (*self.batch, self.outputs))


@cache
def _random_positions(count: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randperm(size, generator=generator)[:count].sort().values


def _variations(name: str, **options: Any) -> tuple[Case, ...]:
    base = Case(name, (7,), 13, 11, (0, 1, 12, 54, 55, 100, 142), **options)
    changes: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "fp64": {"dtype": torch.float64},
        "no-bias": {"bias": False},
        "vector": {"batch": ()},
        "no-token": {"batch": (0,)},
        "batch-3d": {"batch": (2, 3)},
        "few-tokens-bf16": {"batch": (2,), "dtype": torch.bfloat16},
        "many-tokens": {"batch": (300,)},
        "many-tokens-bf16": {"batch": (300,), "dtype": torch.bfloat16},
        "nothing": {"index": ()},
        "everything": {"index": range(13 * 11)},
        "one-row": {"index": range(22, 33)},
        "one-column": {"index": range(5, 13 * 11, 11)},
        "x-permuted-3d": {"batch": (2, 3), "x_layout": "permuted"},
        "x-sliced": {"x_layout": "sliced", "dtype": torch.bfloat16},
        "x-expanded": {"batch": (2, 3), "x_layout": "expanded"},
        "weight-permuted": {"weight_layout": "permuted"},
        "weight-sliced": {"weight_layout": "sliced", "dtype": torch.float64},
    }
    return tuple(replace(base, name=f"{name}-{key}", **change) for key, change in changes.items())


CASES = (
    *_variations("packed"),
    # More rows than one block of the gradient has; every path of tokens and vectors.
    Case("packed-blocks", (130,), 150, 37, 0.05),
    Case("packed-few-tokens", (2,), 64, 48, 0.02),
    Case("packed-aligned", (256,), 160, 128, 0.05),
    Case("packed-aligned-bf16", (256,), 160, 128, 0.05, dtype=torch.bfloat16),
    Case("packed-aligned-fp16", (64,), 160, 128, 0.05, dtype=torch.float16),
)

BENCH_CASES = tuple(
    Case(f"packed-{density:.1%}", (4096,), 2048, 2048, density, bias=False)
    for density in (0.005, 0.05)
)


def flops(case: Case) -> dict[str, int]:
    """FLOPs of each pass, 2 per multiply-add."""
    product = 2 * case.tokens * case.outputs * case.inputs
    return {"forward": product, "dx": product, "dvalues": 2 * case.tokens * case.kept}


def bytes_moved(case: Case) -> dict[str, int]:
    """Bytes of each pass if every operand moves once, and positions as the 8 bytes they are."""
    T, O, I, size = case.tokens, case.outputs, case.inputs, case.dtype.itemsize
    packed = (size + 8) * case.kept
    return {
        "forward": size * (T * (I + O) + O * I + O * case.bias) + packed,
        "dx": size * (T * (I + O) + O * I) + packed,
        "dvalues": size * T * (I + O) + packed,
    }


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``, and what is promised there."""
    width, bars = 4096 // scale, {0.005: {"F.linear": 1.1}, 0.05: {}}
    return [
        (
            Case(
                f"packed-{density:.1%}",
                (8192 // scale,),
                width,
                width,
                density,
                torch.bfloat16,
                bias=False,
            ),
            promised,
        )
        for density, promised in bars.items()
    ]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """The backward against a dense layer's."""
    arguments = case.make(seed, device, requires_grad=True)
    x, values, weight = (arguments[name] for name in ("x", "values", "weight"))
    dense = weight.clone().requires_grad_()
    dy = case.dy(seed + 1, device)
    y, plain = packed_linear(**arguments, impl=impl), F.linear(x, dense, arguments.get("bias"))

    def ours() -> object:
        return torch.autograd.grad(y, [x, values], dy, retain_graph=True)

    def baseline() -> object:
        return torch.autograd.grad(plain, [x, dense], dy, retain_graph=True)

    costs = backward(flops(case)), backward(bytes_moved(case))
    bar = 0.58 if case.kept < 0.01 * case.outputs * case.inputs else 0.64
    return Contest(ours, {"F.linear": baseline}, *costs, bar)


def plain_packed(
    x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What ``packed_linear`` must equal, by torch's autograd."""
    dweight = values.new_zeros(weight.numel()).index_put((index,), values).view(weight.shape)
    return F.linear(x, weight + dweight, bias)


def call(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """``packed_linear`` and its gradients."""
    arguments, dy = case.make(seed, device), case.dy(seed + 1, device)
    return call_with_gradients(packed_linear, arguments, dy, impl, frozen=("weight",))


def check(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless y, dx, dvalues and db are right."""
    arguments, dy = case.make(seed, device), case.dy(seed + 1, device)
    with poisoned():
        actual = results(packed_linear, {**arguments, "impl": impl}, dy, frozen=("weight",))
    plain = results(plain_packed, arguments, dy, frozen=("weight",))
    exact = results(plain_packed, doubled(arguments), dy.double(), frozen=("weight",))
    assert actual.keys() == exact.keys()
    magnitudes = magnitudes_of_few(plain_packed, arguments, dy, frozen=("weight",))
    for name, result in actual.items():
        what, magnitude = f"{case.name}: {name}", magnitudes[name]
        assert_within_budget(result, plain[name], exact[name], what=what, magnitude=magnitude)
