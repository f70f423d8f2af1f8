"""The products of kernels/few_rows.py for 65 to 128 rows on sm_90 (Gluon).

    y = x W^T + bias
    out = y, or silu(y_gate) y_up, or y's pieces: sums over parts of k, [S, T, N] float32

x [T, K], W [N, K], 16 bits, float32 sums, rounded as kernels/few_rows.py does.

At so many rows memory is not alone: every tile of weight rows reads x again, through the L2 cache
that the weights cross as well. So tiles are tall, and as tall as makes one program of them a
multiprocessor: 128 + 16 weight rows, or as many gates and as many of what they let through. Where
that is too few tiles, k is cut into pieces, and the norm behind adds them up, in order (chain.py).
No tile is shared by programs.

Weights and x come together through a ring in shared memory (TMA), weights of the first slots before
the launch's turn (few_rows_hopper.py). Bits depend on shapes and form alone.

Bytes: W once, x once a tile through L2; FLOP 2 T N K. Not here: norms, residuals, adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import jit, triton

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

BLOCK_K = 64
MAX_ROWS = 128
NUM_WARPS = 8


@dataclass(frozen=True, slots=True)
class Wide:
    """How a product is computed: weight rows of a tile in two boxes, base and extra (of a gated
    product as many gates and as many others), depth of the ring in steps of 64 columns, and pieces
    of k: more than one are left to the norm behind. behind: a slot is filled again that many steps
    after it was read, 0 or 1; 1 keeps the MMAs busy, 0 the memory.
    """

    base: int
    extra: int
    stages: int
    pieces: int = 1
    behind: int = 1


@jit
def _ask(
    w_desc, e_desc, w, e, bar, unit, last, slot, row, other,
    BOXES: gl.constexpr, K: gl.constexpr, BYTES: gl.constexpr,
):  # fmt: skip
    """A step's weights are asked for, into a slot of the ring, if it is before the last one."""
    wanted = unit < last
    mbarrier.expect(bar, BYTES, pred=wanted)
    base: gl.constexpr = w.shape[1]
    for box in gl.static_range(BOXES):
        n = row + box * other
        to = slot * BOXES + box
        tma.async_copy_global_to_shared(w_desc, [n, unit * K], bar, w.index(to), pred=wanted)
        tma.async_copy_global_to_shared(e_desc, [n + base, unit * K], bar, e.index(to), pred=wanted)


@jit
def _biased(acc, first_n, bias_ptr, end, N: gl.constexpr, MMA: gl.constexpr):
    """acc [T, N] and the bias of the rows of W before `end`."""
    n = first_n + gl.arange(0, N, layout=gl.SliceLayout(0, MMA))
    return acc + gl.load(bias_ptr + n, mask=n < end, other=0.0).to(gl.float32)[None, :]


@jit
def _store(
    acc, other, first_n, bias_ptr, out_ptr, num_rows, num_outputs, biased,
    N: gl.constexpr, T: gl.constexpr, MMA: gl.constexpr, HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr,
):  # fmt: skip
    """Sums [T, N] as columns of out, 16 bytes of a row a thread; `biased` columns have a bias."""
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    if HAS_BIAS:
        acc = _biased(acc, first_n, bias_ptr, biased, N, MMA)
    y = acc.to(DTYPE)
    if GATED:
        if HAS_BIAS:
            end = biased + num_outputs
            other = _biased(other, first_n + num_outputs, bias_ptr, end, N, MMA)
        g = y.to(gl.float32)
        y = (g / (1.0 + gl.exp(-g)) * other.to(DTYPE).to(gl.float32)).to(DTYPE)
    VEC: gl.constexpr = 128 // DTYPE.primitive_bitwidth
    LANES: gl.constexpr = N // VEC
    OUT: gl.constexpr = gl.BlockedLayout([1, VEC], [32 // LANES, LANES], [8, 1], [1, 0])
    n = first_n + gl.arange(0, N, layout=gl.SliceLayout(0, OUT))
    t = gl.arange(0, T, layout=gl.SliceLayout(1, OUT))
    inside = (t < num_rows)[:, None] & (n < num_outputs)[None, :]
    at = (t * num_outputs)[:, None] + n[None, :]
    gl.store(out_ptr + at, gl.convert_layout(y, OUT), mask=inside)


@jit(do_not_specialize=["num_rows", "eighths", "steps"])
def _wide_kernel(
    w_desc, e_desc, x_desc, bias_ptr, out_ptr, num_rows, eighths, steps,
    T: gl.constexpr, K: gl.constexpr, BASE: gl.constexpr, EXTRA: gl.constexpr,
    STAGES: gl.constexpr, PIECES: gl.constexpr, BEHIND: gl.constexpr, HAS_BIAS: gl.constexpr,
    GATED: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """eighths: columns of out, eight together."""
    DTYPE: gl.constexpr = w_desc.dtype
    BOXES: gl.constexpr = 2 if GATED else 1
    BASE_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BASE, 16])
    EXTRA_MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, EXTRA, 16])
    X_BYTES: gl.constexpr = T * K * 2
    BYTES: gl.constexpr = (BASE + EXTRA) * BOXES * K * 2 + X_BYTES
    num_outputs = eighths * 8
    program = gl.program_id(0)
    row = program // PIECES * (BASE + EXTRA)
    piece = program % PIECES
    first = piece * steps // PIECES
    last = (piece + 1) * steps // PIECES
    w = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, BASE, K], w_desc.layout)
    e = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, EXTRA, K], e_desc.layout)
    x = gl.allocate_shared_memory(DTYPE, [STAGES, T, K], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES + 1):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _ask(
            w_desc, e_desc, w, e, bars.index(i), first + i, last, i, row, num_outputs, BOXES, K,
            BYTES,
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
        tma.async_copy_global_to_shared(
            x_desc, [0, (first + i) * K], bars.index(i), x.index(i), pred=first + i < last
        )
    acc = gl.zeros([T, BASE], gl.float32, layout=BASE_MMA)
    more = gl.zeros([T, EXTRA], gl.float32, layout=EXTRA_MMA)
    other = gl.zeros([T, BASE], gl.float32, layout=BASE_MMA)
    other_more = gl.zeros([T, EXTRA], gl.float32, layout=EXTRA_MMA)
    for turn in range(last - first):
        slot = turn % STAGES
        mbarrier.wait(bars.index(slot), turn // STAGES & 1)
        a = x.index(slot)
        box = slot * BOXES
        acc = warpgroup_mma(a, w.index(box).permute((1, 0)), acc, is_async=True)
        more = warpgroup_mma(a, e.index(box).permute((1, 0)), more, is_async=True)
        if GATED:
            other = warpgroup_mma(a, w.index(box + 1).permute((1, 0)), other, is_async=True)
            other_more = warpgroup_mma(
                a, e.index(box + 1).permute((1, 0)), other_more, is_async=True
            )
            acc, more, other, other_more = warpgroup_mma_wait(
                num_outstanding=4 * BEHIND, deps=[acc, more, other, other_more]
            )
        else:
            acc, more = warpgroup_mma_wait(num_outstanding=2 * BEHIND, deps=[acc, more])
        barrier()  # this step is done, or the one before: its slot is free
        slot = (turn + STAGES - BEHIND) % STAGES
        bar = bars.index(slot)
        unit = gl.where(turn < BEHIND, last, first + turn + STAGES - BEHIND)
        _ask(w_desc, e_desc, w, e, bar, unit, last, slot, row, num_outputs, BOXES, K, BYTES)
        tma.async_copy_global_to_shared(x_desc, [0, unit * K], bar, x.index(slot), pred=unit < last)
    acc, more, other, other_more = warpgroup_mma_wait(
        num_outstanding=0, deps=[acc, more, other, other_more]
    )
    out = out_ptr + piece.to(gl.int64) * num_rows * num_outputs
    biased = gl.where(piece == 0, num_outputs, 0)
    _store(
        acc, other, row, bias_ptr, out, num_rows, num_outputs, biased, BASE, T, BASE_MMA, HAS_BIAS,
        GATED,
    )  # fmt: skip
    _store(
        more, other_more, row + BASE, bias_ptr, out, num_rows, num_outputs, biased, EXTRA, T,
        EXTRA_MMA, HAS_BIAS, GATED,
    )  # fmt: skip


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
    tiles = triton.cdiv(width, wide.base + wide.extra)
    steps = triton.cdiv(columns, BLOCK_K)
    assert num_rows <= MAX_ROWS, "rows of one tile"
    assert wide.pieces <= steps, "a program without work"
    assert wide.stages > 1, "a slot is filled again a step after it was read"
    assert width % 8 == 0, "16 bytes of a row are written together"
    assert wide.pieces == 1 or not gated, "a gate needs whole sums"
    shape: tuple[int, ...] = (num_rows, width)
    if wide.pieces > 1:
        shape, out_dtype = (wide.pieces, num_rows, width), torch.float32
    out = torch.empty(shape, dtype=out_dtype or x.dtype, device=x.device)
    shared = gl.NVMMASharedLayout(128, 16, 2)
    described = [
        TensorDescriptor.from_tensor(matrix, [rows, BLOCK_K], shared)
        for matrix, rows in ((weight, wide.base), (weight, wide.extra), (x, MAX_ROWS))
    ]
    _wide_kernel[(tiles * wide.pieces,)](
        *described, x if bias is None else bias, out, num_rows, width // 8, steps, T=MAX_ROWS,
        K=BLOCK_K, BASE=wide.base, EXTRA=wide.extra, STAGES=wide.stages, PIECES=wide.pieces,
        BEHIND=wide.behind, HAS_BIAS=bias is not None, GATED=gated, OVERLAPS=overlaps,
        num_warps=NUM_WARPS, launch_pdl=overlaps,
    )  # fmt: skip
    return out
