"""Triton backends on CUDA: the merging, and both thin products of a core in one kernel.

``merge`` reads W and writes W' once: V U is added, tile by tile, on the way.

``core``: a program takes a block of tokens, sums their ``h = x first^T``, [block, K], in registers,
and multiplies it with ``second`` while it is there; h, which a backward needs, is written on the
way. Where there are few blocks several programs share one: each has h anew and a part of y.

Sums are in fp32, in one order. Strides are any: the backward's ``dy V`` and ``dx = (dy V) U`` are a
core of the transposed factors.
"""

# Triton's language has no types.
# pyright: basic

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from partial_kernels._core.gpu import ceil_div, launch, precision, refuses
from partial_kernels._core.tiles import Tile, bucket, tuned
from partial_kernels.lfc.reference import CORE, MERGE

# T tokens, O outputs, I inputs, K rank

_PROCESSORS = 132
"""Streaming multiprocessors of an H200."""


@triton.jit
def _merge(
    weight,
    u,
    v,
    merged,
    O,
    I,
    K,
    weight_o,
    weight_i,
    u_k,
    u_i,
    v_o,
    v_k,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Without it Triton 3.6 serialises wgmma in half of the configurations.
    tl.assume(K > 0)
    tiles_i = tl.cdiv(I, BN)
    o = (tl.program_id(0) // tiles_i) * BM + tl.arange(0, BM)
    i = (tl.program_id(0) % tiles_i) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    o_inside, i_inside = o < O, i < I
    inside = o_inside[:, None] & i_inside[None, :]
    row, column, inner = o.to(tl.int64)[:, None], i.to(tl.int64)[None, :], k.to(tl.int64)
    v_at = v + row * v_o + inner[None, :] * v_k
    u_at = u + inner[:, None] * u_k + column * u_i
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        k_inside = k < K - first
        v_tile = tl.load(v_at, mask=o_inside[:, None] & k_inside[None, :], other=0.0)
        u_tile = tl.load(u_at, mask=k_inside[:, None] & i_inside[None, :], other=0.0)
        v_at += BK * v_k
        u_at += BK * u_k
        total = tl.dot(v_tile, u_tile, total, input_precision=PRECISION)
    weight_tile = tl.load(weight + row * weight_o + column * weight_i, mask=inside, other=0.0)
    total += weight_tile.to(tl.float32)
    tl.store(merged + row * I + column, total.to(merged.dtype.element_ty), mask=inside)


@triton.jit
def _core(
    x,
    first,
    second,
    bias,
    y,
    h,
    T,
    O,
    I,
    K,
    x_t,
    x_i,
    first_k,
    first_i,
    second_o,
    second_k,
    bias_o,
    PRECISION: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # Without it Triton 3.6 serialises wgmma in half of the configurations.
    tl.assume(I > 0)
    t, k, i, n = (
        tl.program_id(0) * BM + tl.arange(0, BM),
        tl.arange(0, RANK),
        tl.arange(0, BK),
        tl.arange(0, BN),
    )
    t_inside, k_inside = t < T, k < K
    token, rank = t.to(tl.int64)[:, None], k.to(tl.int64)
    x_at = x + token * x_t + i.to(tl.int64)[None, :] * x_i
    first_at = first + i.to(tl.int64)[:, None] * first_i + rank[None, :] * first_k
    total = tl.zeros((BM, RANK), dtype=tl.float32)
    for begin in range(0, I, BK):
        i_inside = i < I - begin
        x_tile = tl.load(x_at, mask=t_inside[:, None] & i_inside[None, :], other=0.0)
        first_tile = tl.load(first_at, mask=i_inside[:, None] & k_inside[None, :], other=0.0)
        x_at += BK * x_i
        first_at += BK * first_i
        total = tl.dot(x_tile, first_tile.to(x_tile.dtype), total, input_precision=PRECISION)
    h_tile = total.to(x.dtype.element_ty)
    if tl.program_id(1) == 0:
        h_at = h + token * K + k[None, :]
        tl.store(h_at, h_tile, mask=t_inside[:, None] & k_inside[None, :])
    span = tl.cdiv(tl.cdiv(O, BN), tl.num_programs(1)) * BN
    start = tl.program_id(1) * span
    for begin in range(start, tl.minimum(start + span, O), BN):
        o = begin + n
        o_inside = o < O
        second_at = second + rank[:, None] * second_k + o.to(tl.int64)[None, :] * second_o
        second_tile = tl.load(second_at, mask=k_inside[:, None] & o_inside[None, :], other=0.0)
        y_tile = tl.dot(h_tile, second_tile.to(h_tile.dtype), input_precision=PRECISION)
        if bias is not None:
            bias_tile = tl.load(bias + o.to(tl.int64) * bias_o, mask=o_inside, other=0.0)
            y_tile += bias_tile.to(tl.float32)[None, :]
        y_at = y + token * O + o[None, :]
        mask = t_inside[:, None] & o_inside[None, :]
        tl.store(y_at, y_tile.to(y.dtype.element_ty), mask=mask)


def _merge_tile(weight: Tensor, rank: int) -> Tile:
    """Bytes bound it: few elements a thread, and little shared memory, so that a processor has
    several tiles in flight.
    """
    return _merge_sized(64, 128, min(_padded(rank), 128 // weight.element_size()), num_warps=8)


def _merge_sized(bm: int, bn: int, bk: int, *, num_warps: int) -> Tile:
    return Tile({"BM": bm, "BN": bn, "BK": bk}, num_warps=num_warps, num_stages=2)


def _core_tile(x: Tensor, first: Tensor, rank: int) -> Tile:
    """Blocks of few tokens, so that there are many. Few share a processor: its shared memory is
    for loading ahead, and does for narrower tiles only where a row of the factors is long.
    """
    if x.dtype == torch.float32 and precision() == "ieee":
        return _core_sized(32, 32, 32, num_warps=8, num_stages=2)
    size = max(x.element_size(), first.element_size())
    bn, num_stages = (32, 3) if _padded(rank) * size >= 512 else (64, 4)
    return _core_sized(64, bn, 128 // size, num_warps=8, num_stages=num_stages)


def _core_sized(bm: int, bn: int, bk: int, **options: int) -> Tile:
    return Tile({"BM": bm, "BN": bn, "BK": bk}, **options)


def _padded(rank: int) -> int:
    """The next power of two, of 16 at least: sizes that products take."""
    return max(16, 1 << (rank - 1).bit_length())


CANDIDATES = {
    "lfc_merge": tuple(
        _merge_sized(bm, bn, bk, num_warps=num_warps)
        for bm, bn, num_warps in ((64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8))
        for bk in (16, 32, 64)
    ),
    "lfc_core": tuple(
        _core_sized(bm, bn, bk, num_warps=num_warps, num_stages=num_stages)
        for bm, num_warps in ((32, 4), (32, 8), (64, 4), (64, 8), (128, 8))
        for bn in (32, 64)
        for bk in (32, 64, 128)
        for num_stages in (2, 3, 4)
    ),
}
"""Tiles that ``maskedtrain bench --tune`` tries."""


def _supports_merge(weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "it computes in fp32, bf16 and fp16, got torch.float64"
    return refuses(weight, u, v)


def _merge_precision(dtype: torch.dtype) -> str:
    # tf32 loses less than 1e-3 of V U; rounding to bf16 loses 2e-3 of all W' (but to fp16, 2e-4).
    return "tf32" if dtype == torch.bfloat16 else precision()


def _declines_merge(weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> str | None:
    exact = weight.dtype == torch.float32 and _merge_precision(dtype) == "ieee"
    # Untimed: from here on the product, on no tensor cores, should take longer than the bytes.
    if exact and u.shape[0] > 64:
        return "cuBLAS multiplies fp32 of high rank faster"
    return None


@MERGE.backend("triton", _supports_merge, _declines_merge)
def _(weight: Tensor, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    (outputs, inputs), rank = weight.shape, u.shape[0]
    merged = weight.new_empty(weight.shape, dtype=dtype)
    if rank == 0 or merged.numel() == 0:
        return merged.copy_(weight)
    sizes = f"{bucket(outputs, inputs, rank)} {weight.dtype} {dtype}"
    tile = tuned("lfc_merge", sizes, weight.device, _merge_tile(weight, rank))
    grid = (ceil_div(outputs, tile.sizes["BM"]) * ceil_div(inputs, tile.sizes["BN"]),)
    strides = *weight.stride(), *u.stride(), *v.stride()
    operands = weight, u, v, merged, outputs, inputs, rank, *strides
    launch(_merge, grid, *operands, tile=tile, PRECISION=_merge_precision(dtype))
    return merged


def _supports_core(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> str | None:
    if first.shape[0] > 256:
        return f"h stays on chip up to rank 256, got {first.shape[0]}"
    return refuses(x, first, second, bias)


def _declines_core(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> str | None:
    """Whether products take long beside their launches; by counted bytes, untimed."""
    (tokens, inputs), (outputs, rank) = x.shape, second.shape
    if tokens > 4096:
        return "two products of cuBLAS: with many tokens, a launch is little to save"
    # Each block of 64 tokens reads both factors.
    if rank > 128:
        return "two products of cuBLAS: with a high rank, factors are much to read for every block"
    # A program takes all inputs of its tokens one after the other.
    if max(inputs, outputs) > 2048:
        return "two products of cuBLAS: with wide layers, one program has much to do"
    return None


@CORE.backend("triton", _supports_core, _declines_core)
def _(x: Tensor, first: Tensor, second: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    (tokens, inputs), (outputs, rank) = x.shape, second.shape
    y, h = x.new_empty(tokens, outputs), x.new_empty(tokens, rank)
    if inputs == 0 or rank == 0:
        return (y.zero_() if bias is None else y.copy_(bias)), h.zero_()
    if tokens == 0:
        return y, h
    sizes = f"{bucket(tokens, outputs, inputs, rank)} {x.dtype} {first.dtype}"
    tile = tuned("lfc_core", sizes, x.device, _core_tile(x, first, rank))
    blocks = ceil_div(tokens, tile.sizes["BM"])
    grid = blocks, _parts(blocks, outputs, inputs, tile)
    bias_o = 0 if bias is None else bias.stride(0)
    strides = *x.stride(), *first.stride(), *second.stride(), bias_o
    operands = x, first, second, bias, y, h, tokens, outputs, inputs, rank, *strides
    launch(_core, grid, *operands, tile=tile, PRECISION=precision(), RANK=_padded(rank))
    return y, h


def _parts(blocks: int, outputs: int, inputs: int, tile: Tile) -> int:
    """Programs that share a block of tokens: as many as there are processors for, until what each
    does for y is a quarter of what it does for h, which all of them do.
    """
    tiles = ceil_div(outputs, tile.sizes["BN"])
    return max(1, min(_PROCESSORS // blocks, tiles, ceil_div(4 * outputs, inputs)))
