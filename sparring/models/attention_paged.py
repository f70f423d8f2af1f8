"""Attention of new tokens over keys and values that lie in a pool of blocks. No gradient.

The new keys and values are written to their slots first; then every row reads its own blocks back.
Rows with the same number of new tokens and a similar context are computed together; decoding rows
(one new token each) need no loop at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.layout import DecodeLayout, KVPool, PagedLayout

MAX_SCORES = 1 << 24
"""Query-key pairs that one call may hold."""

_CALL_BLOCKS = 64
"""What one more call costs, in blocks of keys and values read in vain (measured on a CPU)."""


@dataclass(slots=True)
class _Rows:
    """Rows computed together: n of them, L new tokens each, padded to the same number of blocks.

    tokens: their new tokens, None where these are all the tokens in order. key_blocks [2 n K N]:
    which (block, key or value, head) of the pool, as one running number, in the order [2, n, K, N].
    first_positions [n]: index of each row's first new token in its context. masks: by window.
    scratch: where one layer's keys and values are read into; every layer uses it again, because
    fresh memory of this size would cost more than the reading.
    """

    tokens: Tensor | None
    num_rows: int
    length: int
    key_blocks: Tensor
    first_positions: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)
    scratch: Tensor | None = None


class PagedPlan:
    """Index tensors of one generation step over a KVPool."""

    def __init__(self, layout: PagedLayout, kv_pool: KVPool) -> None:
        assert not torch.is_grad_enabled(), "attention over blocks has no gradient"
        self.pool = kv_pool
        self.slot_blocks = layout.slots_T // layout.block_size
        self.slot_offsets = layout.slots_T % layout.block_size
        self.rows = [_lay_out(layout, rows, kv_pool) for rows in _group_rows(layout)]

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int
    ) -> Tensor:
        """Write k and v to their slots, then attend: [T, H, E]; `window` > 0 as in PackedPlan."""
        data = self.pool.data[layer]
        new = torch.stack((k_TKE, v_TKE), 1).to(data.dtype)
        data[self.slot_blocks, :, :, self.slot_offsets] = new
        blocks = data.view(-1, data.shape[-2] * data.shape[-1])
        if len(self.rows) == 1 and self.rows[0].tokens is None:
            return _attend_rows(self.rows[0], q_THE, blocks, data.shape[2], window)
        out = torch.empty_like(q_THE)
        for rows in self.rows:
            assert rows.tokens is not None, "several calls need to know their tokens"
            q = q_THE.index_select(0, rows.tokens)
            attended = _attend_rows(rows, q, blocks, data.shape[2], window)
            out.index_copy_(0, rows.tokens, attended)
        return out


def paged_layout(layout: DecodeLayout) -> PagedLayout:
    """The same rows with their lengths on the host; an empty row looks at the spare block."""
    kv_lengths_R = layout.kv_lengths_R.long().clamp(min=1)
    return PagedLayout(
        cu_seqlens=tuple(range(len(kv_lengths_R) + 1)),
        kv_lengths=tuple(kv_lengths_R.tolist()),
        kv_lengths_R=kv_lengths_R,
        block_tables_RN=layout.block_tables_RN.long(),
        slots_T=layout.slots_R,
        block_size=layout.block_size,
    )


def _attend_rows(rows: _Rows, q: Tensor, blocks: Tensor, num_kv_heads: int, window: int) -> Tensor:
    """q [n L, H, E] over the pool's blocks, each a row [B E] of `blocks` -> [n L, H, E]."""
    num_heads, head_size = q.shape[1:]
    group = num_heads // num_kv_heads
    shape = (2, rows.num_rows, num_kv_heads, -1, head_size)
    if rows.scratch is None:
        rows.scratch = blocks.new_empty(len(rows.key_blocks), blocks.shape[1])
    torch.index_select(blocks, 0, rows.key_blocks, out=rows.scratch)
    k, v = rows.scratch.to(q.dtype).view(shape)
    q = q.reshape(rows.num_rows, rows.length, num_kv_heads, group, head_size)
    q = q.permute(0, 2, 3, 1, 4).reshape(rows.num_rows, num_kv_heads, -1, head_size)
    if window not in rows.masks:
        rows.masks[window] = _mask(rows, k.shape[2], window, q.dtype, group)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=rows.masks[window])
    out = out.view(rows.num_rows, num_kv_heads, group, rows.length, head_size)
    return out.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_size)


def _mask(rows: _Rows, num_keys: int, window: int, dtype: torch.dtype, group: int) -> Tensor:
    """Additive mask [n, 1, group L, num_keys]: group query heads share one key head."""
    device = rows.first_positions.device
    offsets = torch.arange(rows.length, device=device)
    query = (rows.first_positions[:, None] + offsets)[:, :, None]
    key = torch.arange(num_keys, device=device)
    sees = key <= query
    if window:
        sees = sees & (query - key < window)
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, -torch.inf)
    return mask.repeat(1, group, 1).unsqueeze(1)


def _group_rows(layout: PagedLayout) -> list[list[int]]:
    """Rows that go through one call: an equal number of new tokens, and contexts of like size."""
    size = layout.block_size
    by_length: dict[int, dict[int, list[int]]] = {}
    for row, kv_length in enumerate(layout.kv_lengths):
        length = layout.cu_seqlens[row + 1] - layout.cu_seqlens[row]
        num_blocks = -(-kv_length // size)
        by_length.setdefault(length, {}).setdefault(num_blocks, []).append(row)
    groups: list[list[int]] = []
    for length, by_blocks in sorted(by_length.items()):
        for sizes in _cut(sorted(by_blocks), [len(by_blocks[n]) for n in sorted(by_blocks)]):
            rows = sorted(row for num_blocks in sizes for row in by_blocks[num_blocks])
            at_once = max(1, MAX_SCORES // (length * sizes[-1] * size))
            groups += [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
    return groups


def _cut(sizes: list[int], counts: list[int]) -> list[list[int]]:
    """Cut ascending sizes into runs so that blocks read in vain and calls cost least together.

    Every item of a run is read as if it had the run's largest size; counts: items of each size.
    """
    best = [0.0] + [float("inf")] * len(sizes)
    cut = [0] * (len(sizes) + 1)
    for end in range(1, len(sizes) + 1):
        items = 0
        for start in range(end - 1, -1, -1):
            items += counts[start]
            cost = best[start] + items * sizes[end - 1] + _CALL_BLOCKS
            if cost < best[end]:
                best[end], cut[end] = cost, start
            if items * sizes[end - 1] > best[end]:
                break
    runs: list[list[int]] = []
    end = len(sizes)
    while end:
        runs.append(sizes[cut[end] : end])
        end = cut[end]
    return runs[::-1]


def _lay_out(layout: PagedLayout, group: list[int], kv_pool: KVPool) -> _Rows:
    device = layout.slots_T.device
    bounds, size = layout.cu_seqlens, layout.block_size
    length = bounds[group[0] + 1] - bounds[group[0]]
    width = -(-max(layout.kv_lengths[row] for row in group) // size)
    num_kv_heads = kv_pool.data.shape[3]
    tokens = None
    table, kv_lengths = layout.block_tables_RN[:, :width], layout.kv_lengths_R
    if len(group) < len(layout.kv_lengths):
        chosen = torch.tensor(group, device=device)
        table, kv_lengths = table[chosen], kv_lengths[chosen]
        starts = torch.tensor([bounds[row] for row in group], device=device)
        tokens = (starts[:, None] + torch.arange(length, device=device)).flatten()
    heads = torch.arange(num_kv_heads, device=device)
    keys = table[:, None, :] * (2 * num_kv_heads) + heads[:, None]
    key_blocks = torch.stack((keys, keys + num_kv_heads)).flatten()
    return _Rows(tokens, len(group), length, key_blocks, kv_lengths - length)
