"""Every case of every family on the GPU, on every backend that takes it: right, and twice the same.

``check`` holds results against fp64, computes in memory that holds NaN until written, and asks for
exact zeros off a mask.
"""

from __future__ import annotations

from typing import Any

import pytest

from partial_kernels._core import discovery
from tests.gpu.toolbox import (
    DEVICE,
    DRY_RUN,
    FAMILIES,
    OWN,
    assert_same,
    call_of,
    copies,
    impl_of,
    name_of,
    refusal,
    spread,
)

pytestmark = pytest.mark.gpu

CASES = {
    name_of(family, backend, case): (family, backend, case)
    for family, module in FAMILIES.items()
    for backend in filter(None, ("reference", OWN.get(family)))
    for case in (spread(module.CASES, 40) if DRY_RUN else module.CASES)
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    family, backend, case = CASES[name]
    if (why := refusal(family, case, backend)) is not None:
        pytest.skip(why)
    FAMILIES[family].check(case, impl=impl_of(backend), device=DEVICE)


@pytest.mark.parametrize("name", [name for name in CASES if "-reference-" not in name])
def test_a_second_run_gives_the_same_bits(name: str) -> None:
    family, backend, case = CASES[name]
    if (why := refusal(family, case, backend)) is not None:
        pytest.skip(why)
    first, second = (call_of(family, case, backend) for _ in range(2))
    assert_same(copies(first.run()), copies(second.run()))


# Skipped for a reason are: fp64 in Triton, blocks that fill no tensor core, what plain PyTorch
# alone computes.
AT_LEAST = {"blocksparse": 0.5, "lfc": 0.6}


@pytest.mark.parametrize("family", OWN)
def test_most_cases_are_run(family: str) -> None:
    cases: tuple[Any, ...] = FAMILIES[family].CASES
    refused = {case.name: refusal(family, case, OWN[family]) for case in cases}
    taken = [name for name, why in refused.items() if why is None]
    assert len(taken) >= AT_LEAST.get(family, 0.7) * len(cases), refused


@pytest.mark.skipif(DRY_RUN, reason="nothing is built in a dry run")
def test_every_backend_is_loaded() -> None:
    missing = discovery.unavailable()
    assert not {"triton", "cuda"} & missing.keys(), missing
