"""Low-rank parts of every shape: odd sizes for correctness, a Transformer's for speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.contest import Bars, Contest, Step
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
from partial_kernels.lfc.function import Form, lfc_linear

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
    "plain_lfc",
]


@dataclass(frozen=True)
class Case:
    """Arguments of one call of ``lfc_linear``, by shape and layout."""

    name: str
    batch: tuple[int, ...]
    """Leading dimensions of x."""
    outputs: int
    inputs: int
    rank: int
    core: bool = False
    """Without W."""
    form: Form = "auto"
    dtype: torch.dtype = torch.float32
    bias: bool = True
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"
    """Of W, U and V."""

    @property
    def tokens(self) -> int:
        return math.prod(self.batch)

    @property
    def merged(self) -> bool:
        """Whether W' is formed."""
        if self.core or self.form != "auto":
            return not self.core and self.form == "merged"
        return self.tokens * (self.inputs + self.outputs) >= self.inputs * self.outputs

    @property
    def plain(self) -> bool:
        """Whether plain PyTorch alone computes it: the factored form with W has no backends."""
        return not (self.core or self.merged)

    def make(
        self, seed: int = 0, device: torch.device | str = "cpu", *, requires_grad: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments for ``lfc_linear``; the same numbers on every device."""
        random = random_tensors(self.dtype, device, seed)
        layout = WEIGHT_LAYOUTS[self.weight_layout]
        tensors = {
            "x": X_LAYOUTS[self.x_layout](random, (*self.batch, self.inputs)),
            "weight": layout(random, (self.outputs, self.inputs)),
            "u": layout(random, (self.rank, self.inputs)),
            "v": layout(random, (self.outputs, self.rank)),
        }
        if self.bias:
            tensors["bias"] = random(self.outputs)
        made: dict[str, Any] = {n: t.requires_grad_(requires_grad) for n, t in tensors.items()}
        if self.core:
            made["weight"] = None
        return {**made, "form": self.form}

    def dy(self, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
        random = random_tensors(self.dtype, device, seed)
        return X_LAYOUTS[self.x_layout](random, (*self.batch, self.outputs))


def _variations(name: str, **options: Any) -> tuple[Case, ...]:
    base = Case(name, (23,), 13, 11, 3, **options)
    changes: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "fp64": {"dtype": torch.float64},
        "no-bias": {"bias": False},
        "vector": {"batch": ()},
        "no-token": {"batch": (0,)},
        "batch-3d": {"batch": (2, 3)},
        "rank-1": {"rank": 1},
        "full-rank": {"rank": 11},
        "x-permuted-3d": {"batch": (2, 3), "x_layout": "permuted"},
        "x-sliced": {"x_layout": "sliced", "dtype": torch.bfloat16},
        "x-expanded": {"batch": (2, 3), "x_layout": "expanded"},
        "weight-permuted": {"weight_layout": "permuted"},
        "weight-sliced": {"weight_layout": "sliced", "dtype": torch.float64},
    }
    return tuple(replace(base, name=f"{name}-{key}", **change) for key, change in changes.items())


CASES = (
    *_variations("auto"),
    *_variations("merged", form="merged"),
    *_variations("factored", form="factored"),
    *_variations("core", core=True),
    Case("merged-aligned", (96,), 160, 128, 16, form="merged"),
    Case("core-aligned-bf16", (96,), 160, 128, 16, core=True, dtype=torch.bfloat16),
)

BENCH_CASES = tuple(
    Case(f"{name}-{tokens}x512x{outputs}-k{rank}", (tokens,), outputs, 512, rank, core)
    for name, core in {"super": False, "core": True}.items()
    for tokens in (1024, 4096)
    for outputs in (512, 1024, 2048)
    for rank in (16, 128)
)


def flops(case: Case) -> dict[str, int]:
    """FLOPs of each pass, 2 per multiply-add, when every tensor needs its gradient."""
    T, O, I, K = case.tokens, case.outputs, case.inputs, case.rank
    thin, product = 2 * T * K * (I + O), 2 * T * O * I
    if case.core:
        return {"forward": thin, "backward": 2 * thin}
    if not case.merged:
        return {"forward": product + thin, "backward": 2 * product + 2 * thin}
    # dU and dV: from dW, or by token.
    factors = min(4 * O * I * K, 2 * thin)
    return {"forward": 2 * O * I * K + product, "backward": 2 * product + factors}


def bytes_moved(case: Case) -> dict[str, int]:
    """Bytes of each pass if every operand moves once, W' once more where it is formed."""
    T, O, I, K = case.tokens, case.outputs, case.inputs, case.rank
    parameters = K * (I + O) + (0 if case.core else O * I)
    forward = T * (I + O) + parameters + O * case.bias
    size = case.dtype.itemsize
    merged = O * I * case.merged
    return {
        "forward": size * (forward + 2 * merged),
        "backward": size * (2 * T * (I + O) + 2 * parameters + merged),
    }


def gpu_cases(scale: int = 1) -> list[tuple[Case, Bars]]:
    """What is timed on a GPU, sizes divided by ``scale``, and what is promised there: a core among
    many tokens, as in training, and among few.
    """

    def case(core: bool, tokens: int, width: int, share: int) -> Case:
        small, rank = width // scale, max(width // scale // share, 1)
        name = f"{'core' if core else 'super'}-{tokens}x{width}-1/{share}"
        return Case(
            name, (tokens // scale,), small, small, rank, core, dtype=torch.bfloat16, bias=False
        )

    sizes = [(width, share) for width in (4096, 1024) for share in (32, 8)]
    few = [(2048, 1024, 32), (2048, 1024, 8), (1024, 2048, 32)]
    return [
        *((case(False, 8192, *size), {"F.linear": 1.03}) for size in sizes),
        *((case(True, 8192, *size), {"two F.linear": 1.0}) for size in sizes),
        *((case(True, *size), {"two F.linear": 1.0}) for size in few),
    ]


def contest(
    case: Case, *, device: torch.device | str = "cpu", impl: str = "auto", seed: int = 0
) -> Contest:
    """Forward and backward of a super layer against ``F.linear``'s, whose step it may exceed by
    K / T and timing's own 0.04; of a core against two thin layers'.

    W' is formed in every step, as in training: with unchanged weights it would be kept.
    """
    arguments = case.make(seed, device, requires_grad=True)
    leaves = {k: a for k, a in arguments.items() if isinstance(a, Tensor)}
    dy = case.dy(seed + 1, device)

    def step(forward: Callable[..., Tensor], names: list[str]) -> Step:
        needed = [leaves[name] for name in names]
        return lambda: torch.autograd.grad(forward(**arguments), needed, dy)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, **_: Any) -> Tensor:
        return F.linear(x, weight, bias)

    ours = step(partial(lfc_linear, impl=impl), list(leaves))
    if case.core:
        baselines, bar = {"two F.linear": step(plain_lfc, list(leaves))}, 1.07
    else:
        plain = step(linear, [name for name in leaves if name not in ("u", "v")])
        baselines, bar = {"F.linear": plain}, 1 + case.rank / case.tokens + 0.04
    costs = sum(flops(case).values()), sum(bytes_moved(case).values())
    return Contest(ours, baselines, *costs, bar)


def plain_lfc(
    x: Tensor,
    weight: Tensor | None,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    form: str = "auto",
) -> Tensor:
    """What ``lfc_linear`` must equal, by torch's autograd, in the form that is named."""
    if weight is None:
        return F.linear(F.linear(x, u), v, bias)
    if form == "factored":
        return F.linear(x, weight, bias) + F.linear(F.linear(x, u), v)
    return F.linear(x, weight + v @ u, bias)


def call(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """``lfc_linear`` and its gradients."""
    arguments = case.make(seed, device)
    return call_with_gradients(lfc_linear, arguments, case.dy(seed + 1, device), impl)


def check(
    case: Case, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless y, dx, dW, dU, dV and db are right."""
    arguments, dy = case.make(seed, device), case.dy(seed + 1, device)
    plain_form = "merged" if case.merged else "factored"
    with poisoned():
        actual = results(lfc_linear, {**arguments, "impl": impl}, dy)
    plain = results(plain_lfc, {**arguments, "form": plain_form}, dy)
    exact = results(plain_lfc, doubled(arguments), dy.double())
    magnitudes = magnitudes_of_few(plain_lfc, arguments, dy)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        what, magnitude = f"{case.name}: {name}", magnitudes[name]
        assert_within_budget(result, plain[name], exact[name], what=what, magnitude=magnitude)
