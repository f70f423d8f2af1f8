"""Attention over packed segments with shared prompts, differentiable.

Segments of similar length are gathered into blocks [S, L], their keys into [S, P + L] (the parent's
P tokens first), and go through scaled_dot_product_attention; the results are put back in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparring.models.layout import PackedLayout

MAX_SCORES = 1 << 24
"""Query-key pairs of one block of segments; a single longer segment goes through in slices of queries."""


@dataclass(slots=True)
class _Bucket:
    """Segments of similar shape: S of them, padded to L queries and P parent keys."""

    queries: slice
    keys: slice
    num_segments: int
    length: int
    parent_length: int
    parent_lengths_S: Tensor
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)


class PackedPlan:
    """Index tensors that lay a PackedLayout into dense blocks and back."""

    def __init__(self, layout: PackedLayout, device: torch.device) -> None:
        bounds = torch.tensor(layout.cu_seqlens)
        starts, lengths = bounds[:-1], bounds.diff()
        parents = torch.tensor(layout.parents)
        has_parent = parents >= 0
        parent_starts = torch.where(has_parent, starts[parents], 0)
        parent_lengths = torch.where(has_parent, lengths[parents], 0)
        order = sorted(
            range(layout.num_segments),
            key=lambda s: (layout.parents[s] >= 0, int(lengths[s])),
        )
        groups = _bucket_segments(order, lengths.tolist(), parent_lengths.tolist())
        self.num_tokens = layout.cu_seqlens[-1]
        self.buckets: list[_Bucket] = []
        query_index: list[Tensor] = []
        key_index: list[Tensor] = []
        query_valid: list[Tensor] = []
        key_valid: list[Tensor] = []
        num_queries = num_keys = 0
        for members in groups:
            length, parent_length = (
                int(lengths[members].max()),
                int(parent_lengths[members].max()),
            )
            own, own_valid = _ranges(starts[members], lengths[members], length)
            theirs, their_valid = _ranges(
                parent_starts[members], parent_lengths[members], parent_length
            )
            query_index.append(own.flatten())
            query_valid.append(own_valid.flatten())
            key_index.append(torch.cat([theirs, own], 1).flatten())
            key_valid.append(torch.cat([their_valid, own_valid], 1).flatten())
            bucket = _Bucket(
                slice(num_queries, num_queries + own.numel()),
                slice(num_keys, num_keys + key_index[-1].numel()),
                len(members),
                length,
                parent_length,
                parent_lengths[members].to(device),
            )
            num_queries, num_keys = bucket.queries.stop, bucket.keys.stop
            self.buckets.append(bucket)
        queries, keys = torch.cat(query_index), torch.cat(key_index)
        positions = torch.cat(query_valid).nonzero().squeeze(1)
        self.query_index = queries.to(device)
        self.key_index = keys.to(device)
        self.query_position = (
            torch.empty_like(positions)
            .scatter_(0, queries[positions], positions)
            .to(device)
        )
        uses = torch.cat(key_valid).nonzero().squeeze(1)
        tokens, by_token = keys[uses].sort(stable=True)
        self.key_uses = uses[by_token].to(device)
        counts = torch.bincount(tokens, minlength=self.num_tokens)
        self.key_use_offsets = F.pad(counts.cumsum(0), (1, 0)).to(device)

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, layer: int, window: int
    ) -> Tensor:
        """Attention output [T, H, E]; `window` > 0: each token sees itself and the window - 1 tokens before."""
        num_heads, head_size = q_THE.shape[1:]
        q_pad: Tensor = _Spread.apply(
            q_THE, self.query_index, self.query_position, None
        )  # type: ignore[no-untyped-call]
        k_pad: Tensor = _Spread.apply(
            k_TKE, self.key_index, self.key_uses, self.key_use_offsets
        )  # type: ignore[no-untyped-call]
        v_pad: Tensor = _Spread.apply(
            v_TKE, self.key_index, self.key_uses, self.key_use_offsets
        )  # type: ignore[no-untyped-call]
        outputs = []
        for bucket in self.buckets:
            q = q_pad[bucket.queries].view(
                bucket.num_segments, bucket.length, num_heads, head_size
            )
            shape = (
                bucket.num_segments,
                bucket.parent_length + bucket.length,
                -1,
                head_size,
            )
            out = _attend_bucket(
                bucket,
                q.transpose(1, 2),
                k_pad[bucket.keys].view(shape).transpose(1, 2),
                v_pad[bucket.keys].view(shape).transpose(1, 2),
                window,
            )
            outputs.append(out.transpose(1, 2).reshape(-1, num_heads, head_size))
        gathered: Tensor = _Collect.apply(torch.cat(outputs), self.query_position)  # type: ignore[no-untyped-call]
        return gathered


def _bucket_segments(
    order: list[int], lengths: list[int], parent_lengths: list[int]
) -> list[list[int]]:
    """Cut a list of segments, ascending in length, where padding or the block would grow too much."""
    groups: list[list[int]] = []
    shortest = widest = 0
    for segment in order:
        length, parent_length = lengths[segment], parent_lengths[segment]
        if groups:
            group = groups[-1]
            width = max(widest, parent_length)
            fits = (len(group) + 1) * length * (width + length) <= MAX_SCORES
            alike = length <= max(8, shortest * 1.25) and (parent_length > 0) == (
                widest > 0
            )
            if fits and alike:
                group.append(segment)
                widest = width
                continue
        groups.append([segment])
        shortest, widest = length, parent_length
    return groups


def _ranges(starts_S: Tensor, lengths_S: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Token indices [S, width] of ranges of unequal length, the last one repeated, and which are real."""
    offsets = torch.arange(width)
    valid = offsets < lengths_S.unsqueeze(1)
    index = starts_S.unsqueeze(1) + torch.minimum(
        offsets, (lengths_S - 1).clamp_min(0).unsqueeze(1)
    )
    return index, valid


def _attend_bucket(
    bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, window: int
) -> Tensor:
    """q [S, H, L, E] with k, v [S, K, P + L, E] -> [S, H, L, E]."""
    length, parent_length = bucket.length, bucket.parent_length
    if window >= parent_length + length:
        window = 0
    if parent_length == 0 and window == 0:
        return _sdpa(q, k, v, None, is_causal=True)
    pairs = bucket.num_segments * length * (parent_length + length)
    if pairs <= MAX_SCORES:
        key = (window, 0)
        if key not in bucket.masks:
            bucket.masks[key] = _mask(bucket, 0, length, window, q.dtype)
        return _sdpa(q, k, v, bucket.masks[key])
    step = max(1, MAX_SCORES // (bucket.num_segments * (parent_length + length)))
    outputs = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        keys = slice(0, parent_length + stop)
        outputs.append(
            checkpoint(
                _attend_slice,
                bucket,
                q[:, :, start:stop],
                k[:, :, keys],
                v[:, :, keys],
                start,
                window,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(outputs, 2)


def _attend_slice(
    bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, start: int, window: int
) -> Tensor:
    return _sdpa(q, k, v, _mask(bucket, start, start + q.shape[2], window, q.dtype))


def _mask(
    bucket: _Bucket, start: int, stop: int, window: int, dtype: torch.dtype
) -> Tensor:
    """Additive mask [S, 1, stop - start, P + stop] of queries start to stop."""
    device = bucket.parent_lengths_S.device
    parent_lengths = bucket.parent_lengths_S[:, None, None]
    query = torch.arange(start, stop, device=device)[:, None]
    own = torch.arange(stop, device=device)[None, :]
    sees_own = own <= query
    parent = torch.arange(bucket.parent_length, device=device)[None, None, :]
    sees_parent = (parent < parent_lengths).expand(-1, stop - start, -1)
    if window:
        sees_own = sees_own & (query - own < window)
        sees_parent = sees_parent & (parent_lengths + query - parent < window)
    sees = torch.cat([sees_parent, sees_own.expand(bucket.num_segments, -1, -1)], 2)
    mask = torch.zeros(sees.shape, dtype=dtype, device=device)
    return mask.masked_fill_(~sees, -torch.inf).unsqueeze(1)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=is_causal,
        enable_gqa=q.shape[1] != k.shape[1],
    )


class _Spread(torch.autograd.Function):
    """x[index] along the first dimension, with a gradient that gathers instead of scattering.

    uses without offsets: the one place where each row went; with offsets [T + 1]: all of them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, index: Tensor, uses: Tensor, offsets: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(uses, offsets)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        uses, offsets = ctx.saved_tensors
        grad = grads[0]
        if offsets is None:
            return grad.index_select(0, uses), None, None, None
        flat = grad.reshape(len(grad), -1)
        summed = F.embedding_bag(
            uses, flat, offsets, mode="sum", include_last_offset=True
        )
        return summed.view(-1, *grad.shape[1:]), None, None, None


class _Collect(torch.autograd.Function):
    """x[position] along the first dimension, where every position occurs once at most."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor) -> Tensor:
        ctx.save_for_backward(position)
        ctx.num_rows = len(x)
        return x.index_select(0, position)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (position,) = ctx.saved_tensors
        grad = grads[0]
        spread = grad.new_zeros(ctx.num_rows, *grad.shape[1:])
        return spread.index_copy_(0, position, grad), None
