"""kernels/nf4_hopper.py for more rows than a multiprocessor has registers for several programs.

The same numbers to the bit, and the same ground. Packed weights go from memory straight to the
registers of the thread that decodes them, a turn of 256 columns ahead, and x [T, K] to shared
memory half a turn at a time: so three programs of 65 to 128 rows share a multiprocessor. With
weights in shared memory as well there is room for one, and gate and up of a 7B take 116 us where
this takes 103 (an H200; LOG.md).

Bytes and instructions: see kernels/nf4_matmul.py.
"""

from __future__ import annotations

from torch import Tensor

from sparring.kernels import jit, triton
from sparring.kernels.low_rank import LowRank
from sparring.kernels.nf4 import NF4Matrix
from sparring.kernels.nf4_hopper import WIDE, rows_layout, start, words_layout

if triton is not None:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        warpgroup_mma,
    )
    from triton.language.extra.cuda import gdc_wait

    from sparring.kernels.nf4_hopper import _decoded, _scales, _sum_and_store, _tables

    jit = gluon.jit


@jit(do_not_specialize=["num_rows", "segments", "steps"])
def _kernel(
    x_ptr, words_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, bias_ptr, xa_ptr, b_ptr,
    parts_ptr, out_ptr, work_ptr, count_ptr, scale, num_rows, num_outputs, blocks, segments, steps,
    stride_xt, stride_ot, stride_xat,
    T: gl.constexpr, WARPS: gl.constexpr, DOUBLE: gl.constexpr, SPLIT: gl.constexpr,
    HAS_BIAS: gl.constexpr, OVERLAPS: gl.constexpr, WORDS: gl.constexpr, ROWS: gl.constexpr,
    NUM_PARTS: gl.constexpr, RANK: gl.constexpr, BLOCK_R: gl.constexpr,
    BESIDE_SHRINK: gl.constexpr,
):  # fmt: skip
    """steps: turns of 256 columns in a segment. WORDS, ROWS: `words_layout`, `rows_layout`."""
    N: gl.constexpr = 16 * WARPS
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, T, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    BLOCKS: gl.constexpr = gl.SliceLayout(2, WORDS)
    tile = gl.program_id(0)
    segment = gl.program_id(1)
    units = blocks // 4
    first = gl.minimum(segment * steps, units - 1)
    count = gl.minimum(steps, units - segment * steps)
    last = gl.maximum(count - 1, 0)
    left = num_outputs - 1 - tile * N
    n = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS))), left)
    run = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, WORDS)))
    word = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))
    w_offset = (n * (blocks * 8))[:, None, None] + (run * 8)[None, :, None] + word[None, None, :]
    n = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(1, BLOCKS)), left)
    run = gl.arange(0, 4, layout=gl.SliceLayout(0, BLOCKS))
    b_offset = (n * blocks)[:, None] + run[None, :]
    at = tile.to(gl.int64) * N * blocks + first * 4
    low = gl.load(words_ptr + at * 8 + w_offset)
    high = gl.load(words_ptr + at * 8 + 4 + w_offset)
    block = tile * N * blocks + first * 4 + b_offset
    index = gl.load(absmax_ptr + block)
    if OVERLAPS and not BESIDE_SHRINK:  # nothing was read that the launch before writes
        gdc_wait()
    t = gl.minimum(gl.arange(0, T, layout=gl.SliceLayout(1, ROWS)), num_rows - 1)
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, ROWS))
    x_offset = (t * stride_xt)[:, None] + k[None, :]
    x_ptr += first * 256
    x = gl.allocate_shared_memory(DTYPE, [2, T, 128], gl.NVMMASharedLayout(128, 16, 2))
    for half in gl.static_range(2):
        async_copy.async_copy_global_to_shared(x.index(half), x_ptr + half * 128 + x_offset)
        async_copy.commit_group()
    acc = gl.zeros([N, T], gl.float32, layout=MMA)
    factor = _scales(index, block, absmax2_ptr, offset_ptr, map_ptr, DOUBLE)
    block = tile * N * blocks + (first + gl.minimum(1, last)) * 4 + b_offset
    index = gl.load(absmax_ptr + block)
    for turn in range(count):
        async_copy.wait_group(1)
        fence_async_shared()
        a, b, c, d, e, f, g, h = _tables(factor, DTYPE)
        words = low
        later = high
        at = tile.to(gl.int64) * N * blocks + (first + gl.minimum(turn + 1, last)) * 4
        low = gl.load(words_ptr + at * 8 + w_offset)
        high = gl.load(words_ptr + at * 8 + 4 + w_offset)
        factor = _scales(index, block, absmax2_ptr, offset_ptr, map_ptr, DOUBLE)  # of the next turn
        block = tile * N * blocks + (first + gl.minimum(turn + 2, last)) * 4 + b_offset
        index = gl.load(absmax_ptr + block)
        coming = x_ptr + gl.minimum(turn + 1, last) * 256 + x_offset
        w = _decoded(words, a, b, c, d, e, f, g, h, DTYPE, N, 4, OPERAND)
        acc = warpgroup_mma(w, x.index(0).permute((1, 0)), acc)
        async_copy.async_copy_global_to_shared(x.index(0), coming)
        async_copy.commit_group()
        async_copy.wait_group(1)
        fence_async_shared()
        w = _decoded(later, a, b, c, d, e, f, g, h, DTYPE, N, 4, OPERAND)
        acc = warpgroup_mma(w, x.index(1).permute((1, 0)), acc)
        async_copy.async_copy_global_to_shared(x.index(1), coming + 128)
        async_copy.commit_group()
    async_copy.wait_group(0)
    _sum_and_store(
        acc, tile, segment, segments, bias_ptr, xa_ptr, b_ptr, parts_ptr, out_ptr, work_ptr,
        count_ptr, scale, num_rows, num_outputs, stride_ot, stride_xat, N, T, WARPS, MMA, SPLIT,
        HAS_BIAS, NUM_PARTS, RANK, BLOCK_R, BESIDE_SHRINK,
    )  # fmt: skip


def launch(
    x: Tensor,
    weight: NF4Matrix,
    bias: Tensor | None,
    segments: int,
    low_rank: LowRank | None = None,
    *,
    overlaps: bool = True,
) -> Tensor:
    """See `launch` of kernels/nf4_hopper.py; this one lets no next launch begin early."""
    return start(_kernel, WIDE, constants(), x, weight, bias, segments, low_rank, overlaps)


def constants() -> dict[str, object]:
    """The kernel's arguments that follow from its tile."""
    return {
        "T": WIDE.block_t,
        "WARPS": WIDE.num_warps,
        "WORDS": words_layout(WIDE.num_warps, 4),
        "ROWS": rows_layout(WIDE.num_warps, WIDE.block_t, 128),
    }
