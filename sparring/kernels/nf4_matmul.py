"""Products with a packed NF4 weight: decoded in registers, multiplied, never written to memory.

    y[t, n] = round(round(sum_k x[t, k] W[n, k] + bias[n]) + scale (xa[t] B[n]))

As in kernels/matmul.py W is the left operand of the matrix instruction, k is cut into segments, and
no bit of a row depends on other rows; the decode rule is that of kernels/nf4.py. What differs is
the order of k inside BLOCK_K columns. The instruction takes 16 columns from four threads, four
each. A thread is to decode a run of BLOCK_K / 4 columns of one quant block, because the table of 16
products is made once a run; so step s of a block takes columns 4 s to 4 s + 3 of each of the four
runs, from x as from W. Then decoded weights are where the instruction wants them: nothing passes
through shared memory and no barrier is waited for. `in_kernel_order` puts a matrix's columns so
(kernels/column_order.py); nf4_matmul(x, W) has the bits of matmul(in_kernel_order(x),
in_kernel_order(decoded W)). x may come in that order; else it is permuted on its way to shared
memory, which every tile of weight rows does again. Up to 128 rows in that order on sm_90 go to
kernels/nf4_hopper.py and nf4_hopper_wide.py, which compute the same bits.

Bytes: 0.516 a weight (0.5625 without double quantisation) once per tile of rows of x, 2 (K + N) a
row. 4.3 to 5.5 instructions a weight on sm_90 for up to 64 rows, some 3.1 of them integer ones of
decoding. From some number of rows on, decoding to memory and a library product is
faster; a copy of the decoded weights, where there is room, is faster still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import (
    Capability,
    capability_of,
    cdiv,
    dot,
    jit,
    nf4_hopper,
    nf4_hopper_wide,
    tl,
    triton,
)
from sparring.kernels import matmul as products
from sparring.kernels.column_order import BLOCK_K, in_kernel_order, out_of_kernel_order
from sparring.kernels.low_rank import LowRank, low_rank_arguments, part_of, rows_of_b
from sparring.kernels.matmul import (
    INTERPRETED_TILE,
    Tile,
    check_shapes,
    first_that_holds,
    matmul_reference,
    segments_of,
    steps_of,
    store_product,
    sum_of_segments,
    workspace,
)
from sparring.kernels.nf4 import (
    BLOCK,
    NF4Matrix,
    block_scales,
    decode_nf4,
    dequantize_nf4,
    dequantize_nf4_reference,
    dynamic_map_on,
    words_of,
)
from sparring.kernels.nf4_hopper import MOST_TURNS

_SMALL = (Tile(64, 16, 4, 3), Tile(64, 32, 4, 3), Tile(64, 64, 4, 2))
_HOPPER = (
    Tile(64, 16, 4, 3, 128),
    Tile(64, 32, 4, 3, 168),
    Tile(64, 64, 4, 2, 168),
    Tile(128, 128, 8, 2),
)
TILES = {0: _SMALL, 90: _HOPPER}
"""By architecture (0: all others): the first whose block_t holds the rows, else the last, repeated.
"""

MAX_ROWS = 256
"""Most rows for which the sums of segments get memory."""


def nf4_segments_of(capability: Capability, num_outputs: int, num_inputs: int) -> int:
    """Into how many pieces k is cut; fixed by shape and architecture. None is longer than
    MOST_TURNS, whose scales a program of nf4_hopper.py keeps.
    """
    return max(
        segments_of(capability, num_outputs, num_inputs),
        cdiv(num_inputs, MOST_TURNS * BLOCK_K),
    )


@jit
def _decoded(
    words, scale, dtype: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WARPS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Weights [N, K] of words [N, K / 8], rows and columns in the instruction's order.

    Row i of the words is 8 W r + 8 w + l (r: turn, w: warp, l < 8); the instruction has a warp's
    rows together: 16 w + 8 (r mod 2) + l of every 16 W.
    """
    J: tl.constexpr = BLOCK_K // 32
    R: tl.constexpr = BLOCK_N // (8 * WARPS)
    v = decode_nf4(words, scale, dtype, FAST).reshape(R // 2, 2, WARPS * 8, 4, J, 2, 2, 2)
    v = v.permute(0, 1, 2, 4, 5, 6, 3, 7).reshape(R // 2, 2, WARPS, 8 * BLOCK_K)
    return v.permute(0, 2, 1, 3).reshape(BLOCK_N, BLOCK_K)


@jit(do_not_specialize=["num_rows", "segments", "steps"])
def _nf4_matmul_kernel(
    x_ptr, words_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, bias_ptr, xa_ptr, b_ptr,
    parts_ptr, out_ptr, work_ptr, count_ptr, scale, num_rows, num_outputs, blocks, segments, steps,
    stride_xt, stride_ot, stride_xat,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr, SPLIT: tl.constexpr, EVEN_K: tl.constexpr, DOUBLE: tl.constexpr,
    FAST: tl.constexpr, HAS_BIAS: tl.constexpr, NUM_PARTS: tl.constexpr, ALIGNED: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, BESIDE_SHRINK: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = BLOCK_K // 64
    R: tl.constexpr = BLOCK_N // (8 * WARPS)
    n0 = tl.program_id(1) * BLOCK_N
    t0 = tl.program_id(0) * BLOCK_T
    row_n = n0 + tl.arange(0, BLOCK_N)
    row_t = t0 + tl.arange(0, BLOCK_T)
    n = tl.minimum(row_n, num_outputs - 1)
    t = tl.minimum(row_t, num_rows - 1) - t0
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_K // 8)
    q = tl.arange(0, Q)
    x_offset = (t * stride_xt)[:, None] + k[None, :]
    w_offset = ((n - n0) * (blocks * 8))[:, None] + word[None, :]
    x_ptr += t0.to(tl.int64) * stride_xt
    words_ptr += n0.to(tl.int64) * (blocks * 8)
    b = 0
    row = 0
    column = 0
    if NUM_PARTS > 0 and ALIGNED:
        row, column = part_of(parts_ptr, n0, NUM_PARTS)
        b = rows_of_b(b_ptr, row, num_outputs - n0, BLOCK_N, RANK, BLOCK_R)
    first = tl.minimum(tl.program_id(2) * steps, blocks)
    last = tl.minimum(first + steps, blocks)
    block = (n * blocks)[:, None] + (first + q)[None, :]
    inside = tl.broadcast_to((first + q < last)[None, :], (BLOCK_N, Q))
    index = tl.load(absmax_ptr + block, mask=inside, other=0)
    acc = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for at in tl.range(first, last, Q, num_stages=STAGES):
        if EVEN_K:
            x = tl.load(x_ptr + at * 64 + x_offset)
            words = tl.load(words_ptr + at * 8 + w_offset)
        else:
            here = (at * 64 + k < blocks * 64)[None, :]
            x = tl.load(x_ptr + at * 64 + x_offset, mask=here, other=0.0)
            here = (at * 8 + word < blocks * 8)[None, :]
            words = tl.load(words_ptr + at * 8 + w_offset, mask=here, other=0)
        inside = tl.broadcast_to((at + q < blocks)[None, :], (BLOCK_N, Q))
        factor = block_scales(index, block, inside, absmax2_ptr, offset_ptr, map_ptr, DOUBLE)
        block += Q
        ahead = tl.broadcast_to((at + Q + q < last)[None, :], (BLOCK_N, Q))
        index = tl.load(absmax_ptr + block, mask=ahead, other=0)
        factor = tl.broadcast_to(factor[:, :, None], (BLOCK_N, Q, 8))
        factor = factor.reshape(BLOCK_N, BLOCK_K // 8)
        if not IN_ORDER:
            x = x.reshape(BLOCK_T, 4, BLOCK_K // 16, 2, 2).permute(0, 2, 3, 1, 4)
            x = x.reshape(BLOCK_T, BLOCK_K)
        w = _decoded(words, factor, x_ptr.dtype.element_ty, BLOCK_N, BLOCK_K, WARPS, FAST)
        acc = dot(w, tl.trans(x), acc)
    acc = acc.reshape(R // 2, WARPS, 2, 8 * BLOCK_T).permute(0, 2, 1, 3).reshape(BLOCK_N, BLOCK_T)
    finishes = True
    if SPLIT:
        acc, finishes = sum_of_segments(
            acc, work_ptr, count_ptr, tl.program_id(2), segments, BLOCK_N, BLOCK_T
        )
    if finishes:
        if BESIDE_SHRINK:  # until here nothing was read that the launch before writes
            tl.extra.cuda.gdc_wait()
        store_product(
            acc, b, row, column, row_n, row_t, xa_ptr, b_ptr, parts_ptr, bias_ptr, out_ptr, scale,
            num_rows, num_outputs, stride_ot, stride_xat, HAS_BIAS, NUM_PARTS, ALIGNED, RANK,
            BLOCK_R,
        )  # fmt: skip


def launch(
    x: Tensor,
    weight: NF4Matrix,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    capability: Capability | None = None,
    *,
    in_order: bool = False,
    segments: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """y [T, N] of x [T, K] and a weight [N, K]; see the module. Raises ValueError on shapes and
    dtypes that the kernel does not take.

    in_order: x is `in_kernel_order`, K whole blocks of its; that changes no bit of the result.
    segments and tile are for tests and measurements; of them only segments changes bits.
    """
    check_shapes(x, weight.shape, weight.dtype)
    assert not in_order or x.shape[1] % BLOCK_K == 0, "padding would lie among the columns"
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return out
    capability = capability or capability_of(x.device)
    if tile is None:
        tiles = TILES.get(capability.arch, TILES[0])
        tile = first_that_holds(tiles, num_rows) if capability.tensor_dots else INTERPRETED_TILE
    segments = segments or nf4_segments_of(capability, num_outputs, num_inputs)
    grid = (triton.cdiv(num_rows, tile.block_t), triton.cdiv(num_outputs, tile.block_n), segments)
    work, count = workspace(x, tile, grid[0] * grid[1], segments) if segments > 1 else (x, x)
    double = weight.absmax2 is not None
    beside = low_rank is not None and low_rank.scratch is not None
    options = {"launch_pdl": True} if beside else {}
    if tile.max_registers:
        options["maxnreg"] = tile.max_registers
    _nf4_matmul_kernel[grid](
        x_ptr=x, words_ptr=words_of(weight), absmax_ptr=weight.absmax,
        absmax2_ptr=weight.absmax2 if double else x, offset_ptr=weight.offset if double else x,
        map_ptr=dynamic_map_on(x.device) if double else x, bias_ptr=x if bias is None else bias,
        out_ptr=out, work_ptr=work, count_ptr=count, num_rows=num_rows, num_outputs=num_outputs,
        blocks=num_inputs // BLOCK, segments=segments, steps=steps_of(num_inputs, segments),
        stride_xt=x.stride(0), stride_ot=out.stride(0), BLOCK_N=tile.block_n, BLOCK_T=tile.block_t,
        BLOCK_K=BLOCK_K, STAGES=tile.num_stages, WARPS=tile.num_warps, SPLIT=segments > 1,
        EVEN_K=num_inputs % BLOCK_K == 0, DOUBLE=double, FAST=capability.tensor_dots,
        HAS_BIAS=bias is not None, BESIDE_SHRINK=beside, IN_ORDER=in_order,
        num_warps=tile.num_warps, enable_fp_fusion=False,
        **low_rank_arguments(low_rank, x, tile.block_n), **options,
    )  # fmt: skip
    return out


def nf4_matmul_reference(
    x: Tensor, weight: NF4Matrix, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """The product with the decoded weight in float64, rounded where `matmul_reference` rounds."""
    return matmul_reference(x, dequantize_nf4_reference(weight), bias, low_rank)


def nf4_matmul_triton(
    x: Tensor, weight: NF4Matrix, bias: Tensor | None = None, low_rank: LowRank | None = None
) -> Tensor:
    """`nf4_matmul_reference` in one launch, summed in float32 in a fixed order."""
    return launch(x, weight, bias, low_rank)


def takes(x: Tensor, weight: NF4Matrix, capability: Capability) -> bool:
    """Whether the kernel can multiply them: on a card with tensor cores, both of one 16-bit dtype,
    rows of whole quant blocks.
    """
    return (
        x.is_cuda
        and triton is not None
        and x.dtype == weight.dtype
        and x.element_size() == 2
        and weight.shape[1] % BLOCK == 0
        and capability.tensor_dots
    )


def nf4_matmul(
    x: Tensor,
    weight: NF4Matrix,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    capability: Capability | None = None,
    *,
    in_order: bool = False,
) -> Tensor:
    """x W^T + scale xa B^T + bias: [T, K] x NF4 [N, K] -> [T, N] in x's dtype, no gradient.

    A row's bits do not depend on the other rows nor on their number: more than MAX_ROWS rows are
    multiplied with the decoded weight in the same order. capability: the model's; left out, what
    the card can do. in_order: x comes in the order of kernels/column_order.py, K in whole blocks.
    """
    capability = capability or capability_of(x.device)
    if not takes(x, weight, capability):
        x = out_of_kernel_order(x) if in_order else x
        return nf4_matmul_reference(x, weight, bias, low_rank)
    if nf4_hopper.serves(x, capability.arch, low_rank, in_order=in_order):
        segments = nf4_segments_of(capability, *weight.shape)
        if len(x) > nf4_hopper.TILES[-1].block_t:
            return nf4_hopper_wide.launch(x, weight, bias, segments, low_rank)
        return nf4_hopper.launch(x, weight, bias, segments, low_rank=low_rank)
    if len(x) <= MAX_ROWS:
        return launch(x, weight, bias, low_rank, capability, in_order=in_order)
    segments = nf4_segments_of(capability, *weight.shape)
    decoded = in_kernel_order(dequantize_nf4(weight, capability=capability))
    x = x if in_order else in_kernel_order(x)
    return products.launch(x, decoded, bias, low_rank, capability, segments=segments)
