"""What results are held against: an error budget, exact zeros off a mask, poisoned memory; and the
numbers that go in.

Tests, benchmarks and ``maskedtrain doctor`` share these; failures are AssertionErrors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Call",
    "assert_within_budget",
    "assert_zero_outside",
    "max_error",
    "normal",
    "poisoned",
]

# Numbers that are drawn on the CPU for any device; more would take it longer than all else.
_FEW = 1 << 22


@dataclass(frozen=True)
class Call:
    """One call of a family's function, to be captured, compiled or repeated.

    Args:
        inputs: the tensors it reads, and those it updates in place: with other numbers in them the
            next run is another one.
        run: makes the call; gives its results and every gradient, or what it has updated.
    """

    inputs: list[Tensor]
    run: Callable[[], list[Tensor]]


def normal(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device | str
) -> Tensor:
    """Standard normal numbers, fp64: up to ``_FEW`` the same on every device."""
    if math.prod(shape) <= _FEW or torch.device(device).type == "cpu":
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    seed = int(torch.randint(1 << 31, (), generator=generator))
    there = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=there, dtype=torch.float64, device=device)


def max_error(actual: Tensor, exact: Tensor) -> float:
    """``max |actual - exact|`` in fp64; 0 for empty tensors, NaN where either holds NaN."""
    difference = (actual.detach().double() - exact.detach().double()).abs()
    return float(difference.max()) if difference.numel() else 0.0


def assert_within_budget(
    actual: Tensor, plain: Tensor, exact: Tensor, *, what: str = "", magnitude: float = 0.0
) -> None:
    """Check that ``actual`` is about as exact as plain PyTorch in the same dtype.

    ``|actual - exact| <= 2 |plain - exact| + eps(dtype) |exact|``, in the norm that takes the
    largest absolute value.

    Args:
        actual: the result under test.
        plain: what plain PyTorch computes from the same arguments; dtype and shape of ``actual``.
        exact: the same in fp64.
        magnitude: counts as ``|exact|`` where it is larger: of sums so few that plain PyTorch may
            be exact by luck, the sum of the terms' absolute values.
    """
    subject = what or "result"
    if exact.dtype != torch.float64:
        raise TypeError(f"exact must be float64, got {exact.dtype}")
    if actual.shape != exact.shape or actual.dtype != plain.dtype:
        raise AssertionError(
            f"{subject} must be {plain.dtype} {list(exact.shape)}, "
            f"got {actual.dtype} {list(actual.shape)}"
        )
    error, plain_error = max_error(actual, exact), max_error(plain, exact)
    scale = max(magnitude, max_error(exact, exact.new_zeros(())))
    budget = 2 * plain_error + torch.finfo(plain.dtype).eps * scale
    # An infinite budget would pass anything, and a NaN on either side must fail.
    if not (math.isfinite(budget) and error <= budget):
        raise AssertionError(
            f"{subject}: error {error:.3g} exceeds the budget of {budget:.3g} "
            f"(plain PyTorch's error {plain_error:.3g}, largest exact value {scale:.3g}, "
            f"{plain.dtype})"
        )


def assert_zero_outside(tensor: Tensor, mask: Tensor, *, what: str = "") -> None:
    """Check that ``tensor`` is exactly 0 where the mask is False, and not all 0 elsewhere."""
    subject = what or "tensor"
    outside, inside = tensor[~mask], tensor[mask]
    # "!= 0" holds for NaN too.
    wrong = int((outside != 0).sum())
    if wrong:
        raise AssertionError(
            f"{subject}: {wrong} of {outside.numel()} elements off the mask are not 0"
        )
    if inside.numel() and not bool((inside != 0).any()):
        raise AssertionError(f"{subject}: all {inside.numel()} elements on the mask are 0")


@contextmanager
def poisoned() -> Generator[None]:
    """Within it ``torch.empty`` and kin come filled with NaN (integers: their largest value)."""
    memory: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        memory.fill_uninitialized_memory = before[1]
