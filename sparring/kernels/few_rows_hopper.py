"""The products of kernels/few_rows.py on sm_90, memory kept busy from launch to launch (Gluon).

    y = f(x) W^T + bias          f: nothing, or RMSNorm with a weight
    out = y                      or y + residual (rounded twice), or silu(y_gate) y_up

x [T, K], W [N, K], 16 bits, float32 sums, the rounding points of kernels/few_rows.py.

A decode step of few rows reads every weight once, so its time is that of memory, if memory never
waits. Weights come in boxes of 64 rows (TMA) into a ring in shared memory, and weights do not
depend on the launch before: each program fills its ring as soon as it is on the card, while the
launch before still runs (programmatic dependent launch), and lets the next launch come and do the
same. So the bytes of the ring are what hides launches and latency.

Work is cut along k: weight rows in tiles of 64 or 128, each tile's columns in steps; the steps of
all tiles, one after the other, are shared out evenly among a fixed number of programs. A tile that
several programs have a part of is added up in the order of k by the one that finishes last. So bits
depend on shapes and form alone. The weight is the left operand of the matrix instruction.

A norm is computed by every program from the rows themselves: x [T, K] lies in its shared memory.
Without one, x comes through the ring beside the weights.

Bytes: W once; FLOP 2 T N K. Not here: adapters, other cards, which layer takes it (models/).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparring.kernels import jit, triton
from sparring.kernels.matmul import Tile, workspace

if triton is not None:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    jit = gluon.jit
    barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, 3.6

ARCH = 90
BOX = 64
"""Weight rows of a box, as the matrix instruction has them."""
MAX_ROWS = 64
MAX_NORM_BYTES = 48 << 10
"""Of x [T, K] in shared memory, where the norm is folded in."""


@dataclass(frozen=True, slots=True)
class Ring:
    """How a product is computed: programs, columns of a step, depth of the ring in steps, and boxes
    of 64 weight rows in a step (2 of a gated product).
    """

    programs: int
    block_k: int = 128
    stages: int = 5
    boxes: int = 1


@jit
def _flat(acc, N: gl.constexpr, T: gl.constexpr, LAYOUT: gl.constexpr):
    """acc [64, T] as the threads have it, four numbers after the other."""
    flat = acc.reshape(4, 2, 8, T // 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(N * T)
    return gl.convert_layout(flat, LAYOUT, assert_trivial=True)


@jit
def _back(flat, N: gl.constexpr, T: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of `_flat`."""
    acc = flat.reshape(T // 8, 4, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5).reshape(N, T)
    return gl.convert_layout(acc, LAYOUT, assert_trivial=True)


@jit
def _sum_of_pieces(
    acc, second, work_ptr, count_ptr, first, piece, pieces,
    T: gl.constexpr, BOXES: gl.constexpr, PIECES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """(a tile's sums, of its second box, whether this program came last and has them). A program
    has one piece at most that begins a tile, and one that does not.
    """
    N: gl.constexpr = 64
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    mine = work_ptr + ((first + piece) * 2 + gl.where(piece == 0, 1, 0)) * (N * T * BOXES)
    cell = gl.arange(0, N * T, layout=FLAT)
    gl.store(mine + cell, _flat(acc, N, T, FLAT))
    if BOXES == 2:
        gl.store(mine + N * T + cell, _flat(second, N, T, FLAT))
    barrier()
    finishes = gl.atomic_add(count_ptr + first, 1, sem="acq_rel") == pieces - 1
    barrier()
    if finishes:
        total = gl.zeros([N * T], gl.float32, layout=FLAT)
        more = gl.zeros([N * T], gl.float32, layout=FLAT)
        for p in gl.static_range(PIECES):
            slot = (first + p) * 2 + (1 if p == 0 else 0)
            part = work_ptr + slot * (N * T * BOXES) + cell
            here = (cell >= 0) & (p < pieces)
            total += gl.load(part, mask=here, other=0.0, cache_modifier=".cg")
            if BOXES == 2:
                more += gl.load(part + N * T, mask=here, other=0.0, cache_modifier=".cg")
        gl.store(count_ptr + first, 0)
        acc = _back(total, N, T, MMA)
        if BOXES == 2:
            second = _back(more, N, T, MMA)
    return acc, second, finishes


@jit
def _biased(acc, row_n, bias_ptr, num_outputs, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr):
    """acc [N, T] and bias, rounded."""
    if HAS_BIAS:
        bias = gl.load(bias_ptr + row_n, mask=row_n < num_outputs, other=0.0)
        acc += bias.to(gl.float32)[:, None]
    return acc.to(DTYPE)


@jit
def read_tile(
    row_n, residual_ptr, num_rows, num_outputs,
    T: gl.constexpr, MMA: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """The residual's [N, T] of a tile."""
    row_t = gl.arange(0, T, layout=gl.SliceLayout(0, MMA))
    inside = (row_n < num_outputs)[:, None] & (row_t < num_rows)[None, :]
    if HAS_RESIDUAL:
        at = (row_t * num_outputs)[None, :] + row_n[:, None]
        return gl.load(residual_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
    else:  # noqa: RET505 - Triton wants one type a branch
        return inside


@jit
def _store(
    acc, before, row_n, bias_ptr, out_ptr, num_rows, num_outputs,
    T: gl.constexpr, MMA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Bias, the residual `before`, and y [N, T] as out [T, N]."""
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    y = _biased(acc, row_n, bias_ptr, num_outputs, HAS_BIAS, DTYPE)
    row_t = gl.arange(0, T, layout=gl.SliceLayout(0, MMA))
    inside = (row_n < num_outputs)[:, None] & (row_t < num_rows)[None, :]
    at = (row_t * num_outputs)[None, :] + row_n[:, None]
    if HAS_RESIDUAL:
        y = (y.to(gl.float32) + before.to(gl.float32)).to(DTYPE)
    gl.store(out_ptr + at, y, mask=inside)


@jit
def _store_gated(
    gate, up, row_n, bias_ptr, out_ptr, num_rows, width,
    T: gl.constexpr, MMA: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """silu(gate) up, both [N, T], as out [T, N]."""
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    g = _biased(gate, row_n, bias_ptr, width, HAS_BIAS, DTYPE).to(gl.float32)
    u = _biased(up, row_n + width, bias_ptr, 2 * width, HAS_BIAS, DTYPE).to(gl.float32)
    h = (g / (1.0 + gl.exp(-g)) * u).to(DTYPE)
    row_t = gl.arange(0, T, layout=gl.SliceLayout(0, MMA))
    inside = (row_n < width)[:, None] & (row_t < num_rows)[None, :]
    gl.store(out_ptr + (row_t * width)[None, :] + row_n[:, None], h, mask=inside)


@jit
def _store_tile(
    acc, other, before, other_before, row_n, bias_ptr, out_ptr, num_rows, num_outputs,
    T: gl.constexpr, BOXES: gl.constexpr, MMA: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A tile's boxes: gates and what they let through, or rows of their own."""
    if GATED:
        _store_gated(acc, other, row_n, bias_ptr, out_ptr, num_rows, num_outputs, T, MMA, HAS_BIAS)
    else:
        _store(
            acc, before, row_n, bias_ptr, out_ptr, num_rows, num_outputs, T, MMA, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip
        if BOXES == 2:
            _store(
                other, other_before, row_n + 64, bias_ptr, out_ptr, num_rows, num_outputs, T, MMA,
                HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip


@jit
def norm_rows(
    x_ptr, x, gains, eps, num_rows, T: gl.constexpr, BLOCK_K: gl.constexpr,
    CHUNKS: gl.constexpr, ROWS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The rows, read past the first cache and normed, into shared memory [CHUNKS, T, BLOCK_K]."""
    t = gl.arange(0, T, layout=gl.SliceLayout(1, ROWS))
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, ROWS))
    at = x_ptr + (t * (CHUNKS * BLOCK_K))[:, None] + k[None, :]
    inside = (t < num_rows)[:, None] & (k >= 0)[None, :]
    chunks = ()
    for i in gl.static_range(CHUNKS):
        there = gl.load(at + i * BLOCK_K, mask=inside, other=0.0, cache_modifier=".cg")
        chunks = chunks + (there,)  # noqa: RUF005 - what the compiler knows of tuples
    total = gl.zeros([T, BLOCK_K], gl.float32, layout=ROWS)
    for i in gl.static_range(CHUNKS):
        wide = chunks[i].to(gl.float32)
        total += wide * wide
    scale = 1.0 / gl.sqrt(gl.sum(total, axis=1) / (CHUNKS * BLOCK_K) + eps)
    for i in gl.static_range(CHUNKS):
        normed = (chunks[i].to(gl.float32) * scale[:, None]).to(DTYPE)
        gain = gains.index(i).load(gl.SliceLayout(0, ROWS)).to(gl.float32)
        x.index(i).store((normed.to(gl.float32) * gain[None, :]).to(DTYPE))
    fence_async_shared()
    barrier()


@jit
def _ask(
    w_desc, w, bar, unit, last, slot, steps, second,
    BOXES: gl.constexpr, BLOCK_K: gl.constexpr, BYTES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """A step's weights are asked for, into a slot of the ring, if it is before the last one."""
    wanted = unit < last
    tile = unit // steps
    k = (unit - tile * steps) * BLOCK_K
    mbarrier.expect(bar, BYTES, pred=wanted)
    for box in gl.static_range(BOXES):
        at = [tile * ROWS + box * second, k]
        tma.async_copy_global_to_shared(w_desc, at, bar, w.index(slot * BOXES + box), pred=wanted)


@jit(do_not_specialize=["num_rows", "num_outputs", "tiles", "steps", "second"])
def _ring_kernel(
    w_desc, x_desc, x_ptr, gain_ptr, bias_ptr, residual_ptr, out_ptr, work_ptr, count_ptr, eps,
    num_rows, num_outputs, tiles, steps, second,
    T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
    CHUNKS: gl.constexpr, PIECES: gl.constexpr, HAS_NORM: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """num_outputs: columns of out. CHUNKS: steps of x that are in shared memory at a time."""
    DTYPE: gl.constexpr = w_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    TILE: gl.constexpr = 64 if GATED else 64 * BOXES  # columns of out
    W_BYTES: gl.constexpr = 64 * BOXES * BLOCK_K * 2
    X_BYTES: gl.constexpr = T * BLOCK_K * 2
    BYTES: gl.constexpr = W_BYTES if HAS_NORM else W_BYTES + X_BYTES
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    units = tiles * steps
    first = program * units // programs
    last = (program + 1) * units // programs
    w = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, 64, BLOCK_K], w_desc.layout)
    x = gl.allocate_shared_memory(DTYPE, [CHUNKS, T, BLOCK_K], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _ask(
            w_desc, w, bars.index(i), first + i, last, i, steps, second, BOXES, BLOCK_K, BYTES, TILE
        )
    if not HAS_NORM:
        # what describes x is fetched with rows past the last, which are zeros and read nothing
        mbarrier.expect(bars.index(STAGES), X_BYTES)
        tma.async_copy_global_to_shared(x_desc, [num_rows, 0], bars.index(STAGES), x.index(0))
    if OVERLAPS:
        gdc_launch_dependents()
    if HAS_NORM:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        VEC: gl.constexpr = min(8, T * BLOCK_K // 128)
        LANES: gl.constexpr = min(32, BLOCK_K // VEC)
        ROWS: gl.constexpr = gl.BlockedLayout([1, VEC], [32 // LANES, LANES], [4, 1], [1, 0])
        gains = gl.allocate_shared_memory(gain_ptr.dtype.element_ty, [CHUNKS, BLOCK_K], FLAT)
        k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, ROWS))
        for i in gl.static_range(CHUNKS):
            gains.index(i).store(gl.load(gain_ptr + i * BLOCK_K + k))
    if not HAS_NORM:
        mbarrier.wait(bars.index(STAGES), 0)
    if OVERLAPS:  # until here nothing was read that a launch before writes
        gdc_wait()
    if HAS_NORM:
        norm_rows(x_ptr, x, gains, eps, num_rows, T, BLOCK_K, CHUNKS, ROWS, DTYPE)
    else:
        for i in gl.static_range(STAGES):
            k = (first + i) % steps * BLOCK_K
            tma.async_copy_global_to_shared(
                x_desc, [0, k], bars.index(i), x.index(i), pred=first + i < last
            )
    turn = first * 0
    unit = first
    while unit < last:
        tile = unit // steps
        begin = unit - tile * steps
        end = gl.minimum(steps, begin + last - unit)
        acc = gl.zeros([64, T], gl.float32, layout=MMA)
        other = gl.zeros([64, T], gl.float32, layout=MMA)
        for step in range(begin, end):
            slot = turn % STAGES
            mbarrier.wait(bars.index(slot), turn // STAGES & 1)
            b = x.index(step if HAS_NORM else slot).permute((1, 0))
            acc = warpgroup_mma(w.index(slot * BOXES), b, acc, is_async=True)
            if BOXES == 2:
                other = warpgroup_mma(w.index(slot * BOXES + 1), b, other, is_async=True)
            # the step before is done: its slot is free
            if BOXES == 2:
                acc, other = warpgroup_mma_wait(num_outstanding=BOXES, deps=[acc, other])
            else:
                acc = warpgroup_mma_wait(num_outstanding=BOXES, deps=[acc])
            barrier()
            later = turn + STAGES - 1
            slot = later % STAGES
            bar = bars.index(slot)
            coming = gl.where(turn == 0, last, first + later)
            _ask(w_desc, w, bar, coming, last, slot, steps, second, BOXES, BLOCK_K, BYTES, TILE)
            if not HAS_NORM:
                at = [0, coming % steps * BLOCK_K]
                tma.async_copy_global_to_shared(x_desc, at, bar, x.index(slot), pred=coming < last)
            turn += 1
        acc, other = warpgroup_mma_wait(num_outstanding=0, deps=[acc, other])
        row_n = tile * TILE + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
        # under way while pieces meet
        before = read_tile(row_n, residual_ptr, num_rows, num_outputs, T, MMA, HAS_RESIDUAL)
        other_before = before
        if BOXES == 2:
            other_before = read_tile(
                row_n + 64, residual_ptr, num_rows, num_outputs, T, MMA, HAS_RESIDUAL
            )
        finishes = True
        if PIECES > 1 and end - begin < steps:
            start = ((tile * steps + 1) * programs - 1) // units
            pieces = ((tile + 1) * steps * programs - 1) // units - start + 1
            acc, other, finishes = _sum_of_pieces(
                acc, other, work_ptr, count_ptr, start, program - start, pieces, T, BOXES,
                PIECES, MMA,
            )  # fmt: skip
        if finishes:
            _store_tile(
                acc, other, before, other_before, row_n, bias_ptr, out_ptr, num_rows, num_outputs,
                T, BOXES, MMA, HAS_BIAS, HAS_RESIDUAL, GATED,
            )  # fmt: skip
        unit += end - begin


@cache
def most_pieces(ring: Ring, tiles: int, steps: int) -> int:
    """Programs that have a part of a tile, at most."""
    units = tiles * steps
    owner = [((unit + 1) * ring.programs - 1) // units for unit in range(0, units + 1, steps)]
    last = [((tile + 1) * steps * ring.programs - 1) // units for tile in range(tiles)]
    return max(b - a + 1 for a, b in zip(owner, last, strict=False))


def block_t_of(num_rows: int) -> int:
    """Rows of x that the instruction takes."""
    return next(n for n in (8, 16, 32, 64) if n >= num_rows)


def folds_norm(ring: Ring, num_rows: int, columns: int) -> bool:
    """Whether a program has room for x [T, K] as a whole."""
    room = block_t_of(num_rows) * columns * 2 <= MAX_NORM_BYTES
    return room and columns % ring.block_k == 0


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    ring: Ring,
    overlaps: bool = True,
) -> Tensor:
    """`few_rows_reference` of kernels/few_rows.py without the squares, in one launch on sm_90.

    norm: weight and eps. overlaps: the launch begins while the one before it runs.
    """
    (num_rows, columns), num_outputs = x.shape, weight.shape[0]
    width = num_outputs // 2 if gated else num_outputs
    block_t = block_t_of(num_rows)
    tiles = triton.cdiv(width, BOX if gated else BOX * ring.boxes)
    steps = triton.cdiv(columns, ring.block_k)
    assert ring.programs <= tiles * steps, "a program without work"
    assert ring.stages > 1, "a slot is filled again a step after it was read"
    assert ring.boxes == 2 or not gated, "gates and what they let through"
    assert norm is None or folds_norm(ring, num_rows, columns), "x fits in shared memory"
    out = torch.empty(num_rows, width, dtype=out_dtype or x.dtype, device=x.device)
    pieces = most_pieces(ring, tiles, steps)
    work, count = out, out
    if pieces > 1:
        tile = Tile(BOX * ring.boxes, block_t, 4, 1)
        work, count = workspace(x, tile, ring.programs, 2)
    shared = gl.NVMMASharedLayout(128, 16, 2)
    described = [
        TensorDescriptor.from_tensor(matrix, [rows, ring.block_k], shared)
        for matrix, rows in ((weight, BOX), (x, block_t))
    ]
    _ring_kernel[(ring.programs,)](
        *described, x, x if norm is None else norm[0], x if bias is None else bias,
        x if residual is None else residual, out, work, count, 0.0 if norm is None else norm[1],
        num_rows, width, tiles, steps, width if gated else BOX,
        T=block_t, BLOCK_K=ring.block_k, STAGES=ring.stages, BOXES=ring.boxes,
        CHUNKS=ring.stages if norm is None else steps, PIECES=pieces, HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated,
        OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out
