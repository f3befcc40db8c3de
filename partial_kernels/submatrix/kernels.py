"""Triton backends for Prefix and Index masks on CUDA: one product that gathers as it loads.

``C[M, N] = A[M, K] B[K, N] (+ bias[N])``, with any strides, in tiles:

==========  ======  ============  =======================================
            A       B             picked by an index, or leading
==========  ======  ============  =======================================
forward     x       W[S, C]^T     k: columns of W, n: rows of W and bias
dx          dy      W[S, C]       k: rows of W, n: columns of W
dW[S, C]    dy^T    x             m, n: where C goes in dW
==========  ======  ============  =======================================

Rows of W are gathered at no cost; columns, which adjoin in memory, only where an index is sorted
into runs. Sums are in fp32, in one order. Tiles of A's rows are taken in groups, which share tiles
of B in the L2 cache.
"""

# Triton's language has no types.
# pyright: basic

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from partial_kernels._core.gpu import (
    capability,
    ceil_div,
    launch,
    precision,
    refuses,
    roomy,
)
from partial_kernels._core.tiles import Tile, bucket, tuned
from partial_kernels.submatrix.reference import OPS


@triton.jit
def _product(
    a,
    b,
    bias,
    c,
    k_index,
    n_index,
    m_place,
    n_place,
    M,
    N,
    K,
    a_m,
    a_k,
    b_k,
    b_n,
    bias_n,
    c_m,
    c_n,
    PRECISION: tl.constexpr,
    A_TMA: tl.constexpr,
    B_TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    # Without it Triton 3.6 serialises wgmma in half of the configurations.
    tl.assume(K > 0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    group, within = program // (GROUP * tiles_n), program % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    m_first, n_first = (group * GROUP + within % height) * BM, (within // height) * BN
    m, n, k = m_first + tl.arange(0, BM), n_first + tl.arange(0, BN), tl.arange(0, BK)
    m_inside, n_inside = m < M, n < N
    n_at = n.to(tl.int64)
    if n_index is not None:
        n_at = tl.load(n_index + n, mask=n_inside, other=0)
    if not A_TMA:
        a_at = a + m.to(tl.int64)[:, None] * a_m + k[None, :] * a_k
    if not B_TMA:
        b_at = b + n_at[None, :] * b_n
        if k_index is None:
            b_at += k[:, None] * b_k
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        k_inside = k < K - first
        if A_TMA == "rows":
            a_tile = a.load([m_first, first])
        elif A_TMA == "columns":
            a_tile = a.load([first, m_first]).T
        else:
            a_tile = tl.load(a_at, mask=m_inside[:, None] & k_inside[None, :], other=0.0)
            a_at += BK * a_k
        b_mask = k_inside[:, None] & n_inside[None, :]
        if B_TMA == "rows":
            b_tile = b.load([first, n_first])
        elif B_TMA == "columns":
            b_tile = b.load([n_first, first]).T
        elif k_index is None:
            b_tile = tl.load(b_at, mask=b_mask, other=0.0)
            b_at += BK * b_k
        else:
            k_at = tl.load(k_index + first + k, mask=k_inside, other=0)
            b_tile = tl.load(b_at + k_at[:, None] * b_k, mask=b_mask, other=0.0)
        total = tl.dot(a_tile, b_tile.to(a_tile.dtype), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + n_at * bias_n, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    c_row, c_column = m.to(tl.int64), n.to(tl.int64)
    if m_place is not None:
        c_row = tl.load(m_place + m, mask=m_inside, other=0)
    if n_place is not None:
        c_column = tl.load(n_place + n, mask=n_inside, other=0)
    c_at = c + c_row[:, None] * c_m + c_column[None, :] * c_n
    tl.store(c_at, total.to(c.dtype.element_ty), mask=m_inside[:, None] & n_inside[None, :])


# Tokens from which on it costs less to gather rows first, for cuBLAS: gathering is 363 / T of a
# product's time on an H200, by its bytes; a quarter is what this kernel is taken to lose against
# cuBLAS, untimed.
_MANY_TOKENS = 1500


def _default(a: Tensor, m: int, n: int, gathers_k: bool, gathers_columns: bool) -> Tile:
    """Big tiles move fewest bytes; if there were few, smaller ones leave fewer processors idle."""
    tiles = ceil_div(m, 128) * ceil_div(n, 128)
    # An index to load before each tile of B takes two of the pipeline's stages.
    stages = 5 if gathers_k else 3
    if a.dtype == torch.float32 and precision() == "ieee":
        return _sized(64, 64, 32, num_warps=4, num_stages=stages)
    if a.dtype == torch.float32:
        return _sized(128, 128, 32, num_warps=8, num_stages=stages)
    if tiles < 66:
        return _sized(64, 64, 64, num_warps=4, num_stages=stages + 1)
    # Elsewhere, and loading number by number, the largest would not fit the registers.
    if tiles < 528 or gathers_columns or not roomy(a):
        return _sized(128, 128, 64, num_warps=8, num_stages=stages)
    return _sized(128, 256, 64, num_warps=8, num_stages=stages)


def _sized(bm: int, bn: int, bk: int, tma: int = 0, **options: int) -> Tile:
    return Tile({"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "TMA": tma}, **options)


def _described(
    matrix: Tensor, rows: int, columns: int, block: tuple[int, int], *, picked: bool
) -> tuple[Any, str]:
    """The matrix as a kernel's argument, and along which of its dimensions memory adjoins.

    From Hopper on, a descriptor has the tensor memory accelerator load whole tiles; it cannot
    gather there, and wants lines that begin at multiples of 16 bytes. In fp32, whose products may
    have to be taken on other cores, there is nothing to gain. "" is for plain pointers.
    """
    usable = capability(matrix) >= 90 and matrix.element_size() == 2 and not picked
    if not usable or matrix.data_ptr() % 16:
        return matrix, ""
    for along, view, sizes, tile in (
        ("rows", matrix, (rows, columns), block),
        ("columns", matrix.mT, (columns, rows), block[::-1]),
    ):
        line = view.stride(0) * view.element_size()
        if view.stride(1) == 1 and line % 16 == 0 and line > 0:
            return TensorDescriptor(view, list(sizes), [view.stride(0), 1], list(tile)), along
    return matrix, ""


CANDIDATES = {
    "submatrix": tuple(
        _sized(bm, bn, bk, tma, num_warps=num_warps, num_stages=num_stages)
        for bm, bn, bk, num_warps in (
            (64, 64, 64, 4),
            (64, 128, 64, 4),
            (128, 64, 64, 4),
            (128, 128, 64, 8),
            (128, 128, 32, 8),
            (128, 256, 64, 8),
            (256, 128, 64, 8),
            (64, 64, 32, 4),
        )
        for num_stages in (3, 4, 5)
        for tma in (0, 1)
    )
}
"""Tiles that ``maskedtrain bench --tune`` tries."""


def _multiply(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    shape: tuple[int, int, int],
    *,
    bias: Tensor | None = None,
    picked: tuple[Tensor | None, Tensor | None] = (None, None),
    placed: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    """``c = a b + bias`` for M, N, K: ``picked`` of b's rows and columns, ``placed`` in c's."""
    m, n, k = shape
    if m == 0 or n == 0:
        return
    if k == 0:
        c.zero_()
        if bias is not None:
            c += bias[:n] if picked[1] is None else bias.index_select(0, picked[1])
        return
    gathers_k, gathers_n = (index is not None for index in picked)
    gathers_columns = (gathers_k and b.stride(0) == 1) or (gathers_n and b.stride(1) == 1)
    sizes = f"{bucket(m, n, k)} {a.dtype}{' gathered' * gathers_k}{' columns' * gathers_columns}"
    tile = tuned("submatrix", sizes, a.device, _default(a, m, n, gathers_k, gathers_columns))
    grid = (ceil_div(m, tile.sizes["BM"]) * ceil_div(n, tile.sizes["BN"]),)
    strides = *a.stride(), *b.stride(), 0 if bias is None else bias.stride(0), *c.stride()
    bm, bn, bk = (tile.sizes[name] for name in ("BM", "BN", "BK"))
    from_a, from_b, a_tma, b_tma = a, b, "", ""
    if tile.sizes["TMA"]:
        from_a, a_tma = _described(a, m, k, (bm, bk), picked=False)
        from_b, b_tma = _described(b, k, n, (bk, bn), picked=picked != (None, None))
    operands = from_a, from_b, bias, c, *picked, *placed, m, n, k, *strides
    options = {"PRECISION": precision(), "A_TMA": a_tma, "B_TMA": b_tma}
    launch(_product, grid, *operands, tile=tile, **options)


def _supports(*args: Any) -> str | None:
    return refuses(*(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()))


def _declines(product: Tensor, *rest: Any) -> str | None:
    *_, rows, columns = rest
    if rows is None and columns is None:
        return "cuBLAS takes leading rows and columns where they are"
    if columns is not None:
        return "columns are gathered first, for cuBLAS"
    if product.shape[0] >= _MANY_TOKENS:
        return "rows are gathered first, for cuBLAS: there are many tokens"
    return None


def _kept(index: Tensor | None, leading: int) -> int:
    return leading if index is None else index.shape[0]


@OPS.forward.backend("triton", _supports, _declines)
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    (tokens, columns), kept = x.shape, _kept(row_index, rows)
    y = x.new_empty(tokens, kept)
    picked = col_index, row_index
    _multiply(x, weight.mT, y, (tokens, kept, columns), bias=bias, picked=picked)
    return y


@OPS.dx.backend("triton", _supports, _declines)
def _(
    dy: Tensor,
    weight: Tensor,
    width: int,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    (tokens, kept) = dy.shape
    dx = dy.new_empty(tokens, width)
    _multiply(dy, weight, dx, (tokens, width, kept), picked=(row_index, col_index))
    return dx


@OPS.dweight.backend("triton", _supports, _declines)
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rows: int,
    row_index: Tensor | None,
    col_index: Tensor | None,
) -> Tensor:
    (tokens, kept), columns = dy.shape, x.shape[1]
    dweight = weight.new_zeros(weight.shape)
    _multiply(dy.mT, x, dweight, (kept, columns, tokens), placed=(row_index, col_index))
    return dweight
