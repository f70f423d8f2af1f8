"""Attention over packed segments with shared prompts: a prompt's keys serve its whole group.

Shapes: q [T, H, E], k and v [T, K, E], out [T, H, E]; H a multiple of K. Segment s is a range of T;
its query i sees all keys of its parent segment (its prompt, P tokens, if it has one) and its own
keys up to i. In one coordinate for both: distance = i + base - j, with base = P for the parent's
keys and 0 for its own; a key is seen where distance >= 0 and, with a window, distance < window.

Forward, one program a query tile and head: an online softmax in base 2 over the parent's keys, then
the segment's own, in that order; out and lse = log2 sum 2^(s log2 e) [H, T] are kept. Backward:
delta = rowsum(dout out), p = 2^(s - lse), ds = p (dp - delta), dq = ds k, dk = ds^T q,
dv = p^T dout. dq goes over the same two ranges. For dk and dv a unit is (key tile, range of
queries): a prompt's tile has one for itself and one for each child; their float32 parts are added
in that order, so there are no atomics and the same call gives the same bits. Query heads of one key
head are summed inside a unit.

FLOP forward: 4 H E pairs of query and key, backward 2.5 times that. Bytes: each tile of queries
reads the keys and values it sees once. Which tiles there are is planned once a batch on the host.
arXiv 2205.14135, 2307.08691; shared prompts arXiv 2506.05433.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.kernels import dot, jit, rounded, tl, triton, uses_triton
from sparring.kernels.attention_plan import SharedPlan, tile_of
from sparring.kernels.split_attention import split_attention_packed
from sparring.kernels.splits import LOG2_E, rounded_and_wide, whole_level

__all__ = ["shared_attention", "shared_attention_reference", "shared_attention_triton"]


def shared_attention_reference(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, plan: SharedPlan, *, window: int = 0
) -> Tensor:
    """Attention output [T, H, E], segment by segment; differentiable; at least float32 inside.

    window > 0: each token sees itself and the window - 1 tokens before it.
    """
    wide = torch.float64 if q_THE.dtype == torch.float64 else torch.float32
    repeat = q_THE.shape[1] // k_TKE.shape[1]
    bounds = list(zip(plan.cu_seqlens, plan.cu_seqlens[1:], strict=False))
    outputs = []
    for (start, stop), parent in zip(bounds, plan.parents, strict=True):
        first, last = bounds[parent] if parent >= 0 else (start, start)
        rows = [*range(first, last), *range(start, stop)]
        q = q_THE[start:stop].to(wide)
        k = k_TKE[rows].to(wide).repeat_interleave(repeat, 1)
        v = v_TKE[rows].to(wide).repeat_interleave(repeat, 1)
        scores = torch.einsum("ihe,jhe->hij", q, k) / math.sqrt(q.shape[-1])
        queries = torch.arange(last - first, len(rows), device=q.device)
        distance = queries[:, None] - torch.arange(len(rows), device=q.device)
        seen = distance >= 0
        if window:
            seen = seen & (distance < window)
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hij,jhe->ihe", probs, v).to(q_THE.dtype))
    return torch.cat(outputs)


@jit
def _attend_range(
    acc, peak, total, q, k_ptr, v_ptr, stride_kt, stride_vt, rows, base, low, high, num_keys,
    scale, window, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys low..high of one range; MASKED where a tile may be seen in part."""
    columns = tl.arange(0, BLOCK_E)
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        at_k = k_ptr + keys[:, None] * stride_kt + columns[None, :]
        at_v = v_ptr + keys[:, None] * stride_vt + columns[None, :]
        if MASKED:
            inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
            k = tl.load(at_k, mask=inside, other=0.0)
            v = tl.load(at_v, mask=inside, other=0.0)
        elif E == BLOCK_E:
            k = tl.load(at_k)
            v = tl.load(at_v)
        else:
            inside = (keys >= 0)[:, None] & (columns < E)[None, :]
            k = tl.load(at_k, mask=inside, other=0.0)
            v = tl.load(at_v, mask=inside, other=0.0)
        s = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
        if MASKED:
            distance = rows[:, None] + base - keys[None, :]
            seen = (distance >= 0) & (keys < num_keys)[None, :]
            if HAS_WINDOW:
                seen = seen & (distance < window)
            s = tl.where(seen, s, -float("inf"))
        above = tl.maximum(peak, whole_level(tl.max(s, axis=1) * scale))
        level = tl.where(above == -float("inf"), 0.0, above)
        p = tl.exp2(tl.fma(s, scale, -level[:, None]))
        p, wide = rounded_and_wide(p, v_ptr.dtype.element_ty)
        shrink = tl.exp2(peak - level)
        total = total * shrink + tl.sum(wide, axis=1)
        acc = dot(p, v, acc * shrink[:, None])
        peak = above
    return acc, peak, total


@jit
def _bounds(first_row, base, num_keys, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Keys of a range that a tile of queries sees: from, up to where in whole tiles, and to."""
    high = tl.minimum(num_keys, first_row + BLOCK_M + base)
    if HAS_WINDOW:
        low = tl.maximum(0, first_row + base - window + 1) // BLOCK_N * BLOCK_N
        whole = low
    else:
        low = 0
        whole = tl.minimum(num_keys, first_row + base + 1) // BLOCK_N * BLOCK_N
    return low, whole, high


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, num_tokens, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, scale, window,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    kv_head = head // GROUP
    tiles_ptr += tl.program_id(1) * 5
    start = tl.load(tiles_ptr).to(tl.int64)
    length = tl.load(tiles_ptr + 1)
    first_row = tl.load(tiles_ptr + 2)
    parent_start = tl.load(tiles_ptr + 3).to(tl.int64)
    parent_length = tl.load(tiles_ptr + 4)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (rows < length)[:, None] & (columns < E)[None, :]
    at = (start + rows)[:, None] * stride_qt + head * stride_qh + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in tl.static_range(2):
        if part == 0:
            key_start, num_keys, base = parent_start, parent_length, parent_length
        else:
            key_start, num_keys, base = start, length, 0
        k_at = k_ptr + key_start * stride_kt + kv_head * stride_kh
        v_at = v_ptr + key_start * stride_vt + kv_head * stride_vh
        low, whole, high = _bounds(first_row, base, num_keys, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
        acc, peak, total = _attend_range(
            acc, peak, total, q, k_at, v_at, stride_kt, stride_vt, rows, base, low, whole, num_keys,
            scale, window, E, BLOCK_E, BLOCK_N, False, HAS_WINDOW,
        )  # fmt: skip
        acc, peak, total = _attend_range(
            acc, peak, total, q, k_at, v_at, stride_kt, stride_vt, rows, base, whole, high,
            num_keys, scale, window, E, BLOCK_E, BLOCK_N, True, HAS_WINDOW,
        )  # fmt: skip
    num_heads = tl.num_programs(0)
    to = ((start + rows)[:, None] * num_heads + head) * E + columns[None, :]
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + to, rounded(out, out_ptr.dtype.element_ty), mask=inside)
    at_lse = lse_ptr + head.to(tl.int64) * num_tokens + start + rows
    tl.store(at_lse, peak + tl.log2(tl.where(total == 0.0, 1.0, total)), mask=rows < length)


@jit
def _delta_kernel(out_ptr, dout_ptr, delta_ptr, num_tokens, E: tl.constexpr, BLOCK_E: tl.constexpr,
                  BLOCK_M: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (rows < num_tokens)[:, None] & (columns < E)[None, :]
    at = (rows[:, None] * tl.num_programs(1) + head) * E + columns[None, :]
    out = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(tl.float32)
    to = delta_ptr + head.to(tl.int64) * num_tokens + rows
    tl.store(to, tl.sum(out * dout, axis=1), mask=rows < num_tokens)


@jit
def _dq_range(
    dq, q, dout, lse, delta, k_ptr, v_ptr, stride_kt, stride_vt, rows, base, low, high, num_keys,
    scale, window, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_E)
    zeros = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
        k = tl.load(k_ptr + keys[:, None] * stride_kt + columns[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + keys[:, None] * stride_vt + columns[None, :], mask=inside, other=0.0)
        p = tl.exp2(dot(q, tl.trans(k), zeros) * scale - lse[:, None])
        if MASKED:
            distance = rows[:, None] + base - keys[None, :]
            seen = (distance >= 0) & (keys < num_keys)[None, :]
            if HAS_WINDOW:
                seen = seen & (distance < window)
            p = tl.where(seen, p, 0.0)
        ds = p * (dot(dout, tl.trans(v), zeros) - delta[:, None])
        dq = dot(rounded(ds, k_ptr.dtype.element_ty), k, dq)
    return dq


@jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, tiles_ptr, num_tokens,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale, factor, window,
    GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    kv_head = head // GROUP
    tiles_ptr += tl.program_id(1) * 5
    start = tl.load(tiles_ptr).to(tl.int64)
    length = tl.load(tiles_ptr + 1)
    first_row = tl.load(tiles_ptr + 2)
    parent_start = tl.load(tiles_ptr + 3).to(tl.int64)
    parent_length = tl.load(tiles_ptr + 4)
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (rows < length)[:, None] & (columns < E)[None, :]
    at = (start + rows)[:, None] * stride_qt + head * stride_qh + columns[None, :]
    q = tl.load(q_ptr + at, mask=inside, other=0.0)
    flat = ((start + rows)[:, None] * tl.num_programs(0) + head) * E + columns[None, :]
    dout = tl.load(dout_ptr + flat, mask=inside, other=0.0)
    row_at = head.to(tl.int64) * num_tokens + start + rows
    lse = tl.load(lse_ptr + row_at, mask=rows < length, other=float("inf"))
    delta = tl.load(delta_ptr + row_at, mask=rows < length, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for part in tl.static_range(2):
        if part == 0:
            key_start, num_keys, base = parent_start, parent_length, parent_length
        else:
            key_start, num_keys, base = start, length, 0
        k_at = k_ptr + key_start * stride_kt + kv_head * stride_kh
        v_at = v_ptr + key_start * stride_vt + kv_head * stride_vh
        low, whole, high = _bounds(first_row, base, num_keys, window, BLOCK_M, BLOCK_N, HAS_WINDOW)
        dq = _dq_range(
            dq, q, dout, lse, delta, k_at, v_at, stride_kt, stride_vt, rows, base, low, whole,
            num_keys, scale, window, E, BLOCK_E, BLOCK_N, False, HAS_WINDOW,
        )  # fmt: skip
        dq = _dq_range(
            dq, q, dout, lse, delta, k_at, v_at, stride_kt, stride_vt, rows, base, whole, high,
            num_keys, scale, window, E, BLOCK_E, BLOCK_N, True, HAS_WINDOW,
        )  # fmt: skip
    tl.store(dq_ptr + flat, rounded(dq * factor, dq_ptr.dtype.element_ty), mask=inside)


@jit
def _dkv_range(
    dk, dv, k, v, q_ptr, dout_ptr, lse_ptr, delta_ptr, stride_qt, stride_ot, low, high, num_rows,
    base, scale, window, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_E)
    zeros = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
    for start in range(low, high, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = (rows < num_rows)[:, None] & (columns < E)[None, :]
        q = tl.load(q_ptr + rows[:, None] * stride_qt + columns[None, :], mask=inside, other=0.0)
        dout_at = dout_ptr + rows[:, None] * stride_ot + columns[None, :]
        dout = tl.load(dout_at, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < num_rows, other=0.0)
        p = tl.exp2(dot(k, tl.trans(q), zeros) * scale - lse[None, :])
        if MASKED:
            distance = rows[None, :] + base - tl.arange(0, k.shape[0])[:, None]
            seen = distance >= 0
            if HAS_WINDOW:
                seen = seen & (distance < window)
            p = tl.where(seen, p, 0.0)
        dv = dot(rounded(p, q_ptr.dtype.element_ty), dout, dv)
        ds = p * (dot(v, tl.trans(dout), zeros) - delta[None, :])
        dk = dot(rounded(ds, q_ptr.dtype.element_ty), q, dk)
    return dk, dv


@jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, parts_ptr, units_ptr,
    num_tokens, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, scale, factor,
    window, GROUP: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    units_ptr += tl.program_id(1) * 6
    key_start = tl.load(units_ptr).to(tl.int64)
    num_keys = tl.load(units_ptr + 1)
    row_start = tl.load(units_ptr + 2).to(tl.int64)
    num_rows = tl.load(units_ptr + 3)
    base = tl.load(units_ptr + 4)
    slot = tl.load(units_ptr + 5)
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_E)
    inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
    key_rows = (key_start + keys)[:, None]
    at_k = k_ptr + key_rows * stride_kt + kv_head * stride_kh + columns[None, :]
    at_v = v_ptr + key_rows * stride_vt + kv_head * stride_vh + columns[None, :]
    k = tl.load(at_k, mask=inside, other=0.0)
    v = tl.load(at_v, mask=inside, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    low = tl.maximum(0, -base) // BLOCK_M * BLOCK_M
    high = num_rows
    edge = tl.minimum(
        high, tl.maximum(low, (num_keys - 1 - base + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    )
    if HAS_WINDOW:
        high = tl.minimum(high, tl.maximum(0, window - base + BLOCK_N))
        edge = high
    stride_ot = num_kv_heads * GROUP * E
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_at = q_ptr + row_start * stride_qt + head * stride_qh
        dout_at = dout_ptr + row_start * stride_ot + head * E
        row_at = head.to(tl.int64) * num_tokens + row_start
        dk, dv = _dkv_range(
            dk, dv, k, v, q_at, dout_at, lse_ptr + row_at, delta_ptr + row_at, stride_qt, stride_ot,
            low, edge, num_rows, base, scale, window, E, BLOCK_E, BLOCK_M, True, HAS_WINDOW,
        )  # fmt: skip
        dk, dv = _dkv_range(
            dk, dv, k, v, q_at, dout_at, lse_ptr + row_at, delta_ptr + row_at, stride_qt, stride_ot,
            edge, high, num_rows, base, scale, window, E, BLOCK_E, BLOCK_M, False, HAS_WINDOW,
        )  # fmt: skip
    dk *= factor
    if slot < 0:
        to = (key_rows * num_kv_heads + kv_head) * E + columns[None, :]
        tl.store(dk_ptr + to, rounded(dk, dk_ptr.dtype.element_ty), mask=inside)
        tl.store(dv_ptr + to, rounded(dv, dv_ptr.dtype.element_ty), mask=inside)
    else:
        first = (slot.to(tl.int64) * num_kv_heads + kv_head) * 2 * BLOCK_N * BLOCK_E
        part_at = parts_ptr + first + keys[:, None] * BLOCK_E + columns[None, :]
        tl.store(part_at, dk)
        tl.store(part_at + BLOCK_N * BLOCK_E, dv)


@jit
def _sum_kernel(
    parts_ptr, dk_ptr, dv_ptr, sums_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Parts of a prompt's key tile, added in the order of their units."""
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    sums_ptr += tl.program_id(1) * 4
    key_start = tl.load(sums_ptr).to(tl.int64)
    num_keys = tl.load(sums_ptr + 1)
    first = tl.load(sums_ptr + 2).to(tl.int64)
    count = tl.load(sums_ptr + 3)
    keys = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_E)
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for i in range(count):
        at = ((first + i) * num_kv_heads + kv_head) * 2 * BLOCK_N * BLOCK_E
        at = parts_ptr + at + keys[:, None] * BLOCK_E + columns[None, :]
        dk += tl.load(at)
        dv += tl.load(at + BLOCK_N * BLOCK_E)
    inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
    to = ((key_start + keys)[:, None] * num_kv_heads + kv_head) * E + columns[None, :]
    tl.store(dk_ptr + to, rounded(dk, dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + to, rounded(dv, dv_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class _Shape:
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    size: int

    def constants(self, window: int) -> dict[str, Any]:
        return {
            "GROUP": self.num_heads // self.num_kv_heads,
            "E": self.size,
            "BLOCK_E": max(16, triton.next_power_of_2(self.size)),
            "HAS_WINDOW": window > 0,
            "enable_fp_fusion": True,
        }


def _strided(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _SharedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: SharedPlan, window: int) -> Tensor:
        out, lse = shared_attention_kept(q, k, v, plan, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.window = plan, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        kept = ctx.saved_tensors
        return *shared_attention_backward(*kept, grads[0], ctx.plan, ctx.window), None, None


def shared_attention_kept(
    q: Tensor, k: Tensor, v: Tensor, plan: SharedPlan, window: int
) -> tuple[Tensor, Tensor]:
    """Output [T, H, E] and log-sum-exps [H, T] by kernels, without a graph: all that the backward
    pass needs beside q, k and v.
    """
    q, k, v = _strided(q), _strided(k), _strided(v)
    if plan.bitwise:
        return split_attention_packed(q, k, v, plan, window)
    shape = _shape_of(q, k)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    tile = tile_of(plan.capability, shape.size, "forward")
    tiles = plan.query_tiles(tile["BLOCK_M"])
    scale = LOG2_E / math.sqrt(shape.size)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    if len(tiles):
        _forward_kernel[(shape.num_heads, len(tiles))](
            q, k, v, out, lse, tiles, shape.num_tokens, *strides, scale, window,
            **shape.constants(window), **tile,
        )  # fmt: skip
    return out, lse


def _shape_of(q: Tensor, k: Tensor) -> _Shape:
    return _Shape(q.shape[0], q.shape[1], k.shape[1], q.shape[2])


def shared_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, plan: SharedPlan,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from what `shared_attention_kept` gave."""
    q, k, v, dout = _strided(q), _strided(k), _strided(v), dout.contiguous()
    shape = _shape_of(q, k)
    constants = shape.constants(window)
    delta = torch.empty_like(lse)
    sizes = {"E": shape.size, "BLOCK_E": constants["BLOCK_E"]}
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not shape.num_tokens:
        return dq, dk, dv
    _delta_kernel[(triton.cdiv(shape.num_tokens, 64), shape.num_heads)](
        out, dout, delta, shape.num_tokens, **sizes, BLOCK_M=64, num_warps=4, enable_fp_fusion=True
    )
    scale, factor = LOG2_E / math.sqrt(shape.size), 1.0 / math.sqrt(shape.size)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    tile = tile_of(plan.capability, shape.size, "dq")
    tiles = plan.query_tiles(tile["BLOCK_M"])
    _dq_kernel[(shape.num_heads, len(tiles))](
        q, k, v, dout, lse, delta, dq, tiles, shape.num_tokens, *strides, scale, factor, window,
        **constants, **tile,
    )  # fmt: skip
    tile = tile_of(plan.capability, shape.size, "dkv")
    units, sums, num_slots = plan.key_units(tile["BLOCK_N"])
    part_shape = (max(1, num_slots), shape.num_kv_heads, 2, tile["BLOCK_N"], constants["BLOCK_E"])
    parts = torch.empty(part_shape if num_slots else (1,), dtype=torch.float32, device=q.device)
    _dkv_kernel[(shape.num_kv_heads, len(units))](
        q, k, v, dout, lse, delta, dk, dv, parts, units, shape.num_tokens, *strides, scale, factor,
        window, **constants, **tile,
    )  # fmt: skip
    if len(sums):
        _sum_kernel[(shape.num_kv_heads, len(sums))](
            parts,
            dk,
            dv,
            sums,
            **sizes,
            BLOCK_N=tile["BLOCK_N"],
            num_warps=8,
            enable_fp_fusion=True,
        )
    return dq, dk, dv


def shared_attention_triton(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, plan: SharedPlan, *, window: int = 0
) -> Tensor:
    """`shared_attention_reference` by kernels; q, k and v may be views with strides."""
    out: Tensor = _SharedAttention.apply(q_THE, k_TKE, v_TKE, plan, window)
    return out


def shared_attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, plan: SharedPlan, *, window: int = 0
) -> Tensor:
    """Attention output [T, H, E] of packed segments with shared prompts; differentiable.

    window > 0: each token sees itself and the window - 1 tokens before it.
    """
    if uses_triton(q_THE) and q_THE.dtype != torch.float32 and plan.capability.tensor_dots:
        return shared_attention_triton(q_THE, k_TKE, v_TKE, plan, window=window)
    return shared_attention_reference(q_THE, k_TKE, v_TKE, plan, window=window)
