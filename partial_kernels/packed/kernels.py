"""Triton backends of ``packed_linear`` on CUDA: a gradient of the trained elements alone.

The gradient of the values takes every tile of ``dW = dy^T x``, since random positions leave none
empty, and of each tile stores what stands at positions; dW itself is nowhere. The positions are
sorted by tile once for an index. Forward and dx are cuBLAS' with ``W + dW``, made in one copy of W.
Sums are in fp32, in one order.
"""

# Triton's language has no types.
# pyright: basic

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from partial_kernels._core.derived import derived
from partial_kernels._core.gpu import ceil_div, launch, precision, refuses, roomy
from partial_kernels._core.tiles import Tile, bucket, tuned
from partial_kernels.packed.reference import DVALUES, DX, FORWARD


@triton.jit
def _dvalues(
    dy,
    x,
    dvalues,
    starts,
    places,
    order,
    M,
    N,
    T,
    dy_t,
    dy_m,
    x_t,
    x_n,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Without it Triton 3.6 serialises wgmma in half of the configurations.
    tl.assume(T > 0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program = tl.program_id(0)
    group, within = program // (GROUP * tiles_n), program % (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m, tile_n = group * GROUP + within % height, within // height
    tile = tile_m * tiles_n + tile_n
    start, end = tl.load(starts + tile), tl.load(starts + tile + 1)
    if start == end:
        return
    m = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
    n = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
    t = tl.arange(0, BT).to(tl.int64)
    m_inside, n_inside = m < M, n < N
    dy_at = dy + m[:, None] * dy_m + t[None, :] * dy_t
    x_at = x + t[:, None] * x_t + n[None, :] * x_n
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, T, BT):
        t_inside = t < T - first
        dy_tile = tl.load(dy_at, mask=m_inside[:, None] & t_inside[None, :], other=0.0)
        x_tile = tl.load(x_at, mask=t_inside[:, None] & n_inside[None, :], other=0.0)
        total = tl.dot(dy_tile, x_tile, total, input_precision=PRECISION)
        dy_at += BT * dy_t
        x_at += BT * x_t
    flat = tl.reshape(total, [BM * BN])
    for first in range(start, end, CHUNK):
        number = first + tl.arange(0, CHUNK)
        inside = number < end
        place = tl.load(places + number, mask=inside, other=0).to(tl.int32)
        to = tl.load(order + number, mask=inside, other=0)
        found = tl.gather(flat, place, 0).to(dvalues.dtype.element_ty)
        tl.store(dvalues + to, found, mask=inside)


@triton.jit
def _add(merged, weight, values, index, elements, count, columns, w_m, w_n, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    place = tl.load(index + number, mask=inside, other=0)
    # An index that nobody has looked at must not reach other memory.
    inside &= (place >= 0) & (place < elements)
    at = weight + place // columns * w_m + place % columns * w_n
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(values + number, mask=inside, other=0.0).to(tl.float32)
    tl.store(merged + place, total.to(merged.dtype.element_ty), mask=inside)


def _merged(weight: Tensor, values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """``W + dW``, added in fp32 and rounded once to the dtype: beside W, only this copy of it."""
    merged = weight.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if len(index):
        tile = Tile({"BLOCK": 1024}, num_warps=4, num_stages=1)
        grid = (ceil_div(len(index), tile.sizes["BLOCK"]),)
        operands = merged, weight, values.contiguous(), index.contiguous()
        sizes = merged.numel(), len(index), merged.shape[1]
        launch(_add, grid, *operands, *sizes, *weight.stride(), tile=tile)
    return merged


class Positions(NamedTuple):
    """Positions in a matrix, sorted by the tile that they are in."""

    starts: Tensor
    """``[tiles + 1]``: where the positions of each tile start; the last is their number."""
    places: Tensor
    """``[N]``: the position within its tile, ``row * BN + column``."""
    order: Tensor
    """``[N]``: which of the index it is."""


def positions(index: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Positions:
    """An index' positions in a matrix of this shape; made once, on the device alone."""
    (rows, columns), (bm, bn) = shape, tile
    tiles_n = ceil_div(columns, bn)

    def make() -> Positions:
        row, column = index // columns, index % columns
        tiles = (row // bm * tiles_n + column // bn).int()
        tiles, order = tiles.sort(stable=True)
        numbers = torch.arange(ceil_div(rows, bm) * tiles_n + 1, device=index.device)
        starts = torch.searchsorted(tiles, numbers.int(), out_int32=True)
        places = (row % bm * bn + column % bn).to(torch.int16)[order]
        return Positions(starts, places, order.int())

    return derived(index, f"{bm} x {bn} tiles of {rows} x {columns}", make)


def _default(x: Tensor, outputs: int, inputs: int) -> Tile:
    """Big tiles move fewest bytes; if there were few, smaller ones leave fewer processors idle."""
    if x.dtype == torch.float32 and precision() == "ieee":
        return _sized(64, 64, 32, num_warps=4, num_stages=3)
    if x.dtype == torch.float32:
        return _sized(128, 128, 32, num_warps=8, num_stages=3)
    tiles = ceil_div(outputs, 128) * ceil_div(inputs, 128)
    if tiles < 66:
        return _sized(64, 64, 64, num_warps=4, num_stages=4)
    # Elsewhere the largest would not leave registers to look up positions.
    if tiles < 528 or not roomy(x):
        return _sized(128, 128, 64, num_warps=8, num_stages=3)
    return _sized(128, 256, 64, num_warps=8, num_stages=3)


def _sized(bm: int, bn: int, bt: int, **options: int) -> Tile:
    return Tile({"BM": bm, "BN": bn, "BT": bt, "GROUP": 8}, **options)


CANDIDATES = {
    "packed_dvalues": tuple(
        _sized(bm, bn, bt, num_warps=num_warps, num_stages=num_stages)
        for bm, bn, bt, num_warps in (
            (64, 64, 64, 4),
            (64, 128, 64, 4),
            (128, 64, 64, 4),
            (128, 128, 64, 8),
            (128, 128, 32, 8),
            (128, 256, 64, 8),
            (256, 128, 64, 8),
            (64, 64, 32, 4),
        )
        for num_stages in (3, 4)
    )
}
"""Tiles that ``maskedtrain bench --tune`` tries; a place within one must fit 16 bits."""


def _chunk(count: int, elements: int, tile: Tile) -> int:
    """Positions that a tile looks up at a time: each time it goes through shared memory."""
    expected = ceil_div(count * tile.sizes["BM"] * tile.sizes["BN"], elements)
    # Where they are spread evenly, few tiles have a half more than their share.
    return min(max(1 << (expected + expected // 2).bit_length(), 64), 2048)


def _supports(*args: Any) -> str | None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if why := refuses(*(tensor for tensor in tensors if tensor.is_floating_point())):
        return why
    counts = (tensor.numel() for tensor in tensors if not tensor.is_floating_point())
    return "it counts positions in 32 bits" if max(counts) >= 2**31 else None


@FORWARD.backend("triton", _supports)
def _(x: Tensor, weight: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, _merged(weight, values, index, x.dtype), bias)


@DX.backend("triton", _supports)
def _(dy: Tensor, weight: Tensor, values: Tensor, index: Tensor) -> Tensor:
    return dy @ _merged(weight, values, index, dy.dtype)


@DVALUES.backend("triton", _supports)
def _(dy: Tensor, x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    (tokens, outputs), inputs, count = dy.shape, x.shape[1], len(index)
    dvalues = values.new_zeros(count)
    if not tokens or not count:
        return dvalues
    sizes = f"{bucket(outputs, inputs, tokens)} {x.dtype}"
    tile = tuned("packed_dvalues", sizes, x.device, _default(x, outputs, inputs))
    bm, bn = tile.sizes["BM"], tile.sizes["BN"]
    operands = dy, x, dvalues, *positions(index, (outputs, inputs), (bm, bn))
    strides = *dy.stride(), *x.stride()
    grid = (ceil_div(outputs, bm) * ceil_div(inputs, bn),)
    chunk = _chunk(count, outputs * inputs, tile)
    options: dict[str, Any] = {"tile": tile, "CHUNK": chunk, "PRECISION": precision()}
    launch(_dvalues, grid, *operands, outputs, inputs, tokens, *strides, **options)
    return dvalues
