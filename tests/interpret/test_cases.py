"""Every family's Triton kernels, interpreted, on every case of the family."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from partial_kernels._core import discovery
from partial_kernels.masks import Full

# bf16 arithmetic is wrong in the interpreter.
DTYPES = {torch.float32, torch.float16}

CASES = {
    f"{family}-{case.name}": (module, case)
    for family, module in discovery.cases()
    if find_spec(f"partial_kernels.{family}.kernels")
    for case in module.CASES
    # A full mask is one plain PyTorch call.
    if case.dtype in DTYPES and case.mask != Full()
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    module: Any
    module, case = CASES[name]
    module.check(case, impl="triton")
