"""Decoding's splits that lie wholly inside a shared prompt, computed once for several rows.

Rows go in chunks of neighbours. Within a chunk, the rows whose table holds the same block at the
end of a split as the chunk's first row share that split (a prompt's blocks are shared from the
front), provided it is not their last one. `shared_splits` counts, once a step and on the device,
how many leading splits of each row are shared so; nothing about groups is an argument. In the
decode launch (paged_attention.py) one program then computes such a split for all rows of its chunk,
their query heads side by side, and counts as done in each of them; those rows' own programs leave
it out. How many queries a program holds changes no bit (splits.py), so neither does this. Shapes:
those of paged_attention.py, counts int32 [R]. Bytes: a shared split's keys once a chunk, not once a
row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparring.kernels import jit, rounded, tl, triton
from sparring.kernels.column_order import place_of
from sparring.kernels.rotate_write import rotated_heads
from sparring.kernels.splits import inverse, merge_factors, paged_split

MAX_CHUNK = 8
"""Most rows of a chunk: groups are rarely smaller, and a chunk looks for one prompt alone."""


def chunk_of(group: int) -> int:
    """Neighbouring rows whose prompt is computed once: a power of two, 32 query heads at most; 1
    where that is none.
    """
    return min(MAX_CHUNK, 1 << max(1, 32 // group).bit_length() - 1)


@jit(do_not_specialize=["table_stride", "num_rows"])
def _shared_splits_kernel(
    tables_ptr, lengths_ptr, shared_ptr, table_stride, num_rows,
    ROWS: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    leader = tl.program_id(0) * ROWS
    rows = leader + tl.arange(0, ROWS)
    ends = (tl.arange(0, BLOCK_S) + 1) * SPLIT
    last = ends // B - 1
    lengths = tl.load(lengths_ptr + rows, mask=rows < num_rows, other=0)
    goes_on = lengths[:, None] > ends[None, :]
    at = tables_ptr + rows[:, None].to(tl.int64) * table_stride + last[None, :]
    theirs = tl.load(at, mask=goes_on, other=-1)
    leads = tl.load(lengths_ptr + leader) > ends
    at = tables_ptr + leader.to(tl.int64) * table_stride + last
    block = tl.load(at, mask=leads, other=-2)
    same = (theirs == block[None, :]).to(tl.int32)
    shared = tl.where((tl.sum(same, axis=0) > 1)[None, :], same, 0)
    tl.store(shared_ptr + rows, tl.sum(shared, axis=1), mask=rows < num_rows)


def shared_splits(
    tables_RN: Tensor,
    lengths_R: Tensor,
    *,
    chunk: int,
    block_size: int,
    split: int,
    max_splits: int,
) -> Tensor:
    """How many leading splits of each row [R] int32 are computed together with neighbours."""
    rows = len(lengths_R)
    shared_R = torch.empty(rows, dtype=torch.int32, device=lengths_R.device)
    if rows:
        _shared_splits_kernel[(triton.cdiv(rows, chunk),)](
            tables_RN, lengths_R, shared_R, tables_RN.stride(0), rows, ROWS=chunk, B=block_size,
            SPLIT=split, BLOCK_S=triton.next_power_of_2(max_splits), num_warps=1,
        )  # fmt: skip
    return shared_R


@jit
def write_heads(
    out_ptr, pair, num_rows, to, out, inside, K: tl.constexpr, GROUP: tl.constexpr,
    E: tl.constexpr, IN_ORDER: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Writes what a pair (a row and key head) attended to, whose values have places `to` among its
    GROUP E; IN_ORDER, BOTH: see `Written`, the second form num_rows rows behind the first.
    """
    out = rounded(out, out_ptr.dtype.element_ty)
    if IN_ORDER:
        first = pair // K * (K * GROUP * E)
        places = place_of(pair % K * (GROUP * E) + to)
        tl.store(out_ptr + first + places, out, mask=inside)
        pair += num_rows * K  # where the rows as they are begin
    if BOTH or not IN_ORDER:
        tl.store(out_ptr + pair * (GROUP * E) + to, out, mask=inside)


@jit
def _merge_row(
    out_ptr, partial_ptr, states_ptr, pair, num_rows, low, high, K: tl.constexpr,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    IN_ORDER: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Splits low..high of a row and key head, four loads under way at once, merged in order."""
    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (members < GROUP)[:, None] & (columns < E)[None, :]
    to = members[:, None] * E + columns[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(low, high, 4):
        for i in tl.static_range(4):
            there = (members < GROUP) & (first + i < high)
            state_at = states_ptr + (first + i) * (2 * GROUP) + members
            peak_new = tl.load(state_at, there, other=-float("inf"), cache_modifier=".cg")
            total_new = tl.load(state_at + GROUP, there, other=0.0, cache_modifier=".cg")
            acc_new = tl.load(
                partial_ptr + (first + i) * (GROUP * E) + to, inside & (first + i < high),
                other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            peak, keep, add = merge_factors(peak, peak_new)
            total = tl.fma(total_new, add, total * keep)
            acc = tl.fma(acc_new, add[:, None], acc * keep[:, None])
    out = acc * inverse(total)[:, None]
    write_heads(out_ptr, pair, num_rows, to, out, inside, K, GROUP, E, IN_ORDER, BOTH)


@jit
def finish(
    out_ptr, partial_ptr, states_ptr, tickets_ptr, pair, num_rows, num_slots, first_split,
    num_splits, shared, K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr, IN_ORDER: tl.constexpr,
    BOTH: tl.constexpr,
):  # fmt: skip
    """Tells that one of the programs of `pair` (a row and key head) is done; the last one merges.

    What it computed is in the workspace and a barrier has passed. shared: the row's leading splits
    that programs for several rows compute, one each; its own programs take SPAN splits each.
    """
    done = tl.atomic_add(tickets_ptr + pair, 1, sem="acq_rel", scope="gpu")
    first_own = tl.maximum(first_split, shared)
    if done == shared + (num_splits - 1) // SPAN - first_own // SPAN:
        place = pair * num_slots
        _merge_row(
            out_ptr, partial_ptr + place * (GROUP * E), states_ptr + place * (2 * GROUP), pair,
            num_rows, first_split, num_splits, K, GROUP, E, BLOCK_E, BLOCK_M, IN_ORDER, BOTH,
        )  # fmt: skip
        tl.store(tickets_ptr + pair, 0)


@jit
def shared_program(
    q_ptr, k_ptr, scales_ptr, tables_ptr, lengths_ptr, shared_ptr, out_ptr, partial_ptr, states_ptr,
    tickets_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, row, kv_head, part, stride_t,
    table_stride, num_slots, num_rows, scale, eps,
    K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, LIMIT: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_W: tl.constexpr, ROTATES: tl.constexpr, HAS_NORM: tl.constexpr,
    SPAN: tl.constexpr, IN_ORDER: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """One split for those rows of a chunk of SHARED that share it, if any do.

    The chunk's programs of one `part` (one for each of its rows) take SHARED splits, one each.
    """
    leader = row // SHARED * SHARED
    split = (part * SHARED + row % SHARED).to(tl.int32)
    places = tl.arange(0, BLOCK_W)
    rows = leader + places // GROUP
    members = places % GROUP
    known = (places < SHARED * GROUP) & (rows < num_rows)
    joins = known & (tl.load(shared_ptr + rows, mask=known, other=0) > split)
    if tl.sum(joins.to(tl.int32), axis=0) > 0:
        columns = tl.arange(0, BLOCK_E)
        inside = (columns < E)[:, None] & joins[None, :]
        tables_ptr += leader * table_stride
        low = split * SPLIT
        end = low + SPLIT
        v_ptr = k_ptr + K * B * E
        pairs = rows * K + kv_head
        if ROTATES:
            tokens = tl.where(joins, rows, leader)[:, None]  # no angles are read past the last row
            turn = tokens * (E // 2)
            new = rotated_heads(
                q_ptr + tokens * stride_t, cos_ptr + turn, sin_ptr + turn, q_norm_ptr,
                k_norm_ptr, kv_head * GROUP + members, joins, places >= 0, places < 0, eps, E,
                BLOCK_E, HAS_NORM,
            )  # fmt: skip
            q = tl.trans(new)
        else:
            at = (pairs * GROUP + members)[None, :] * E + columns[:, None]
            q = tl.load(q_ptr + at, mask=inside, other=0.0)
        acc, peak, total = paged_split(
            q, tl.zeros([BLOCK_W], tl.int32) + end, k_ptr, v_ptr, scales_ptr, tables_ptr,
            tl.load(tables_ptr + low // B), low, end, end, scale, 0, 2 * K * B * E, B, E, BLOCK_E,
            BLOCK_W, BLOCK_N, False, LIMIT,
        )  # fmt: skip
        slots = pairs * num_slots + split
        to = (slots * GROUP + members)[None, :] * E + columns[:, None]
        tl.store(partial_ptr + to, acc, mask=inside)
        state_at = states_ptr + slots * (2 * GROUP) + members
        tl.store(state_at, peak, mask=joins)
        tl.store(state_at + GROUP, total, mask=joins)
        tl.debug_barrier()  # every thread has stored before one of them tells
        for mate in range(leader, tl.minimum(leader + SHARED, num_rows)):
            shared = tl.load(shared_ptr + mate)
            if shared > split:
                num_splits = (tl.load(lengths_ptr + mate) + SPLIT - 1) // SPLIT
                finish(
                    out_ptr, partial_ptr, states_ptr, tickets_ptr, mate * K + kv_head, num_rows,
                    num_slots, 0, num_splits, shared, K, GROUP, E, BLOCK_E, BLOCK_M, SPAN,
                    IN_ORDER, BOTH,
                )  # fmt: skip
