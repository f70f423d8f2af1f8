"""Attention of one new token for few rows of a chain on sm_90: keys come before their turn (Gluon).

`rotate_decode_triton` of kernels/paged_attention.py for 16-bit keys and values, heads of 128, no
norm and no window. Keys and values of all tokens but the newest were written by earlier steps: a
program (row, key head, part of SPAN keys) copies its own into shared memory while the launch
before, which computes qkv, still runs; then it waits, rotates the group's queries and the new key,
and has all scores in one product. The newest token needs no copy: its key and value are in
registers. The last program of a row and key head merges the parts in order. Levels that
probabilities are counted from are whole numbers (splits.py); the order of sums is this kernel's
own, so it serves default mode alone. Shapes: qkv [R, (H + 2K) E] over a pool [L, N, 2, K, B, E] ->
out [R, H, E]. Bytes: 4 E a key and key head, and 4 (E + 2) NH a part through the L2 cache.
arXiv 2205.14135.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparring.kernels import few_rows_hopper, jit, triton
from sparring.kernels.matmul import Tile, workspace
from sparring.kernels.splits import LOG2_E
from sparring.layout import KVPool

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
    barrier = few_rows_hopper.barrier

ARCH = 90
HEAD_SIZE = 128
MAX_GROUP = 14
"""Query heads of a key head: of the instruction's 16 columns two are the new key and value."""
MAX_PARTS = 16
SPAN = 256
"""Keys of a part: whole steps were faster with it than with 128 or 64."""
MAX_PAIRS = 32
"""Rows times key heads up to which this kernel is faster than kernels/paged_attention.py: an H200,
8 and 16 rows of two key heads; 32 rows of four were slower.
"""


@jit
def _flat(acc, NH: gl.constexpr, LAYOUT: gl.constexpr):
    """acc [128, NH] as the threads have it, four numbers after the other."""
    flat = acc.reshape(2, 4, 2, 8, NH // 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6).reshape(128 * NH)
    return gl.convert_layout(flat, LAYOUT, assert_trivial=True)


@jit
def _back(flat, NH: gl.constexpr, LAYOUT: gl.constexpr):
    """The inverse of `_flat`."""
    acc = flat.reshape(2, NH // 8, 4, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 4, 6).reshape(128, NH)
    return gl.convert_layout(acc, LAYOUT, assert_trivial=True)


@jit
def _merged(
    acc, level, total, work_ptr, count_ptr, pair, part, parts,
    NH: gl.constexpr, PARTS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """(acc, total) of a pair's parts together, and whether this program came last and has them."""
    FLAT: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    EACH: gl.constexpr = 130 * NH
    cell = gl.arange(0, 128 * NH, layout=FLAT)
    head = gl.arange(0, NH, layout=gl.SliceLayout(0, MMA))
    work_ptr += pair.to(gl.int64) * (PARTS * EACH)
    mine = work_ptr + part * EACH
    gl.store(mine + cell, _flat(acc, NH, FLAT))
    gl.store(mine + 128 * NH + head, level)
    gl.store(mine + 129 * NH + head, total)
    barrier()
    finishes = gl.atomic_add(count_ptr + pair, 1, sem="acq_rel") == parts - 1
    barrier()
    if finishes:
        levels, totals = (), ()
        for p in gl.static_range(PARTS):
            there = (head >= 0) & (p < parts)
            at = work_ptr + p * EACH + 128 * NH + head
            level = gl.load(at, mask=there, other=-float("inf"), cache_modifier=".cg")
            total = gl.load(at + NH, mask=there, other=0.0, cache_modifier=".cg")
            levels, totals = levels + (level,), totals + (total,)  # noqa: RUF005 - its tuples
        acc = gl.zeros([128, NH], gl.float32, layout=MMA)
        top = gl.full([NH], -float("inf"), gl.float32, layout=gl.SliceLayout(0, MMA))
        total = gl.zeros([NH], gl.float32, layout=gl.SliceLayout(0, MMA))
        for group in gl.static_range(0, PARTS, 8):
            flats = ()
            for p in gl.static_range(group, min(group + 8, PARTS)):
                inside = (cell >= 0) & (p < parts)
                there = gl.load(
                    work_ptr + p * EACH + cell, mask=inside, other=0.0, cache_modifier=".cg"
                )
                flats = flats + (there,)  # noqa: RUF005 - what the compiler knows of tuples
            if group == 0:
                for p in gl.static_range(PARTS):
                    top = gl.maximum(top, levels[p])
            for p in gl.static_range(group, min(group + 8, PARTS)):
                factor = gl.exp2(levels[p] - top)
                total += factor * totals[p]
                acc += _back(flats[p - group], NH, MMA) * factor[None, :]
        gl.store(count_ptr + pair, 0)
    return acc, total, finishes


@jit
def _rotated(a, b, cos, sin, DTYPE: gl.constexpr):
    """Both halves of heads, rotated and rounded."""
    return gl.fma(a, cos, -(b * sin)).to(DTYPE), gl.fma(b, cos, a * sin).to(DTYPE)


@jit
def _read(at, inside):
    return gl.load(at, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)


@jit(do_not_specialize=["layer", "num_blocks", "table_stride"])
def _attention_kernel(
    qkv_ptr, address_ptr, tables_ptr, lengths_ptr, slots_ptr, cos_ptr, sin_ptr, out_ptr, work_ptr,
    count_ptr, stride_t, table_stride, layer, num_blocks, scale,
    K: gl.constexpr, GROUP: gl.constexpr, NH: gl.constexpr, B: gl.constexpr, SPAN: gl.constexpr,
    PARTS: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    E: gl.constexpr = 128
    DTYPE: gl.constexpr = qkv_ptr.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NH, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    VEC: gl.constexpr = 4 if NH == 8 else 8
    HEADS: gl.constexpr = gl.BlockedLayout([1, VEC], [VEC // 2, 64 // VEC], [4, 1], [1, 0])
    row = gl.program_id(0)
    kv_head = gl.program_id(1)
    part = gl.program_id(2)
    length = gl.load(lengths_ptr + row, cache_modifier=".cg")  # as the step began, see above
    low = part * SPAN
    pool_ptr = gl.multiple_of(
        gl.load(address_ptr, cache_modifier=".cg").to(gl.pointer_type(DTYPE), bitcast=True), 16
    )
    k_ptr = pool_ptr + (layer.to(gl.int64) * num_blocks * (2 * K) + kv_head) * (B * E)
    k = gl.allocate_shared_memory(DTYPE, [SPAN, E], SHARED)
    v = gl.allocate_shared_memory(DTYPE, [SPAN, E], SHARED)
    if (low < length) | (part == 0):  # what lies past the end becomes zeros
        key = low + gl.arange(0, SPAN, layout=gl.SliceLayout(1, COPY))
        column = gl.arange(0, E, layout=gl.SliceLayout(0, COPY))
        old = key < length - 1  # the newest is not written yet
        place = tables_ptr + row * table_stride + key // B
        block = gl.load(place, mask=old, other=0, cache_modifier=".cg")
        at = (block.to(gl.int64) * (2 * K * B * E) + key % B * E)[:, None] + column[None, :]
        at = k_ptr + at
        inside = old[:, None] & (column >= 0)[None, :]
        async_copy.async_copy_global_to_shared(k, at, mask=inside)
        async_copy.async_copy_global_to_shared(v, at + K * B * E, mask=inside)
    async_copy.commit_group()
    if OVERLAPS:  # until here only earlier steps' numbers were read
        gdc_launch_dependents()
        gdc_wait()
    if (low < length) | (part == 0):
        head = gl.arange(0, NH, layout=gl.SliceLayout(1, HEADS))
        column = gl.arange(0, 64, layout=gl.SliceLayout(0, HEADS))
        e = gl.arange(0, E, layout=gl.SliceLayout(1, MMA))
        qkv_ptr += row.to(gl.int64) * stride_t
        new_k = qkv_ptr + (K * GROUP + kv_head) * E + column
        new_v = qkv_ptr + (K * GROUP + K + kv_head) * E
        inside = (head < GROUP)[:, None] & (column >= 0)[None, :]
        query = qkv_ptr + (kv_head * GROUP + head)[:, None] * E + column[None, :]
        q_first, q_second = _read(query, inside), _read(query + 64, inside)
        k_first, k_second = _read(new_k, column >= 0), _read(new_k + 64, column >= 0)
        v_first, v_second = (
            _read(new_v + column, column >= 0),
            _read(new_v + 64 + column, column >= 0),
        )
        v_new = _read(new_v + e, e >= 0)
        cos = _read(cos_ptr + row * 64 + column, column >= 0)
        sin = _read(sin_ptr + row * 64 + column, column >= 0)
        slot = gl.load(slots_ptr + row, cache_modifier=".cg")
        q_first, q_second = _rotated(q_first, q_second, cos[None, :], sin[None, :], DTYPE)
        k_first, k_second = _rotated(k_first, k_second, cos, sin, DTYPE)
        q = gl.allocate_shared_memory(DTYPE, [2, NH, 64], SHARED)
        q.index(0).store(q_first)
        q.index(1).store(q_second)
        product = q_first.to(gl.float32) * k_first.to(gl.float32)[None, :]
        product += q_second.to(gl.float32) * k_second.to(gl.float32)[None, :]
        s_new = gl.sum(product, axis=1)
        has_newest = (length - 1 >= low) & (length - 1 < low + SPAN)
        if has_newest:
            to = k_ptr + slot // B * (2 * K * B * E) + slot % B * E + column
            gl.store(to, k_first)
            gl.store(to + 64, k_second)
            to += K * B * E
            gl.store(to, v_first.to(DTYPE))
            gl.store(to + 64, v_second.to(DTYPE))
        async_copy.wait_group(0)
        fence_async_shared()
        barrier()
        zeros = gl.zeros([SPAN, NH], gl.float32, layout=MMA)
        s = warpgroup_mma(k, q._reinterpret(DTYPE, [NH, E], SHARED).permute((1, 0)), zeros)
        key = low + gl.arange(0, SPAN, layout=gl.SliceLayout(1, MMA))
        s = gl.where((key < length - 1)[:, None], s * scale, -float("inf"))
        s_new = gl.convert_layout(s_new * scale, gl.SliceLayout(0, MMA))
        s_new = gl.where(has_newest, s_new, -float("inf"))
        level = gl.ceil(gl.maximum(gl.max(s, axis=0), s_new))
        base = gl.where(level == -float("inf"), 0.0, level)
        p = gl.exp2(s - base[None, :]).to(DTYPE)
        p_new = gl.exp2(s_new - base).to(DTYPE).to(gl.float32)
        total = gl.sum(p.to(gl.float32), axis=0) + p_new
        weights = gl.allocate_shared_memory(DTYPE, [NH, SPAN], SHARED)
        weights.store(p.permute((1, 0)))
        fence_async_shared()
        barrier()
        zeros = gl.zeros([E, NH], gl.float32, layout=MMA)
        acc = warpgroup_mma(v.permute((1, 0)), weights.permute((1, 0)), zeros)
        acc += v_new[:, None] * p_new[None, :]
        parts = (length + SPAN - 1) // SPAN
        finishes = True
        if PARTS > 1 and parts > 1:
            acc, total, finishes = _merged(
                acc, level, total, work_ptr, count_ptr, row * K + kv_head, part, parts, NH, PARTS,
                MMA,
            )  # fmt: skip
        if finishes:
            inverse = gl.where(total == 0.0, 0.0, 1.0 / gl.where(total == 0.0, 1.0, total))
            out = (acc * inverse[None, :]).to(DTYPE)
            h = gl.arange(0, NH, layout=gl.SliceLayout(0, MMA))
            to_out = out_ptr + (row * K + kv_head) * (GROUP * E) + (h * E)[None, :] + e[:, None]
            gl.store(to_out, out, mask=(h < GROUP)[None, :] & (e >= 0)[:, None])


def serves(
    qkv_RC: Tensor, kv_pool: KVPool, arch: int, max_keys: int, *, has_norm: bool, window: int
) -> bool:
    """Whether this kernel attends for such rows of a chain."""
    num_kv_heads, size = kv_pool.data.shape[3], kv_pool.data.shape[5]
    group = qkv_RC.shape[1] // size // num_kv_heads - 2
    is_plain = not has_norm and not window and kv_pool.data.dtype == qkv_RC.dtype
    return (
        arch == ARCH
        and is_plain
        and size == HEAD_SIZE
        and group <= MAX_GROUP
        and len(qkv_RC) * num_kv_heads <= MAX_PAIRS
        and max_keys <= MAX_PARTS * SPAN
    )


def attend(
    qkv_RC: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots_R: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    lengths_R: Tensor,
    *,
    max_keys: int,
    overlaps: bool = True,
) -> Tensor:
    """Attention output [R, H, E] of one new token a row, whose key and value are written.

    qkv_RC [R, (H + 2K) E] before rotation; cos, sin [R, E / 2] float32; tables_RN [R, N] and
    lengths_R [R] int32, the new token counted. max_keys: no row has more. overlaps: the launch may
    begin while the one before it runs. `serves` says which rows.
    """
    rows, num_kv_heads, block_size, size = len(qkv_RC), *kv_pool.data.shape[3:]
    group = qkv_RC.shape[1] // size // num_kv_heads - 2
    assert kv_pool.address is not None, "kernels find the pool through its address"
    assert qkv_RC.stride(1) == cos.stride(1) == sin.stride(1) == 1, "adjacent numbers"
    parts = triton.cdiv(max_keys, SPAN)
    columns = 8 if group <= 6 else 16
    out = torch.empty(rows, num_kv_heads * group, size, dtype=qkv_RC.dtype, device=qkv_RC.device)
    work, count = out, out
    if parts > 1:
        work, count = workspace(qkv_RC, Tile(size + 2, columns, 4, 1), rows * num_kv_heads, parts)
    _attention_kernel[(rows, num_kv_heads, parts)](
        qkv_RC, kv_pool.address, tables_RN, lengths_R, slots_R, cos.contiguous(),
        sin.contiguous(), out, work, count, qkv_RC.stride(0), tables_RN.stride(0), layer,
        kv_pool.num_blocks, LOG2_E / math.sqrt(size), K=num_kv_heads, GROUP=group, NH=columns,
        B=block_size, SPAN=SPAN, PARTS=parts, OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out
