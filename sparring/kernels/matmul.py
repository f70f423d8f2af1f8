"""Products of a few rows with a weight, each row's bits independent of how many rows there are.

    y[t, n] = round(sum_k x[t, k] W[n, k] + scale (xa[t] B[n]) + bias[n])

x [T, K] and y [T, N] in 16 bits, W [N, K] in 16 bits or NF4 (kernels/nf4.py), float32 sums, one
rounding. The middle term is a low-rank adapter (kernels/lora.py), xa = round(x A^T).

The weight is the left operand of the matrix instruction (y^T = W x^T), so 1 row and 4,096 rows use
the same instruction; k is summed in steps of BLOCK_K from 0 up. Where a weight has too few rows to
fill a card, k is cut into segments, a number fixed by the weight's shape: their sums are added in
order, by the program that finishes last (FUSED = False, decode) or by one program that computes
them all (FUSED = True, many rows). So a row's bits do not depend on T, on the tile, on FUSED, nor
on whether W was NF4 or the same values decoded before.

Bytes: W once per tile of BLOCK_T rows: 2 or 0.516 a weight; FLOP 2 T N K.

Not here: which form a layer uses (models/quantised.py), gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparring.kernels import Capability, capability_of, dot, jit, rounded, tl, triton
from sparring.kernels.nf4 import (
    BLOCK,
    NF4Matrix,
    block_scales,
    decode_nf4,
    dynamic_map_on,
    words_of,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """An adapter's addition to a product: y[:, rows] += scale xa[:, ranks] B[b_rows]^T a part.

    xa 16 bits [T, sum of ranks], b 16 bits [sum of adapted outputs, rank]. parts int32 [P, 4] on
    the device: first and last output of the part (exclusive), its first row in b, its first
    column in xa.
    """

    xa: Tensor
    b: Tensor
    parts: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Tile:
    """Weight rows and rows of x a program computes, warps, and depth of the load pipeline."""

    block_n: int
    block_t: int
    num_warps: int
    num_stages: int


BLOCK_K = 128

_SMALL = (Tile(64, 16, 4, 4), Tile(64, 32, 4, 4), Tile(64, 64, 4, 3))
TILES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("nf4", 0): _SMALL,
    ("nf4", 90): (*_SMALL, Tile(64, 128, 4, 3)),
    ("nf4", 100): (*_SMALL, Tile(64, 128, 4, 3)),
    ("16-bit", 0): (*_SMALL, Tile(128, 128, 8, 2)),
    ("16-bit", 90): (*_SMALL, Tile(128, 128, 8, 3)),
    ("16-bit", 100): (*_SMALL, Tile(128, 128, 8, 3)),
}
"""By kind of weight and architecture (0: all others): the first tile whose block_t holds the rows,
else the last, repeated.
"""

NUM_SMS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a typical card: a constant, so that segments depend on the shape alone."""


def tile_of(capability: Capability, num_rows: int, kind: str) -> Tile:
    """The tile for a number of rows; kind "nf4" or "16-bit"."""
    if not capability.tensor_dots:
        return Tile(64, 32, 4, 2)
    tiles = TILES.get((kind, capability.arch)) or TILES[kind, 0]
    return next((tile for tile in tiles if tile.block_t >= num_rows), tiles[-1])


def segments_of(capability: Capability, num_outputs: int, num_inputs: int) -> int:
    """Into how many pieces k is cut: few weight rows must still fill the card.

    Of 1 to 16 pieces, the number with the least time in steps: the steps of the busiest
    multiprocessor, but at least three times those of one program (so many hide each other's
    waiting), and the sum of the pieces. 1 where there are four programs a multiprocessor anyway.
    """
    steps = -(-num_inputs // BLOCK_K)
    programs = -(-num_outputs // 64)
    sms = NUM_SMS.get(capability.arch, 132)
    if programs >= 4 * sms:
        return 1

    def cost(pieces: int) -> float:
        length, turns = -(-steps // pieces), -(-programs * pieces // sms)
        return length * max(turns, 3) + 0.2 * pieces

    return min(range(1, min(16, steps) + 1), key=lambda n: (cost(n), n))


@jit
def _low_rank(
    acc, xa_ptr, b_ptr, parts_ptr, scale, n, t, num_rows, stride_xat,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, NUM_PARTS: tl.constexpr,
):  # fmt: skip
    """acc [N, T] + scale xa B^T, part by part; rows n outside a part get zeros."""
    r = tl.arange(0, BLOCK_R)
    for part in tl.static_range(NUM_PARTS):
        first = tl.load(parts_ptr + 4 * part)
        last = tl.load(parts_ptr + 4 * part + 1)
        row = tl.load(parts_ptr + 4 * part + 2) + n - first
        column = tl.load(parts_ptr + 4 * part + 3) + r
        here = (n >= first) & (n < last)
        b = tl.load(
            b_ptr + row[:, None] * RANK + r[None, :],
            mask=here[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        xa = tl.load(
            xa_ptr + t[:, None] * stride_xat + column[None, :],
            mask=(t < num_rows)[:, None] & (r < RANK)[None, :], other=0.0,
        )  # fmt: skip
        low = dot(b, tl.trans(xa), tl.zeros(acc.shape, tl.float32))
        acc += scale * low
    return acc


@jit
def _segment(
    acc, x_ptr, w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, n, t, stride_xt, blocks,
    first, last,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr, PACKED: tl.constexpr, DOUBLE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """acc [N, T] + W x^T over quant blocks first to last (64 columns each, `blocks` a row)."""
    Q: tl.constexpr = BLOCK_K // 64
    k = tl.arange(0, BLOCK_K)
    q = tl.arange(0, Q)
    x_ptrs = x_ptr + t.to(tl.int64)[:, None] * stride_xt + (first * 64 + k)[None, :]
    if PACKED:
        word = tl.arange(0, BLOCK_K // 8)
        w_ptrs = w_ptr + (n.to(tl.int64) * (blocks * 8))[:, None] + (first * 8 + word)[None, :]
        block = (n * blocks)[:, None] + (first + q)[None, :]
        inside = tl.broadcast_to((first + q < last)[None, :], (BLOCK_N, Q))
        index = tl.load(absmax_ptr + block, mask=inside, other=0)
    else:
        w_ptrs = w_ptr + (n.to(tl.int64) * (blocks * 64))[:, None] + (first * 64 + k)[None, :]
    for at in tl.range(first, last, Q, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(at * 64 + k < blocks * 64)[None, :], other=0.0)
        if PACKED:
            if EVEN_K:
                words = tl.load(w_ptrs)
            else:
                words = tl.load(w_ptrs, mask=(at * 8 + word < blocks * 8)[None, :], other=0)
            inside = tl.broadcast_to((at + q < blocks)[None, :], (BLOCK_N, Q))
            scale = block_scales(index, block, inside, absmax2_ptr, offset_ptr, map_ptr, DOUBLE)
            block += Q
            ahead = tl.broadcast_to((at + Q + q < last)[None, :], (BLOCK_N, Q))
            index = tl.load(absmax_ptr + block, mask=ahead, other=0)
            scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, Q, 8))
            scale = scale.reshape(BLOCK_N, BLOCK_K // 8)
            w = decode_nf4(words, scale, x_ptr.dtype.element_ty, FAST)
            w_ptrs += BLOCK_K // 8
        else:
            if EVEN_K:
                w = tl.load(w_ptrs)
            else:
                w = tl.load(w_ptrs, mask=(at * 64 + k < blocks * 64)[None, :], other=0.0)
            w_ptrs += BLOCK_K
        acc = dot(w, tl.trans(x), acc)
        x_ptrs += BLOCK_K
    return acc


@jit(do_not_specialize=["num_rows"])
def _matmul_kernel(
    x_ptr, w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, bias_ptr, xa_ptr, b_ptr, parts_ptr,
    out_ptr, work_ptr, count_ptr, scale, num_rows, num_outputs, blocks, stride_xt, stride_ot,
    stride_xat,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SEGMENTS: tl.constexpr, FUSED: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
    DOUBLE: tl.constexpr, FAST: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = BLOCK_K // 64
    row_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.minimum(row_n, num_outputs - 1)
    t = tl.minimum(row_t, num_rows - 1)
    steps = tl.cdiv(tl.cdiv(blocks, Q), SEGMENTS) * Q
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    finishes = True
    if FUSED and SEGMENTS > 1:
        for segment in tl.range(SEGMENTS):
            acc += _segment(
                tl.zeros([BLOCK_N, BLOCK_T], tl.float32), x_ptr, w_ptr, absmax_ptr, absmax2_ptr,
                offset_ptr, map_ptr, n, t, stride_xt, blocks, tl.minimum(segment * steps, blocks),
                tl.minimum((segment + 1) * steps, blocks), BLOCK_N, BLOCK_K, STAGES,
                EVEN_K, PACKED, DOUBLE, FAST,
            )  # fmt: skip
    else:
        segment = tl.program_id(2)
        acc = _segment(
            acc, x_ptr, w_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, n, t, stride_xt,
            blocks, tl.minimum(segment * steps, blocks), tl.minimum((segment + 1) * steps, blocks),
            BLOCK_N, BLOCK_K, STAGES, EVEN_K, PACKED, DOUBLE, FAST,
        )  # fmt: skip
    if not FUSED:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        cell = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_T)[None, :] * BLOCK_N
        work = work_ptr + tile.to(tl.int64) * (SEGMENTS * BLOCK_N * BLOCK_T) + cell
        tl.store(work + segment * (BLOCK_N * BLOCK_T), acc)
        tl.debug_barrier()
        finishes = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SEGMENTS - 1
        tl.debug_barrier()
        if finishes:
            acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
            for piece in tl.range(SEGMENTS):
                acc += tl.load(work + piece * (BLOCK_N * BLOCK_T), cache_modifier=".cg")
            tl.store(count_ptr + tile, 0)
    if finishes:
        if NUM_PARTS > 0:
            acc = _low_rank(
                acc, xa_ptr, b_ptr, parts_ptr, scale, row_n, row_t, num_rows, stride_xat,
                RANK, BLOCK_R, NUM_PARTS,
            )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        tl.store(
            out_ptr + row_t.to(tl.int64)[None, :] * stride_ot + row_n[:, None],
            rounded(acc, out_ptr.dtype.element_ty),
            mask=(row_n < num_outputs)[:, None] & (row_t < num_rows)[None, :],
        )


@cache
def _counters(device: torch.device) -> Tensor:
    """Arrival counters of unfinished tiles; every launch leaves them at zero."""
    return torch.zeros(65536, dtype=torch.int32, device=device)


def launch(
    x: Tensor,
    weight: Tensor | NF4Matrix,
    bias: Tensor | None,
    low_rank: LowRank | None,
    capability: Capability | None = None,
    *,
    segments: int | None = None,
    tile: Tile | None = None,
    fused: bool | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [T, N] of x [T, K] and a weight [N, K]; see the module. Raises ValueError on shapes and
    dtypes that the kernel does not take.

    out_dtype: float32 where sums are not to be rounded. segments, tile and fused are for tests and
    measurements; of them only segments changes bits.
    """
    num_rows, num_inputs = x.shape
    packed = weight if isinstance(weight, NF4Matrix) else None
    num_outputs = weight.shape[0]
    if weight.shape[1] != num_inputs or num_inputs % BLOCK or x.stride(1) != 1:
        raise ValueError(
            f"x is {tuple(x.shape)}, strides {x.stride()}, the weight {tuple(weight.shape)}; "
            f"columns must be equal, adjacent and a multiple of {BLOCK}"
        )
    if x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: both bfloat16 or float16")
    out = torch.empty(num_rows, num_outputs, dtype=out_dtype or x.dtype, device=x.device)
    if num_rows == 0:
        return out
    capability = capability or capability_of(x.device)
    tile = tile or tile_of(capability, num_rows, "16-bit" if packed is None else "nf4")
    segments = segments or segments_of(capability, num_outputs, num_inputs)
    grid = (triton.cdiv(num_rows, tile.block_t), triton.cdiv(num_outputs, tile.block_n))
    if fused is None:
        fused = segments == 1 or num_rows > MAX_SPLIT_ROWS
    work, count = x, x
    if not fused:
        size = grid[0] * grid[1] * segments * tile.block_n * tile.block_t
        work = torch.empty(size, dtype=torch.float32, device=x.device)
        count = _counters(x.device)
    double = packed is not None and packed.absmax2 is not None
    _matmul_kernel[(*grid, 1 if fused else segments)](
        x, weight if packed is None else words_of(packed), x if packed is None else packed.absmax,
        packed.absmax2 if double else x, packed.offset if double else x,
        dynamic_map_on(x.device) if double else x, x if bias is None else bias,
        x if low_rank is None else low_rank.xa, x if low_rank is None else low_rank.b,
        x if low_rank is None else low_rank.parts, out, work, count,
        0.0 if low_rank is None else low_rank.scale, num_rows, num_outputs, num_inputs // BLOCK,
        x.stride(0), out.stride(0), 0 if low_rank is None else low_rank.xa.stride(0),
        BLOCK_N=tile.block_n, BLOCK_T=tile.block_t, BLOCK_K=BLOCK_K, STAGES=tile.num_stages,
        SEGMENTS=segments, FUSED=fused, EVEN_K=num_inputs % BLOCK_K == 0,
        PACKED=packed is not None, DOUBLE=double, FAST=capability.tensor_dots,
        HAS_BIAS=bias is not None, NUM_PARTS=0 if low_rank is None else len(low_rank.parts),
        RANK=1 if low_rank is None else low_rank.b.shape[1],
        BLOCK_R=16 if low_rank is None else max(16, triton.next_power_of_2(low_rank.b.shape[1])),
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


MAX_SPLIT_ROWS = 256
"""More rows fill the card without segments side by side, and their sums would take much memory."""


def matmul_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product in float64, rounded once to out_dtype (x's by default)."""
    y = x.double() @ weight.double().T
    if low_rank is not None:
        rank = low_rank.b.shape[1]
        for first, last, row, column in low_rank.parts.tolist():
            xa = low_rank.xa[:, column : column + rank].double()
            b = low_rank.b[row : row + last - first].double()
            y[:, first:last] += low_rank.scale * (xa @ b.T)
    if bias is not None:
        y += bias.double()
    return y.to(out_dtype or x.dtype)


def matmul_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """`matmul_reference` in one launch, summed in float32 in a fixed order."""
    return launch(x, weight, bias, low_rank)


def matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    capability: Capability | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W^T + scale xa B^T + bias: [T, K] x [N, K] -> [T, N], no gradient.

    A row's bits do not depend on the other rows nor on their number. Where the kernel does not run
    (a CPU, 32 bits, odd widths) sums are in float64. capability: the model's; left
    out, what the card can do.
    """
    capability = capability or capability_of(x.device)
    fits = x.element_size() == 2 and x.shape[1] % BLOCK == 0
    if x.is_cuda and triton is not None and capability.tensor_dots and fits:
        return launch(x, weight, bias, low_rank, capability, out_dtype=out_dtype)
    return matmul_reference(x, weight, bias, low_rank, out_dtype)
