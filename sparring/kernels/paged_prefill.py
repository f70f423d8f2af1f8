"""Attention of several new tokens a row over keys and values in blocks: prompts and their chunks.

Shapes: q [T, H, E], T new tokens of several rows, over a pool [L, N, 2, K, B, E] -> out [T, H, E].
The new tokens' keys and values are in the pool already; each token sees every key of its row up to
its own. A program takes a tile of one row's queries and one head: an online softmax in base 2 over
the row's blocks from position 0, whole tiles first, then those seen in part. Which tiles there are
is planned once a batch on the host. In bitwise mode kernels/split_attention.py takes this place.
FLOP: 4 H E pairs of query and key; bytes: each tile of queries reads the keys and values it sees.
No gradient. arXiv 2205.14135, 2309.06180.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.kernels import Capability, dot, jit, rounded, tl
from sparring.kernels.attention_plan import tile_of
from sparring.kernels.paged_attention import constants_of, read_slots
from sparring.kernels.paged_plan import PrefillTiles
from sparring.kernels.splits import LOG2_E, rounded_and_wide, scales_of, whole_level, widened
from sparring.layout import KVPool

__all__ = ["paged_prefill_reference", "paged_prefill_triton"]


def paged_prefill_reference(
    q_THE: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    cu_seqlens: Sequence[int],
    kv_lengths: Sequence[int],
    *,
    window: int = 0,
) -> Tensor:
    """Attention output [T, H, E], row by row; at least float32 inside.

    Row r's new tokens are cu_seqlens[r] to cu_seqlens[r + 1], the last of its kv_lengths[r] keys.
    """
    wide = torch.float64 if q_THE.dtype == torch.float64 else torch.float32
    data = kv_pool.data[layer]
    repeat = q_THE.shape[1] // data.shape[2]
    outputs = [q_THE[:0]]
    for row, length in enumerate(kv_lengths):
        q = q_THE[cu_seqlens[row] : cu_seqlens[row + 1]].to(wide)
        places = torch.arange(length, device=data.device)
        blocks = tables_RN[row].long()[places // data.shape[3]]
        keys = read_slots(kv_pool, layer, blocks, places % data.shape[3]).to(wide)
        k, v = (keys[:, i].repeat_interleave(repeat, 1) for i in range(2))
        distance = places[length - len(q) :, None] - places
        seen = (distance >= 0) & ((distance < window) if window else True)
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(data.shape[4])
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhe->ihe", probs, v).to(q_THE.dtype))
    return torch.cat(outputs)


@jit
def _paged_range(
    acc, peak, total, q, k_ptr, v_ptr, scales_ptr, table_ptr, positions, low, high, num_keys,
    scale, window, STRIDE: tl.constexpr, B: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low..high; MASKED where a tile may be seen in part."""
    columns = tl.arange(0, BLOCK_E)
    # a tile's block is known a tile ahead, so that its keys can be under way two tiles ahead
    block = tl.load(table_ptr + low // B, mask=low < high, other=0).to(tl.int64)
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if B % BLOCK_N == 0:  # a tile lies in one block
            first = block * STRIDE + (start % B) * E
            at = first + (tl.arange(0, BLOCK_N) * E)[:, None] + columns[None, :]
            at_scale = block * (STRIDE // E) + start % B + tl.arange(0, BLOCK_N)
        else:
            blocks = tl.load(table_ptr + keys // B, mask=keys < num_keys, other=0).to(tl.int64)
            at = (blocks * STRIDE + (keys % B) * E)[:, None] + columns[None, :]
            at_scale = blocks * (STRIDE // E) + keys % B
        if MASKED:
            inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
            k = tl.load(k_ptr + at, mask=inside, other=0.0)
            v = tl.load(v_ptr + at, mask=inside, other=0.0)
        elif E == BLOCK_E:
            k = tl.load(k_ptr + at)
            v = tl.load(v_ptr + at)
        else:
            inside = (keys >= 0)[:, None] & (columns < E)[None, :]
            k = tl.load(k_ptr + at, mask=inside, other=0.0)
            v = tl.load(v_ptr + at, mask=inside, other=0.0)
        if LIMIT > 0:
            k, v = widened(k, q.dtype), widened(v, q.dtype)
            scale_at = scales_ptr + at_scale
            k_scale = tl.load(scale_at, mask=keys < num_keys, other=0.0)
            v_scale = tl.load(scale_at + STRIDE // E // 2, mask=keys < num_keys, other=0.0)
        s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if LIMIT > 0:
            s = s * k_scale[None, :]
        if MASKED:
            distance = positions[:, None] - keys[None, :]
            seen = (distance >= 0) & (keys < num_keys)[None, :]
            if HAS_WINDOW:
                seen = seen & (distance < window)
            s = tl.where(seen, s, -float("inf"))
        above = tl.maximum(peak, whole_level(tl.max(s, axis=1) * scale))
        level = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(tl.fma(s, scale, -level[:, None]))
        shrink = tl.exp2(peak - level)
        if LIMIT > 0:
            total = total * shrink + tl.sum(p, axis=1)
            used = rounded(p * v_scale[None, :], q.dtype)
        else:
            used, wide = rounded_and_wide(p, q.dtype)
            total = total * shrink + tl.sum(wide, axis=1)
        acc = dot(used, v, acc * shrink[:, None])
        peak = above
        after = start + BLOCK_N
        block = tl.load(table_ptr + after // B, mask=after < high, other=0).to(tl.int64)
    return acc, peak, total


@jit(do_not_specialize=["layer", "num_blocks", "table_stride", "window"])
def _prefill_kernel(
    q_ptr, address_ptr, tables_ptr, out_ptr, tiles_ptr, table_stride, layer, num_blocks, scale,
    window, K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
    KV_DTYPE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    tiles_ptr += tl.program_id(1) * 4
    row = tl.load(tiles_ptr).to(tl.int64)
    token = tl.load(tiles_ptr + 1).to(tl.int64)
    count = tl.load(tiles_ptr + 2)
    first_position = tl.load(tiles_ptr + 3)
    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (members < count)[:, None] & (columns < E)[None, :]
    flat = ((token + members)[:, None] * (K * GROUP) + head) * E + columns[None, :]
    q = tl.load(q_ptr + flat, mask=inside, other=0.0)
    pool_ptr = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(KV_DTYPE)), 16)
    k_ptr = pool_ptr + (layer.to(tl.int64) * num_blocks * (2 * K) + head // GROUP) * (B * E)
    v_ptr = k_ptr + K * B * E
    scales_ptr = scales_of(address_ptr, layer, num_blocks, head // GROUP, K, B, LIMIT)
    table_ptr = tables_ptr + row * table_stride
    positions = first_position + members
    num_keys = first_position + count
    if HAS_WINDOW:
        low = tl.maximum(0, first_position - window + 1) // BLOCK_N * BLOCK_N
        whole = low
    else:
        low = 0
        whole = (first_position + 1) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = _paged_range(
        acc, peak, total, q, k_ptr, v_ptr, scales_ptr, table_ptr, positions, low, whole, num_keys,
        scale, window, 2 * K * B * E, B, E, BLOCK_E, BLOCK_N, False, HAS_WINDOW, LIMIT,
    )  # fmt: skip
    acc, peak, total = _paged_range(
        acc, peak, total, q, k_ptr, v_ptr, scales_ptr, table_ptr, positions, whole, num_keys,
        num_keys, scale, window, 2 * K * B * E, B, E, BLOCK_E, BLOCK_N, True, HAS_WINDOW, LIMIT,
    )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + flat, rounded(out, out_ptr.dtype.element_ty), mask=inside)


def paged_prefill_triton(
    q_THE: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    tiles: PrefillTiles,
    *,
    capability: Capability,
    window: int = 0,
) -> Tensor:
    """`paged_prefill_reference` in one launch; tables_RN int32."""
    assert kv_pool.address is not None, "kernels find the pool through its address"
    assert tables_RN.dtype == torch.int32, "tables are int32"
    num_heads, size = q_THE.shape[1:]
    tile = tile_of(capability, size, "forward")
    places = tiles.of(tile["BLOCK_M"])
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    constants = constants_of(kv_pool.data, num_heads) | tile
    if len(places):
        _prefill_kernel[(num_heads, len(places))](
            q_THE.contiguous(), kv_pool.address, tables_RN, out_THE, places, tables_RN.stride(0),
            layer, kv_pool.num_blocks, LOG2_E / math.sqrt(size), window, HAS_WINDOW=window > 0,
            enable_fp_fusion=True, **constants,
        )  # fmt: skip
    return out_THE
