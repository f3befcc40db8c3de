"""The compiled library's kernels, each with every ISA that this processor runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from partial_kernels._native import native_status

_status = native_status()
_library: Any = importlib.import_module("partial_kernels._C") if _status.available else None


@pytest.fixture(params=_status.info["isas"] if _status.info else ["portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The ISA in use."""
    if _library is None:
        pytest.skip(f"no compiled library: {_status.reason}")
    before = _library.isa()
    _library.set_isa(request.param)
    yield request.param
    _library.set_isa(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
