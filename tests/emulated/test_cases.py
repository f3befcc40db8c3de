"""Every family's CUDA kernels, emulated, on every case of the family."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from partial_kernels._core import discovery
from partial_kernels._native import cuda_status

FAMILIES = [
    (family, module)
    for family, module in discovery.cases()
    if find_spec(f"partial_kernels.{family}.cuda")
]
CASES = {
    f"{family}-{case.name}": (module, case) for family, module in FAMILIES for case in module.CASES
}


def test_the_library_is_loaded() -> None:
    assert cuda_status().available, cuda_status().reason
    assert {family for family, _ in FAMILIES} == {"optim", "select", "stats", "topk"}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    module: Any
    module, case = CASES[name]
    module.check(case, impl="cuda")
