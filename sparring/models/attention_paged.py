"""Attention of new tokens over keys and values that lie in a pool of blocks. No gradient.

The new keys and values are written to their slots first; then every row reads its own blocks back.
Rows with the same number of new tokens and a similar context are computed together; decoding rows
(one new token each) need no loop at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.models.layout import KVPool, PagedLayout

MAX_SCORES = 1 << 24
"""Query-key pairs that one call may hold."""


@dataclass(slots=True)
class _Rows:
    """Rows computed together: n of them, L new tokens each, over N blocks each."""

    tokens: Tensor | slice
    num_rows: int
    length: int
    key_blocks: Tensor
    mask: dict[int, Tensor]
    kv_lengths: Tensor
    query_starts: Tensor


class PagedPlan:
    """Index tensors of one generation step over a KVPool."""

    def __init__(self, layout: PagedLayout, kv_pool: KVPool) -> None:
        self.pool = kv_pool
        self.block_size = layout.block_size
        self.slot_blocks = layout.slots_T // layout.block_size
        self.slot_offsets = layout.slots_T % layout.block_size
        self.num_tokens = layout.cu_seqlens[-1]
        self.rows = _group_rows(layout, kv_pool)

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int
    ) -> Tensor:
        """Write k, v to their slots, then attend: output [T, H, E]."""
        data = self.pool.data[layer]
        data[self.slot_blocks, :, :, self.slot_offsets] = torch.stack(
            [k_TKE, v_TKE], 1
        ).to(data.dtype)
        flat = data.view(-1, data.shape[-2] * data.shape[-1])
        if len(self.rows) == 1 and isinstance(self.rows[0].tokens, slice):
            return self._attend_rows(self.rows[0], q_THE, flat, window)
        out = torch.empty_like(q_THE)
        for rows in self.rows:
            out[rows.tokens] = self._attend_rows(rows, q_THE[rows.tokens], flat, window)
        return out

    def _attend_rows(self, rows: _Rows, q: Tensor, flat: Tensor, window: int) -> Tensor:
        """q [n L, H, E] -> [n L, H, E]."""
        num_heads, head_size = q.shape[1:]
        num_kv_heads = self.pool.data.shape[3]
        shape = (rows.num_rows, num_kv_heads, -1, head_size)
        k = flat.index_select(0, rows.key_blocks).view(shape)
        v = flat.index_select(0, rows.key_blocks + num_kv_heads).view(shape)
        group = num_heads // num_kv_heads
        q = q.view(rows.num_rows, rows.length, num_kv_heads, group, head_size)
        q = q.permute(0, 2, 3, 1, 4).reshape(
            rows.num_rows, num_kv_heads, group * rows.length, head_size
        )
        if window not in rows.mask:
            rows.mask[window] = _mask(rows, k.shape[2], window, q.dtype, group)
        out = F.scaled_dot_product_attention(
            q, k.to(q.dtype), v.to(q.dtype), attn_mask=rows.mask[window]
        )
        out = out.view(rows.num_rows, num_kv_heads, group, rows.length, head_size)
        return out.permute(0, 3, 1, 2, 4).reshape(-1, num_heads, head_size)


def _group_rows(layout: PagedLayout, kv_pool: KVPool) -> list[_Rows]:
    device = layout.slots_T.device
    num_rows, num_kv_heads = len(layout.kv_lengths), kv_pool.data.shape[3]
    lengths = [layout.cu_seqlens[r + 1] - layout.cu_seqlens[r] for r in range(num_rows)]
    blocks = [-(-kv_length // layout.block_size) for kv_length in layout.kv_lengths]
    order = sorted(range(num_rows), key=lambda r: (lengths[r], blocks[r]))
    groups: list[list[int]] = []
    for row in order:
        if groups:
            group = groups[-1]
            pairs = (len(group) + 1) * lengths[row] * blocks[row] * layout.block_size
            if (
                lengths[group[0]] == lengths[row]
                and pairs <= MAX_SCORES
                and blocks[row] <= 2 * blocks[group[0]]
            ):
                group.append(row)
                continue
        groups.append([row])
    result = []
    starts = torch.tensor(layout.cu_seqlens[:-1])
    for group in groups:
        length, width = lengths[group[0]], blocks[group[-1]]
        tokens: Tensor | slice
        if len(groups) == 1 and (length == 1 or num_rows == 1):
            group = sorted(group)
            tokens = slice(0, layout.cu_seqlens[-1])
        else:
            tokens = (
                (starts[group].unsqueeze(1) + torch.arange(length)).flatten().to(device)
            )
        chosen = torch.tensor(group, device=device)
        table = layout.block_tables_RN[chosen, :width]
        heads = torch.arange(num_kv_heads, device=device)
        key_blocks = (
            table[:, None, :] * (2 * num_kv_heads) + heads[None, :, None]
        ).flatten()
        kv_lengths = layout.kv_lengths_R[chosen]
        result.append(
            _Rows(
                tokens,
                len(group),
                length,
                key_blocks,
                {},
                kv_lengths,
                kv_lengths - length,
            )
        )
    return result


def _mask(
    rows: _Rows, num_keys: int, window: int, dtype: torch.dtype, group: int
) -> Tensor:
    """Additive mask [n, 1, group L, num_keys]."""
    device = rows.kv_lengths.device
    query = (
        rows.query_starts[:, None, None]
        + torch.arange(rows.length, device=device)[None, :, None]
    )
    key = torch.arange(num_keys, device=device)[None, None, :]
    sees = key <= query
    if window:
        sees = sees & (query - key < window)
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(
        ~sees, -torch.inf
    )
    return (
        mask.unsqueeze(1)
        .expand(-1, group, -1, -1)
        .reshape(len(mask), 1, group * rows.length, num_keys)
    )
