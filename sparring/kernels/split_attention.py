"""Attention in fixed splits for bitwise mode: tiles of queries, the bits that decoding gives.

Two sources of keys and values, one order of sums (splits.py): a pool of blocks (prefill, chunks of
prompts, recomputation: no gradient) and packed segments with shared prompts (the training forward;
position j of a segment is token j of its parent, and from the parent's length on its own). A
program takes a tile of one head's queries through every split that one of them sees; each query's
splits are merged in order, as decoding merges them. Shapes, FLOP and bytes: those of
kernels/paged_prefill.py and kernels/attention.py. The packed form also gives lse [H, T] = log2 sum
2^(s log2 e), which is what the backward pass of kernels/attention.py needs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparring.kernels import Capability, jit, rounded, tl, triton
from sparring.kernels.attention_plan import SharedPlan
from sparring.kernels.paged_plan import PrefillTiles, split_of
from sparring.kernels.rotate_write import kv_dtype_of
from sparring.kernels.splits import (
    LOG2_E,
    OPTIONS,
    inverse,
    merge_factors,
    packed_split,
    paged_split,
    scales_of,
)
from sparring.layout import KVPool

__all__ = ["split_attention_packed", "split_attention_paged"]


@jit(do_not_specialize=["layer", "num_blocks", "table_stride", "window"])
def _paged_kernel(
    q_ptr, address_ptr, tables_ptr, out_ptr, tiles_ptr, table_stride, layer, num_blocks, scale,
    window, K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, KV_DTYPE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tiles_ptr += tl.program_id(1) * 4
    row = tl.load(tiles_ptr).to(tl.int64)
    token = tl.load(tiles_ptr + 1).to(tl.int64)
    count = tl.load(tiles_ptr + 2)
    first_position = tl.load(tiles_ptr + 3)
    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (columns < E)[:, None] & (members < count)[None, :]
    flat = ((token + members)[None, :] * (K * GROUP) + head) * E + columns[:, None]
    q = tl.load(q_ptr + flat, mask=inside, other=0.0)
    pool_ptr = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(KV_DTYPE)), 16)
    k_ptr = pool_ptr + (layer.to(tl.int64) * num_blocks * (2 * K) + head // GROUP) * (B * E)
    scales_ptr = scales_of(address_ptr, layer, num_blocks, head // GROUP, K, B, LIMIT)
    table_ptr = tables_ptr + row * table_stride
    positions = first_position + members
    num_keys = first_position + count
    first_key = tl.maximum(0, first_position - window + 1) if HAS_WINDOW else 0
    acc = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in range(first_key // SPLIT, (num_keys + SPLIT - 1) // SPLIT):
        low = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
        acc_new, peak_new, total_new = paged_split(
            q, positions, k_ptr, k_ptr + K * B * E, scales_ptr, table_ptr,
            tl.load(table_ptr + low // B), low, tl.minimum(num_keys, split * SPLIT + SPLIT),
            num_keys, scale, window, 2 * K * B * E, B, E, BLOCK_E, BLOCK_M, BLOCK_N, HAS_WINDOW,
            LIMIT,
        )  # fmt: skip
        peak, keep, add = merge_factors(peak, peak_new)
        total = tl.fma(total_new, add, total * keep)
        acc = tl.fma(acc_new, add[None, :], acc * keep[None, :])
    out = acc * inverse(total)[None, :]
    tl.store(out_ptr + flat, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["num_tokens", "window"])
def _packed_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, num_tokens, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, scale, window,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tiles_ptr += tl.program_id(1) * 5
    start = tl.load(tiles_ptr).to(tl.int64)
    length = tl.load(tiles_ptr + 1)
    first_row = tl.load(tiles_ptr + 2)
    parent_start = tl.load(tiles_ptr + 3).to(tl.int64)
    parent_length = tl.load(tiles_ptr + 4)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (columns < E)[:, None] & (rows < length)[None, :]
    at = (start + rows)[None, :] * stride_qt + head * stride_qh + columns[:, None]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    k_ptr += (head // GROUP) * stride_kh
    v_ptr += (head // GROUP) * stride_vh
    positions = parent_length + rows
    num_keys = parent_length + tl.minimum(length, first_row + BLOCK_M)
    first_key = tl.maximum(0, parent_length + first_row - window + 1) if HAS_WINDOW else 0
    acc = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in range(first_key // SPLIT, (num_keys + SPLIT - 1) // SPLIT):
        low = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
        acc_new, peak_new, total_new = packed_split(
            q, positions, k_ptr, v_ptr, stride_kt, stride_vt, parent_start, parent_length, start,
            low, tl.minimum(num_keys, split * SPLIT + SPLIT), num_keys, scale, window, E, BLOCK_E,
            BLOCK_M, BLOCK_N, HAS_WINDOW,
        )  # fmt: skip
        peak, keep, add = merge_factors(peak, peak_new)
        total = tl.fma(total_new, add, total * keep)
        acc = tl.fma(acc_new, add[None, :], acc * keep[None, :])
    num_heads = tl.num_programs(0)
    to = ((start + rows)[None, :] * num_heads + head) * E + columns[:, None]
    out = acc * inverse(total)[None, :]
    tl.store(out_ptr + to, rounded(out, out_ptr.dtype.element_ty), mask=inside)
    at_lse = lse_ptr + head.to(tl.int64) * num_tokens + start + rows
    tl.store(at_lse, peak + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=rows < length)


def tile_of(capability: Capability, head_size: int) -> dict[str, int]:
    """Launch table: queries a program holds; this size alone may vary without changing a bit."""
    queries = 32 if head_size <= 128 else 16
    if head_size <= 64 and capability.arch in (0, 90):
        queries = 64  # more spill on older cards
    if head_size > 64 and 100 <= capability.arch < 120:
        queries = 16  # more spill there
    return {"BLOCK_M": queries} | split_of(capability, head_size)


def split_attention_paged(
    q_THE: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    tiles: PrefillTiles,
    *,
    capability: Capability,
    window: int = 0,
) -> Tensor:
    """`paged_prefill_reference` [T, H, E] with the bits of decoding; tables_RN int32."""
    assert kv_pool.address is not None, "kernels find the pool through its address"
    assert tables_RN.dtype == torch.int32, "tables are int32"
    num_heads, size = q_THE.shape[1:]
    num_kv_heads, block_size = kv_pool.data.shape[3:5]
    tile = tile_of(capability, size)
    places = tiles.of(tile["BLOCK_M"])
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    if len(places):
        _paged_kernel[(num_heads, len(places))](
            q_THE.contiguous(), kv_pool.address, tables_RN, out_THE, places, tables_RN.stride(0),
            layer, kv_pool.num_blocks, LOG2_E / math.sqrt(size), window, K=num_kv_heads,
            GROUP=num_heads // num_kv_heads, E=size, B=block_size,
            BLOCK_E=max(16, triton.next_power_of_2(size)), HAS_WINDOW=window > 0,
            **kv_dtype_of(kv_pool.data), **tile, **OPTIONS,
        )  # fmt: skip
    return out_THE


def split_attention_packed(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, plan: SharedPlan, window: int
) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and log-sum-exps [H, T] of packed segments, with the bits of decoding.

    q, k and v may have strides, 1 in the last dimension.
    """
    longest = max(plan.context_lengths, default=0)
    assert longest * max(k_TKE.stride(0), v_TKE.stride(0)) < 1 << 31, "offsets in a row fit 32 bits"
    num_tokens, num_heads, size = q_THE.shape
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    lse_HT = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q_THE.device)
    tile = tile_of(plan.capability, size)
    tiles = plan.query_tiles(tile["BLOCK_M"])
    if len(tiles):
        _packed_kernel[(num_heads, len(tiles))](
            q_THE, k_TKE, v_TKE, out_THE, lse_HT, tiles, num_tokens, *q_THE.stride()[:2],
            *k_TKE.stride()[:2], *v_TKE.stride()[:2], LOG2_E / math.sqrt(size), window,
            GROUP=num_heads // k_TKE.shape[1], E=size,
            BLOCK_E=max(16, triton.next_power_of_2(size)), HAS_WINDOW=window > 0, **tile, **OPTIONS,
        )  # fmt: skip
    return out_THE, lse_HT
