"""The kernels of ``packed_linear``, compiled for three architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partial_kernels._core.gpu import Launch, recorded
from partial_kernels.packed import kernels as kernels
from partial_kernels.packed.reference import DVALUES, DX, FORWARD
from tests.aot.compiler import SHARED_LIMIT, Compiled, compiled

BF16 = torch.bfloat16
# Of the gradient: one for each of the tiles, and for the longest list of positions at a time.
CALLS: dict[str, dict[str, Any]] = {
    "large": {"dtype": BF16},
    "large-dense": {"dtype": BF16, "count": 8_000_000},
    "middle": {"dtype": BF16, "shape": (2048, 2048, 2048), "count": 40_000},
    "small": {"dtype": BF16, "shape": (512, 768, 768), "count": 5_000},
    "small-dense": {"dtype": BF16, "shape": (512, 768, 768), "count": 500_000},
    "fp32": {"dtype": torch.float32},
    "fp32-dense": {"dtype": torch.float32, "count": 8_000_000},
    "mixed": {"dtype": BF16, "wide": torch.float32},
}


def launched(
    op: Any,
    dtype: torch.dtype,
    capability: int,
    *,
    shape: tuple[int, int, int] = (2048, 4096, 4096),
    count: int = 160_000,
    wide: torch.dtype | None = None,
) -> Launch:
    """What an op would launch for tokens, outputs and inputs; ``wide`` are the weight and values.

    Meta tensors hold nothing: an op that asked the device for a number would fail.
    """
    tokens, outputs, inputs = shape

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, dy = tensor(tokens, inputs), tensor(tokens, outputs)
    weight = tensor(outputs, inputs, dtype=wide or dtype)
    values, index = tensor(count, dtype=wide or dtype), tensor(count, dtype=torch.int64)
    given: dict[str, tuple[Any, ...]] = {
        "packed_forward": (x, weight, values, index, None),
        "packed_dx": (dy, weight, values, index),
        "packed_dvalues": (dy, x, values, index),
    }
    run = next(b.run for b in op.backends if b.name == "triton")
    with recorded(capability) as launches:
        run(*given[op.name])
    (launch,) = launches
    return launch


def assert_good(found: Compiled, capability: int) -> None:
    assert found.shared <= SHARED_LIMIT[capability]
    assert found.spilled == 0
    assert not found.losses


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("call", CALLS)
def test_the_gradient_compiles(call: str, capability: int, tmp_path: Path) -> None:
    found = compiled(launched(DVALUES, capability=capability, **CALLS[call]), capability, tmp_path)
    assert_good(found, capability)
    if capability == 90 and CALLS[call]["dtype"] == BF16:
        assert "wgmma" in found.ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("wide", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("op", [FORWARD, DX], ids=lambda op: op.name)
def test_the_copy_of_the_weight_compiles(
    op: Any, wide: torch.dtype, capability: int, tmp_path: Path
) -> None:
    found = compiled(launched(op, BF16, capability, wide=wide), capability, tmp_path)
    assert_good(found, capability)


# What is 1 is a constant to the compiler.
@pytest.mark.parametrize("shape", [(1, 64, 64), (64, 1, 64), (64, 64, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("op", [FORWARD, DVALUES], ids=lambda op: op.name)
def test_sizes_of_one_compile(op: Any, shape: tuple[int, int, int], tmp_path: Path) -> None:
    found = compiled(launched(op, BF16, 90, shape=shape, count=1), 90, tmp_path)
    assert_good(found, 90)
