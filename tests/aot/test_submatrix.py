"""The product kernels of Prefix and Index masks, compiled for three architectures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partial_kernels._core.gpu import Launch, recorded
from partial_kernels._core.tiles import Tile, choosing
from partial_kernels.submatrix import kernels as kernels
from partial_kernels.submatrix.reference import OPS
from tests.aot.compiler import SHARED_LIMIT, compiled

# Tokens, rows and columns kept of 4096 x 4096: for each of the tiles.
SIZES = {"small": (512, 512, 1024), "middle": (2048, 1024, 2048), "large": (8192, 2048, 2048)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def launched(
    op: str, size: str, dtype: torch.dtype, rows: bool, columns: bool, capability: int
) -> Launch:
    """What an op would launch, with some of the rows and columns picked by an index."""
    tokens, kept, width = SIZES[size]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    weight, dy, x = tensor(4096, 4096), tensor(tokens, kept), tensor(tokens, width)
    row_index, col_index = (
        tensor(count, dtype=torch.int64) if there else None
        for count, there in ((kept, rows), (width, columns))
    )
    given: dict[str, tuple[Any, ...]] = {
        "forward": (x, weight, tensor(4096)),
        "dx": (dy, weight, width),
        "dweight": (dy, x, weight),
    }
    run = next(b.run for b in getattr(OPS, op).backends if b.name == "triton")
    with recorded(capability) as launches:
        run(*given[op], kept, row_index, col_index)
    (launch,) = launches
    return launch


def by_tma(_: str, tile: Tile) -> Tile:
    """The tile, with matrices loaded by descriptors."""
    return replace(tile, sizes={**tile.sizes, "TMA": 1})


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["forward", "dx", "dweight"])
def test_descriptors_compile(
    op: str, size: str, rows: bool, capability: int, tmp_path: Path
) -> None:
    with choosing(by_tma):
        launch = launched(op, size, torch.bfloat16, rows, False, capability)
    assert launch.constants["A_TMA"]
    found = compiled(launch, capability, tmp_path)
    assert "cp.async.bulk.tensor" in found.ptx
    assert found.shared <= SHARED_LIMIT[capability]
    assert found.spilled == 0
    assert not found.losses
    if capability == 90:
        assert "wgmma" in found.ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("picks", ["prefix", "rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", ["forward", "dx", "dweight"])
def test_compiles(
    op: str, size: str, dtype: str, picks: str, capability: int, tmp_path: Path
) -> None:
    launch = launched(op, size, DTYPES[dtype], picks == "rows", picks == "columns", capability)
    found = compiled(launch, capability, tmp_path)
    assert found.shared <= SHARED_LIMIT[capability]
    # Numbers that are loaded one by one cost Triton 3.6 two registers too many here and there.
    assert found.spilled <= (8 if picks == "columns" else 0)
    assert not found.losses
    if capability == 90 and dtype != "fp32":
        assert "wgmma" in found.ptx
