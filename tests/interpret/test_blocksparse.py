"""Products of Block masks: any size, any stride, any blocks; what is made of a mask once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import partial_kernels as pk
from partial_kernels._core.linear_cases import WEIGHT_LAYOUTS, X_LAYOUTS, LinearCase, check
from partial_kernels.blocksparse import kernels, reference
from partial_kernels.blocksparse.kernels import SIZES, lists
from partial_kernels.blocksparse.reference import on
from partial_kernels.masks import Block


@st.composite
def cases(draw: Any) -> LinearCase:
    outputs, inputs = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    size = draw(st.sampled_from(SIZES))
    rows, columns = -(-outputs // size), -(-inputs // size)
    bits = st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)
    return LinearCase(
        "",
        (draw(st.integers(0, 150)),),
        outputs,
        inputs,
        Block(torch.tensor(draw(bits)).view(rows, columns), size),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        bias=draw(st.booleans()),
        x_layout=draw(st.sampled_from(sorted(X_LAYOUTS))),
        weight_layout=draw(st.sampled_from(sorted(WEIGHT_LAYOUTS))),
    )


@settings(max_examples=60)
@given(cases())
def test_any_product(case: LinearCase) -> None:
    check(case, impl="triton")


def test_tiles_of_several_groups() -> None:
    bitmap = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    check(LinearCase("", (600,), 48, 32, Block(bitmap, 16)), impl="triton")


def test_a_weight_of_another_dtype_is_cast_as_it_is_loaded() -> None:
    x, weight = torch.randn(5, 32).half(), torch.randn(48, 32)
    bitmap = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    ops = torch.ops.partial_kernels
    y, expected = (
        ops.blocksparse_forward(x, weight, None, bitmap, 16, impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(y, expected)
    dweight, expected = (
        ops.blocksparse_dweight(y, x, weight, bitmap, 16, impl) for impl in ("triton", "reference")
    )
    assert dweight.dtype == torch.float32
    # The reference takes the product in fp16.
    torch.testing.assert_close(dweight, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("size", [1, 8, 24, 256])
def test_other_blocks_are_refused(size: int) -> None:
    mask = Block(torch.ones(1, 1, dtype=torch.bool), size)
    x, weight = torch.ones(2, size), torch.ones(size, size)
    with pytest.raises(RuntimeError, match=f"its blocks are of 16, 32, 64 or 128, got {size}"):
        pk.masked_linear(x, weight, mask=mask, impl="triton")


@pytest.mark.parametrize(("size", "most"), [(16, 10), (32, 20), (64, 45), (128, 65)])
def test_auto_takes_it_where_it_is_faster(size: int, most: int) -> None:
    x, weight = torch.ones(1, 10 * size), torch.ones(10 * size, 10 * size)
    for kept, faster in ((most, True), (most + 1, False)):
        mask = Block((torch.arange(100) < kept).view(10, 10), size)
        choice = pk.explain("masked_linear", x, weight, mask=mask)
        assert (choice.backend == "triton") == faster
        if not faster:
            assert choice.reasons["triton"] == (
                f"cuBLAS is faster where {kept} of 100 blocks are kept"
            )


def test_lists_of_kept_blocks() -> None:
    bitmap = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    for by, rows in (("rows", bitmap), ("columns", bitmap.mT)):
        order, counts, kept = lists(bitmap, by, bitmap.device)
        assert counts.tolist() == [int(row.sum()) for row in rows]
        assert order.tolist() == sorted(range(len(rows)), key=lambda r: -int(rows[r].sum()))
        assert kept.is_contiguous()
        for row, columns in zip(rows, kept.tolist(), strict=True):
            assert columns[: int(row.sum())] == row.nonzero().flatten().tolist()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_lists_are_made_once_for_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    held = kernels.derived

    def counted(source: Any, name: str, make: Any) -> Any:
        return held(source, name, lambda: (made.append(name), make())[1])

    for module in (kernels, reference):
        monkeypatch.setattr(module, "derived", counted)
    mask = Block(torch.arange(100).view(10, 10) % 37 == 0, 16)
    x, weight = (torch.randn(n, 160, requires_grad=True) for n in (3, 160))
    compiled = torch.compile(pk.masked_linear, backend="aot_eager", fullgraph=True)
    for function in (compiled, pk.masked_linear, compiled, pk.masked_linear):
        function(x, weight, mask=mask).sum().backward()
    assert sorted(made) == ["columns", "kept", "rows"]


def test_a_bitmap_is_copied_to_a_device_once() -> None:
    bitmap, meta = torch.ones(2, 3, dtype=torch.bool), torch.device("meta")
    assert on(bitmap.device, bitmap) is bitmap
    with torch.inference_mode():
        copied = on(meta, bitmap)
    assert copied.device == meta and on(meta, bitmap) is copied and not copied.is_inference()
