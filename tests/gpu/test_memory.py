"""What is in memory: no dense gradient of a packed layer, and tensors of over 2^31 elements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core.linear_cases import results
from partial_kernels._core.testing import assert_within_budget
from tests.gpu.toolbox import DEVICE, DRY_RUN, OWN, assert_same, impl_of

# One process for all of these: each takes tens of GB.
pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("memory")]

WIDE = 4096
# Beyond what 32 bits count, by more than one tile.
TOKENS = 300 if DRY_RUN else 2**31 // WIDE + 1000
TAIL = 256
HALF = {"dtype": torch.bfloat16, "device": DEVICE}


@pytest.fixture
def much_memory() -> None:
    if not DRY_RUN and torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB of free memory")


def layer(family: str) -> tuple[Any, dict[str, Any]]:
    """A function and its arguments without x, whose input or output is ``WIDE``."""
    torch.manual_seed(0)
    weight = torch.randn(128, WIDE, **HALF)
    if family == "submatrix":
        return pk.masked_linear, {"weight": weight, "mask": pk.Index(rows=range(0, 128, 2))}
    if family == "blocksparse":
        bitmap = torch.arange(WIDE // 128)[None] % 2 == 1
        return pk.masked_linear, {"weight": weight, "mask": pk.Block(bitmap, 128)}
    if family == "packed":
        index = torch.arange(5, weight.numel(), 997, device=DEVICE)
        values = torch.randn(len(index), **HALF)
        return pk.packed_linear, {"weight": weight, "values": values, "index": index}
    if family == "lfc":
        u, v = torch.randn(16, WIDE, **HALF), torch.randn(128, 16, **HALF)
        return pk.lfc_linear, {"weight": None, "u": u, "v": v}
    return pk.topk_linear, {"weight": weight.mT.contiguous(), "k": 4}


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("family", ["submatrix", "blocksparse", "packed", "lfc", "topk"])
def test_the_last_tokens_of_many(family: str) -> None:
    """With a gradient of theirs alone, results are those of a call with nothing but them."""
    function, arguments = layer(family)
    arguments["impl"] = impl_of(OWN[family])
    frozen = ("weight",) if family == "packed" else ()
    inputs = arguments["weight"].shape[1] if family == "topk" else WIDE
    x = torch.randn(TOKENS, inputs, **HALF)
    with torch.no_grad():
        outputs = function(x=x[:1], **arguments).shape[1]
    dy = torch.zeros(TOKENS, outputs, **HALF)
    dy[-TAIL:] = torch.randn(TAIL, outputs, **HALF)
    many = results(function, {"x": x, **arguments}, dy, frozen=frozen)
    few = results(function, {"x": x[-TAIL:], **arguments}, dy[-TAIL:], frozen=frozen)
    assert not bool(many["dx"][:-TAIL].any())
    many = {name: found[-TAIL:] if name in ("y", "dx") else found for name, found in many.items()}
    for name, found in many.items():
        assert_within_budget(found, few[name], few[name].double(), what=name)


def long_and_tail(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zeros that end with random numbers, and those alone."""
    long = torch.zeros(TOKENS * WIDE, dtype=dtype, device=DEVICE)
    long[-TAIL:] = torch.randn(TAIL, device=DEVICE).to(dtype).abs()
    return long, long[-TAIL:].clone()


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("packed", [False, True])
def test_the_last_elements_of_a_long_parameter(packed: bool) -> None:
    lists = [
        long_and_tail(dtype)
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    ]
    long, tail = ([[pair[i]] for pair in lists] for i in range(2))
    size = long[0][0].numel()
    mask: pk.Mask = pk.Full()
    if packed:
        mask = pk.Packed(torch.arange(size - TAIL, size, device=DEVICE))
        long = [long[0], *tail[1:]]
        tail = [tail[0], *([t[0].clone()] for t in tail[1:])]
    for tensors, chosen in ((long, mask), (tail, pk.Full())):
        pk.masked_adamw_(*tensors, [chosen], [2], lr=0.1, impl=impl_of("cuda"))
    assert_same([t[0][-TAIL:] for t in long], [t[0] for t in tail])
    assert packed or not bool(long[0][0][:-TAIL].any())


@pytest.mark.usefixtures("much_memory")
def test_stats_of_long_gradients() -> None:
    (g, few_g), (h, few_h) = (long_and_tail(torch.bfloat16) for _ in range(2))
    for mask, other in ((pk.Full(), pk.Full()), (pk.Prefix(TAIL), None)):
        found = pk.masked_stats([g], [h], [mask], impl=impl_of("cuda"))
        expected = pk.masked_stats([few_g], [few_h], [other], impl=impl_of("cuda"))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@pytest.mark.usefixtures("much_memory")
def test_selection_from_the_last_rows_of_many() -> None:
    x = torch.randn(TOKENS, WIDE, **HALF)
    found = pk.topk_select(x, 5, impl=impl_of("cuda"))[-TAIL:]
    assert torch.equal(found, pk.topk_select(x[-TAIL:], 5, impl=impl_of("cuda")))


@pytest.mark.skipif(DRY_RUN, reason="memory is counted on CUDA alone")
@pytest.mark.parametrize("needs_dx", [False, True])
def test_a_packed_backward_has_no_dense_gradient(needs_dx: bool) -> None:
    """Beside dx and the copy of W that it is the product with, next to nothing."""
    tokens, width = 2048, 4096
    x = torch.randn(tokens, width, **HALF, requires_grad=needs_dx)
    weight = torch.randn(width, width, **HALF)
    index = torch.randperm(width * width, device=DEVICE)[: width * width // 200].sort().values
    values = torch.zeros(len(index), **HALF, requires_grad=True)
    dy = torch.randn(tokens, width, **HALF)
    leaves = [values, x] if needs_dx else [values]

    def backward_bytes() -> int:
        y = pk.packed_linear(x, weight, values, index, impl="triton")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(y, leaves, dy)
        return torch.cuda.max_memory_allocated() - before

    # Workspaces and the list of positions are made once.
    backward_bytes()
    allowed = weight.nbytes // 4 + needs_dx * (x.nbytes + weight.nbytes)
    assert backward_bytes() <= allowed
