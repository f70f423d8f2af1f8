"""The products of kernels/few_rows_hopper.py for up to 8 rows, in strips of 16 weight rows (Gluon).

The same rounding points, ring and early launch. A program computes strips of 16 weight rows (8
gates and the 8 rows that they gate) over all of k, its four warps a quarter of each step's columns
each, so that no two programs meet in a sum: a launch whose weights lay in shared memory before its
turn ends as soon as its rows were read. The price is that every program reads all of x, which 64
rows a tile (few_rows_hopper.py) do a quarter as often. Sums: k in steps of 256, four parts a step,
the parts added at the end; bits depend on K alone.

Bytes: W once, x [T, K] once a program from the L2 cache. Not here: see few_rows_hopper.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import few_rows_hopper, jit, triton

if triton is not None:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

    jit = gluon.jit
    barrier = few_rows_hopper.barrier
    norm_rows = few_rows_hopper.norm_rows

STRIP = 16
BLOCK_K = 256
"""Columns of a step."""
MAX_ROWS = 8


@dataclass(frozen=True, slots=True)
class Strips:
    """How a product is computed: programs, depth of the ring in steps of 256 columns, and strips
    past a program's first that it asks for to come to the L2 cache before its turn.
    """

    programs: int
    stages: int = 6
    ahead: int = 0


@jit
def _ask(
    w_desc, w, bar, unit, end, slot, program, programs, steps, BYTES: gl.constexpr,
    HEIGHT: gl.constexpr,
):  # fmt: skip
    """A step's weights are asked for, into a slot of the ring, if it is before the last one."""
    wanted = unit < end
    turn = unit // steps
    row = (program + turn * programs) * HEIGHT
    part = (unit - turn * steps) * 4
    mbarrier.expect(bar, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(w_desc, [part, 0, row, 0], bar, w.index(slot), pred=wanted)


@jit
def _prefetch(
    w_ptr, tile, num_outputs, num_inputs, HEIGHT: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """A strip's rows are asked for, into the L2 cache, a row a thread."""
    lane = gl.arange(0, 32 * WARPS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    row = tile * HEIGHT + lane % HEIGHT + lane // HEIGHT * num_outputs
    wanted = (lane < 16) & (tile * HEIGHT + lane % HEIGHT < num_outputs)
    at = w_ptr + row.to(gl.int64) * num_inputs
    gl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3;"
        " mov.u32 $0, 0;}",
        "=r,l,r,r", [at.to(gl.int64), wanted.to(gl.int32), num_inputs * 2],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _biased(y, row_n, bias_ptr, num_outputs, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr):
    """y [N, T] and bias, rounded."""
    if HAS_BIAS:
        bias = gl.load(bias_ptr + row_n, mask=row_n < num_outputs, other=0.0)
        y += bias.to(gl.float32)[:, None]
    return y.to(DTYPE)


@jit
def _added(
    acc, strip, rows, i, step, MMA: gl.constexpr, HAS_NORM: gl.constexpr
):  # fmt: skip
    """acc [4, 16, T] and a step's products, of a slot of the ring."""
    b = rows.index(step if HAS_NORM else i).permute((0, 2, 1))
    return mma_v2(
        strip.index(i).load(gl.DotOperandLayout(0, MMA, 2)),
        b.load(gl.DotOperandLayout(1, MMA, 2)),
        acc,
    )


@jit
def _store(
    total, before, tile, at, inside, bias_ptr, out_ptr, num_rows, num_outputs,
    T: gl.constexpr, MMA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Bias, gate or residual, and total [16, T] as out [T, N]."""
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    if GATED:
        gate, up = gl.split(total.reshape(2, 8, T).permute(1, 2, 0))
        PAIR: gl.constexpr = gate.type.layout
        row_n = tile * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, PAIR))
        row_t = gl.arange(0, T, layout=gl.SliceLayout(0, PAIR))
        gate = _biased(gate, row_n, bias_ptr, num_outputs, HAS_BIAS, OUT).to(gl.float32)
        up = _biased(up, row_n + num_outputs, bias_ptr, 2 * num_outputs, HAS_BIAS, OUT)
        h = (gate / (1.0 + gl.exp(-gate)) * up.to(gl.float32)).to(OUT)
        inside = (row_n < num_outputs)[:, None] & (row_t < num_rows)[None, :]
        gl.store(out_ptr + (row_t * num_outputs)[None, :] + row_n[:, None], h, mask=inside)
    else:
        row_n = tile * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
        y = _biased(total, row_n, bias_ptr, num_outputs, HAS_BIAS, OUT)
        if HAS_RESIDUAL:
            y = (y.to(gl.float32) + before.to(gl.float32)).to(OUT)
        gl.store(out_ptr + at, y, mask=inside)


@jit(do_not_specialize=["num_rows", "num_outputs", "tiles", "steps"])
def _strips_kernel(
    w_desc, x_desc, w_ptr, x_ptr, gain_ptr, bias_ptr, residual_ptr, out_ptr, eps, num_rows,
    num_outputs, num_inputs, tiles, steps,
    T: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, WHOLE: gl.constexpr,
    AHEAD: gl.constexpr, HAS_NORM: gl.constexpr, HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """num_outputs: columns of out. CHUNKS: steps of x that are in shared memory at a time. WHOLE: a
    program has one strip, which fits in the ring.
    """
    DTYPE: gl.constexpr = w_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    PARTS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)  # [part of the columns, row, column]
    HEIGHT: gl.constexpr = 8 if GATED else 16
    X_BYTES: gl.constexpr = T * 256 * 2
    BYTES: gl.constexpr = 16 * 256 * 2 + (0 if HAS_NORM else X_BYTES)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    units = (tiles - program + programs - 1) // programs * steps
    w = gl.allocate_shared_memory(DTYPE, [STAGES, 4, 16 // HEIGHT, HEIGHT, 64], w_desc.layout)
    rows = gl.allocate_shared_memory(DTYPE, [CHUNKS, 4, T, 64], PARTS)
    strip = w._reinterpret(DTYPE, [STAGES, 4, 16, 64], PARTS)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _ask(w_desc, w, bars.index(i), i, units, i, program, programs, steps, BYTES, HEIGHT)
    if not HAS_NORM:
        # what describes x is fetched with rows past the last, which are zeros and read nothing
        bar = bars.index(STAGES)
        mbarrier.expect(bar, X_BYTES)
        tma.async_copy_global_to_shared(x_desc, [0, num_rows, 0], bar, rows.index(0))
    if OVERLAPS:
        gdc_launch_dependents()
    for i in gl.static_range(AHEAD):
        tile = program + (i + 1) * programs
        _prefetch(w_ptr, tile, num_outputs, num_inputs, HEIGHT, 4)
    if HAS_NORM:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        gains = gl.allocate_shared_memory(gain_ptr.dtype.element_ty, [CHUNKS, 256], FLAT)
        k = gl.arange(0, 256, layout=gl.SliceLayout(0, ROWS))
        for i in gl.static_range(CHUNKS):
            gains.index(i).store(gl.load(gain_ptr + i * 256 + k))
    if not HAS_NORM:
        mbarrier.wait(bars.index(STAGES), 0)
    if OVERLAPS:  # until here nothing was read that a launch before writes
        gdc_wait()
    n = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(0, MMA)))
    if HAS_NORM:
        x = rows._reinterpret(DTYPE, [CHUNKS, T, 256], gl.NVMMASharedLayout(128, 16, 2))
        norm_rows(x_ptr, x, gains, eps, num_rows, T, 256, CHUNKS, ROWS, DTYPE)
    else:
        for i in gl.static_range(STAGES):
            tma.async_copy_global_to_shared(
                x_desc, [i % steps * 4, 0, 0], bars.index(i), rows.index(i), pred=i < units
            )
    unit = program * 0
    for tile in range(program, tiles, programs):
        row_n = tile * HEIGHT + n
        at = (t * num_outputs)[None, :] + row_n[:, None]
        inside = (row_n < num_outputs)[:, None] & (t < num_rows)[None, :]
        before = inside
        if HAS_RESIDUAL:
            before = gl.load(residual_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        acc = gl.zeros([4, 16, T], gl.float32, layout=MMA)
        if WHOLE:
            for i in gl.static_range(STAGES):
                mbarrier.wait(bars.index(i), 0)
            for i in gl.static_range(STAGES):
                acc = _added(acc, strip, rows, i, i, MMA, HAS_NORM)
        else:
            for step in range(steps):
                slot = unit % STAGES
                bar = bars.index(slot)
                mbarrier.wait(bar, unit // STAGES & 1)
                acc = _added(acc, strip, rows, slot, step, MMA, HAS_NORM)
                barrier()
                coming = unit + STAGES
                _ask(w_desc, w, bar, coming, units, slot, program, programs, steps, BYTES, HEIGHT)
                if not HAS_NORM:
                    part = coming % steps * 4
                    tma.async_copy_global_to_shared(
                        x_desc, [part, 0, 0], bar, rows.index(slot), pred=coming < units
                    )
                unit += 1
        _store(
            gl.sum(acc, axis=0), before, tile, at, inside, bias_ptr, out_ptr, num_rows,
            num_outputs, T, MMA, HAS_BIAS, HAS_RESIDUAL, GATED,
        )  # fmt: skip


def folds_norm(columns: int) -> bool:
    """Whether a program has room for x [8, K] as a whole."""
    return MAX_ROWS * columns * 2 <= few_rows_hopper.MAX_NORM_BYTES


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    strips: Strips,
    overlaps: bool = True,
) -> Tensor:
    """As `launch` of few_rows_hopper.py; K is a multiple of 256, rows at most 8."""
    (num_rows, columns), num_outputs = x.shape, weight.shape[0]
    width = num_outputs // 2 if gated else num_outputs
    height = STRIP // 2 if gated else STRIP
    tiles, steps = triton.cdiv(width, height), columns // BLOCK_K
    assert num_rows <= MAX_ROWS, "columns of the instruction"
    assert columns % BLOCK_K == 0, "whole steps"
    assert strips.programs <= tiles, "a program without work"
    assert norm is None or folds_norm(columns), "x fits in shared memory"
    out = torch.empty(num_rows, width, dtype=out_dtype or x.dtype, device=x.device)
    halves = STRIP // height
    described = TensorDescriptor(
        weight,
        [columns // 64, halves, width, 64],
        [64, width * columns, columns, 1],
        [4, halves, height, 64],
        gl.NVMMASharedLayout(128, 16, 4),
    )
    rows = TensorDescriptor(
        x,
        [columns // 64, num_rows, 64],
        [64, columns, 1],
        [4, MAX_ROWS, 64],
        gl.NVMMASharedLayout(128, 16, 3),
    )
    _strips_kernel[(strips.programs,)](
        described, rows, weight, x, x if norm is None else norm[0], x if bias is None else bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm[1], num_rows,
        width, columns, tiles, steps,
        T=MAX_ROWS, STAGES=strips.stages, CHUNKS=strips.stages if norm is None else steps,
        WHOLE=strips.programs == tiles and strips.stages == steps,
        AHEAD=strips.ahead if overlaps else 0, HAS_NORM=norm is not None,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated,
        OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out
