"""The kernels of low-rank layers, compiled for three architectures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partial_kernels._core.gpu import Launch, recorded
from partial_kernels.lfc import kernels as kernels
from partial_kernels.lfc.reference import CORE, MERGE
from tests.aot.compiler import SHARED_LIMIT, Compiled, compiled

RANKS = (16, 64, 128, 256)
# Of x and the results, and of the parameters: under autocast these stay in fp32.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
T, O, I = 1024, 2048, 512


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launched(op: Any, capability: int, *args: Any) -> Launch:
    run = next(backend.run for backend in op.backends if backend.name == "triton")
    with recorded(capability) as launches:
        run(*args)
    (launch,) = launches
    return launch


def assert_sound(found: Compiled, capability: int, dtype: str) -> None:
    assert found.shared <= SHARED_LIMIT[capability]
    assert found.spilled == 0
    assert not found.losses
    if capability == 90 and dtype != "fp32":
        assert "wgmma" in found.ptx


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge(dtype: str, rank: int, capability: int, tmp_path: Path) -> None:
    result, parameters = DTYPES[dtype]
    shapes = (O, I), (rank, I), (O, rank)
    tensors = [empty(*shape, dtype=parameters) for shape in shapes]
    launch = launched(MERGE, capability, *tensors, result)
    assert_sound(compiled(launch, capability, tmp_path), capability, dtype)


# Back are the transposed factors, where that could matter: little and much on chip.
@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("way", "rank"), [*(("forward", rank) for rank in RANKS), ("back", 64), ("back", 256)]
)
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"])
def test_core(
    way: str,
    dtype: str,
    rank: int,
    capability: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "precision", lambda: "tf32" if dtype == "tf32" else "ieee")
    activations, parameters = DTYPES["fp32" if dtype == "tf32" else dtype]
    u, v = empty(rank, I, dtype=parameters), empty(O, rank, dtype=parameters)
    if way == "forward":
        args = empty(T, I, dtype=activations), u, v, empty(O, dtype=parameters)
    else:
        args = empty(T, O, dtype=activations), v.mT, u.mT, None
    launch = launched(CORE, capability, *args)
    assert_sound(compiled(launch, capability, tmp_path), capability, dtype)
