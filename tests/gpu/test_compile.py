"""torch.compile on the GPU: one call of every family in one graph, inductor's code around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core.testing import assert_within_budget
from tests.gpu.toolbox import (
    DEVICE,
    DRY_RUN,
    FAMILIES,
    OWN,
    assert_same,
    call_of,
    copies,
    impl_of,
    set_to,
)

pytestmark = [
    pytest.mark.gpu,
    # What torch's compiler warns of (its own use of torch, fp32 products) is another in every
    # release.
    pytest.mark.filterwarnings("ignore"),
]

# Inductor's code for the CPU would take a dry run too long.
BACKEND = "aot_eager" if DRY_RUN else "inductor"
LAYERS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "index-aligned-bf16": ("submatrix", pk.masked_linear),
    "prefix-aligned-bf16": ("submatrix", pk.masked_linear),
    "block-aligned-bf16": ("blocksparse", pk.masked_linear),
    "merged-aligned": ("lfc", pk.lfc_linear),
    "core-aligned-bf16": ("lfc", pk.lfc_linear),
    "packed-aligned-bf16": ("packed", pk.packed_linear),
    "row-many-bf16": ("topk", pk.topk_linear),
    "batch-many-bf16": ("topk", pk.topk_linear),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def case_of(family: str, name: str) -> Any:
    return next(case for case in FAMILIES[family].CASES if case.name == name)


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    family, function = LAYERS[name]
    made = case_of(family, name).make(0, DEVICE, requires_grad=True)

    def step(**made: Any) -> Tensor:
        return 2 * function(**made, impl=impl_of(OWN[family])).relu()

    def results(step: Callable[..., Tensor]) -> list[Tensor]:
        y = step(**made)
        leaves = [v for v in made.values() if isinstance(v, Tensor) and v.requires_grad]
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    compiled = torch.compile(step, backend=BACKEND, fullgraph=True)
    for mine, plain in zip(results(compiled), results(step), strict=True):
        assert_within_budget(mine, plain, plain.double(), what=name)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("optim", "adamw-prefix-2d"),
        ("optim", "sgd-element-2d"),
        ("select", "row-normal"),
        ("stats", "prefix-2d"),
    ],
)
def test_call(family: str, name: str) -> None:
    """Twice, the second time with other numbers."""
    case = case_of(family, name)
    plain, ours = (call_of(family, case, OWN[family]) for _ in range(2))
    compiled = torch.compile(ours.run, backend=BACKEND, fullgraph=True)
    for seed in (0, 1):
        given = call_of(family, case, OWN[family], seed).inputs
        for call in (plain, ours):
            set_to(call, given)
        assert_same(copies(compiled()), copies(plain.run()))
