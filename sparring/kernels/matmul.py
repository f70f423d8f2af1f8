"""Products with a 16-bit weight, each row's bits independent of how many rows there are.

    y[t, n] = round(sum_k x[t, k] W[n, k] + bias[n])
    y[t, n] = round(y[t, n] + scale (xa[t] B[n]))          with a low-rank adapter

x [T, K] and y [T, N] in 16 bits, W [N, K] in 16 bits (NF4: kernels/nf4_matmul.py), float32 sums.
The adapter (kernels/lora.py), xa = round(x A^T), is added to the rounded product, as it is after a
library's product: training and decoding round at the same places.

The weight is the left operand of the matrix instruction (y^T = W x^T), so 1 row and 4,096 rows use
the same instruction; k is summed from 0 up. Where a weight has too few rows to fill a card, k is
cut into segments, a number fixed by the weight's shape: their sums are added in order, by the
program that finishes last (few rows) or by one program that computes them all (many rows). So a
row's bits do not depend on T, on the tile, nor on the form.

Bytes: W once per tile of BLOCK_T rows; FLOP 2 T N K.

Not here: which form a layer uses (models/), gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import Capability, capability_of, dot, jit, rounded, tl, triton
from sparring.kernels.kept import kept
from sparring.kernels.low_rank import (
    LowRank,
    add_low_rank,
    low_rank_arguments,
    part_of,
    rows_of_b,
    rows_of_xa,
)

BLOCK = 64
"""Columns are a multiple of this."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Weight rows and rows of x a program computes, warps, and depth of the load pipeline.

    max_registers: of a thread, so that more programs fit on a multiprocessor; 0: no limit.
    block_k: columns a turn of the loop loads (here; it changes no bit).
    """

    block_n: int
    block_t: int
    num_warps: int
    num_stages: int
    max_registers: int = 0
    block_k: int = 128


_SMALL = (Tile(64, 16, 4, 4), Tile(64, 32, 4, 4), Tile(64, 64, 4, 3))
TILES = {
    0: (*_SMALL, Tile(128, 128, 8, 2)),
    90: (*_SMALL, Tile(128, 128, 8, 3)),
    100: (*_SMALL, Tile(128, 128, 8, 3)),
}
"""By architecture (0: all others): the first whose block_t holds the rows, else the last, repeated.
"""

INTERPRETED_TILE = Tile(64, 32, 4, 2)

NUM_SMS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}
"""Multiprocessors of a typical card: a constant, so that segments depend on the shape alone."""

SEGMENT_UNIT = 256
"""Columns that a segment has a whole number of."""

GROUP = 8
"""Tiles of x among which programs go before they go on to other weights, many rows given, so that
both stay in the L2 cache.
"""

MAX_SPLIT_ROWS = 256
"""More rows fill the card without segments side by side, and their sums would take much memory."""


def tile_of(capability: Capability, num_rows: int) -> Tile:
    """The tile for a number of rows."""
    if not capability.tensor_dots:
        return INTERPRETED_TILE
    return first_that_holds(TILES.get(capability.arch, TILES[0]), num_rows)


def first_that_holds(tiles: Sequence[Tile], num_rows: int) -> Tile:
    """The first tile that holds the rows, else the last."""
    return next((tile for tile in tiles if tile.block_t >= num_rows), tiles[-1])


def segments_of(
    capability: Capability, num_outputs: int, num_inputs: int, block_n: int = 64
) -> int:
    """Into how many pieces k is cut: few weight rows must still fill the card.

    Of 1 to 16 pieces, the number with the least time in units of k: those of the busiest
    multiprocessor, but at least three times those of one program (so many hide each other's
    waiting), and something for the sum of the pieces.
    """
    steps = -(-num_inputs // SEGMENT_UNIT)
    programs = -(-num_outputs // block_n)
    sms = NUM_SMS.get(capability.arch, 132)
    if programs >= 16 * sms:
        return 1

    def cost(pieces: int) -> float:
        length, turns = -(-steps // pieces), -(-programs * pieces // sms)
        return length * max(turns, 3) + (0.2 * pieces + 1 if pieces > 1 else 0)

    return min(range(1, min(16, steps) + 1), key=lambda n: (cost(n), n))


def steps_of(num_inputs: int, segments: int) -> int:
    """Blocks of 64 columns in a segment."""
    units = -(-num_inputs // SEGMENT_UNIT)
    return -(-units // segments) * (SEGMENT_UNIT // BLOCK)


@jit
def sum_of_segments(
    acc, work_ptr, count_ptr, segment, segments, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """(sum of the tile's segments in order, whether this program is the last and has it)."""
    tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    cell = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_T)[None, :] * BLOCK_N
    work = work_ptr + tile.to(tl.int64) * (segments * BLOCK_N * BLOCK_T) + cell
    tl.store(work + segment * (BLOCK_N * BLOCK_T), acc)
    tl.debug_barrier()
    finishes = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == segments - 1
    tl.debug_barrier()
    if finishes:
        AT_ONCE: tl.constexpr = 4 if BLOCK_N * BLOCK_T <= 2048 else 2  # they wait for each other
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for piece in tl.range(0, segments, AT_ONCE):
            part = work + piece * (BLOCK_N * BLOCK_T)
            a = tl.load(part, cache_modifier=".cg")
            part += BLOCK_N * BLOCK_T
            b = tl.load(part, mask=piece + 1 < segments, other=0.0, cache_modifier=".cg")
            if AT_ONCE == 4:
                part += BLOCK_N * BLOCK_T
                c = tl.load(part, mask=piece + 2 < segments, other=0.0, cache_modifier=".cg")
                part += BLOCK_N * BLOCK_T
                d = tl.load(part, mask=piece + 3 < segments, other=0.0, cache_modifier=".cg")
                acc = acc + a + b + c + d
            else:
                acc = acc + a + b
        tl.store(count_ptr + tile, 0)
    return acc, finishes


@jit
def store_product(
    acc, b, row, column, row_n, row_t, xa_ptr, b_ptr, parts_ptr, bias_ptr, out_ptr, scale,
    num_rows, num_outputs, stride_ot, stride_xat,
    HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Bias, rounding, adapter, rounding again where there is one; acc [N, T] is stored as y [T, N].

    A weight's own product is rounded before the adapter is added, as it is wherever a library
    computes it (training, decoding from 16-bit weights).
    """
    inside = row_n < num_outputs
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row_n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if NUM_PARTS > 0:
        acc = rounded(acc, out_ptr.dtype.element_ty).to(tl.float32)
        if ALIGNED:
            xa = rows_of_xa(
                xa_ptr, row, column, row_t, num_rows, stride_xat, RANK, BLOCK_R
            )  # fmt: skip
            acc += scale * dot(b, tl.trans(xa), tl.zeros(acc.shape, tl.float32))
        else:
            acc = add_low_rank(
                acc, xa_ptr, b_ptr, parts_ptr, scale, row_n, row_t, num_rows, stride_xat,
                RANK, BLOCK_R, NUM_PARTS,
            )  # fmt: skip
    tl.store(
        out_ptr + row_t.to(tl.int64)[None, :] * stride_ot + row_n[:, None],
        rounded(acc, out_ptr.dtype.element_ty),
        mask=inside[:, None] & (row_t < num_rows)[None, :],
    )


@jit
def _segment(
    x_ptr, w_ptr, x_offset, w_offset, first, last, blocks,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """W x^T [N, T] over 64 columns each of `first` to `last`; past `blocks` there are zeros."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for at in tl.range(first, last, BLOCK_K // 64, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptr + at * 64 + x_offset)
            w = tl.load(w_ptr + at * 64 + w_offset)
        else:
            inside = (at * 64 + k < blocks * 64)[None, :]
            x = tl.load(x_ptr + at * 64 + x_offset, mask=inside, other=0.0)
            w = tl.load(w_ptr + at * 64 + w_offset, mask=inside, other=0.0)
        acc = dot(w, tl.trans(x), acc)
    return acc


@jit(do_not_specialize=["num_rows", "segments", "steps"])
def _matmul_kernel(
    x_ptr, w_ptr, bias_ptr, xa_ptr, b_ptr, parts_ptr, out_ptr, work_ptr, count_ptr, scale,
    num_rows, num_outputs, blocks, segments, steps, stride_xt, stride_ot, stride_xat,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SPLIT: tl.constexpr, CHAINED: tl.constexpr, EVEN_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    NUM_PARTS: tl.constexpr, ALIGNED: tl.constexpr, RANK: tl.constexpr, BLOCK_R: tl.constexpr,
    LETS_NEXT_START: tl.constexpr, IS_EARLY: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if IS_EARLY:  # what it reads is written then, also for the launch that may begin with it
        tl.extra.cuda.gdc_wait()
    if LETS_NEXT_START:
        tl.extra.cuda.gdc_launch_dependents()
    tile_n = tl.program_id(1)
    tile_t = tl.program_id(0)
    if GROUP > 1:
        program = tile_n * tl.num_programs(0) + tile_t
        group = program // (GROUP * tl.num_programs(1))
        here = tl.minimum(tl.num_programs(0) - group * GROUP, GROUP)
        inside = program % (GROUP * tl.num_programs(1))
        tile_t = group * GROUP + inside % here
        tile_n = inside // here
    n0 = tile_n * BLOCK_N
    t0 = tile_t * BLOCK_T
    row_n = n0 + tl.arange(0, BLOCK_N)
    row_t = t0 + tl.arange(0, BLOCK_T)
    columns = blocks * 64
    k = tl.arange(0, BLOCK_K)
    n = tl.minimum(row_n, num_outputs - 1) - n0
    t = tl.minimum(row_t, num_rows - 1) - t0
    w_offset = (n * columns)[:, None] + k[None, :]
    x_offset = (t * stride_xt)[:, None] + k[None, :]
    w_ptr += n0.to(tl.int64) * columns
    x_ptr += t0.to(tl.int64) * stride_xt
    b = 0
    row = 0
    column = 0
    if NUM_PARTS > 0 and ALIGNED:
        row, column = part_of(parts_ptr, n0, NUM_PARTS)
        b = rows_of_b(b_ptr, row, num_outputs - n0, BLOCK_N, RANK, BLOCK_R)
    finishes = True
    if CHAINED:
        acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        for segment in tl.range(segments):
            acc += _segment(
                x_ptr, w_ptr, x_offset, w_offset, tl.minimum(segment * steps, blocks),
                tl.minimum((segment + 1) * steps, blocks), blocks,
                BLOCK_N, BLOCK_T, BLOCK_K, STAGES, EVEN_K,
            )  # fmt: skip
    else:
        segment = tl.program_id(2)
        acc = _segment(
            x_ptr, w_ptr, x_offset, w_offset, tl.minimum(segment * steps, blocks),
            tl.minimum((segment + 1) * steps, blocks), blocks,
            BLOCK_N, BLOCK_T, BLOCK_K, STAGES, EVEN_K,
        )  # fmt: skip
    if SPLIT:
        acc, finishes = sum_of_segments(
            acc, work_ptr, count_ptr, tl.program_id(2), segments, BLOCK_N, BLOCK_T
        )
    if finishes:
        store_product(
            acc, b, row, column, row_n, row_t, xa_ptr, b_ptr, parts_ptr, bias_ptr, out_ptr, scale,
            num_rows, num_outputs, stride_ot, stride_xat, HAS_BIAS, NUM_PARTS, ALIGNED, RANK,
            BLOCK_R,
        )  # fmt: skip


@kept
def _counters(device: torch.device) -> Tensor:
    """Two sets of arrival counters of unfinished tiles; every launch leaves them at zero."""
    return torch.zeros(2, 65536, dtype=torch.int32, device=device)


def workspace(
    x: Tensor, tile: Tile, tiles: int, segments: int, which: int = 0
) -> tuple[Tensor, Tensor]:
    """Where segments wait for their sum, and the counters of who has arrived; products that can run
    at the same time take different ones.
    """
    size = tiles * segments * tile.block_n * tile.block_t
    return torch.empty(size, dtype=torch.float32, device=x.device), _counters(x.device)[which]


def check_shapes(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError where x [T, K] and a weight [N, K] are not what the kernels take."""
    if shape[1] != x.shape[1] or shape[1] % BLOCK or x.stride(1) != 1:
        raise ValueError(
            f"x is {tuple(x.shape)}, strides {x.stride()}, the weight {tuple(shape)}; "
            f"columns must be equal, adjacent and a multiple of {BLOCK}"
        )
    if x.dtype != dtype or x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"x is {x.dtype} and the weight {dtype}: both bfloat16 or float16")


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    capability: Capability | None = None,
    *,
    segments: int | None = None,
    tile: Tile | None = None,
    is_chained: bool | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [T, N] of x [T, K] and a weight [N, K]; see the module. Raises ValueError on shapes and
    dtypes that the kernel does not take.

    out_dtype: float32 where sums are not to be rounded. segments, tile and is_chained are for tests
    and measurements; of them only segments changes bits.
    """
    return launch_beside_next(
        x, weight, bias, low_rank, capability, segments=segments, tile=tile,
        is_chained=is_chained, out_dtype=out_dtype, lets_next_start=False,
    )[0]  # fmt: skip


def launch_beside_next(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    capability: Capability | None = None,
    *,
    segments: int | None = None,
    tile: Tile | None = None,
    is_chained: bool | None = None,
    out_dtype: torch.dtype | None = None,
    lets_next_start: bool = True,
    is_early: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`launch`, and its scratch. lets_next_start: a next kernel that is launched so may start while
    this one runs, and waits for y where it reads it; the scratch must be held until then (sm_90).
    is_early: it is launched while the kernel before it runs, and begins when that has ended.
    """
    check_shapes(x, weight.shape, weight.dtype)
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=out_dtype or x.dtype, device=x.device)
    if num_rows == 0:
        return out, None
    capability = capability or capability_of(x.device)
    tile = tile or tile_of(capability, num_rows)
    segments = segments or segments_of(capability, num_outputs, num_inputs)
    if is_chained is None:
        is_chained = num_rows > MAX_SPLIT_ROWS
    is_split = segments > 1 and not is_chained
    grid = (triton.cdiv(num_rows, tile.block_t), triton.cdiv(num_outputs, tile.block_n))
    work, count = x, x
    if is_split:
        work, count = workspace(x, tile, grid[0] * grid[1], segments, int(lets_next_start))
    _matmul_kernel[(*grid, segments if is_split else 1)](
        x_ptr=x, w_ptr=weight, bias_ptr=x if bias is None else bias, out_ptr=out, work_ptr=work,
        count_ptr=count, num_rows=num_rows, num_outputs=num_outputs, blocks=num_inputs // BLOCK,
        segments=segments, steps=steps_of(num_inputs, segments), stride_xt=x.stride(0),
        stride_ot=out.stride(0), BLOCK_N=tile.block_n, BLOCK_T=tile.block_t, BLOCK_K=tile.block_k,
        STAGES=tile.num_stages, SPLIT=is_split, CHAINED=segments > 1 and is_chained,
        EVEN_K=num_inputs % tile.block_k == 0, HAS_BIAS=bias is not None, num_warps=tile.num_warps,
        enable_fp_fusion=False, LETS_NEXT_START=lets_next_start, IS_EARLY=is_early,
        GROUP=1 if is_split or grid[0] < 2 * GROUP else GROUP,
        **low_rank_arguments(low_rank, x, tile.block_n),
        **({"launch_pdl": True} if is_early else {}),
    )  # fmt: skip
    return out, work


def matmul_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The product in float64, rounded to out_dtype (x's by default), again after the adapter."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    if low_rank is not None:
        y = y.to(out_dtype or x.dtype).double()
        rank = low_rank.b.shape[1]
        for first, last, row, column in low_rank.parts.tolist():
            xa = low_rank.xa[:, column : column + rank].double()
            b = low_rank.b[row : row + last - first].double()
            y[:, first:last] += low_rank.scale * (xa @ b.T)
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
    (a CPU, 32 bits, odd widths) sums are in float64. capability: the model's; left out, what the
    card can do.
    """
    capability = capability or capability_of(x.device)
    fits = x.element_size() == 2 and x.shape[1] % BLOCK == 0
    if x.is_cuda and triton is not None and capability.tensor_dots and fits:
        return launch(x, weight, bias, low_rank, capability, out_dtype=out_dtype)
    return matmul_reference(x, weight, bias, low_rank, out_dtype)
