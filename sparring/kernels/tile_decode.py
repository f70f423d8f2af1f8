"""Decoding with few rows: a program takes one tile of keys, on its way before the queries are.

The numbers of paged_attention.py to the bit, from more programs that do less: with few rows a
launch takes as long as its longest chain of waits. A program asks for its tile of old keys and
values first; in a chain of launches (few_rows.py) they come while the product that makes the
queries runs. Then it waits for its turn, rotates the queries, puts the row's new key and value into
its tile and leaves the tile's sums in a workspace; the program of a row and key head that finishes
last merges them, tiles within splits and splits, in order. Shapes: those of paged_attention.py, out
[R, H, E]. Bytes: its, and 4 H (E + N + 1) a tile of N keys through the L2 cache.
"""

from __future__ import annotations

from sparring.kernels import jit, rounded, tl
from sparring.kernels.rotate_write import rotated_heads
from sparring.kernels.splits import inverse, merge_factors, product, tile_scores, whole_total

AT_ONCE = 2
"""Splits whose tiles are on their way at once where they are merged."""

__all__ = ["AT_ONCE", "tile_kernel"]


@jit
def _merge_tiles(
    out_ptr, partial_ptr, states_ptr, low, high, GROUP: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Tiles low..high of a row and key head, TILES a split and AT_ONCE splits under way."""
    members = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_E)
    known = members < GROUP
    inside = known[:, None] & (columns < E)[None, :]
    to = members[:, None] * E + columns[None, :]
    to_p = members[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row_acc = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
    row_peak = tl.full([BLOCK_G], -float("inf"), tl.float32)
    row_total = tl.zeros([BLOCK_G], tl.float32)
    for first in range(low // TILES * TILES, high, AT_ONCE * TILES):
        for ahead in tl.static_range(AT_ONCE):
            acc = tl.zeros([BLOCK_G, BLOCK_E], tl.float32)
            peak = tl.full([BLOCK_G], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_G, BLOCK_N], tl.float32)
            for i in tl.static_range(TILES):
                tile = first + ahead * TILES + i
                there = (tile >= low) & (tile < high)
                has = known & there
                at = states_ptr + tile * (GROUP + BLOCK_N * GROUP)
                peak_new = tl.load(
                    at + BLOCK_N * GROUP + members, has, other=-float("inf"), cache_modifier=".cg"
                )
                p = tl.load(at + to_p, has[:, None], other=0.0, cache_modifier=".cg")
                acc_new = tl.load(
                    partial_ptr + tile * (GROUP * E) + to, inside & there, other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                peak, keep, add = merge_factors(peak, peak_new)
                acc = tl.fma(acc_new, add[:, None], acc * keep[:, None])
                total = tl.fma(p, add[:, None], total * keep[:, None])
            row_peak, keep, add = merge_factors(row_peak, peak)
            row_total = tl.fma(whole_total(total), add, row_total * keep)
            row_acc = tl.fma(acc, add[:, None], row_acc * keep[:, None])
    out = row_acc * inverse(row_total)[:, None]
    tl.store(out_ptr + to, rounded(out, out_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["layer", "num_blocks", "num_slots", "table_stride", "window"])
def tile_kernel(
    q_ptr, address_ptr, tables_ptr, lengths_ptr, out_ptr, partial_ptr, states_ptr, tickets_ptr,
    cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, stride_t, table_stride, layer, num_blocks,
    num_slots, scale, window, eps,
    K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, KV_DTYPE: tl.constexpr, HAS_NORM: tl.constexpr,
    OVERLAPS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    tile = tl.program_id(2)
    pool_ptr = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(KV_DTYPE)), 16)
    length = tl.load(lengths_ptr + row)
    first_key = tl.maximum(0, length - window) if HAS_WINDOW else 0
    first_tile = first_key // BLOCK_N
    num_tiles = (length + BLOCK_N - 1) // BLOCK_N
    start = tile * BLOCK_N
    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    keys = start + tl.arange(0, BLOCK_N)
    is_there = (tile >= first_tile) & (tile < num_tiles)
    block = tl.load(tables_ptr + row * table_stride + start // B, mask=is_there, other=0)
    k_ptr = pool_ptr + (layer.to(tl.int64) * num_blocks * (2 * K) + kv_head) * (B * E)
    rows_at = k_ptr + block.to(tl.int64) * (2 * K * B * E) + (start % B) * E
    rows_at = rows_at + (tl.arange(0, BLOCK_N) * E)[:, None]
    at = rows_at + columns[None, :]
    old = ((keys < length - 1) & is_there)[:, None] & (columns < E)[None, :]
    k = tl.load(at, mask=old, other=0.0)
    # values in halves, each a product: else probabilities came to lie in shared memory where the
    # queries had been, and ptxas 12.8 takes undefined registers for an operand's second address
    HALF: tl.constexpr = BLOCK_E // 2
    halves = tl.arange(0, HALF)
    at_v = rows_at + K * B * E + halves[None, :]
    is_old = ((keys < length - 1) & is_there)[:, None]
    v_low = tl.load(at_v, mask=is_old & (halves < E)[None, :], other=0.0)
    v_high = tl.load(at_v + HALF, mask=is_old & (halves < E - HALF)[None, :], other=0.0)
    slot = tl.load(slots_ptr + row)
    if OVERLAPS:  # in a chain of launches, see chain.py; what was read is as the step began
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = (columns < E)[:, None] & (members < GROUP)[None, :]
    pair = row * K + kv_head
    to = members[None, :] * E + columns[:, None]
    if length <= 0:
        if tile == 0:
            zeros = tl.zeros([BLOCK_E, BLOCK_M], out_ptr.dtype.element_ty)
            tl.store(out_ptr + pair * (GROUP * E) + to, zeros, mask=inside)
        return
    if is_there == 0:
        return
    # the row's query heads, then its new key and value
    is_query, is_value = members < GROUP, members > GROUP
    heads = tl.where(is_query, kv_head * GROUP + members, K * GROUP + kv_head)
    heads = tl.where(is_value, heads + K, heads)
    new = rotated_heads(
        q_ptr + row * stride_t, cos_ptr + row * (E // 2), sin_ptr + row * (E // 2), q_norm_ptr,
        k_norm_ptr, heads, members < GROUP + 2, is_query, is_value, eps, E, BLOCK_E, HAS_NORM,
    )  # fmt: skip
    if tile == num_tiles - 1:
        place = slot // B * (2 * K * B * E) + (slot % B) * E
        place += (members - GROUP)[:, None] * (K * B * E) + columns[None, :]
        is_new = (members >= GROUP) & (members < GROUP + 2)
        tl.store(k_ptr + place, new, mask=is_new[:, None] & (columns < E)[None, :])
        tl.debug_barrier()  # before this program reads it back
        own = (keys == length - 1)[:, None] & (columns < E)[None, :]
        k = tl.load(at, mask=own, other=k)
        is_own = (keys == length - 1)[:, None]
        v_low = tl.load(at_v, mask=is_own & (halves < E)[None, :], other=v_low)
        v_high = tl.load(at_v + HALF, mask=is_own & (halves < E - HALF)[None, :], other=v_high)
    positions = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
    used, peak, p = tile_scores(
        tl.trans(new), k, 0.0, 0.0, keys, positions, length, scale, window, HAS_WINDOW, False
    )
    low = product(tl.trans(v_low), used, tl.zeros([HALF, BLOCK_M], tl.float32))
    high = product(tl.trans(v_high), used, tl.zeros([HALF, BLOCK_M], tl.float32))
    to = members[None, :] * E + halves[:, None]
    in_low = (halves < E)[:, None] & (members < GROUP)[None, :]
    in_high = (halves < E - HALF)[:, None] & (members < GROUP)[None, :]
    if num_tiles - first_tile == 1:
        factor = inverse(whole_total(tl.trans(p)))[None, :]
        out_at = out_ptr + pair * (GROUP * E) + to
        dtype = out_ptr.dtype.element_ty
        tl.store(out_at, rounded(low * factor, dtype), mask=in_low)
        tl.store(out_at + HALF, rounded(high * factor, dtype), mask=in_high)
        return
    place = pair * num_slots + tile
    acc_at = partial_ptr + place * (GROUP * E) + to
    tl.store(acc_at, low, mask=in_low)
    tl.store(acc_at + HALF, high, mask=in_high)
    state_at = states_ptr + place * (GROUP + BLOCK_N * GROUP)
    tl.store(state_at + BLOCK_N * GROUP + members, peak, mask=members < GROUP)
    to_p = tl.arange(0, BLOCK_N)[:, None] + members[None, :] * BLOCK_N
    tl.store(state_at + to_p, p, mask=(members < GROUP)[None, :])
    tl.debug_barrier()  # every thread has stored before one of them tells
    done = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel", scope="gpu")
    if done == num_tiles - first_tile - 1:
        first = pair * num_slots
        _merge_tiles(
            out_ptr + pair * (GROUP * E), partial_ptr + first * (GROUP * E),
            states_ptr + first * ((1 + BLOCK_N) * GROUP), first_tile, num_tiles, GROUP, E, BLOCK_E,
            BLOCK_G, BLOCK_N, SPLIT // BLOCK_N, AT_ONCE,
        )  # fmt: skip
        tl.store(tickets_ptr + pair, 0)
