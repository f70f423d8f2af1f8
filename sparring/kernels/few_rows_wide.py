"""The products of kernels/few_rows.py for 65 to 256 rows on sm_90 (Gluon).

    y = x W^T + bias
    out = y, or silu(y_gate) y_up, or y's pieces: sums over parts of k, [S, T, N] float32

x [T, K], W [N, K], 16 bits, float32 sums, rounded as kernels/few_rows.py does.

At so many rows memory is not alone: every tile of weight rows reads x again, through the L2 cache
that the weights cross as well. So tiles are tall, 128 or 256 weight rows (gates and what they let
through are one tile) and 128 of x, eight warps share one, and weight and x come together through
a ring in shared memory (TMA), weights of the first slots before the launch's turn
(few_rows_hopper.py).

Two ways to keep all multiprocessors busy. Even: the steps of all tiles, one after the other, are
shared out evenly; a tile that several programs have a part of is finished by the one that has its
beginning, which reads it last, so that the others' parts are there long before; they are added in
the order of k. Later programs of the grid have earlier parts: nobody waits for a program that may
not have begun. Pieces: k is cut, every program computes one piece of one tile, and the norm
behind adds them (chain.py), in order. Bits depend on shapes and form alone.

Bytes: W once, x once a tile through L2; FLOP 2 T N K. Not here: norms, residuals, adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

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

BOX = 128
"""Weight rows of a box."""
BLOCK_K = 64
BLOCK_T = 128
"""Rows of x in a tile."""
MAX_ROWS = 256
NUM_WARPS = 8
MAX_REGISTERS = 168
"""A thread: so that a norm behind has room beside and begins early (chain.py)."""


@dataclass(frozen=True, slots=True)
class Wide:
    """How a product is computed: boxes of 128 weight rows in a tile (2 of a gated product), depth
    of the ring in steps of 64 columns, and programs of an even form or pieces of k.
    """

    boxes: int = 2
    stages: int = 4
    programs: int = 0
    pieces: int = 0


@jit
def _ask(
    w_desc, w, bar, unit, last, slot, steps, second,
    BOXES: gl.constexpr, K: gl.constexpr, BYTES: gl.constexpr, TILE: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """A step's weights are asked for, into a slot of the ring, if it is before the last one."""
    wanted = unit < last
    tile = unit // steps
    k = (unit - tile * steps) * K
    mbarrier.expect(bar, BYTES, pred=wanted)
    for box in gl.static_range(BOXES):
        at = [tile // HALVES * TILE + box * second, k]
        tma.async_copy_global_to_shared(w_desc, at, bar, w.index(slot * BOXES + box), pred=wanted)


@jit
def _ask_rows(
    x_desc, x, bar, unit, last, slot, steps, K: gl.constexpr, T: gl.constexpr, HALVES: gl.constexpr
):
    """The same of a step's columns of x."""
    tile = unit // steps
    at = [tile % HALVES * T, (unit - tile * steps) * K]
    tma.async_copy_global_to_shared(x_desc, at, bar, x.index(slot), pred=unit < last)


@jit
def _flat(acc, N: gl.constexpr, T: gl.constexpr, LAYOUT: gl.constexpr):
    """acc [N, T] as the threads have it, four numbers after the other."""
    flat = acc.reshape(N // 16, 2, 8, T // 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(N * T)
    return gl.convert_layout(flat, LAYOUT, assert_trivial=True)


@jit
def _back(flat, N: gl.constexpr, T: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of `_flat`."""
    acc = flat.reshape(T // 8, N // 16, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5).reshape(N, T)
    return gl.convert_layout(acc, LAYOUT, assert_trivial=True)


@jit
def _others(
    acc, other, work_ptr, ready_ptr, mine, last_one, N: gl.constexpr, T: gl.constexpr,
    BOXES: gl.constexpr, MMA: gl.constexpr, FLAT: gl.constexpr,
):  # fmt: skip
    """A tile's sums: what this program has of it, and the parts of ranges mine + 1 to last_one."""
    for part in range(mine + 1, last_one + 1):
        while gl.atomic_add(ready_ptr + part, 0, sem="acquire") == 0:
            pass
        barrier()
        there = work_ptr + part * (N * T * BOXES) + gl.arange(0, N * T, layout=FLAT)
        acc += _back(gl.load(there, cache_modifier=".cg"), N, T, MMA)
        if BOXES == 2:
            other += _back(gl.load(there + N * T, cache_modifier=".cg"), N, T, MMA)
        barrier()
        gl.store(ready_ptr + part, 0)
    return acc, other


@jit
def _biased(acc, row_n, bias_ptr, end, HAS_BIAS: gl.constexpr):
    """acc [N, T] and the bias of rows before `end`."""
    if HAS_BIAS:
        bias = gl.load(bias_ptr + row_n, mask=row_n < end, other=0.0)
        acc += bias.to(gl.float32)[:, None]
    return acc


@jit
def _store(y, out_ptr, tile_n, first_t, num_rows, num_outputs, N: gl.constexpr, T: gl.constexpr):
    """y [N, T] as rows of out [T, N] from first_t on, 16 bytes of a row a thread."""
    VEC: gl.constexpr = 128 // y.dtype.primitive_bitwidth
    LANES: gl.constexpr = N // VEC
    OUT: gl.constexpr = gl.BlockedLayout([VEC, 1], [LANES, 32 // LANES], [1, 8], [0, 1])
    n = tile_n + gl.arange(0, N, layout=gl.SliceLayout(1, OUT))
    t = first_t + gl.arange(0, T, layout=gl.SliceLayout(0, OUT))
    inside = (n < num_outputs)[:, None] & (t < num_rows)[None, :]
    at = (t * num_outputs)[None, :] + n[:, None]
    gl.store(out_ptr + at, gl.convert_layout(y, OUT), mask=inside)


@jit
def _finish(
    acc, other, tile, bias_ptr, out_ptr, num_rows, num_outputs, biased, N: gl.constexpr,
    T: gl.constexpr, BOXES: gl.constexpr, MMA: gl.constexpr, HALVES: gl.constexpr,
    HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """A tile's rows: gates and what they let through, or rows of their own; `biased`: of the weight
    have a bias.
    """
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    first_n = tile // HALVES * (N if GATED else N * BOXES)
    first_t = tile % HALVES * T
    row_n = first_n + gl.arange(0, N, layout=gl.SliceLayout(1, MMA))
    acc = _biased(acc, row_n, bias_ptr, biased, HAS_BIAS)
    if GATED:
        other = _biased(other, row_n + num_outputs, bias_ptr, biased, HAS_BIAS)
        g = acc.to(DTYPE).to(gl.float32)
        u = other.to(DTYPE).to(gl.float32)
        h = (g / (1.0 + gl.exp(-g)) * u).to(DTYPE)
        _store(h, out_ptr, first_n, first_t, num_rows, num_outputs, N, T)
    else:
        _store(acc.to(DTYPE), out_ptr, first_n, first_t, num_rows, num_outputs, N, T)
        if BOXES == 2:
            other = _biased(other, row_n + N, bias_ptr, biased, HAS_BIAS)
            _store(other.to(DTYPE), out_ptr, first_n + N, first_t, num_rows, num_outputs, N, T)


@jit(do_not_specialize=["num_rows", "eighths", "tiles", "steps", "second"])
def _wide_kernel(
    w_desc, x_desc, bias_ptr, out_ptr, work_ptr, ready_ptr,
    num_rows, eighths, tiles, steps, second,
    T: gl.constexpr, K: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
    PIECES: gl.constexpr, HALVES: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    OVERLAPS: gl.constexpr,
):  # fmt: skip
    """eighths: columns of out, eight together. PIECES: of k, a program each; 0: steps are shared
    out evenly. HALVES: tiles of rows of x, 1 or 2, with the same weights one after the other.
    """
    DTYPE: gl.constexpr = w_desc.dtype
    N: gl.constexpr = 128
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, T, 16])
    TILE: gl.constexpr = N if GATED else N * BOXES  # columns of out
    X_BYTES: gl.constexpr = T * K * 2
    BYTES: gl.constexpr = N * BOXES * K * 2 + X_BYTES
    num_outputs = eighths * 8
    program = gl.program_id(0)
    if PIECES > 0:
        piece = program % PIECES
        first = program // PIECES * steps
        last = first + (piece + 1) * steps // PIECES
        first += piece * steps // PIECES
        mine = program
        programs = program
        units = program
    else:
        programs = gl.num_programs(0)
        units = tiles * steps
        mine = programs - 1 - program
        first = mine * units // programs
        last = (mine + 1) * units // programs
        piece = program * 0
    w = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, N, K], w_desc.layout)
    x = gl.allocate_shared_memory(DTYPE, [STAGES, T, K], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _ask(
            w_desc, w, bars.index(i), first + i, last, i, steps, second, BOXES, K, BYTES, TILE,
            HALVES,
        )  # fmt: skip
    # what describes x is fetched with rows past the last, which are zeros and read nothing
    mbarrier.expect(bars.index(STAGES), X_BYTES)
    tma.async_copy_global_to_shared(x_desc, [num_rows, 0], bars.index(STAGES), x.index(0))
    if OVERLAPS:
        gdc_launch_dependents()
    mbarrier.wait(bars.index(STAGES), 0)
    if OVERLAPS:  # until here nothing was read that a launch before writes
        gdc_wait()
    for i in gl.static_range(STAGES):
        _ask_rows(x_desc, x, bars.index(i), first + i, last, i, steps, K, T, HALVES)
    turn = first * 0
    unit = first
    while unit < last:
        tile = unit // steps
        begin = unit - tile * steps
        end = gl.minimum(steps, begin + last - unit)
        acc = gl.zeros([N, T], gl.float32, layout=MMA)
        other = gl.zeros([N, T], gl.float32, layout=MMA)
        for _ in range(begin, end):
            slot = turn % STAGES
            mbarrier.wait(bars.index(slot), turn // STAGES & 1)
            b = x.index(slot).permute((1, 0))
            acc = warpgroup_mma(w.index(slot * BOXES), b, acc, is_async=True)
            # the step before is done: its slot is free
            if BOXES == 2:
                other = warpgroup_mma(w.index(slot * BOXES + 1), b, other, is_async=True)
                acc, other = warpgroup_mma_wait(num_outstanding=BOXES, deps=[acc, other])
            else:
                acc = warpgroup_mma_wait(num_outstanding=BOXES, deps=[acc])
            barrier()
            slot = (turn + STAGES - 1) % STAGES
            bar = bars.index(slot)
            coming = gl.where(turn == 0, last, first + turn + STAGES - 1)
            _ask(w_desc, w, bar, coming, last, slot, steps, second, BOXES, K, BYTES, TILE, HALVES)
            _ask_rows(x_desc, x, bar, coming, last, slot, steps, K, T, HALVES)
            turn += 1
        acc, other = warpgroup_mma_wait(num_outstanding=0, deps=[acc, other])
        if PIECES > 0:
            out = out_ptr + piece.to(gl.int64) * num_rows * num_outputs
            biased = gl.where(piece == 0, num_outputs, 0)
            _finish(
                acc, other, tile, bias_ptr, out, num_rows, num_outputs, biased, N, T, BOXES, MMA,
                HALVES, HAS_BIAS, GATED,
            )  # fmt: skip
        else:
            FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [8], [0])
            if begin > 0:
                there = work_ptr + mine * (N * T * BOXES) + gl.arange(0, N * T, layout=FLAT)
                gl.store(there, _flat(acc, N, T, FLAT))
                if BOXES == 2:
                    gl.store(there + N * T, _flat(other, N, T, FLAT))
                barrier()
                gl.atomic_xchg(ready_ptr + mine, 1, sem="release")
            else:
                last_one = ((tile + 1) * steps * programs - 1) // units
                acc, other = _others(
                    acc, other, work_ptr, ready_ptr, mine, last_one, N, T, BOXES, MMA, FLAT
                )
                _finish(
                    acc, other, tile, bias_ptr, out_ptr, num_rows, num_outputs,
                    num_outputs * (2 if GATED else 1), N, T, BOXES, MMA, HALVES, HAS_BIAS, GATED,
                )  # fmt: skip
        unit += end - begin


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    wide: Wide,
    overlaps: bool = True,
) -> Tensor:
    """y [T, N], its gate applied ([T, N / 2]), or its pieces [S, T, N] in float32, in one launch.

    overlaps: the launch begins while the one before it runs.
    """
    (num_rows, columns), num_outputs = x.shape, weight.shape[0]
    width = num_outputs // 2 if gated else num_outputs
    halves = triton.cdiv(num_rows, BLOCK_T)
    tiles = triton.cdiv(width, BOX if gated else BOX * wide.boxes) * halves
    steps = triton.cdiv(columns, BLOCK_K)
    programs = wide.programs or tiles * wide.pieces
    assert num_rows <= MAX_ROWS, "two tiles of rows"
    assert programs <= tiles * steps, "a program without work"
    assert width % 8 == 0, "16 bytes of a row are written together"
    assert wide.boxes == 2 or not gated, "gates and what they let through"
    assert not wide.pieces or not (wide.programs or gated), "one of the two ways"
    if wide.pieces:
        shape, out_dtype = (wide.pieces, num_rows, width), torch.float32
    else:
        shape = (num_rows, width)
    out = torch.empty(shape, dtype=out_dtype or x.dtype, device=x.device)
    work, ready = out, out
    if not wide.pieces:
        work, ready = workspace(x, Tile(BOX * wide.boxes, BLOCK_T, 4, 1), programs, 1)
    shared = gl.NVMMASharedLayout(128, 16, 2)
    described = [
        TensorDescriptor.from_tensor(matrix, [rows, BLOCK_K], shared)
        for matrix, rows in ((weight, BOX), (x, BLOCK_T))
    ]
    _wide_kernel[(programs,)](
        *described, x if bias is None else bias, out, work, ready, num_rows, width // 8, tiles,
        steps, width if gated else BOX, T=BLOCK_T, K=BLOCK_K, STAGES=wide.stages,
        BOXES=wide.boxes, PIECES=wide.pieces, HALVES=halves, HAS_BIAS=bias is not None,
        GATED=gated, OVERLAPS=overlaps, num_warps=NUM_WARPS, maxnreg=MAX_REGISTERS,
        launch_pdl=overlaps,
    )  # fmt: skip
    return out
