"""Products of decode steps of 65 to 256 rows on sm_90, weights before their turn (Gluon).

    y = x W^T + bias
    out = y, or y + residual (rounded twice), or y's pieces: sums over parts of k, [S, T, N] float32

x [T, K], W [N, K], 16 bits, float32 sums, the rounding points of kernels/few_rows.py. For weights
that are small for so many rows: a program computes 64 weight rows by `block_t` rows over all of k,
or over a piece of it, which the norm behind adds up (chain.py): no two programs meet in a sum, and
several read the same weights from the L2 cache. As in few_rows_hopper.py the weights come through a
ring in shared memory (TMA) which is filled while the launch before still runs; rows follow when it
has ended. Of a weight whose k fits in the ring nothing but rows is read then. Bits depend on K and
the pieces alone.

Bytes: W once, T / block_t times from the L2 cache; x N / 64 times from there; FLOP 2 T N K. Not
here: norms, gates, adapters, other cards, which layer takes it (models/).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import few_rows_hopper, jit, triton

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
    barrier = few_rows_hopper.barrier
    read_tile = few_rows_hopper.read_tile

BOX = few_rows_hopper.BOX
BLOCK_K = 128
"""Columns of a step."""
MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is computed: rows of x in a tile, depth of the ring in steps, pieces of k."""

    block_t: int
    stages: int
    pieces: int = 1


@jit
def _store(
    acc, bias, before, row_n, out_ptr, num_rows, num_outputs,
    T: gl.constexpr, MMA: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """acc [64, T] with bias and the residual `before`, as out [T, N]."""
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    if HAS_BIAS:
        acc += bias.to(gl.float32)[:, None]
    y = acc.to(DTYPE)
    if HAS_RESIDUAL:
        y = (y.to(gl.float32) + before.to(gl.float32)).to(DTYPE)
    row_t = gl.arange(0, T, layout=gl.SliceLayout(0, MMA))
    inside = (row_n < num_outputs)[:, None] & (row_t < num_rows)[None, :]
    gl.store(out_ptr + (row_t * num_outputs)[None, :] + row_n[:, None], y, mask=inside)


@jit(do_not_specialize=["num_rows", "num_outputs", "steps"])
def _tiles_kernel(
    w_desc, x_desc, bias_ptr, residual_ptr, out_ptr, num_rows, num_outputs, steps,
    T: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    PIECES: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """steps: of a piece."""
    DTYPE: gl.constexpr = w_desc.dtype
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, T, 16])
    X_BYTES: gl.constexpr = T * 128 * 2
    BYTES: gl.constexpr = 64 * 128 * 2 + X_BYTES
    row = gl.program_id(0) * T
    first = gl.program_id(1) * 64
    begin = 0
    if PIECES > 1:
        begin = gl.program_id(2) * steps * 128
        out_ptr += gl.program_id(2).to(gl.int64) * num_rows * num_outputs
    w = gl.allocate_shared_memory(DTYPE, [STAGES, 64, 128], w_desc.layout)
    x = gl.allocate_shared_memory(DTYPE, [STAGES, T, 128], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        bar = bars.index(i)
        mbarrier.expect(bar, BYTES, pred=i < steps)
        at = [first, begin + i * 128]
        tma.async_copy_global_to_shared(w_desc, at, bar, w.index(i), pred=i < steps)
    # what describes x is fetched with rows past the last, which are zeros and read nothing
    mbarrier.expect(bars.index(STAGES), X_BYTES)
    tma.async_copy_global_to_shared(x_desc, [num_rows, 0], bars.index(STAGES), x.index(0))
    if OVERLAPS:
        gdc_launch_dependents()
    row_n = first + gl.arange(0, 64, layout=gl.SliceLayout(1, MMA))
    bias = row_n
    if HAS_BIAS:  # no cache holds it
        bias = gl.load(bias_ptr + row_n, mask=row_n < num_outputs, other=0.0)
    mbarrier.wait(bars.index(STAGES), 0)
    if OVERLAPS:  # until here nothing was read that a launch before writes
        gdc_wait()
    for i in gl.static_range(STAGES):
        tma.async_copy_global_to_shared(
            x_desc, [row, begin + i * 128], bars.index(i), x.index(i), pred=i < steps
        )
    at = row * num_outputs
    # under way while products are computed
    before = read_tile(row_n, residual_ptr + at, num_rows - row, num_outputs, T, MMA, HAS_RESIDUAL)
    acc = gl.zeros([64, T], gl.float32, layout=MMA)
    for step in range(steps):
        slot = step % STAGES
        mbarrier.wait(bars.index(slot), step // STAGES & 1)
        b = x.index(slot).permute((1, 0))
        acc = warpgroup_mma(w.index(slot), b, acc, is_async=True)
        # the step before is done: its slot is free
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        barrier()
        later = step + STAGES - 1
        wanted = (step > 0) & (later < steps)
        slot = later % STAGES
        bar = bars.index(slot)
        mbarrier.expect(bar, BYTES, pred=wanted)
        k = begin + later * 128
        tma.async_copy_global_to_shared(w_desc, [first, k], bar, w.index(slot), pred=wanted)
        tma.async_copy_global_to_shared(x_desc, [row, k], bar, x.index(slot), pred=wanted)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    _store(
        acc, bias, before, row_n, out_ptr + at, num_rows - row, num_outputs, T, MMA, HAS_BIAS,
        HAS_RESIDUAL,
    )  # fmt: skip


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    tiles: Tiles,
    overlaps: bool = True,
) -> Tensor:
    """`few_rows_reference` of kernels/few_rows.py without norm, gate and squares, in one launch on
    sm_90, or pieces of it [S, T, N] in float32; overlaps: it begins while the one before it runs.
    """
    (num_rows, columns), num_outputs = x.shape, weight.shape[0]
    steps = triton.cdiv(columns, BLOCK_K)
    assert tiles.stages > 1, "a slot is filled again a step after it was read"
    assert steps % tiles.pieces == 0, "pieces are equal: an uneven loop is compiled badly"
    assert not gated, "a gate and what it lets through are in different tiles"
    if tiles.pieces > 1:
        assert bias is None, "is added to the sum of pieces"
        assert residual is None, "is added by the norm behind"
        shape, dtype = (tiles.pieces, num_rows, num_outputs), torch.float32
    else:
        shape, dtype = (num_rows, num_outputs), out_dtype or x.dtype
    out = torch.empty(shape, dtype=dtype, device=x.device)
    shared = gl.NVMMASharedLayout(128, 16, 2)
    described = [
        TensorDescriptor.from_tensor(matrix, [rows, BLOCK_K], shared)
        for matrix, rows in ((weight, BOX), (x, tiles.block_t))
    ]
    grid = (triton.cdiv(num_rows, tiles.block_t), triton.cdiv(num_outputs, BOX), tiles.pieces)
    _tiles_kernel[grid](
        *described, x if bias is None else bias, x if residual is None else residual, out,
        num_rows, num_outputs, steps // tiles.pieces, T=tiles.block_t,
        STAGES=tiles.stages, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        PIECES=tiles.pieces, OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out
