"""Every family's Triton kernels, interpreted, on every case of the family."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from partial_kernels._core import discovery
from partial_kernels.masks import Block, Full

# bf16 arithmetic is wrong in the interpreter.
DTYPES = {torch.float32, torch.float16}
# Others, which fill no tensor core, must be refused.
BLOCKS = {16, 32, 64, 128}

CASES = {
    f"{family}-{case.name}": (module, case)
    for family, module in discovery.cases()
    if find_spec(f"partial_kernels.{family}.kernels")
    for case in module.CASES
    if case.dtype in DTYPES
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    module: Any
    module, case = CASES[name]
    mask = getattr(case, "mask", None)
    if mask == Full() or getattr(case, "plain", False):
        pytest.skip("plain PyTorch alone computes it")
    if isinstance(mask, Block) and mask.size not in BLOCKS:
        with pytest.raises(RuntimeError, match="its blocks are of 16, 32, 64 or 128"):
            module.check(case, impl="triton")
        return
    module.check(case, impl="triton")
