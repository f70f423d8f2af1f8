"""Attention of one new token a row over keys and values in blocks, in fixed splits, in one launch.

Shapes: q [R, H, E] over a pool [L, N, 2, K, B, E] -> out [R, H, E]; row r has lengths_R[r] keys, in
the blocks of tables_RN[r]; a row of length 0 gives zeros. A program takes one split of one row and
one key head, whose H / K query heads it holds together, so that every key is read once. The split
size is fixed and splits start at position 0 (splits.py says why). A row of one split is done by its
program; else each leaves (acc, peak, total) in float32 in a workspace, and the program that
finishes last merges them in the order of the splits: out = sum acc_s f_s / sum total_s f_s. The
grid is static; programs past a row's end or before its window leave at once. Nothing that changes
from step to step is an argument: lengths, tables and the pool's address are read from the device.
Bytes: 2 K E 16-bit values a key read; 2 H (E + 2) float32 a split through the L2 cache. No
gradient. arXiv 2205.14135, 2309.06180.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparring.kernels import Capability, jit, tl, triton
from sparring.kernels.column_order import AS_THEY_ARE, BLOCK_K, Written
from sparring.kernels.paged_plan import DecodeWorkspace, span_of, split_of, swaps_splits
from sparring.kernels.rotate_write import (
    LEAST_VALUES,
    kv_dtype_of,
    num_heads_of,
    rotated_heads,
    to_eight_bits,
)
from sparring.kernels.shared_decode import chunk_of, finish, shared_program, write_heads
from sparring.kernels.splits import (
    LOG2_E,
    OPTIONS,
    ask_for_keys,
    inverse,
    paged_split,
    paged_splits,
    scales_of,
)
from sparring.layout import KVPool

ASKED_BYTES = 24 << 20
"""Of keys and values, asked for by a launch of a chain before the queries are there: half of an
H100's L2 cache.
"""

__all__ = ["paged_decode_reference", "paged_decode_triton", "rotate_decode_triton"]


def paged_decode_reference(
    q_RHE: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    lengths_R: Tensor,
    *,
    window: int = 0,
) -> Tensor:
    """Attention output [R, H, E] of one token a row, row by row; at least float32 inside.

    tables_RN [R, N], lengths_R [R]: blocks and keys of each row, its own token included. window >
    0: the last `window` of them.
    """
    wide = torch.float64 if q_RHE.dtype == torch.float64 else torch.float32
    data = kv_pool.data[layer]
    repeat = q_RHE.shape[1] // data.shape[2]
    out_RHE = torch.zeros_like(q_RHE)
    for row, length in enumerate(lengths_R.tolist()):
        if not length:
            continue
        places = torch.arange(max(0, length - window) if window else 0, length, device=data.device)
        blocks = tables_RN[row].long()[places // data.shape[3]]
        keys = read_slots(kv_pool, layer, blocks, places % data.shape[3]).to(wide)
        k, v = (keys[:, i].repeat_interleave(repeat, 1) for i in range(2))
        scores = torch.einsum("he,jhe->hj", q_RHE[row].to(wide), k) / math.sqrt(data.shape[4])
        out_RHE[row] = torch.einsum("hj,jhe->he", scores.softmax(-1), v).to(q_RHE.dtype)
    return out_RHE


def read_slots(kv_pool: KVPool, layer: int, blocks: Tensor, places: Tensor) -> Tensor:
    """Keys and values [n, 2, K, E] out of a pool, multiplied by their scales where it has any."""
    found = kv_pool.data[layer][blocks, :, :, places]
    if kv_pool.scales is None:
        return found
    return found.float() * kv_pool.scales[layer][blocks, :, :, places].unsqueeze(-1)


@jit
def _before_turn(
    k_ptr, table_ptr, length_ptr, asked_keys, K: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
    KEYS: tl.constexpr, ASKS: tl.constexpr,
):  # fmt: skip
    """Asks for the program's first keys and values, then waits for its turn."""
    if ASKS:
        low = tl.program_id(2) * KEYS
        end = tl.minimum(tl.load(length_ptr), low + tl.minimum(asked_keys, KEYS))
        ask_for_keys(k_ptr, k_ptr + K * B * E, table_ptr, low, end, 2 * K * B * E, B, E)
    tl.extra.cuda.gdc_launch_dependents()  # it waits for the end of this one
    tl.extra.cuda.gdc_wait()


@jit
def _first_blocks(
    tables_ptr, row, num_rows, table_stride, split, SPLIT: tl.constexpr, B: tl.constexpr
):  # fmt: skip
    """(The block in which `split` begins, that of the next split, whether the row is to read the
    next one first): every other four rows, where the row beside shares the first of them alone.
    """
    at = split * SPLIT // B
    beside = row ^ 1
    there = (at < table_stride) & (beside < num_rows)
    block = tl.load(tables_ptr + row * table_stride + at, mask=at < table_stride, other=0)
    shared = tl.load(tables_ptr + beside * table_stride + at, mask=there, other=-1) == block
    at = (split + 1) * SPLIT // B
    there = (at < table_stride) & (beside < num_rows)
    second = tl.load(tables_ptr + row * table_stride + at, mask=at < table_stride, other=0)
    goes_on = tl.load(tables_ptr + beside * table_stride + at, mask=there, other=-1) == second
    return block, second, shared & (goes_on == 0) & (row // 4 % 2 == 1)


@jit
def _write_new(
    k_ptr, scales_ptr, new, slot, is_last, K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr,
    B: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, KV_DTYPE: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Writes the new key and value, rows GROUP and GROUP + 1 of new [BLOCK_M, BLOCK_E], to their
    slot, if the program has the row's last split, and waits: this program reads them back.
    """
    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    written = (members >= GROUP) & (members < GROUP + 2) & is_last
    at = slot // B * (2 * K * B * E) + (slot % B) * E
    at += (members - GROUP)[:, None] * (K * B * E) + columns[None, :]
    to_pool = written[:, None] & (columns < E)[None, :]
    if LIMIT == 0:  # no branch: the slot is then asked for early
        tl.store(k_ptr + at, new, mask=to_pool)
    elif is_last:
        wide = new.to(tl.float32)
        most = tl.max(tl.abs(wide), axis=1)
        factor = tl.where(most == 0.0, 0.0, LIMIT / tl.where(most == 0.0, 1.0, most))
        tl.store(k_ptr + at, to_eight_bits(wide, factor[:, None], KV_DTYPE), mask=to_pool)
        to_scale = slot // B * (2 * K * B) + slot % B + (members - GROUP) * (K * B)
        tl.store(scales_ptr + to_scale, most / LIMIT, mask=written)
    tl.debug_barrier()


@jit(
    do_not_specialize=[
        "layer", "num_blocks", "num_slots", "table_stride", "window", "asked_keys",
    ]
)  # fmt: skip
def _decode_kernel(
    q_ptr, address_ptr, tables_ptr, lengths_ptr, shared_ptr, out_ptr, partial_ptr, states_ptr,
    tickets_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, stride_t, table_stride, layer,
    num_blocks, num_slots, scale, window, eps, asked_keys,
    K: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, B: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr,
    KV_DTYPE: tl.constexpr, LIMIT: tl.constexpr, SHARED: tl.constexpr, ROTATES: tl.constexpr,
    HAS_NORM: tl.constexpr, OVERLAPS: tl.constexpr, SPAN: tl.constexpr, BLOCK_W: tl.constexpr,
    ASKS: tl.constexpr, SWAPS: tl.constexpr = False, IN_ORDER: tl.constexpr = False,
    BOTH: tl.constexpr = False,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    pool_ptr = tl.multiple_of(tl.load(address_ptr).to(tl.pointer_type(KV_DTYPE)), 16)
    k_ptr = pool_ptr + (layer.to(tl.int64) * num_blocks * (2 * K) + kv_head) * (B * E)
    # what the step began with is asked for together, before the turn: one wait for memory, not four
    row_table_ptr = tables_ptr + row * table_stride
    length = tl.load(lengths_ptr + row)
    slot = tl.load(slots_ptr + row) if ROTATES else 0
    IS_PLAIN: tl.constexpr = SHARED == 1 and not HAS_WINDOW
    if IS_PLAIN:
        block, second_block, shares_first = _first_blocks(
            tables_ptr, row, tl.num_programs(0), table_stride, part * SPAN, SPLIT, B
        )  # fmt: skip
    if OVERLAPS:  # in a chain of launches, see chain.py
        _before_turn(
            k_ptr, row_table_ptr, lengths_ptr + row, asked_keys, K, E, B, SPLIT * SPAN, ASKS
        )  # fmt: skip
    scales_ptr = scales_of(address_ptr, layer, num_blocks, kv_head, K, B, LIMIT)
    shared = 0
    if SHARED > 1:
        slices = (num_slots + SHARED - 2) // SHARED  # of parts: every split but one may be shared
        if part < slices:
            shared_program(
                q_ptr, k_ptr, scales_ptr, tables_ptr, lengths_ptr, shared_ptr, out_ptr, partial_ptr,
                states_ptr, tickets_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, row, kv_head,
                part, stride_t, table_stride, num_slots, tl.num_programs(0), scale, eps, K, GROUP,
                E, B, BLOCK_E, BLOCK_M, BLOCK_N, SPLIT, LIMIT, SHARED, BLOCK_W, ROTATES, HAS_NORM,
                SPAN, IN_ORDER, BOTH,
            )  # fmt: skip
            return
        part -= slices
        shared = tl.load(shared_ptr + row)
    split = part * SPAN
    members, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_E)
    inside = (columns < E)[:, None] & (members < GROUP)[None, :]
    to = members[None, :] * E + columns[:, None]
    pair, num_rows = row * K + kv_head, tl.num_programs(0)
    if ROTATES:  # the row's query heads, then its new key and value
        is_query, is_value = members < GROUP, members > GROUP
        heads = tl.where(is_query, kv_head * GROUP + members, K * GROUP + kv_head)
        heads = tl.where(is_value, heads + K, heads)
        new = rotated_heads(
            q_ptr + row * stride_t, cos_ptr + row * (E // 2), sin_ptr + row * (E // 2), q_norm_ptr,
            k_norm_ptr, heads, members < GROUP + 2, is_query, is_value, eps, E, BLOCK_E, HAS_NORM,
        )  # fmt: skip
        q = tl.trans(new)
    if length <= 0:
        if split == 0:
            zeros = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
            write_heads(out_ptr, pair, num_rows, to, zeros, inside, K, GROUP, E, IN_ORDER, BOTH)
        return
    first_key = tl.maximum(0, length - window) if HAS_WINDOW else 0
    first_split = first_key // SPLIT
    num_splits = (length + SPLIT - 1) // SPLIT
    end_split = tl.minimum(split + SPAN, num_splits)
    split = tl.maximum(split, tl.maximum(first_split, shared))
    if split >= end_split:
        return
    v_ptr = k_ptr + K * B * E
    low = tl.maximum(split * SPLIT, first_key // BLOCK_N * BLOCK_N)
    high = tl.minimum(length, end_split * SPLIT)
    swapped = 0
    if not IS_PLAIN:
        block = tl.load(row_table_ptr + low // B)
    elif SWAPS and SPAN > 1:
        swapped = tl.where(shares_first, tl.minimum(high - low - SPLIT, SPLIT), 0)
        swapped = (tl.maximum(swapped, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        block = tl.where(swapped > 0, second_block, block)
    if ROTATES:
        _write_new(
            k_ptr, scales_ptr, new, slot, end_split == num_splits, K, GROUP, E, B, BLOCK_E, BLOCK_M,
            KV_DTYPE, LIMIT,
        )  # fmt: skip
    else:
        q = tl.load(q_ptr + pair * (GROUP * E) + to, mask=inside, other=0.0)
    positions = tl.zeros([BLOCK_M], tl.int32) + (length - 1)
    partial_at = partial_ptr + pair * num_slots * (GROUP * E)
    states_at = states_ptr + pair * num_slots * (2 * GROUP)
    is_whole = (split == first_split) & (end_split == num_splits)
    if SPAN == 1:
        acc, peak, total = paged_split(
            q, positions, k_ptr, v_ptr, scales_ptr, row_table_ptr, block, low, high, length, scale,
            window, 2 * K * B * E, B, E, BLOCK_E, BLOCK_M, BLOCK_N, HAS_WINDOW, LIMIT,
        )  # fmt: skip
    else:
        acc, total = paged_splits(
            q, positions, k_ptr, v_ptr, scales_ptr, row_table_ptr, block, partial_at, states_at,
            low, high, length, scale, window, is_whole == 0, swapped, 2 * K * B * E, B, E, GROUP,
            BLOCK_E, BLOCK_M, BLOCK_N, SPLIT, HAS_WINDOW, LIMIT,
        )  # fmt: skip
    if is_whole:
        out = acc * inverse(total)[None, :]
        write_heads(out_ptr, pair, num_rows, to, out, inside, K, GROUP, E, IN_ORDER, BOTH)
        return
    if SPAN == 1:
        tl.store(partial_at + split * (GROUP * E) + to, acc, mask=inside)
        state_at = states_at + split * (2 * GROUP) + members
        tl.store(state_at, peak, mask=members < GROUP)
        tl.store(state_at + GROUP, total, mask=members < GROUP)
    tl.debug_barrier()  # every thread has stored before one of them tells
    finish(
        out_ptr, partial_ptr, states_ptr, tickets_ptr, pair, num_rows, num_slots, first_split,
        num_splits, shared, K, GROUP, E, BLOCK_E, BLOCK_M, SPAN, IN_ORDER, BOTH,
    )  # fmt: skip


def paged_decode_triton(
    q_RHE: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    lengths_R: Tensor,
    *,
    max_splits: int,
    capability: Capability,
    window: int = 0,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    shared_R: Tensor | None = None,
) -> Tensor:
    """`paged_decode_reference` in one launch, fit for capture.

    tables_RN, lengths_R: int32. max_splits: (length + SPLIT - 1) // SPLIT of the longest row that
    may come. workspace: for at least R rows of exactly max_splits splits; None makes one.
    shared_R: `shared_splits` of these rows, which are then computed once for neighbours of a group;
    not with a window.
    """
    rows, num_heads, size = q_RHE.shape
    num_kv_heads = kv_pool.data.shape[3]
    out, workspace = _prepared(
        q_RHE, num_heads, kv_pool, tables_RN, lengths_R, max_splits, out, workspace
    )
    constants = constants_of(kv_pool.data, num_heads) | split_of(capability, size) | OPTIONS
    if rows:
        form = _form(capability, rows, constants, shared_R, window)
        grid = (rows, num_kv_heads, _parts(max_splits, form))
        _decode_kernel[grid](
            q_RHE.contiguous(), kv_pool.address, tables_RN, lengths_R,
            lengths_R if shared_R is None else shared_R, out, workspace.partial, workspace.states,
            workspace.tickets, *[workspace.states] * 4, tables_RN, 0, tables_RN.stride(0), layer,
            kv_pool.num_blocks, max_splits, LOG2_E / math.sqrt(size), window, 0.0, 0,
            HAS_WINDOW=window > 0, ROTATES=False, HAS_NORM=False, OVERLAPS=False, ASKS=False,
            **form, **constants,
        )  # fmt: skip
    return out


def rotate_decode_triton(
    qkv_RC: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    slots_R: Tensor,
    kv_pool: KVPool,
    layer: int,
    tables_RN: Tensor,
    lengths_R: Tensor,
    *,
    max_splits: int,
    capability: Capability,
    window: int = 0,
    out: Tensor | None = None,
    workspace: DecodeWorkspace | None = None,
    shared_R: Tensor | None = None,
    overlaps: bool = False,
    written: Written = AS_THEY_ARE,
) -> Tensor:
    """`rotate_write` and `paged_decode_triton` of its queries in one launch, the same bits.

    The program of a row's last split writes the row's new key and value before it reads them; a row
    of length 0 writes nothing. overlaps: it may be launched while the launch before it runs, and
    waits for that one (few_rows.py). written: how rows of H E values are written; [2, R, H, E] with
    both; whether the launch is early is said by overlaps.
    """
    rows, size = len(qkv_RC), kv_pool.data.shape[5]
    num_kv_heads = kv_pool.data.shape[3]
    num_heads = num_heads_of(qkv_RC, kv_pool)
    if out is None:
        shape = (2,) * written.both + (rows, num_heads, size)
        out = torch.empty(shape, dtype=qkv_RC.dtype, device=qkv_RC.device)
    assert not written.in_order or num_heads * size % BLOCK_K == 0, "an order is of whole blocks"
    out, workspace = _prepared(
        qkv_RC, num_heads, kv_pool, tables_RN, lengths_R, max_splits, out, workspace
    )
    has_norm = q_norm is not None and k_norm is not None
    constants = constants_of(kv_pool.data, num_heads) | split_of(capability, size) | OPTIONS
    constants["BLOCK_M"] = rotated_columns(constants["GROUP"], constants["BLOCK_E"], has_norm)
    if overlaps:
        constants["launch_pdl"] = True
    if rows:
        form = _form(capability, rows, constants, shared_R, window)
        grid = (rows, num_kv_heads, _parts(max_splits, form))
        _decode_kernel[grid](
            qkv_RC, kv_pool.address, tables_RN, lengths_R,
            lengths_R if shared_R is None else shared_R, out, workspace.partial, workspace.states,
            workspace.tickets, cos.contiguous(), sin.contiguous(),
            q_norm if has_norm else cos, k_norm if has_norm else cos, slots_R, qkv_RC.stride(0),
            tables_RN.stride(0), layer, kv_pool.num_blocks, max_splits, LOG2_E / math.sqrt(size),
            window, eps, _keys_asked_for(grid, kv_pool), HAS_WINDOW=window > 0,
            ROTATES=True, HAS_NORM=has_norm, OVERLAPS=overlaps,
            ASKS=overlaps and _asks(form, constants, window), IN_ORDER=written.in_order,
            BOTH=written.both, **form, **constants,
        )  # fmt: skip
    return out


def _prepared(
    like: Tensor,
    num_heads: int,
    kv_pool: KVPool,
    tables_RN: Tensor,
    lengths_R: Tensor,
    max_splits: int,
    out: Tensor | None,
    workspace: DecodeWorkspace | None,
) -> tuple[Tensor, DecodeWorkspace]:
    """Where the output [R, H, E] and the splits go, after a look at what was given."""
    assert kv_pool.address is not None, "kernels find the pool through its address"
    assert tables_RN.dtype == lengths_R.dtype == torch.int32, "tables and lengths are int32"
    rows, num_kv_heads, size = len(like), kv_pool.data.shape[3], kv_pool.data.shape[5]
    if out is None:
        out = torch.empty(rows, num_heads, size, dtype=like.dtype, device=like.device)
    if workspace is None:
        workspace = DecodeWorkspace.new(
            rows, num_heads, num_kv_heads, size, max_splits, like.device
        )
    assert workspace.partial.shape[0] >= rows, "the workspace has room for every row"
    assert workspace.partial.shape[2] == max_splits, "the workspace is laid out for max_splits"
    return out, workspace


def _asks(form: dict[str, int], constants: dict[str, object], window: int) -> bool:
    """Whether programs ask for their keys before their turn: whole lines of 16-bit numbers."""
    lines = constants["B"] * constants["E"] // 64
    is_plain = form["SPAN"] == form["SHARED"] == 1 and not window and constants["LIMIT"] == 0
    return ASKED_BYTES > 0 and is_plain and lines & (lines - 1) == 0


def _keys_asked_for(grid: tuple[int, ...], kv_pool: KVPool) -> int:
    """Keys a program asks for, so that all of them are in the cache together."""
    each = 2 * kv_pool.data.shape[5] * kv_pool.data.element_size()
    return ASKED_BYTES // (math.prod(grid) * each) // kv_pool.block_size * kv_pool.block_size


def rotated_columns(group: int, block_e: int, has_norm: bool) -> int:
    """Columns of a tile of heads to be rotated: queries, a key and a value; with a norm as many as
    its order of sums takes.
    """
    least = LEAST_VALUES // block_e if has_norm else 16
    return max(16, least, triton.next_power_of_2(group + 2))


def _form(
    capability: Capability,
    rows: int,
    constants: dict[str, object],
    shared_R: Tensor | None,
    window: int,
) -> dict[str, int]:
    """How programs share the work of so many rows: splits one takes, and rows of a chunk."""
    chunk = 1 if shared_R is None else chunk_of(constants["GROUP"])
    assert chunk == 1 or not window, "a window's rows share no splits"
    width = max(triton.next_power_of_2(chunk * constants["GROUP"]), constants["BLOCK_M"])
    span = span_of(capability, rows * constants["K"], constants["E"])
    swaps = swaps_splits(span, constants["E"])
    return {"SPAN": span, "SHARED": chunk, "BLOCK_W": width, "SWAPS": swaps}


def _parts(max_splits: int, form: dict[str, int]) -> int:
    """Programs a row and key head: for shared splits, of which SHARED rows have one each, and own
    ones.
    """
    shared = triton.cdiv(max_splits - 1, form["SHARED"]) if form["SHARED"] > 1 else 0
    return shared + triton.cdiv(max_splits, form["SPAN"])


def constants_of(data: Tensor, num_heads: int) -> dict[str, object]:
    """Compile-time sizes of the decode kernel for a pool and a number of query heads."""
    num_kv_heads, block_size, size = data.shape[3:]
    group = num_heads // num_kv_heads
    return {
        "K": num_kv_heads,
        "GROUP": group,
        "E": size,
        "B": block_size,
        "BLOCK_E": max(16, triton.next_power_of_2(size)),
        "BLOCK_M": max(16, triton.next_power_of_2(group)),
        **kv_dtype_of(data),
    }
