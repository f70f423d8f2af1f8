"""Attention over packed segments with shared prompts, differentiable.

Segments of similar length are gathered into blocks [S, L], their keys into [S, P + L] (the parent's
P tokens first), and go through scaled_dot_product_attention; the results are put back in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sparring.layout import PackedLayout

Graph = tuple[Tensor, tuple[Tensor, ...]]
"""An output with its graph and the leaves that it begins at."""

MAX_SCORES = 1 << 24
"""Query-key pairs of one block of segments; a single longer segment goes through in slices of
queries.
"""


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Segments of similar shape: S of them, padded to L queries and P parent keys."""

    num_segments: int
    length: int
    parent_length: int
    parent_lengths_S: Tensor
    masks: dict[int, Tensor] = field(default_factory=dict)


class PackedPlan:
    """Index tensors that lay a PackedLayout into dense blocks and back.

    query_index, key_index: token of every row of the query and key blocks (padding repeats a real
    token). query_position [T]: row of the query blocks where each token went. key_uses, offsets
    [T + 1]: rows of the key blocks that hold each token, which is several times for a parent's.
    """

    def __init__(self, layout: PackedLayout, device: torch.device) -> None:
        bounds = torch.tensor(layout.cu_seqlens)
        starts, lengths = bounds[:-1], bounds.diff()
        parents = torch.tensor(layout.parents)
        parent_starts = torch.where(parents >= 0, starts[parents], 0)
        parent_lengths = torch.where(parents >= 0, lengths[parents], 0)
        self.buckets: list[_Bucket] = []
        query_index, query_valid, key_index, key_valid = [], [], [], []
        for members in _bucket_segments(lengths.tolist(), parent_lengths.tolist()):
            length = int(lengths[members].max())
            parent_length = int(parent_lengths[members].max())
            own, own_valid = _ranges(starts[members], lengths[members], length)
            theirs, their_valid = _ranges(
                parent_starts[members], parent_lengths[members], parent_length
            )
            query_index.append(own.flatten())
            query_valid.append(own_valid.flatten())
            key_index.append(torch.cat([theirs, own], 1).flatten())
            key_valid.append(torch.cat([their_valid, own_valid], 1).flatten())
            lengths_S = parent_lengths[members].to(device)
            self.buckets.append(_Bucket(len(members), length, parent_length, lengths_S))
        self.query_sizes = [len(index) for index in query_index]
        self.key_sizes = [len(index) for index in key_index]
        queries, keys = torch.cat(query_index), torch.cat(key_index)
        rows = torch.cat(query_valid).nonzero().squeeze(1)
        position_T = torch.empty_like(rows).scatter_(0, queries[rows], rows)
        uses = torch.cat(key_valid).nonzero().squeeze(1)
        tokens, by_token = keys[uses].sort(stable=True)
        counts_T = torch.bincount(tokens, minlength=layout.cu_seqlens[-1])
        self.query_index, self.key_index = queries.to(device), keys.to(device)
        self.query_position = position_T.to(device)
        self.key_uses = uses[by_token].to(device)
        self.key_use_offsets = F.pad(counts_T.cumsum(0), (1, 0)).to(device)

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, _layer: int, window: int
    ) -> Tensor:
        """Attention output [T, H, E]; `window` > 0: a token sees itself and window - 1 before."""
        num_heads, head_size = q_THE.shape[1:]
        q_pad: Tensor = _Spread.apply(q_THE, self.query_index, self.query_position, None)  # type: ignore[no-untyped-call]
        k_pad: Tensor = _Spread.apply(k_TKE, self.key_index, self.key_uses, self.key_use_offsets)  # type: ignore[no-untyped-call]
        v_pad: Tensor = _Spread.apply(v_TKE, self.key_index, self.key_uses, self.key_use_offsets)  # type: ignore[no-untyped-call]
        outputs = []
        blocks = zip(
            self.buckets,
            torch.split(q_pad, self.query_sizes),
            torch.split(k_pad, self.key_sizes),
            torch.split(v_pad, self.key_sizes),
            strict=True,
        )
        for bucket, q_block, k_block, v_block in blocks:
            q = q_block.view(bucket.num_segments, bucket.length, num_heads, head_size)
            shape = (bucket.num_segments, bucket.parent_length + bucket.length, -1, head_size)
            out = _attend_bucket(
                bucket,
                q.transpose(1, 2),
                k_block.view(shape).transpose(1, 2),
                v_block.view(shape).transpose(1, 2),
                window,
            )
            outputs.append(out.transpose(1, 2).reshape(-1, num_heads, head_size))
        gathered: Tensor = _Collect.apply(torch.cat(outputs), self.query_position)  # type: ignore[no-untyped-call]
        return gathered

    def attend_kept(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int
    ) -> tuple[Tensor, Graph]:
        """Attention's output, and its graph for `attend_backward`."""
        q, k, v = (x.detach().requires_grad_() for x in (q_THE, k_TKE, v_TKE))
        with torch.enable_grad():
            out = self.attend(q, k, v, 0, window)
        return out.detach(), (out, (q, k, v))

    def attend_backward(
        self, _q: Tensor, _k: Tensor, _v: Tensor, _out: Tensor, residue: Graph,
        d_out: Tensor, _window: int,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Gradients of q, k and v from what `attend_kept` gave; nothing is computed again."""
        out, leaves = residue
        return torch.autograd.grad(out, leaves, d_out)


def _bucket_segments(lengths: list[int], parent_lengths: list[int]) -> list[list[int]]:
    """Segments in buckets where padding stays below a third, scores below MAX_SCORES."""

    def parent_class(segment: int) -> int:
        length = parent_lengths[segment]
        return math.ceil(math.log(length, 1.3)) if length else -1

    order = sorted(range(len(lengths)), key=lambda s: (parent_class(s), lengths[s]))
    buckets: list[list[int]] = []
    shortest = widest = 0
    for segment in order:
        length, width = lengths[segment], max(widest, parent_lengths[segment])
        if buckets and parent_class(buckets[-1][0]) == parent_class(segment):
            pairs = (len(buckets[-1]) + 1) * length * (width + length)
            if pairs <= MAX_SCORES and length <= max(8, shortest * 1.3):
                buckets[-1].append(segment)
                widest = width
                continue
        buckets.append([segment])
        shortest, widest = length, parent_lengths[segment]
    return buckets


def _ranges(starts_S: Tensor, lengths_S: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Token indices [S, width] of ranges, the last one repeated, and which are real."""
    offsets = torch.arange(width)
    valid = offsets < lengths_S.unsqueeze(1)
    index = starts_S.unsqueeze(1) + torch.minimum(
        offsets, (lengths_S - 1).clamp_min(0).unsqueeze(1)
    )
    return index, valid


def _attend_bucket(bucket: _Bucket, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """q [S, H, L, E] with k, v [S, K, P + L, E] -> [S, H, L, E]."""
    length, parent_length = bucket.length, bucket.parent_length
    if window >= parent_length + length:
        window = 0
    if parent_length == 0 and window == 0:
        return _sdpa(q, k, v, None, is_causal=True)
    pairs = bucket.num_segments * length * (parent_length + length)
    if pairs <= MAX_SCORES:
        if window not in bucket.masks:
            bucket.masks[window] = _mask(bucket, 0, length, window, q.dtype)
        return _sdpa(q, k, v, bucket.masks[window])
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


def _mask(bucket: _Bucket, start: int, stop: int, window: int, dtype: torch.dtype) -> Tensor:
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
    def forward(ctx: Any, x: Tensor, index: Tensor, uses: Tensor, offsets: Tensor | None) -> Tensor:
        ctx.save_for_backward(uses, offsets)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        uses, offsets = ctx.saved_tensors
        grad = grads[0]
        if offsets is None:
            return grad.index_select(0, uses), None, None, None
        flat = grad.reshape(len(grad), -1)
        summed = F.embedding_bag(uses, flat, offsets, mode="sum", include_last_offset=True)
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
