"""Low-rank layers: any size, any rank, any stride, more than one tile a side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import partial_kernels as pk
from partial_kernels._core.linear_cases import WEIGHT_LAYOUTS, X_LAYOUTS, doubled, results
from partial_kernels._core.testing import assert_within_budget
from partial_kernels._core.tiles import Tile, choosing
from partial_kernels.lfc.cases import Case, check, plain_lfc
from partial_kernels.lfc.kernels import CANDIDATES, _merge_precision
from partial_kernels.lfc.reference import CORE, MERGE

# Plain PyTorch's errors must not be small by luck: where tokens differ and every result has many
# elements they are not; where all have few, ``check`` counts the terms. Hence no thin matrices.
DISTINCT = sorted(X_LAYOUTS.keys() - {"expanded"})
FEW, MANY = st.integers(1, 9), st.integers(10, 150)


@st.composite
def cases(draw: Any) -> Case:
    core, size = draw(st.booleans()), draw(st.sampled_from([FEW, MANY]))
    return Case(
        "",
        (draw(st.just(0) | size),),
        draw(size),
        draw(size),
        draw(st.sampled_from([0, 1, 17, 130]) | size),
        core,
        "auto" if core else "merged",
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(DISTINCT)),
        weight_layout=draw(st.sampled_from(sorted(WEIGHT_LAYOUTS))),
    )


@settings(max_examples=80)
@given(cases())
def test_any_layer(case: Case) -> None:
    check(case, impl="triton")


@pytest.mark.parametrize("kernel", CANDIDATES)
@pytest.mark.parametrize("which", [0, -1])
def test_other_tiles(kernel: str, which: int) -> None:
    taken: list[str] = []

    def choose(key: str, default: Tile) -> Tile:
        taken.append(key)
        return CANDIDATES[kernel][which]

    case = Case("", (200,), 150, 100, 40, kernel == "lfc_core", "merged")
    with choosing(choose):
        check(case, impl="triton")
    assert all(key.startswith(f"{kernel} ") for key in taken)
    assert len(taken) == (2 if case.core else 1)


@settings(max_examples=20)
@given(
    frozen=st.sets(st.sampled_from(["x", "u", "v", "bias"]), max_size=3),
    core=st.booleans(),
    rank=st.sampled_from([1, 17]),
)
def test_second_derivatives(frozen: set[str], core: bool, rank: int) -> None:
    case = Case("", (40,), 13, 21, rank, core, "merged")
    made = case.make()
    dy = torch.randn(40, 13, generator=torch.Generator().manual_seed(2))

    def squares(function: Any, arguments: dict[str, Any], dy: Tensor) -> list[Tensor]:
        """Gradients of the sum of the first gradients' squares."""
        leaves = {
            name: value.detach().requires_grad_(name not in frozen)
            for name, value in arguments.items()
            if isinstance(value, Tensor)
        }
        y = function(**{**arguments, **leaves})
        needed = [leaf for leaf in leaves.values() if leaf.requires_grad]
        dy = dy.detach().requires_grad_()
        grads = torch.autograd.grad(y, needed, dy, create_graph=True)
        loss = sum(grad.square().sum() for grad in grads)
        return [
            g for g in torch.autograd.grad(loss, [*needed, dy], allow_unused=True) if g is not None
        ]

    def ours(**arguments: Any) -> Tensor:
        return pk.lfc_linear(**arguments, impl="triton")

    found = zip(
        squares(ours, made, dy),
        squares(plain_lfc, made, dy),
        squares(plain_lfc, doubled(made), dy.double()),
        strict=True,
    )
    for actual, plain, exact in found:
        assert_within_budget(actual, plain, exact)


@pytest.mark.parametrize("core", [False, True])
def test_factors_of_another_dtype_are_cast_as_they_are_loaded(core: bool) -> None:
    made = Case("", (70,), 50, 90, 17, core, "merged").make()
    dy = torch.randn(70, 50)
    outcomes: list[dict[str, Tensor]] = []
    for impl in ("triton", "reference"):
        with torch.autocast("cpu", torch.float16):
            outcomes.append(results(pk.lfc_linear, {**made, "impl": impl}, dy.half()))
    exact = results(plain_lfc, doubled(made), dy.double())
    for name, actual in outcomes[0].items():
        assert actual.dtype == (torch.float16 if name == "y" else torch.float32)
        assert_within_budget(actual, outcomes[1][name], exact[name], what=name)


def test_few_tokens_of_a_wide_layer_share_its_outputs() -> None:
    # One block of tokens, whose outputs ten programs divide among themselves.
    check(Case("", (5,), 300, 40, 9, core=True), impl="triton")
    check(Case("", (33,), 320, 400, 9, core=True), impl="triton")


@pytest.mark.parametrize("shape", [(3, 0, 4, 2), (3, 4, 0, 2), (0, 4, 5, 2), (3, 4, 5, 0)])
@pytest.mark.parametrize("bias", [False, True])
def test_nothing_to_sum(shape: tuple[int, int, int, int], bias: bool) -> None:
    tokens, outputs, inputs, rank = shape
    x, u, v = torch.randn(tokens, inputs), torch.randn(rank, inputs), torch.randn(outputs, rank)
    b = torch.randn(outputs) if bias else None
    for ours, plain in zip(CORE(x, u, v, b, "triton"), CORE(x, u, v, b, "reference"), strict=True):
        torch.testing.assert_close(ours, plain)
    weight = torch.randn(outputs, inputs)
    merged = MERGE(weight, u, v, torch.float16, "triton")
    torch.testing.assert_close(merged, MERGE(weight, u, v, torch.float16, "reference"))
    assert merged.is_contiguous()


def test_merging_to_16_bits_rounds_once() -> None:
    made = Case("", (1,), 70, 130, 40).make()
    weight, u, v = made["weight"], made["u"], made["v"]
    merged = MERGE(weight, u, v, torch.float16, "triton")
    exact = weight.double() + v.double() @ u.double()
    # Half a unit in the last place, and the sum's error in fp32.
    assert ((merged.double() - exact).abs() <= 0.501 * 2**-10 * exact.abs() + 1e-5).all()


def test_what_it_refuses() -> None:
    x, u, v = torch.ones(2, 3), torch.ones(257, 3), torch.ones(4, 257)
    with pytest.raises(RuntimeError, match="h stays on chip up to rank 256, got 257"):
        pk.lfc_linear(x, None, u, v, impl="triton")
    double = {k: t.double() for k, t in {"x": x, "u": u[:2], "v": v[:, :2]}.items()}
    for weight in (None, torch.ones(4, 3).double()):
        with pytest.raises(RuntimeError, match=r"fp32, bf16 and fp16, got torch\.float64"):
            pk.lfc_linear(**double, weight=weight, form="merged", impl="triton")


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ((4096, 2048, 2048, 128), None),
        ((1, 512, 512, 16), None),
        ((4097, 512, 512, 16), "with many tokens, a launch is little to save"),
        ((1024, 512, 512, 129), "with a high rank, factors are much to read for every block"),
        ((1024, 2049, 512, 16), "with wide layers, one program has much to do"),
        ((1024, 512, 2049, 16), "with wide layers, one program has much to do"),
    ],
)
def test_auto_takes_the_core_where_launches_count(
    shape: tuple[int, int, int, int], why: str | None
) -> None:
    tokens, outputs, inputs, rank = shape
    meta = {"device": "meta"}
    factors = torch.empty(rank, inputs, **meta), torch.empty(outputs, rank, **meta)
    _, choice = CORE.choose(torch.empty(tokens, inputs, **meta), *factors, None, "auto")
    assert (choice.backend == "triton") == (why is None)
    assert why is None or choice.reasons["triton"] == f"two products of cuBLAS: {why}"


def test_auto_leaves_exact_products_of_high_rank_to_cublas() -> None:
    def backend(rank: int, dtype: torch.dtype) -> str | None:
        weight, u, v = (torch.empty(s, device="meta") for s in ((8, 8), (rank, 8), (8, rank)))
        return MERGE.choose(weight, u, v, dtype, "auto")[1].backend

    assert backend(64, torch.float32) == backend(65, torch.bfloat16) == "triton"
    assert backend(65, torch.float32) == backend(65, torch.float16) == "reference"
    assert [_merge_precision(d) for d in (torch.bfloat16, torch.float16)] == ["tf32", "ieee"]
