"""Decoding's splits that lie wholly inside a shared prompt, computed once for several rows.

Rows go in chunks of `ROWS` neighbours. Within a chunk, the rows whose table holds the same block at
the end of a split as the chunk's first row share that split (a prompt's blocks are shared from the
front), provided it is not their last one; where two or more do, one program computes it for all of
them, their query heads side by side, and leaves (acc, peak, total) where decoding would have. The
decode kernel that follows asks the same question and leaves those splits out. How many queries a
program holds changes no bit (splits.py), so neither does this. It finds out on the device: nothing
about groups is an argument. Bytes: a shared split's keys once a chunk, not once a row.
"""

from __future__ import annotations

from sparring.kernels import jit, tl
from sparring.kernels.splits import paged_split, scales_of


@jit
def shared_mates(
    lengths_ptr, tables_ptr, table_stride, rows, leader, num_rows, end, B: tl.constexpr
):  # fmt: skip
    """Which of `rows` [M] share the split that ends at key `end` with row `leader`."""
    last = end // B - 1
    length = tl.load(lengths_ptr + rows, mask=rows < num_rows, other=0)
    theirs = tl.load(
        tables_ptr + rows * table_stride + last, mask=(rows < num_rows) & (length > end), other=-1
    )
    leads = tl.load(lengths_ptr + leader) > end
    block = tl.load(tables_ptr + leader * table_stride + last, mask=leads, other=-2)
    return theirs == block


@jit(do_not_specialize=["layer", "num_blocks", "table_stride", "num_rows", "max_splits"])
def _shared_kernel(
    q_ptr, address_ptr, tables_ptr, lengths_ptr, partial_ptr, states_ptr, tickets_ptr,
    table_stride, layer, num_blocks, num_rows, max_splits, scale,
    K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
    KV_DTYPE: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    leader = tl.program_id(0).to(tl.int64) * ROWS
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    places = tl.arange(0, BLOCK_M)
    rows = leader + places // GROUP
    members = places % GROUP
    end = split * SPLIT + SPLIT
    same = shared_mates(lengths_ptr, tables_ptr, table_stride, rows, leader, num_rows, end, B)
    same = same & (places < ROWS * GROUP)
    if tl.sum(same.to(tl.int32), axis=0) < 2 * GROUP:
        return
    columns = tl.arange(0, BLOCK_E)
    inside = (columns < E)[:, None] & same[None, :]
    heads = rows * K + kv_head
    at = (heads * GROUP + members)[None, :] * E + columns[:, None]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    pool_ptr = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(KV_DTYPE)), 16)
    k_ptr = pool_ptr + (layer.to(tl.int64) * num_blocks * (2 * K) + kv_head) * (B * E)
    acc, peak, total = paged_split(
        q, tl.zeros([BLOCK_M], tl.int32) + end, k_ptr, k_ptr + K * B * E,
        scales_of(address_ptr, layer, num_blocks, kv_head, K, B, LIMIT),
        tables_ptr + leader * table_stride, split * SPLIT, end, end, scale, 0, 2 * K * B * E, B, E,
        BLOCK_E, BLOCK_M, BLOCK_N, False, LIMIT,
    )  # fmt: skip
    slots = heads * max_splits + split
    to = (slots * GROUP + members)[None, :] * E + columns[:, None]
    tl.store(partial_ptr + to, acc, mask=inside)
    state_at = states_ptr + slots * (2 * GROUP) + members
    tl.store(state_at, peak, mask=same)
    tl.store(state_at + GROUP, total, mask=same)
    tl.atomic_add(tickets_ptr + heads, 1, mask=same & (members == 0))
