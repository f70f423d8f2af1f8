"""The product of kernels/nf4_matmul.py for few rows on sm_90, with its layouts written out (Gluon).

The same numbers to the bit: the same decode rule, order of k and segments. What differs is where
things lie. Packed weights and x, which comes in the order of kernels/column_order.py, go by
asynchronous copies to shared memory, a turn of 256 columns ahead: registers cannot hold the next
turn's words while this one's are decoded, and a compiler that is left to load them does it just
before they are used. Scales of a segment (MOST_TURNS turns at most) are computed before its first
turn. A thread takes its words from there, decodes half of them, multiplies, then the other
half; four or five programs share a multiprocessor. Sums of segments are written and read 16 bytes a
thread. An adapter's part is added in the last step, as kernels/low_rank.py does it.

Launches overlap (programmatic dependent launch): what depends on weights alone is asked for before
the launch before this one has ended, and the next launch may begin when all programs have begun.

Bytes and instructions: see kernels/nf4_matmul.py. Not here: rows in another order, other cards;
more than 64 rows (nf4_hopper_wide.py).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sparring.kernels import Capability, jit, triton
from sparring.kernels.column_order import BLOCK_K
from sparring.kernels.low_rank import LowRank, low_rank_arguments
from sparring.kernels.matmul import Tile, first_that_holds, steps_of, workspace
from sparring.kernels.nf4 import BLOCK, CODE, NF4Matrix, dynamic_map_on, words_of

if triton is not None:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        async_copy,
        fence_async_shared,
        warpgroup_mma,
    )
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    jit = gluon.jit
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

ARCH = 90

TILES = (
    Tile(64, 8, 4, 2, 96),
    Tile(64, 16, 4, 2, 96),
    Tile(64, 32, 4, 2, 128),
    Tile(128, 64, 8, 2, 128),
)
"""The first whose block_t holds the rows."""

WIDE = Tile(64, 128, 4, 1, 168)
"""For more rows, in kernels/nf4_hopper_wide.py."""

MAX_ROWS = WIDE.block_t

MOST_ROWS_OF_W = max(tile.block_n for tile in TILES)

MAX_RANK = 64
"""Of an adapter: what one piece of shared memory in the instruction's order holds."""

MOST_TURNS = 8
"""Of a segment, all of whose scales are kept in shared memory."""


def table_asm(half_type: str) -> str:
    """PTX: a quant block's scale $8 to the 16 products of the code with it, their low bytes in $0
    to $3 and their high bytes in $4 to $7.
    """
    lines = [".reg .b32 t<8>;", ".reg .f32 x<16>;"]
    for i, value in enumerate(CODE):
        bits = torch.tensor(value, dtype=torch.float32).view(torch.int32).item() & 0xFFFFFFFF
        lines.append(f"mul.rn.f32 x{i},$8,0f{bits:08X};")
    for i in range(8):
        lines.append(f"cvt.rn.{half_type}x2.f32 t{i},x{2 * i + 1},x{2 * i};")
    for i in range(4):
        lines.append(f"prmt.b32 ${i},t{2 * i},t{2 * i + 1},0x6420;")
        lines.append(f"prmt.b32 ${i + 4},t{2 * i},t{2 * i + 1},0x7531;")
    return "{" + " ".join(lines) + "}"


def lookup_asm() -> str:
    """PTX: a word of four packed bytes $4 to four registers of two weights each, by the tables $5
    to $8 and $9 to $12; see `lookup_asm` of kernels/nf4.py.
    """
    lines = [".reg .b32 s,m,n,a,b,c,d;", "and.b32 s,$4,0x77777777;", "shl.b32 m,$4,4;"]
    for first, second, tops in (("$0", "$1", "0xd9c8"), ("$2", "$3", "0xfbea")):
        if first == "$2":
            lines.append("shr.u32 s,s,16;")
        lines += [
            f"prmt.b32 n,m,$4,{tops};", "prmt.b32 a,$9,$10,s;", "prmt.b32 b,$11,$12,s;",
            "prmt.b32 c,$5,$6,s;", "prmt.b32 d,$7,$8,s;", "lop3.b32 a,b,a,n,0xe4;",
            "lop3.b32 c,d,c,n,0xe4;", f"prmt.b32 {first},c,a,0x4051;",
            f"prmt.b32 {second},c,a,0x6273;",
        ]  # fmt: skip
    return "{" + " ".join(lines) + "}"


if triton is not None:
    TABLE_BF16 = gl.constexpr(table_asm("bf16"))
    TABLE_FP16 = gl.constexpr(table_asm("f16"))
    LOOKUP = gl.constexpr(lookup_asm())


def _powers(count: int, first: int, rank: int, axis: int) -> list[list[int]]:
    """Bases first, 2 first, ... of an axis, for `count` places."""
    steps = [first << i for i in range(count.bit_length() - 1)]
    return [[step if i == axis else 0 for i in range(rank)] for step in steps]


@cache
def words_layout(warps: int, words: int):
    """Who holds what of words [N, run 4, words of a run]: thread 4 g + q of a warp has rows g and
    g + 8 of the warp's 16, run q, as the instruction has them.
    """
    registers = [*_powers(words, 1, 3, 2), [8, 0, 0]]
    lanes = [*_powers(4, 1, 3, 1), *_powers(8, 1, 3, 0)]
    shape = [16 * warps, 4, words]
    return gl.DistributedLinearLayout(registers, lanes, _powers(warps, 16, 3, 0), [], shape)


@cache
def turn_layout(warps: int):
    """The same of a turn's words [N, 32]."""
    registers = [*_powers(8, 1, 2, 1), [8, 0]]
    lanes = [*_powers(4, 8, 2, 1), *_powers(8, 1, 2, 0)]
    return gl.DistributedLinearLayout(
        registers, lanes, _powers(warps, 16, 2, 0), [], [16 * warps, 32]
    )


@cache
def rows_layout(warps: int, rows: int, columns: int):
    """Who copies what of x [rows, columns]: 16 bytes each, along a row first."""
    places = [*_powers(columns // 8, 8, 2, 1), *_powers(rows, 1, 2, 0)]
    more = warps.bit_length() - 1
    in_warps = places[5 : 5 + more]
    in_warps += [[0, 0]] * (more - len(in_warps))
    registers = [*_powers(8, 1, 2, 1), *places[5 + more :]]
    return gl.DistributedLinearLayout(registers, places[:5], in_warps, [], [rows, columns])


@jit
def _tables(scale, DTYPE: gl.constexpr):
    """The eight table words of every quant block [N, 4], each [N, 4, 1]."""
    kind: gl.constexpr = (
        gl.uint32, gl.uint32, gl.uint32, gl.uint32, gl.uint32, gl.uint32, gl.uint32, gl.uint32,
    )  # fmt: skip
    places: gl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r"
    if gl.bfloat16 == DTYPE:
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            TABLE_BF16, places, [scale], dtype=kind, is_pure=True, pack=1
        )
    else:
        a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
            TABLE_FP16, places, [scale], dtype=kind, is_pure=True, pack=1
        )
    return (
        gl.expand_dims(a, 2), gl.expand_dims(b, 2), gl.expand_dims(c, 2), gl.expand_dims(d, 2),
        gl.expand_dims(e, 2), gl.expand_dims(f, 2), gl.expand_dims(g, 2), gl.expand_dims(h, 2),
    )  # fmt: skip


@jit
def _decoded(
    words, a, b, c, d, e, f, g, h,
    DTYPE: gl.constexpr, N: gl.constexpr, WORDS: gl.constexpr, OPERAND: gl.constexpr,
):  # fmt: skip
    """Weights [N, 32 WORDS] of words [N, 4, WORDS], in the order of the sum and as an operand."""
    kind: gl.constexpr = (gl.uint32, gl.uint32, gl.uint32, gl.uint32)
    p, q, r, s = gl.inline_asm_elementwise(
        LOOKUP, "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [words, a, b, c, d, e, f, g, h],
        dtype=kind, is_pure=True, pack=1,
    )  # fmt: skip
    pairs = gl.join(gl.join(p, r), gl.join(q, s))  # [N, run, word, step, half]
    first = pairs.to(gl.uint16).to(DTYPE, bitcast=True)
    second = (pairs >> 16).to(gl.uint16).to(DTYPE, bitcast=True)
    v = gl.join(first, second).permute(0, 2, 3, 4, 1, 5).reshape(N, WORDS * 32)
    return gl.convert_layout(v, OPERAND, assert_trivial=True)


@jit
def _scales(index, block, absmax2_ptr, offset_ptr, map_ptr, DOUBLE: gl.constexpr):
    """Scales of quant blocks from what absmax holds for them (`index`)."""
    if DOUBLE:
        group = block // 256
        scale = gl.load(map_ptr + index.to(gl.int32))
        scale = scale * gl.load(absmax2_ptr + group)
        return scale + gl.load(offset_ptr + group)
    else:  # noqa: RET505 - Triton wants one type a branch
        return index


@jit
def _add_low_rank(
    acc, n, xa_ptr, b_ptr, parts_ptr, scale, num_rows, num_outputs, stride_xat,
    N: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr,
    DTYPE: gl.constexpr, NUM_PARTS: gl.constexpr, RANK: gl.constexpr, BLOCK_R: gl.constexpr,
):  # fmt: skip
    """acc [N, T] + scale B xa^T of the part that output n is in; see kernels/low_rank.py."""
    EIGHTS: gl.constexpr = gl.BlockedLayout(
        [1, 8], [256 // BLOCK_R, BLOCK_R // 8], [WARPS, 1], [1, 0]
    )
    LINES: gl.constexpr = gl.NVMMASharedLayout(2 * BLOCK_R, 16, 2)
    row = -1
    column = 0
    for part in gl.static_range(NUM_PARTS):
        first = gl.load(parts_ptr + 4 * part)
        if (n >= first) & (n < gl.load(parts_ptr + 4 * part + 1)):
            row = gl.load(parts_ptr + 4 * part + 2) + n - first
            column = gl.load(parts_ptr + 4 * part + 3)
    r = gl.arange(0, BLOCK_R, layout=gl.SliceLayout(0, EIGHTS))
    i = gl.arange(0, N, layout=gl.SliceLayout(1, EIGHTS))
    t = gl.arange(0, T, layout=gl.SliceLayout(1, EIGHTS))
    b = gl.load(
        b_ptr + ((row + i) * RANK)[:, None] + r[None, :],
        mask=((row >= 0) & (i < num_outputs - n))[:, None] & (r < RANK)[None, :], other=0.0,
    )  # fmt: skip
    xa = gl.load(
        xa_ptr + (t * stride_xat + column)[:, None] + r[None, :],
        mask=((row >= 0) & (t < num_rows))[:, None] & (r < RANK)[None, :], other=0.0,
    )  # fmt: skip
    held = gl.allocate_shared_memory(DTYPE, [T, BLOCK_R], LINES, xa)
    fence_async_shared()
    b = gl.convert_layout(b, gl.DotOperandLayout(0, MMA, 2))
    zeros = gl.zeros([N, T], gl.float32, layout=MMA)
    return acc + scale * warpgroup_mma(b, held.permute((1, 0)), zeros)


@jit
def _sum_and_store(
    acc, tile, segment, segments, bias_ptr, xa_ptr, b_ptr, parts_ptr, out_ptr, work_ptr,
    count_ptr, scale, num_rows, num_outputs, stride_ot, stride_xat,
    N: gl.constexpr, T: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr,
    SPLIT: gl.constexpr, HAS_BIAS: gl.constexpr, NUM_PARTS: gl.constexpr, RANK: gl.constexpr,
    BLOCK_R: gl.constexpr, BESIDE_SHRINK: gl.constexpr,
):  # fmt: skip
    """The sum of a tile's segments in order, bias, rounding, an adapter and rounding again, and acc
    [N, T] as y [T, N].
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    finishes = True
    if SPLIT:
        FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
        work = work_ptr + tile.to(gl.int64) * (segments * N * T)
        work += gl.arange(0, N * T, layout=FLAT)
        flat = acc.reshape(WARPS, 2, 8, T // 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(N * T)
        gl.store(work + segment * (N * T), gl.convert_layout(flat, FLAT, assert_trivial=True))
        barrier()
        finishes = gl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == segments - 1
        barrier()
        if finishes:
            total = gl.zeros([N * T], gl.float32, layout=FLAT)
            for piece in range(segments):
                total = total + gl.load(work + piece * (N * T), cache_modifier=".cg")
            gl.store(count_ptr + tile, 0)
            back = total.reshape(T // 8, WARPS, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5)
            acc = gl.convert_layout(back.reshape(N, T), MMA, assert_trivial=True)
    if finishes:
        STORE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [WARPS // 4, 4], [0, 1])
        if HAS_BIAS:
            row_n = tile * N + gl.arange(0, N, layout=gl.SliceLayout(1, MMA))
            bias = gl.load(bias_ptr + row_n, mask=row_n < num_outputs, other=0.0)
            acc += bias.to(gl.float32)[:, None]
        if NUM_PARTS > 0:
            if BESIDE_SHRINK:
                gdc_wait()
            acc = _add_low_rank(
                acc.to(DTYPE).to(gl.float32), tile * N, xa_ptr, b_ptr, parts_ptr, scale, num_rows,
                num_outputs, stride_xat, N, T, WARPS, MMA, DTYPE, NUM_PARTS, RANK, BLOCK_R,
            )  # fmt: skip
        y = gl.convert_layout(acc.to(DTYPE), STORE)
        row_n = tile * N + gl.arange(0, N, layout=gl.SliceLayout(1, STORE))
        row_t = gl.arange(0, T, layout=gl.SliceLayout(0, STORE))
        inside = (row_n < num_outputs)[:, None] & (row_t < num_rows)[None, :]
        gl.store(out_ptr + row_t.to(gl.int64)[None, :] * stride_ot + row_n[:, None], y, mask=inside)


@jit
def _keep_scales(
    scales, at, last, b_offset, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr,
    DOUBLE: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Puts the scales of TURNS turns from quant block `at` on where the turns take them from; every
    thread writes what it will read, and asks for all before it uses the first.
    """
    index = ()
    for i in gl.static_range(TURNS):
        index += (gl.load(absmax_ptr + at + gl.minimum(i, last) * 4 + b_offset),)
    found = ()
    for i in gl.static_range(TURNS):
        block = at + gl.minimum(i, last) * 4 + b_offset
        found += (_scales(index[i], block, absmax2_ptr, offset_ptr, map_ptr, DOUBLE),)
    for i in gl.static_range(TURNS):
        scales.index(i).store(found[i])


@jit(do_not_specialize=["num_rows", "segments", "steps"])
def _kernel(
    x_ptr, words_ptr, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, bias_ptr, xa_ptr, b_ptr,
    parts_ptr, out_ptr, work_ptr, count_ptr, scale, num_rows, num_outputs, blocks, segments, steps,
    stride_xt, stride_ot, stride_xat,
    T: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr, DOUBLE: gl.constexpr,
    SPLIT: gl.constexpr, HAS_BIAS: gl.constexpr, OVERLAPS: gl.constexpr, TURNS: gl.constexpr,
    WORDS: gl.constexpr, TURN: gl.constexpr, ROWS: gl.constexpr, NUM_PARTS: gl.constexpr,
    RANK: gl.constexpr, BLOCK_R: gl.constexpr, BESIDE_SHRINK: gl.constexpr,
):  # fmt: skip
    """steps: turns of 256 columns in a segment, at most TURNS. WORDS, TURN, ROWS: `words_layout`,
    `turn_layout`, `rows_layout`.
    """
    N: gl.constexpr = 16 * WARPS
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, T, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    BLOCKS: gl.constexpr = gl.SliceLayout(2, WORDS)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    LINES: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tile = gl.program_id(0)
    segment = gl.program_id(1)
    units = blocks // 4
    first = gl.minimum(segment * steps, units - 1)
    count = gl.minimum(steps, units - segment * steps)
    last = gl.maximum(count - 1, 0)
    left = num_outputs - 1 - tile * N
    words = gl.allocate_shared_memory(
        gl.int32, [STAGES, N, 32], gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    )
    near = gl.allocate_shared_memory(DTYPE, [STAGES, T, 128], LINES)
    far = gl.allocate_shared_memory(DTYPE, [STAGES, T, 128], LINES)
    scales = gl.allocate_shared_memory(
        gl.float32, [TURNS, N, 4], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    n = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(1, COPY)), left)
    word = gl.arange(0, 32, layout=gl.SliceLayout(0, COPY))
    words_ptr += (tile.to(gl.int64) * N * blocks + first * 4) * 8
    words_at = words_ptr + ((n * (blocks * 8))[:, None] + word[None, :])
    for turn in gl.static_range(STAGES - 1):
        if turn < count:
            async_copy.async_copy_global_to_shared(words.index(turn), words_at + turn * 32)
    n = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(1, BLOCKS)), left)
    run = gl.arange(0, 4, layout=gl.SliceLayout(0, BLOCKS))
    b_offset = (n * blocks)[:, None] + run[None, :]
    block = tile * N * blocks + first * 4
    _keep_scales(
        scales, block, last, b_offset, absmax_ptr, absmax2_ptr, offset_ptr, map_ptr, DOUBLE, TURNS
    )
    if OVERLAPS:
        gdc_launch_dependents()
        if not BESIDE_SHRINK:  # until here nothing was read that the launch before writes
            gdc_wait()
    t = gl.minimum(gl.arange(0, T, layout=gl.SliceLayout(1, ROWS)), num_rows - 1)
    k = gl.arange(0, 128, layout=gl.SliceLayout(0, ROWS))
    x_at = x_ptr + first * 256 + ((t * stride_xt)[:, None] + k[None, :])
    for turn in gl.static_range(STAGES - 1):
        if turn < count:
            async_copy.async_copy_global_to_shared(near.index(turn), x_at + turn * 256)
            async_copy.async_copy_global_to_shared(far.index(turn), x_at + (turn * 256 + 128))
        async_copy.commit_group()
    acc = gl.zeros([N, T], gl.float32, layout=MMA)
    for turn in range(count):
        async_copy.wait_group(STAGES - 2)
        barrier()  # a turn's copies are there, and all have done with the turn before
        coming = turn + STAGES - 1
        if coming < count:
            slot = coming % STAGES
            async_copy.async_copy_global_to_shared(words.index(slot), words_at + coming * 32)
            async_copy.async_copy_global_to_shared(near.index(slot), x_at + coming * 256)
            async_copy.async_copy_global_to_shared(far.index(slot), x_at + (coming * 256 + 128))
        async_copy.commit_group()
        fence_async_shared()
        slot = turn % STAGES
        factor = scales.index(turn).load(BLOCKS)
        packed = words.index(slot).load(TURN)
        a, b, c, d, e, f, g, h = _tables(factor, DTYPE)
        low, high = gl.split(packed.reshape(N, 4, 2, 4).permute(0, 1, 3, 2))
        low = gl.convert_layout(low, WORDS, assert_trivial=True)
        high = gl.convert_layout(high, WORDS, assert_trivial=True)
        w = _decoded(low, a, b, c, d, e, f, g, h, DTYPE, N, 4, OPERAND)
        acc = warpgroup_mma(w, near.index(slot).permute((1, 0)), acc)
        w = _decoded(high, a, b, c, d, e, f, g, h, DTYPE, N, 4, OPERAND)
        acc = warpgroup_mma(w, far.index(slot).permute((1, 0)), acc)
    async_copy.wait_group(0)
    _sum_and_store(
        acc, tile, segment, segments, bias_ptr, xa_ptr, b_ptr, parts_ptr, out_ptr, work_ptr,
        count_ptr, scale, num_rows, num_outputs, stride_ot, stride_xat, N, T, WARPS, MMA, SPLIT,
        HAS_BIAS, NUM_PARTS, RANK, BLOCK_R, BESIDE_SHRINK,
    )  # fmt: skip


def serves(x: Tensor, arch: int, low_rank: LowRank | None = None, *, in_order: bool) -> bool:
    """Whether this form takes such rows and such an adapter."""
    fits = in_order and arch == ARCH and len(x) <= MAX_ROWS and x.shape[1] % BLOCK_K == 0
    return fits and (low_rank is None or _fits(low_rank.b.shape[1], low_rank.granule))


def takes_adapter(capability: Capability, num_rows: int, rank: int, granule: int) -> bool:
    """Whether such an adapter's part can be added here (granule: of LowRank)."""
    return capability.arch == ARCH and num_rows <= MAX_ROWS and _fits(rank, granule)


def _fits(rank: int, granule: int) -> bool:
    return rank <= MAX_RANK and granule % MOST_ROWS_OF_W == 0  # a tile lies in one part


def launch(
    x: Tensor,
    weight: NF4Matrix,
    bias: Tensor | None,
    segments: int,
    tile: Tile | None = None,
    low_rank: LowRank | None = None,
    *,
    overlaps: bool = True,
) -> Tensor:
    """y [T, N] of x [T, K] in the order of the sum and a weight [N, K], where `serves` allows it.

    overlaps: the launch begins while the one before it ends, with what that one cannot write, and
    lets the next one do so. tile: for tests and measurements.
    """
    tile = tile or first_that_holds(TILES, len(x))
    constants = constants_of(tile, steps_of(x.shape[1], segments) // 4)
    return start(_kernel, tile, constants, x, weight, bias, segments, low_rank, overlaps)


def start(
    kernel: object,
    tile: Tile,
    constants: dict[str, object],
    x: Tensor,
    weight: NF4Matrix,
    bias: Tensor | None,
    segments: int,
    low_rank: LowRank | None,
    overlaps: bool,
) -> Tensor:
    """`launch` of a kernel with such arguments, by one tile for all rows."""
    (num_rows, num_inputs), num_outputs = x.shape, weight.shape[0]
    out = torch.empty(num_rows, num_outputs, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(num_outputs, tile.block_n)
    work, count = workspace(x, tile, tiles, segments) if segments > 1 else (x, x)
    double = weight.absmax2 is not None
    beside = low_rank is not None and low_rank.scratch is not None
    adapter = low_rank_arguments(low_rank, x, tile.block_n)
    assert adapter.pop("ALIGNED") or low_rank is None, "a tile lies in one part of an adapter"
    kernel[(tiles, segments)](
        x_ptr=x, words_ptr=words_of(weight), absmax_ptr=weight.absmax,
        absmax2_ptr=weight.absmax2 if double else x, offset_ptr=weight.offset if double else x,
        map_ptr=dynamic_map_on(x.device) if double else x, bias_ptr=x if bias is None else bias,
        out_ptr=out, work_ptr=work, count_ptr=count, num_rows=num_rows, num_outputs=num_outputs,
        blocks=num_inputs // BLOCK, segments=segments, steps=steps_of(num_inputs, segments) // 4,
        stride_xt=x.stride(0), stride_ot=out.stride(0), num_warps=tile.num_warps,
        enable_fp_fusion=False, DOUBLE=double, SPLIT=segments > 1, HAS_BIAS=bias is not None,
        OVERLAPS=overlaps or beside, BESIDE_SHRINK=beside, launch_pdl=overlaps or beside,
        **constants, **adapter,
        **({"maxnreg": tile.max_registers} if tile.max_registers else {}),
    )  # fmt: skip
    return out


def constants_of(tile: Tile, turns: int) -> dict[str, object]:
    """The kernel's arguments that follow from its tile and the turns of a segment."""
    assert tile.block_n == 16 * tile.num_warps, "a warp has 16 rows of the weight"
    assert turns <= MOST_TURNS, "shared memory holds their scales"
    return {
        "T": tile.block_t,
        "WARPS": tile.num_warps,
        "STAGES": tile.num_stages,
        "TURNS": turns,
        "WORDS": words_layout(tile.num_warps, 4),
        "TURN": turn_layout(tile.num_warps),
        "ROWS": rows_layout(tile.num_warps, tile.block_t, 128),
    }
