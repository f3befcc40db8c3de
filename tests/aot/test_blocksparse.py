"""The kernels of Block masks, compiled for three architectures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partial_kernels._core.gpu import Launch, recorded
from partial_kernels.blocksparse.kernels import SIZES
from partial_kernels.blocksparse.reference import OPS
from tests.aot.compiler import SHARED_LIMIT, Compiled, compiled

OPERATIONS = ("forward", "dx", "dweight")
BF16 = torch.bfloat16


def launched(
    op: str,
    size: int,
    dtype: torch.dtype,
    capability: int,
    *,
    tokens: int = 2048,
    weight_dtype: torch.dtype | None = None,
) -> Launch:
    """What an op would launch for a weight of 4096 x 4096.

    Meta tensors hold nothing: an op that asked the device for a number would fail.
    """

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight, a = tensor(4096, 4096, dtype=weight_dtype or dtype), tensor(tokens, 4096)
    given: dict[str, tuple[Any, ...]] = {
        "forward": (a, weight, tensor(4096)),
        "dx": (a, weight, 4096),
        "dweight": (a, a, weight),
    }
    bitmap = tensor(4096 // size, 4096 // size, dtype=torch.bool)
    run = next(b.run for b in getattr(OPS, op).backends if b.name == "triton")
    with recorded(capability) as launches:
        run(*given[op], bitmap, size)
    (launch,) = launches
    return launch


def assert_good(found: Compiled, capability: int) -> None:
    assert found.shared <= SHARED_LIMIT[capability]
    assert found.spilled == 0
    assert not found.losses
    # A run of indices is loaded as a vector.
    assert not re.search(r"ld\.global\S*\.[bu]16 ", found.ptx)


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPERATIONS)
def test_compiles(op: str, size: int, capability: int, tmp_path: Path) -> None:
    found = compiled(launched(op, size, BF16, capability), capability, tmp_path)
    assert_good(found, capability)
    assert re.search(r"cp\.async\.cg\.shared\.global .* 0x10", found.ptx)
    if capability == 90:
        assert "wgmma" in found.ptx


# Of the others, the tiles that take most registers.
@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("op", ["forward", "dweight"])
def test_compiles_with_a_weight_in_fp32(
    op: str, dtype: torch.dtype, size: int, capability: int, tmp_path: Path
) -> None:
    launch = launched(op, size, dtype, capability, weight_dtype=torch.float32)
    assert_good(compiled(launch, capability, tmp_path), capability)


@pytest.mark.parametrize("tokens", [1, 64])
@pytest.mark.parametrize("size", [16, 128])
@pytest.mark.parametrize("op", ["forward", "dweight"])
def test_compiles_for_few_tokens(op: str, size: int, tokens: int, tmp_path: Path) -> None:
    assert_good(compiled(launched(op, size, BF16, 90, tokens=tokens), 90, tmp_path), 90)
