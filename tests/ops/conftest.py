"""One mask of every kind for a small weight, and calls of ``masked_linear`` with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import partial_kernels as pk
from partial_kernels._core.linear_cases import LinearCase

SHAPE = (8, 6)
MASKS: dict[str, pk.Mask] = {
    "full": pk.Full(),
    "prefix": pk.Prefix(5, 4),
    "prefix-rows": pk.Prefix(rows=3),
    "index": pk.Index([0, 2, 7], [1, 3, 4]),
    "index-cols": pk.Index(cols=[0, 5]),
    "block": pk.Block(torch.tensor([[True, False], [False, True]]), 4),
    "element": pk.Element(torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) < 0.5),
    "packed": pk.Packed([0, 1, 8, 13, 40, 47]),
}

Make = Callable[..., dict[str, Any]]


@pytest.fixture(params=MASKS.values(), ids=MASKS)
def mask(request: pytest.FixtureRequest) -> pk.Mask:
    return request.param


@pytest.fixture
def case(mask: pk.Mask) -> LinearCase:
    return LinearCase("", (7,), *SHAPE, mask)


@pytest.fixture
def make(case: LinearCase) -> Make:
    """Keyword arguments of ``case``, with changes; every tensor requires a gradient."""

    def make(**changes: Any) -> dict[str, Any]:
        return replace(case, **changes).make(requires_grad=True)

    return make


@pytest.fixture
def small_layers_use_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers above are so small that plain PyTorch would do for a Prefix."""
    monkeypatch.setattr("partial_kernels.submatrix.function.SMALL", 0)


@pytest.fixture
def inductor() -> None:
    """Skips where torch.compile's default backend cannot build code for the CPU."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    if " " in torch.__file__:
        pytest.skip("inductor does not quote the path of torch for the linker: it has a space")
