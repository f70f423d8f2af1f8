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
    """How a product is computed: programs, and depth of the ring in steps of 256 columns."""

    programs: int
    stages: int = 6


@jit
def _ask(
    w_desc, w, bar, unit, end, slot, program, programs, steps, BYTES: gl.constexpr,
    HEIGHT: gl.constexpr,
):  # fmt: skip
    """A step's weights are asked for, into a slot of the ring, if it is before the last one."""
    wanted = unit < end
    turn = unit // steps
    row = (program + turn * programs) * HEIGHT
    k = (unit - turn * steps) * 256
    mbarrier.expect(bar, BYTES, pred=wanted)
    for i in gl.static_range(4):
        at = [0, row, k + i * 64]
        tma.async_copy_global_to_shared(w_desc, at, bar, w.index(slot * 4 + i), pred=wanted)


@jit
def _biased(y, row_n, bias_ptr, num_outputs, HAS_BIAS: gl.constexpr, DTYPE: gl.constexpr):
    """y [N, T] and bias, rounded."""
    if HAS_BIAS:
        bias = gl.load(bias_ptr + row_n, mask=row_n < num_outputs, other=0.0)
        y += bias.to(gl.float32)[:, None]
    return y.to(DTYPE)


@jit(do_not_specialize=["num_rows", "num_outputs", "tiles", "steps"])
def _kernel(
    w_desc, x_desc, gain_ptr, bias_ptr, residual_ptr, out_ptr, eps, num_rows, num_outputs, tiles,
    steps,
    T: gl.constexpr, STAGES: gl.constexpr, CHUNKS: gl.constexpr, HAS_NORM: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, GATED: gl.constexpr,
    OVERLAPS: gl.constexpr,
):  # fmt: skip
    """num_outputs: columns of out. CHUNKS: steps of x that are in shared memory at a time."""
    DTYPE: gl.constexpr = w_desc.dtype
    OUT: gl.constexpr = out_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8])
    PARTS: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)  # [part of the columns, row, column]
    HEIGHT: gl.constexpr = 8 if GATED else 16
    X_BYTES: gl.constexpr = T * 256 * 2
    BYTES: gl.constexpr = 16 * 256 * 2 + (0 if HAS_NORM else X_BYTES)
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    units = (tiles - program + programs - 1) // programs * steps
    w = gl.allocate_shared_memory(DTYPE, [STAGES * 4, w_desc.block_shape[0], HEIGHT, 64], PARTS)
    x = gl.allocate_shared_memory(DTYPE, [CHUNKS, T, 256], x_desc.layout)
    strip = w._reinterpret(DTYPE, [STAGES, 4, 16, 64], PARTS)
    rows = x._reinterpret(DTYPE, [CHUNKS, 4, T, 64], PARTS)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _ask(w_desc, w, bars.index(i), i, units, i, program, programs, steps, BYTES, HEIGHT)
    # what describes x is fetched with rows past the last, which are zeros and read nothing
    bar = bars.index(STAGES)
    mbarrier.expect(bar, X_BYTES)
    tma.async_copy_global_to_shared(x_desc, [num_rows, 0], bar, x.index(0))
    if OVERLAPS:
        gdc_launch_dependents()
    if HAS_NORM:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
        gains = gl.allocate_shared_memory(gain_ptr.dtype.element_ty, [CHUNKS, 256], FLAT)
        k = gl.arange(0, 256, layout=gl.SliceLayout(0, ROWS))
        for i in gl.static_range(CHUNKS):
            gains.index(i).store(gl.load(gain_ptr + i * 256 + k))
    mbarrier.wait(bar, 0)
    if OVERLAPS:  # until here nothing was read that a launch before writes
        gdc_wait()
    if HAS_NORM:
        mbarrier.expect(bar, CHUNKS * X_BYTES)
        for i in gl.static_range(CHUNKS):
            tma.async_copy_global_to_shared(x_desc, [0, i * 256], bar, x.index(i))
        mbarrier.wait(bar, 1)
        norm_rows(x, gains, eps, steps * 256, T, 256, CHUNKS, ROWS, DTYPE)
    else:
        for i in gl.static_range(STAGES):
            tma.async_copy_global_to_shared(
                x_desc, [0, i % steps * 256], bars.index(i), x.index(i), pred=i < units
            )
    n = gl.arange(0, 16, layout=gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(0, MMA)))
    unit = program * 0
    for tile in range(program, tiles, programs):
        row_n = tile * HEIGHT + n
        at = (t * num_outputs)[None, :] + row_n[:, None]
        inside = (row_n < num_outputs)[:, None] & (t < num_rows)[None, :]
        if HAS_RESIDUAL:
            before = gl.load(residual_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
        acc = gl.zeros([4, 16, T], gl.float32, layout=MMA)
        for step in range(steps):
            slot = unit % STAGES
            bar = bars.index(slot)
            mbarrier.wait(bar, unit // STAGES & 1)
            b = rows.index(step if HAS_NORM else slot).permute((0, 2, 1))
            acc = mma_v2(
                strip.index(slot).load(gl.DotOperandLayout(0, MMA, 2)),
                b.load(gl.DotOperandLayout(1, MMA, 2)),
                acc,
            )
            barrier()
            coming = unit + STAGES
            _ask(w_desc, w, bar, coming, units, slot, program, programs, steps, BYTES, HEIGHT)
            if not HAS_NORM:
                k = coming % steps * 256
                tma.async_copy_global_to_shared(
                    x_desc, [0, k], bar, x.index(slot), pred=coming < units
                )
            unit += 1
        total = gl.sum(acc, axis=0)
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
            y = _biased(total, row_n, bias_ptr, num_outputs, HAS_BIAS, OUT)
            if HAS_RESIDUAL:
                y = (y.to(gl.float32) + before.to(gl.float32)).to(OUT)
            gl.store(out_ptr + at, y, mask=inside)


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
    halves = 2 if gated else 1
    described = TensorDescriptor(
        weight,
        [halves, width, columns],
        [width * columns, columns, 1],
        [halves, height, 64],
        gl.NVMMASharedLayout(128, 16, 3),
    )
    rows = TensorDescriptor.from_tensor(x, [MAX_ROWS, BLOCK_K], gl.NVMMASharedLayout(128, 16, 2))
    _kernel[(strips.programs,)](
        described, rows, x if norm is None else norm[0], x if bias is None else bias,
        x if residual is None else residual, out, 0.0 if norm is None else norm[1], num_rows,
        width, tiles, steps,
        T=MAX_ROWS, STAGES=strips.stages, CHUNKS=strips.stages if norm is None else steps,
        HAS_NORM=norm is not None, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        GATED=gated, OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out
