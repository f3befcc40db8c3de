"""Triton backends for Block masks on CUDA: products that skip the blocks which are not kept.

A block of the output's columns is summed over the blocks that are kept with it::

    y[:, r] = sum over kept (r, c) of x[:, c] W[r, c]^T (+ b[r])     one block row r a program
    dx[:, c] = sum over kept (r, c) of dy[:, r] W[r, c]              one block column c a program
    dW[r, c] = dy[:, r]^T x[:, c]                                    some r of one c a program

Small blocks are taken several at a time, so that tensor cores are filled: in a product along the
sum, in dW side by side. Indices go in runs of a block, which adjoin in memory. Sums are in fp32, in
one order.
"""

# Triton's language has no types.
# pyright: basic

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_kernels._core.crossovers import crossover, dtype_name
from partial_kernels._core.derived import derived
from partial_kernels._core.gpu import ceil_div, launch, precision, refuses
from partial_kernels._core.tiles import Tile, bucket, tuned
from partial_kernels.blocksparse.reference import OPS, dense_is_faster, on


@triton.jit
def _places(kept, count, first, SIZE: tl.constexpr, N: tl.constexpr):
    """N rows or columns of the kept blocks, from the first on, and whether there are so many."""
    RUN: tl.constexpr = SIZE if SIZE < N else N
    number = first + tl.arange(0, N)
    inside = number // SIZE < count
    block = tl.load(kept + number // SIZE, mask=inside, other=0)
    place = block.to(tl.int64) * SIZE + number % SIZE
    # Without the hint they would be loaded one by one.
    return tl.max_contiguous(tl.multiple_of(place, RUN), RUN), inside


@triton.jit
def _product(
    a,
    b,
    bias,
    c,
    order,
    counts,
    kept,
    M,
    N,
    K,
    kept_n,
    a_m,
    a_k,
    b_k,
    b_n,
    bias_n,
    c_m,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, SIZE)
    program = tl.program_id(0)
    group, within = program // (GROUP * tiles_n), program % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    block = tl.load(order + within // height)
    m = ((group * GROUP + within % height) * BM + tl.arange(0, BM)).to(tl.int64)
    n = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m_inside, n_inside = m < M, n < N
    a_at, b_at = a + m[:, None] * a_m, b + n[None, :] * b_n
    count = tl.load(counts + block)
    kept += block * kept_n
    total = tl.zeros((BM, SIZE), dtype=tl.float32)
    # Where no block is kept there is no step.
    for first in range(0, count * SIZE, BK):
        k, k_inside = _places(kept, count, first, SIZE, BK)  # pyright: ignore[reportGeneralTypeIssues]
        k_inside &= k < K
        a_mask = m_inside[:, None] & k_inside[None, :]
        b_mask = k_inside[:, None] & n_inside[None, :]
        a_tile = tl.load(a_at + k[None, :] * a_k, mask=a_mask, other=0.0)
        b_tile = tl.load(b_at + k[:, None] * b_k, mask=b_mask, other=0.0)
        total = tl.dot(a_tile, b_tile.to(a_tile.dtype), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + n * bias_n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    c_at = c + m[:, None] * c_m + n[None, :]
    tl.store(c_at, total.to(c.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


@triton.jit
def _dweight(
    dy,
    x,
    dweight,
    counts,
    kept,
    M,
    N,
    T,
    kept_n,
    dy_t,
    dy_m,
    x_t,
    x_n,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    # Without it Triton 3.6 serialises wgmma in half of the configurations.
    tl.assume(T > 0)
    program, blocks = tl.program_id(0), tl.cdiv(N, SIZE)
    block, first = program % blocks, program // blocks * BM
    count = tl.load(counts + block)
    # The grid has room for columns of which every block is kept.
    if first >= count * SIZE:
        return
    m, m_inside = _places(kept + block * kept_n, count, first, SIZE, BM)
    m_inside &= m < M
    n = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    t = tl.arange(0, BT).to(tl.int64)
    n_inside = n < N
    dy_at = dy + m[:, None] * dy_m + t[None, :] * dy_t
    x_at = x + t[:, None] * x_t + n[None, :] * x_n
    total = tl.zeros((BM, SIZE), dtype=tl.float32)
    for first_token in range(0, T, BT):
        t_inside = t < T - first_token
        dy_tile = tl.load(dy_at, mask=m_inside[:, None] & t_inside[None, :], other=0.0)
        x_tile = tl.load(x_at, mask=t_inside[:, None] & n_inside[None, :], other=0.0)
        total = tl.dot(dy_tile, x_tile, total, input_precision=PRECISION)
        dy_at += BT * dy_t
        x_at += BT * x_t
    at = dweight + m[:, None] * N + n[None, :]
    tl.store(at, total.to(dweight.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


class Lists(NamedTuple):
    """Of each row of a bitmap ``[R, C]``, which blocks are kept."""

    order: Tensor
    """``[R]``: rows, those of most blocks first, that the longest programs do not start last."""
    counts: Tensor
    """``[R]``: how many blocks are kept."""
    kept: Tensor
    """``[R, C]``: the columns of these, ascending; then the others."""


def lists(bitmap: Tensor, by: str, device: torch.device) -> Lists:
    """Of the bitmap's rows or, by "columns", of its columns; made once, on the device alone."""
    bitmap = on(device, bitmap)

    def make() -> Lists:
        rows = (bitmap if by == "rows" else bitmap.mT).to(torch.uint8)
        counts = rows.sum(1, dtype=torch.int32)
        order = counts.argsort(descending=True, stable=True).int()
        kept = rows.argsort(dim=1, descending=True, stable=True).int().contiguous()
        return Lists(order, counts, kept)

    return derived(bitmap, by, make)


SIZES = (16, 32, 64, 128)
"""Blocks that these kernels take."""

# From this share of the blocks on, cuBLAS takes the dense product in less time on an H200: small
# blocks read x or dy from the L2 cache once for each row or column of blocks. By the bytes,
# untimed.
BREAK_EVEN = {16: 0.10, 32: 0.20, 64: 0.45, 128: 0.65}


def _default(a: Tensor, tokens: int, size: int) -> Tile:
    """A product's tile: tall, since a block is its whole width."""
    num_warps = 8 if size >= 64 else 4
    # The list to read before each tile takes two of the pipeline's stages.
    if a.dtype == torch.float32:
        height = 64 if precision() == "ieee" else 128
        return _sized(height, 32, num_warps=num_warps, num_stages=5)
    return _sized(128 if tokens > 64 else 64, 64, num_warps=num_warps, num_stages=5)


def _dweight_default(a: Tensor, size: int) -> Tile:
    """dW's tile: rows of blocks until tensor cores are filled, and one block wide."""
    num_warps = 8 if size == 128 else 4
    if a.dtype == torch.float32:
        height = 64 if precision() == "ieee" else 128
        return _dweight_sized(height, 32, num_warps=num_warps, num_stages=4)
    return _dweight_sized(128, 64, num_warps=num_warps, num_stages=4)


def _sized(bm: int, bk: int, **options: int) -> Tile:
    return Tile({"BM": bm, "BK": bk, "GROUP": 8}, **options)


def _dweight_sized(bm: int, bt: int, **options: int) -> Tile:
    return Tile({"BM": bm, "BT": bt}, **options)


CANDIDATES = {
    "blocksparse_product": tuple(
        _sized(bm, bk, num_warps=num_warps, num_stages=num_stages)
        for bm, bk, num_warps in (
            (64, 64, 4),
            (128, 64, 4),
            (128, 64, 8),
            (128, 128, 4),
            (128, 128, 8),
            (256, 64, 8),
            (64, 32, 4),
        )
        for num_stages in (3, 5, 6)
    ),
    "blocksparse_dweight": tuple(
        _dweight_sized(bm, bt, num_warps=num_warps, num_stages=num_stages)
        for bm, bt, num_warps in (
            (64, 64, 4),
            (128, 64, 4),
            (128, 64, 8),
            (128, 128, 8),
            (256, 64, 8),
            (64, 32, 4),
        )
        for num_stages in (3, 4)
    ),
}
"""Tiles that ``maskedtrain bench --tune`` tries."""


def _multiply(
    a: Tensor, b: Tensor, bias: Tensor | None, shape: tuple[int, int, int], of: Lists, size: int
) -> Tensor:
    """``a b + bias [M, N]`` with, in each block of b's columns, the kept blocks of rows."""
    m, n, k = shape
    c = a.new_empty(m, n)
    if m == 0 or n == 0:
        return c
    sizes = f"{bucket(m, n, k)} {a.dtype} blocks of {size}"
    tile = tuned("blocksparse_product", sizes, a.device, _default(a, m, size))
    grid = (ceil_div(m, tile.sizes["BM"]) * ceil_div(n, size),)
    strides = *a.stride(), *b.stride(), 0 if bias is None else bias.stride(0), c.stride(0)
    operands = a, b, bias, c, *of, m, n, k, of.kept.shape[1], *strides
    launch(_product, grid, *operands, tile=tile, SIZE=size, PRECISION=precision())
    return c


def _supports(*args: Any) -> str | None:
    if why := refuses(*(a for a in args if isinstance(a, Tensor) and a.is_floating_point())):
        return why
    size: int = args[-1]
    return None if size in SIZES else f"its blocks are of 16, 32, 64 or 128, got {size}"


def _declines(*args: Any) -> str | None:
    first: Tensor = args[0]
    size: int = args[-1]
    key = f"blocksparse triton {size} {dtype_name(first.dtype)}"
    return dense_is_faster(args[-2], crossover(key, first.device, BREAK_EVEN[size]), "cuBLAS")


@OPS.forward.backend("triton", _supports, _declines)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, bitmap: Tensor, size: int) -> Tensor:
    outputs, inputs = weight.shape
    shape = x.shape[0], outputs, inputs
    return _multiply(x, weight.mT, bias, shape, lists(bitmap, "rows", x.device), size)


@OPS.dx.backend("triton", _supports, _declines)
def _(dy: Tensor, weight: Tensor, width: int, bitmap: Tensor, size: int) -> Tensor:
    shape = dy.shape[0], width, dy.shape[1]
    return _multiply(dy, weight, None, shape, lists(bitmap, "columns", dy.device), size)


@OPS.dweight.backend("triton", _supports, _declines)
def _(dy: Tensor, x: Tensor, weight: Tensor, bitmap: Tensor, size: int) -> Tensor:
    (tokens, outputs), inputs = dy.shape, x.shape[1]
    dweight = weight.new_zeros(weight.shape)
    if not tokens or not dweight.numel():
        return dweight
    _, counts, kept = lists(bitmap, "columns", x.device)
    sizes = f"{bucket(outputs, inputs, tokens)} {x.dtype} blocks of {size}"
    tile = tuned("blocksparse_dweight", sizes, x.device, _dweight_default(x, size))
    # As many programs a column as if all of its blocks were kept: nobody asks the device.
    grid = (ceil_div(inputs, size) * ceil_div(kept.shape[1] * size, tile.sizes["BM"]),)
    operands = dy, x, dweight, counts, kept, outputs, inputs, tokens, kept.shape[1]
    strides = *dy.stride(), *x.stride()
    launch(_dweight, grid, *operands, *strides, tile=tile, SIZE=size, PRECISION=precision())
    return dweight
