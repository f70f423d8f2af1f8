"""Output head and draw in one launch: the logits never lie in memory.

    z = x W^T                    [T, V], float32 sums, a tile at a time in registers
    token = argmax_v of z_v / temperature - log E_v,     logprob = z_token / temperature - lse

x [T, D], W [V, D] in 16 bits. What is drawn, its noise and its log-probability are those of
kernels/sampling.py, over tiles of BLOCK_V entries: each gives its maximum, its sum of exponentials,
its best entry of the race with that entry's score and logit; a second launch combines the tiles of
a row in one order. A draw from logits in memory reads 4 V bytes a row that the head wrote before:
with many rows that is as much work as the product itself. Tiles of x and W come by bulk copies
(sm_90); two programs share a multiprocessor, so that one multiplies while another draws.

Bytes: W once for each tile of BLOCK_T rows, 20 T V / BLOCK_V for the tiles; FLOP 2 T V D. A row's
result does not depend on the others. Not here: top-k, top-p and min-p, which need all logits of a
row before one is drawn; bitwise mode, whose trainer sums logits in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import Capability, dot, jit, tl, triton, uses_triton
from sparring.kernels.philox import exp2_fast, exponential, philox_words
from sparring.kernels.sampling import DrawRules, _quotient, draw_tokens_reference

__all__ = ["HeadForm", "head_draw", "head_form"]

BLOCK_K = 64
COMBINED_ROWS, COMBINED_TILES = 4, 256
"""Rows of a program that combines tiles, and tiles that it reads at a time."""


@dataclass(frozen=True, slots=True)
class HeadForm:
    """Vocabulary entries and rows that a program computes, warps and stages of the queue."""

    block_v: int
    block_t: int
    num_warps: int = 8
    num_stages: int = 3
    max_registers: int = 0
    pieces: int = 4


FORMS: dict[int, tuple[tuple[int, HeadForm], ...]] = {}
"""By architecture: (fewest rows, form), the last that fits is taken, as measured
(benchmarks/head_draw.py); elsewhere head and draw are two launches with the logits between them.
"""


def head_form(capability: Capability, num_rows: int) -> HeadForm | None:
    """The form for a number of rows; None: the library's head and kernels/sampling.py."""
    found = None
    for fewest, form in FORMS.get(capability.arch, ()):
        if num_rows >= fewest:
            found = form
    return found


@jit
def _piece(z, i: tl.constexpr, PIECES: tl.constexpr):
    """The i-th of some pieces of a tile's columns; no value changes its thread."""
    rows: tl.constexpr = z.shape[0]
    half: tl.constexpr = z.shape[1] // 2
    if PIECES == 1:
        return z
    else:  # noqa: RET505 - Triton wants one type a branch
        left, right = tl.split(z.reshape(rows, 2, half).permute(0, 2, 1))
        if i < PIECES // 2:
            return _piece(left, i, PIECES // 2)
        else:  # noqa: RET505
            return _piece(right, i - PIECES // 2, PIECES // 2)


@jit
def _race(
    z, v0, base, scale, is_greedy, is_early, held_ptr, position, id0, id1, key0, key1, V,
    HELD: tl.constexpr,
):  # fmt: skip
    """Of some columns from v0 on: sum of exponentials, best score, its entry and its logit."""
    rows: tl.constexpr = z.shape[0]
    columns: tl.constexpr = z.shape[1]
    v = v0 + tl.arange(0, columns)
    e = exp2_fast((z - base[:, None]) * scale[:, None])
    total = tl.sum(e, axis=1)
    for i in range(HELD):
        held = is_early[:, None] & (v == tl.load(held_ptr + i).to(tl.int32))[None, :]
        e = tl.where(held, 0.0, e)
        z = tl.where(held, -float("inf"), z)
    quads = v0 // 4 + tl.arange(0, columns // 4)
    counters = quads[None, :] + tl.zeros([rows, 1], tl.int32)
    w0, w1, w2, w3 = philox_words(
        counters, position[:, None], id0[:, None], id1[:, None], key0, key1
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    scores = tl.where(is_greedy[:, None], z, _quotient(e, exponential(words)))
    peak = tl.max(scores, axis=1)
    best = tl.min(tl.where(scores == peak[:, None], v[None, :], V - 1), axis=1)
    chosen = tl.max(tl.where(v[None, :] == best[:, None], z, -float("inf")), axis=1)
    return total, peak, best, chosen


@jit
def _better(first, second):
    """Of two races over neighbouring columns: the sums together, and the better entry."""
    total, peak, best, chosen = first
    other_total, other_peak, other_best, other_chosen = second
    is_ahead = other_peak > peak
    best = tl.where(is_ahead, other_best, best)
    chosen = tl.where(is_ahead, other_chosen, chosen)
    return total + other_total, tl.maximum(peak, other_peak), best, chosen


@jit(do_not_specialize=["num_rows", "num_steps"])
def _tiles_kernel(
    x_desc, w_desc, parts_ptr, best_ptr, inverse_ptr, seed_ptr, ids_ptr, draws_ptr, held_ptr,
    min_draws_ptr, num_rows, num_steps,
    V: tl.constexpr, TILES: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """One tile of logits [T, V], and what the draw needs of it, piece by piece: that is done in
    few registers.
    """
    t0 = tl.program_id(0) * BLOCK_T
    tile = tl.program_id(1)
    v0 = tile * BLOCK_V
    z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for at in tl.range(0, num_steps, num_stages=STAGES):
        x = x_desc.load([t0, at * BLOCK_K])
        w = w_desc.load([v0, at * BLOCK_K])
        z = dot(x, w.T, z)
    t = t0 + tl.arange(0, BLOCK_T)
    row = tl.minimum(t, num_rows - 1)
    inverse = tl.load(inverse_ptr + row)
    is_greedy = inverse == 0.0
    if V % BLOCK_V:
        z = tl.where((v0 + tl.arange(0, BLOCK_V) < V)[None, :], z, -float("inf"))
    top = tl.max(z, axis=1)
    base = tl.where(top == -float("inf"), 0.0, top)
    scale = tl.where(is_greedy, 1.0, inverse) * 1.4426950408889634  # exp(x) = 2^(x log2 e)
    draw = tl.load(draws_ptr + row)
    is_early = draw < tl.load(min_draws_ptr + row)
    position = draw.to(tl.uint32)
    id0 = tl.load(ids_ptr + 2 * row).to(tl.uint32)
    id1 = tl.load(ids_ptr + 2 * row + 1).to(tl.uint32)
    key0 = tl.load(seed_ptr).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    EACH: tl.constexpr = BLOCK_V // PIECES
    total = tl.zeros([BLOCK_T], tl.float32)
    peak = tl.full([BLOCK_T], -float("inf"), tl.float32)
    found = total, peak, tl.zeros([BLOCK_T], tl.int32) + v0, peak
    for i in tl.static_range(PIECES):
        more = _race(
            _piece(z, i, PIECES), v0 + i * EACH, base, scale, is_greedy, is_early, held_ptr,
            position, id0, id1, key0, key1, V, HELD,
        )  # fmt: skip
        found = _better(found, more)
    total, peak, best, chosen = found
    gap = tl.where(is_greedy, peak - base, tl.log(tl.where(is_greedy, 1.0, peak)))
    inside = t < num_rows
    plane = num_rows.to(tl.int64) * TILES
    to = parts_ptr + tile.to(tl.int64) * num_rows + t
    tl.store(to, top, mask=inside)
    tl.store(to + plane, total, mask=inside)
    tl.store(to + 2 * plane, gap, mask=inside)
    tl.store(to + 3 * plane, chosen, mask=inside)
    tl.store(best_ptr + tile.to(tl.int64) * num_rows + t, best, mask=inside)


@jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    parts_ptr, best_ptr, inverse_ptr, tokens_ptr, logprobs_ptr, num_rows,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some rows a program: the best tile's entry and its log-probability."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.minimum(r, num_rows - 1)[None, :]
    inverse = tl.load(inverse_ptr + row)
    inverse = tl.where(inverse == 0.0, 1.0, inverse)
    plane = num_rows.to(tl.int64) * TILES
    top = tl.full([1, BLOCK_R], -float("inf"), tl.float32)
    for first in range(0, TILES, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S))[:, None]
        at = parts_ptr + s.to(tl.int64) * num_rows + row
        tops = tl.load(at, mask=s < TILES, other=-float("inf"))
        top = tl.maximum(top, tl.max(tops, axis=0)[None, :])
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([1, BLOCK_R], tl.float32)
    lead = tl.full([1, BLOCK_R], -float("inf"), tl.float32)
    winner = tl.zeros([1, BLOCK_R], tl.int32)
    for first in range(0, TILES, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S))[:, None]
        at = parts_ptr + s.to(tl.int64) * num_rows + row
        tops = tl.load(at, mask=s < TILES, other=-float("inf"))
        totals = tl.load(at + plane, mask=s < TILES, other=0.0)
        gaps = tl.load(at + 2 * plane, mask=s < TILES, other=-float("inf"))
        above = (tops - base) * inverse
        total += tl.sum(totals * tl.exp(above), axis=0)[None, :]
        # a tile without finite logits has the maximum -inf, which its gap counts from 0
        scores = tl.where(tops == -float("inf"), -float("inf"), above + gaps)
        peak = tl.max(scores, axis=0)[None, :]
        here = tl.min(tl.where((scores == peak) & (s < TILES), s, TILES - 1), axis=0)[None, :]
        winner = tl.where(peak > lead, here, winner)
        lead = tl.maximum(lead, peak)
    at = winner.to(tl.int64) * num_rows + row
    token = tl.load(best_ptr + at).to(tl.int64)
    chosen = tl.load(parts_ptr + 3 * plane + at)
    inside = (r < num_rows)[None, :]
    tl.store(tokens_ptr + row, token, mask=inside)
    tl.store(logprobs_ptr + row, (chosen - base) * inverse - tl.log(total), mask=inside)


def head_draw_triton(
    x_TD: Tensor,
    weight_VD: Tensor,
    sample_ids_R2: Tensor,
    draws_R: Tensor,
    rules: DrawRules,
    form: HeadForm,
) -> tuple[Tensor, Tensor]:
    """`head_draw_reference` in two launches; raises ValueError on what the kernel does not take."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (num_rows, width), vocab_size = x_TD.shape, weight_VD.shape[0]
    if width % BLOCK_K or weight_VD.shape[1] != width or x_TD.dtype != weight_VD.dtype:
        raise ValueError(
            f"x is {tuple(x_TD.shape)} {x_TD.dtype} and the weight {tuple(weight_VD.shape)} "
            f"{weight_VD.dtype}: columns must be equal and a multiple of {BLOCK_K}, dtypes the same"
        )
    if rules.cut is not None:
        raise ValueError("top-k, top-p and min-p need the logits of a row: draw from those")
    device = x_TD.device
    tokens_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    tiles = triton.cdiv(vocab_size, form.block_v)
    parts = torch.empty(4, tiles, num_rows, dtype=torch.float32, device=device)
    best = torch.empty(tiles, num_rows, dtype=torch.int32, device=device)
    limit = {"maxnreg": form.max_registers} if form.max_registers else {}
    _tiles_kernel[(triton.cdiv(num_rows, form.block_t), tiles)](
        TensorDescriptor.from_tensor(x_TD.contiguous(), [form.block_t, BLOCK_K]),
        TensorDescriptor.from_tensor(weight_VD, [form.block_v, BLOCK_K]),
        parts, best, rules.inverse_temperatures_R, rules.seed_words_2,
        sample_ids_R2.contiguous(), draws_R.contiguous(), rules.held_ids_H, rules.min_draws_R,
        num_rows, width // BLOCK_K, V=vocab_size, TILES=tiles, BLOCK_V=form.block_v,
        BLOCK_T=form.block_t, BLOCK_K=BLOCK_K, STAGES=form.num_stages,
        HELD=len(rules.held_ids_H), PIECES=form.pieces, num_warps=form.num_warps,
        enable_fp_fusion=True, **limit,
    )  # fmt: skip
    _combine_kernel[(triton.cdiv(num_rows, COMBINED_ROWS),)](
        parts, best, rules.inverse_temperatures_R, tokens_R, logprobs_R, num_rows, TILES=tiles,
        BLOCK_R=COMBINED_ROWS, BLOCK_S=COMBINED_TILES, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return tokens_R, logprobs_R


def head_draw_reference(
    x_TD: Tensor, weight_VD: Tensor, sample_ids_R2: Tensor, draws_R: Tensor, rules: DrawRules
) -> tuple[Tensor, Tensor]:
    """(tokens [R] int64, logprobs [R] float32) drawn from the logits of x [R, D] and W [V, D], as
    `draw_tokens_reference` does; logits in float64, rounded to float32.
    """
    logits_RV = (x_TD.double() @ weight_VD.double().T).float()
    return draw_tokens_reference(logits_RV, sample_ids_R2, draws_R, rules)


def head_draw(
    x_TD: Tensor,
    weight_VD: Tensor,
    sample_ids_R2: Tensor,
    draws_R: Tensor,
    rules: DrawRules,
    form: HeadForm,
) -> tuple[Tensor, Tensor]:
    """(tokens [R] int64, logprobs [R] float32) drawn from the logits of x [R, D] and W [V, D]."""
    given = x_TD, weight_VD, sample_ids_R2, draws_R, rules
    return head_draw_triton(*given, form) if uses_triton(x_TD) else head_draw_reference(*given)
