"""Cases of ``masked_linear`` and what each must satisfy: shared by the families that serve it.

Tests, benchmarks, ahead-of-time compilation and fuzzing all read the families' ``cases.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from partial_kernels._core.contest import Contest
from partial_kernels._core.testing import (
    Call,
    assert_within_budget,
    assert_zero_outside,
    max_error,
    normal,
    poisoned,
)
from partial_kernels.linear import masked_linear
from partial_kernels.masks import Mask

__all__ = [
    "WEIGHT_LAYOUTS",
    "X_LAYOUTS",
    "LinearCase",
    "bytes_moved",
    "call",
    "call_with_gradients",
    "check",
    "contest",
    "dense_linear",
    "doubled",
    "flops",
    "kept_indices",
    "magnitudes_of_few",
    "random_tensors",
    "results",
    "variations",
]

# O outputs, I inputs of the weight; S rows, C columns kept (O and I unless the mask is compact)


@dataclass(frozen=True)
class LinearCase:
    """Arguments of one call of ``masked_linear``, by shape, mask and layout."""

    name: str
    batch: tuple[int, ...]
    """Leading dimensions of x."""
    outputs: int
    inputs: int
    mask: Mask
    dtype: torch.dtype = torch.float32
    bias: bool = True
    x_layout: str = "contiguous"
    """A key of ``X_LAYOUTS``; ``check`` gives dy the same one."""
    weight_layout: str = "contiguous"
    """A key of ``WEIGHT_LAYOUTS``."""

    @property
    def tokens(self) -> int:
        return math.prod(self.batch)

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's."""
        return self.outputs, self.inputs

    @property
    def kept(self) -> tuple[int, int]:
        """S and C."""
        rows, cols = self.mask.restricted_shape(self.shape)
        return rows, cols

    def make(
        self, seed: int = 0, device: torch.device | str = "cpu", *, requires_grad: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments for ``masked_linear``; the same numbers on every device."""
        random = random_tensors(self.dtype, device, seed)
        tensors = {
            "x": X_LAYOUTS[self.x_layout](random, (*self.batch, self.kept[1])),
            "weight": WEIGHT_LAYOUTS[self.weight_layout](random, self.shape),
        }
        if self.bias:
            tensors["bias"] = random(self.outputs)
        return {
            **{name: value.requires_grad_(requires_grad) for name, value in tensors.items()},
            "mask": self.mask,
        }

    def dy(self, seed: int = 1, device: torch.device | str = "cpu") -> Tensor:
        random = random_tensors(self.dtype, device, seed)
        return X_LAYOUTS[self.x_layout](random, (*self.batch, self.kept[0]))


_Random = Callable[..., Tensor]


def random_tensors(dtype: torch.dtype, device: torch.device | str, seed: int) -> _Random:
    """Standard normal tensors of the shapes asked for."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        values = normal(shape, generator, device)
        if dtype == torch.float64:
            # On this grid fp64 products, and sums of hundreds, are exact in any order (in fp32 they
            # are not), so that in fp64 "equals the dense computation" means every bit.
            values = (values * 2**20).round() / 2**20
        return values.to(dtype)

    return random


def _contiguous(random: _Random, shape: tuple[int, ...]) -> Tensor:
    return random(*shape)


def _permuted(random: _Random, shape: tuple[int, ...]) -> Tensor:
    return random(*reversed(shape)).permute(*reversed(range(len(shape))))


def _sliced(random: _Random, shape: tuple[int, ...]) -> Tensor:
    """Every second row of a wider tensor, from an odd offset on."""
    *batch, last = shape
    return random(*(2 * n for n in batch), last + 3)[(*[slice(None, None, 2)] * len(batch),)][
        ..., 1 : last + 1
    ]


def _expanded(random: _Random, shape: tuple[int, ...]) -> Tensor:
    """One token, repeated without storage of its own."""
    return random(shape[-1]).expand(shape)


X_LAYOUTS: dict[str, Callable[[_Random, tuple[int, ...]], Tensor]] = {
    "contiguous": _contiguous,
    "permuted": _permuted,
    "sliced": _sliced,
    "expanded": _expanded,
}
WEIGHT_LAYOUTS: dict[str, Callable[[_Random, tuple[int, ...]], Tensor]] = {
    "contiguous": _contiguous,
    "permuted": _permuted,
    "sliced": _sliced,
}


def variations(name: str, outputs: int, inputs: int, mask: Mask) -> tuple[LinearCase, ...]:
    """One mask with every dtype, layout and kind of batch."""
    base = LinearCase(name, (7,), outputs, inputs, mask)
    changes: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"dtype": torch.bfloat16},
        "fp64": {"dtype": torch.float64},
        "no-bias": {"bias": False},
        "no-bias-bf16": {"bias": False, "dtype": torch.bfloat16},
        "vector": {"batch": ()},
        "one-token": {"batch": (1,)},
        "no-token": {"batch": (0,)},
        "batch-3d": {"batch": (2, 3)},
        "batch-3d-empty": {"batch": (2, 0)},
        "x-permuted": {"x_layout": "permuted"},
        "x-permuted-3d": {"batch": (2, 3), "x_layout": "permuted"},
        "x-sliced": {"x_layout": "sliced", "dtype": torch.bfloat16},
        "x-expanded": {"batch": (2, 3), "x_layout": "expanded"},
        "weight-permuted": {"weight_layout": "permuted"},
        "weight-sliced": {"weight_layout": "sliced", "dtype": torch.float64},
    }
    return tuple(replace(base, name=f"{name}-{key}", **change) for key, change in changes.items())


def flops(case: LinearCase) -> dict[str, int]:
    """FLOPs of each pass, 2 per multiply-add, if nothing off the mask is computed."""
    count = 2 * case.tokens * case.mask.numel(case.shape)
    return {"forward": count, "dx": count, "dweight": count}


def bytes_moved(case: LinearCase) -> dict[str, int]:
    """Bytes of each pass if every operand moves once; the weight gradient has the weight's shape.

    Of the weight only the masked elements count; the mask itself does not.
    """
    (rows, cols), size = case.kept, case.dtype.itemsize
    x, y, weight = case.tokens * cols, case.tokens * rows, case.mask.numel(case.shape)
    return {
        "forward": size * (x + weight + y + rows * case.bias),
        "dx": size * (y + weight + x),
        "dweight": size * (y + x + math.prod(case.shape)),
    }


def contest(
    case: LinearCase,
    bar: float | None = None,
    *,
    device: torch.device | str = "cpu",
    impl: str = "auto",
    seed: int = 0,
) -> Contest:
    """Forward and backward against ``F.linear``: of the small weight, gathered before, if the mask
    is compact, else of the whole one.
    """
    arguments = case.make(seed, device, requires_grad=True)
    x, weight = arguments["x"], arguments["weight"]
    plain = weight
    if case.mask.compact:
        plain = case.mask.restrict(weight.detach()).contiguous().requires_grad_()
    dy = case.dy(seed + 1, device)

    def ours() -> object:
        return torch.autograd.grad(masked_linear(**arguments, impl=impl), [x, weight], dy)

    def baseline() -> object:
        return torch.autograd.grad(F.linear(x, plain), [x, plain], dy)

    costs = sum(flops(case).values()), sum(bytes_moved(case).values())
    return Contest(ours, {"F.linear": baseline}, *costs, bar)


def call(
    case: LinearCase, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> Call:
    """``masked_linear`` and its gradients."""
    arguments = case.make(seed, device)
    return call_with_gradients(masked_linear, arguments, case.dy(seed + 1, device), impl)


def call_with_gradients(
    function: Callable[..., Tensor],
    arguments: dict[str, Any],
    dy: Tensor,
    impl: str,
    *,
    frozen: tuple[str, ...] = (),
) -> Call:
    """The function, and the gradient of every floating-point tensor that is not frozen."""
    given = (value for value in arguments.values() if isinstance(value, Tensor))

    def run() -> list[Tensor]:
        return list(results(function, {**arguments, "impl": impl}, dy, frozen=frozen).values())

    return Call([*(tensor for tensor in given if tensor.is_floating_point()), dy], run)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Mask) -> Tensor:
    """What ``masked_linear`` must equal: the dense product with masked weights set to zero.

    For a compact mask, x is scattered to full width with zeros and y is gathered from full width.
    """
    weight = torch.where(mask.dense(weight.shape, weight.device), weight, 0)
    if not mask.compact:
        return F.linear(x, weight, bias)
    rows, cols = kept_indices(mask, weight)
    x = x.new_zeros(*x.shape[:-1], weight.shape[1]).index_copy(-1, cols, x)
    return F.linear(x, weight, bias).index_select(-1, rows)


def kept_indices(mask: Mask, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the weight that the sub-network sees: all unless the mask is compact."""

    def kept(which: int | Tensor | None, size: int) -> Tensor:
        if isinstance(which, Tensor):
            return which.to(weight.device)
        return torch.arange(size, device=weight.device)[:which]

    rows, cols = (getattr(mask, name, None) if mask.compact else None for name in ("rows", "cols"))
    return kept(rows, weight.shape[0]), kept(cols, weight.shape[1])


def check(
    case: LinearCase, *, impl: str = "auto", device: torch.device | str = "cpu", seed: int = 0
) -> None:
    """Raise AssertionError unless y, dx, dW and db are right, and nothing off the mask is touched.

    Ours computes from a weight and a bias that hold NaN off the mask, in memory that holds NaN
    until written; plain PyTorch and the fp64 result compute from clean ones.
    """
    arguments, poison = case.make(seed, device), case.make(seed, device)
    inside = case.mask.dense(case.shape, device)
    inside_rows = torch.zeros(case.outputs, dtype=torch.bool, device=device)
    inside_rows[kept_indices(case.mask, arguments["weight"])[0]] = True
    poison["weight"][~inside] = math.nan
    if case.bias:
        poison["bias"][~inside_rows] = math.nan
    dy = case.dy(seed + 1, device)

    with poisoned():
        actual = results(masked_linear, {**poison, "impl": impl}, dy)
    plain = results(dense_linear, arguments, dy)
    exact = results(dense_linear, doubled(arguments), dy.double())
    magnitudes = magnitudes_of_few(dense_linear, arguments, dy)
    for name, result in actual.items():
        what, magnitude = f"{case.name}: {name}", magnitudes[name]
        assert_within_budget(result, plain[name], exact[name], what=what, magnitude=magnitude)
    # Without tokens the gradients are 0 on the mask, too.
    has_tokens = case.tokens > 0
    assert_zero_outside(actual["dweight"], inside & has_tokens, what=f"{case.name}: dweight")
    if case.bias:
        assert_zero_outside(actual["dbias"], inside_rows & has_tokens, what=f"{case.name}: dbias")


def doubled(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their floating-point tensors in fp64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def magnitudes_of_few(
    function: Callable[..., Tensor], arguments: dict[str, Any], dy: Tensor, **options: Any
) -> dict[str, float]:
    """Of each result of few different elements, what its error may be in units of the dtype's eps;
    else 0. Of so few sums, plain PyTorch's may all be exact by luck.

    With A the largest sum of a result's terms' absolute values, and n terms at most, the sum is off
    by up to n u A in whatever order it is taken (u is half an eps of fp32, or of fp64), and its
    rounding by eps A.
    """
    tensors = [dy, *(value for value in arguments.values() if isinstance(value, Tensor))]
    terms = max(math.prod(dy.shape[:-1]), *(n for tensor in tensors for n in tensor.shape), 1)
    eps = torch.finfo(dy.dtype).eps
    share = 1 + terms * min(eps, torch.finfo(torch.float32).eps) / (2 * eps)
    positive = {
        name: value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in doubled(arguments).items()
    }
    sums = results(function, positive, dy.double().abs(), **options)
    return {
        name: share * max_error(found, found.new_zeros(())) if _different(found) < 100 else 0.0
        for name, found in sums.items()
    }


def _different(tensor: Any) -> int:
    """How many different numbers it holds."""
    return tensor.unique().numel()


def results(
    function: Callable[..., Tensor],
    arguments: dict[str, Any],
    dy: Tensor,
    *,
    frozen: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """y and the gradient of every floating-point tensor that is not frozen."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in arguments.items()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in frozen
    }
    y = function(**{**arguments, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y, **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}
