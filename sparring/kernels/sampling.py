"""A token and its log-probability from each row of logits, in one pass over them.

s = logits / temperature in float32 (a product with the rounded 1 / temperature, as in the output
head). The token is argmax_v of s_v - log E_v with E_v exponential noise (philox.py), which draws
from softmax(s): an exponential race. The log-probability is s_token - logsumexp(s) over the whole
vocabulary; both terms are counted from the row's largest logit, so that the token's own is the same
number above and below. Greedy rows take argmax_v of the logits and the log-probability of
temperature 1. What holds tokens back (a minimum length, cut.py's top-k, top-p and min-p) bends the
draw and never the log-probability. Shapes: logits [R, V] -> tokens int64 [R], logprobs float32 [R].

The Triton form reads the logits once. Tiles of BLOCK_V entries give their maximum, their sum of
exponentials, and their best entry of the race; a second launch combines the tiles of a row in one
fixed order. The split of tiles over programs changes no bit, so neither does the number of rows.
Bytes: 4 a logit.

The race is run on quotients exp(s - maximum of the tile) / E: no logarithm an entry for the score,
and no underflow that counts, since E lies between 2^-33 and 23, so that whatever is 27 below a
tile's maximum cannot win in it. E > word 2^-32 bounds a quotient from above without any logarithm;
a tile in which no entry's bound reaches the best score so far is left after that test. Scores are
right to a few units in the last place of float32 logits; the token equals the reference's wherever
the two best scores differ by more (tests: 1e-5 and 4 units of the largest |s|).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import INTERPRETED, jit, tl, triton, uses_triton
from sparring.kernels.cut import CutRules, cut_reference, find_cuts, order_key
from sparring.kernels.philox import (
    exp2_fast,
    exponential,
    log_exponential,
    noise_words,
    philox_words,
)

__all__ = [
    "DrawRules",
    "draw_tokens",
    "draw_tokens_reference",
    "draw_tokens_triton",
    "label_logprobs",
    "label_logprobs_reference",
    "label_logprobs_triton",
]

BLOCK_V = 512
NUM_WARPS = 1
COMBINE_WARPS = 2
MAX_REGISTERS = 96
BUSY_PROGRAMS = 2772
"""Programs that run at once on a large card (132 multiprocessors of 21 warps): with more tiles than
that, a program takes several, so that all end together.
"""
AHEAD = 1
"""Where the next tile is brought while one is computed: 0 nowhere, 1 the L2 cache, 2 registers."""
ALIGNED = 16
"""Rows of logits begin at multiples of so many entries."""
MAX_CHUNK_ENTRIES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawRules:
    """How each row R is drawn; every tensor is read at run time, so graphs may be replayed on it.

    inverse_temperatures_R float32: 1 / temperature, rounded once; 0 is greedy. seed_words_2 int64:
    the seed's lower and upper 32 bits. held_ids_H int64: tokens not drawn while a row's draw index
    is below min_draws_R int64; negative entries are unused. cut: None where no row has any.
    """

    inverse_temperatures_R: Tensor
    seed_words_2: Tensor
    held_ids_H: Tensor
    min_draws_R: Tensor
    cut: CutRules | None = None

    def of_rows(self, rows: slice) -> DrawRules:
        """Those of some rows, as views."""
        cut = self.cut
        return DrawRules(
            inverse_temperatures_R=self.inverse_temperatures_R[rows],
            seed_words_2=self.seed_words_2,
            held_ids_H=self.held_ids_H,
            min_draws_R=self.min_draws_R[rows],
            cut=cut
            and CutRules(
                top_k_R=cut.top_k_R[rows], top_p_R=cut.top_p_R[rows], min_p_R=cut.min_p_R[rows]
            ),
        )


def _draw_chunk(
    logits_RV: Tensor, sample_ids_R2: Tensor, draws_R: Tensor, rules: DrawRules
) -> tuple[Tensor, Tensor]:
    inverse_R = rules.inverse_temperatures_R
    is_greedy_R = inverse_R == 0
    scaled_RV = logits_RV.float() * torch.where(is_greedy_R, 1.0, inverse_R)[:, None]
    logprobs_RV = torch.log_softmax(scaled_RV, dim=-1)
    vocab_size = logits_RV.shape[1]
    scores_RV = scaled_RV
    held_H = rules.held_ids_H[(rules.held_ids_H >= 0) & (rules.held_ids_H < vocab_size)]
    if len(held_H):
        scores_RV = scaled_RV.clone()
        is_early_R1 = (draws_R < rules.min_draws_R)[:, None]
        scores_RV[:, held_H] = scores_RV[:, held_H].masked_fill(is_early_R1, -torch.inf)
    if rules.cut is not None:
        scores_RV = cut_reference(scores_RV, rules.cut)
    key = (rules.seed_words_2[0], rules.seed_words_2[1])
    noise_RV = log_exponential(noise_words(key, sample_ids_R2, draws_R, vocab_size))
    tokens_R = (scores_RV - noise_RV.masked_fill_(is_greedy_R[:, None], 0.0)).argmax(dim=-1)
    return tokens_R, logprobs_RV.gather(1, tokens_R[:, None])[:, 0]


def draw_tokens_reference(
    logits_RV: Tensor, sample_ids_R2: Tensor, draws_R: Tensor, rules: DrawRules
) -> tuple[Tensor, Tensor]:
    """Draws one token a row: (tokens [R] int64, logprobs [R] float32); noise in float64.

    logits [R, V]. sample_ids_R2 [R, 2] int64 below 2^32 and draws_R [R] int64, the token's place in
    its completion, key the noise. Equal scores give the lower index. Logits that are not finite
    give a log-probability of NaN.
    """
    rows = max(1, MAX_CHUNK_ENTRIES // logits_RV.shape[1])
    parts = []
    for start in range(0, len(logits_RV), rows):
        chunk = slice(start, start + rows)
        of_chunk = rules.of_rows(chunk)
        parts.append(_draw_chunk(logits_RV[chunk], sample_ids_R2[chunk], draws_R[chunk], of_chunk))
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return draws_R.new_empty(0), logits_RV.new_empty(0, dtype=torch.float32)
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([lp for _, lp in parts])


@jit
def _tile_at(logits_ptr, start, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Logits start.. of a row in float32, -inf past its end."""
    lane = tl.arange(0, BLOCK_V)
    if start + BLOCK_V <= V:  # all but a row's last tile do without a mask
        z = tl.load(logits_ptr + start + lane)
    else:
        z = tl.load(logits_ptr + start + lane, mask=lane < V - start, other=-float("inf"))
    return z.to(tl.float32)


@jit
def _quotient(e, noise):
    """e / noise to 2 units in the last place, for a noise from 2^-33 to 23."""
    if INTERPRETED:
        return e / noise
    else:  # noqa: RET505 - Triton wants one type a branch
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [noise], dtype=tl.float32, is_pure=True, pack=1
        )
        return e * inverse


@jit
def _ask_for(logits_ptr, start, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Brings logits start.. of a row into the L2 cache, a cache line a lane; none past the row."""
    if not INTERPRETED:
        at = start + tl.arange(0, 32) * (BLOCK_V // 32)
        tl.inline_asm_elementwise(
            "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
            "=r,l",
            [(logits_ptr + tl.minimum(at, V - 1)).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit(do_not_specialize=["span"])
def _tiles_kernel(
    logits_ptr, parts_ptr, best_ptr, inverse_ptr, seed_ptr, ids_ptr, draws_ptr, held_ptr,
    min_draws_ptr, keys_ptr, last_ptr, stride_r, span,
    V: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr,
    HELD: tl.constexpr, IS_CUT: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """`span` tiles of a row: for each its maximum, sum, best score above the maximum and index."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * span
    inverse = tl.load(inverse_ptr + row)
    is_greedy = inverse == 0.0
    inverse = tl.where(is_greedy, 1.0, inverse)
    draw = tl.load(draws_ptr + row)
    is_early = draw < tl.load(min_draws_ptr + row)
    position = draw.to(tl.uint32)
    id0 = tl.load(ids_ptr + 2 * row).to(tl.uint32)
    id1 = tl.load(ids_ptr + 2 * row + 1).to(tl.uint32)
    key0 = tl.load(seed_ptr).to(tl.uint32)
    key1 = tl.load(seed_ptr + 1).to(tl.uint32)
    lane = tl.arange(0, BLOCK_V)
    quads = tl.arange(0, BLOCK_V // 4)
    logits_ptr += row * stride_r
    parts_ptr += row * TILES
    best_ptr += row * TILES
    plane = tl.num_programs(0).to(tl.int64) * TILES
    scale = inverse * 1.4426950408889634  # exp(x) = 2^(x log2 e)
    lead = -float("inf")
    end = min(first + span, TILES)
    num_held = tl.where(is_early, HELD, 0)
    coming = lane.to(tl.float32)
    if AHEAD == 2:
        coming = _tile_at(logits_ptr, first * BLOCK_V, V, BLOCK_V)
    for tile in range(first, end):
        start = tile * BLOCK_V
        after = min(tile + 1, end - 1) * BLOCK_V
        if AHEAD == 2:
            z = coming
            coming = _tile_at(logits_ptr, after, V, BLOCK_V)
        else:
            z = _tile_at(logits_ptr, start, V, BLOCK_V)
        if AHEAD == 1:
            _ask_for(logits_ptr, after, V, BLOCK_V)
        top = tl.max(z, axis=0)
        base = tl.where(top == -float("inf"), 0.0, top)
        e = exp2_fast((z - base) * scale)
        total = tl.sum(e, axis=0)
        for i in range(num_held):  # a loop, not a condition: that would be computed in vain
            e = tl.where(lane == (tl.load(held_ptr + i) - start).to(tl.int32), 0.0, e)
        if IS_CUT:
            key = order_key(z * inverse)
            least = tl.load(keys_ptr + row)
            stays = (key > least) | ((key == least) & (lane <= tl.load(last_ptr + row) - start))
            e = tl.where(stays, e, 0.0)
        gap = -float("inf")
        best = start
        if is_greedy:
            # read again: most rows are not greedy, and need the registers
            z = _tile_at(logits_ptr, start, V, BLOCK_V)
            for i in range(num_held):
                is_held = lane == (tl.load(held_ptr + i) - start).to(tl.int32)
                z = tl.where(is_held, -float("inf"), z)
            peak = tl.max(z, axis=0)
            gap = peak - base
            best = start + tl.min(tl.where(z == peak, lane, V - 1 - start), axis=0)
        else:
            counters = tile * (BLOCK_V // 4) + quads
            w0, w1, w2, w3 = philox_words(counters, position, id0, id1, key0, key1)
            words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
            # the quotient that this tile must reach; a little less, for what rounding may take
            bar = tl.exp(lead - base * inverse) * 0.9999
            # E's upper 23 bits, set as the digits of 1 + E: dearer to convert than to shift
            under = (words >> 9 | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
            if tl.max(e - under * bar, axis=0) >= 0.0:
                quotients = _quotient(e, exponential(words))
                peak = tl.max(quotients, axis=0)
                gap = tl.log(peak)
                best = start + tl.min(tl.where(quotients == peak, lane, V - 1 - start), axis=0)
                lead = tl.maximum(lead, base * inverse + gap)
        tl.store(parts_ptr + tile, top)
        tl.store(parts_ptr + plane + tile, total)
        tl.store(parts_ptr + 2 * plane + tile, gap)
        tl.store(best_ptr + tile, best)


@jit
def _combine_kernel(
    logits_ptr, parts_ptr, best_ptr, inverse_ptr, tokens_ptr, logprobs_ptr, stride_r,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, HAS_TOKEN: tl.constexpr,
):  # fmt: skip
    """One row a program: the best tile's entry, or the given token, and its log-probability."""
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * TILES
    tiles = tl.arange(0, BLOCK_T)
    inside = tiles < TILES
    parts_ptr += row * TILES
    tops = tl.load(parts_ptr + tiles, mask=inside, other=-float("inf"))
    totals = tl.load(parts_ptr + plane + tiles, mask=inside, other=0.0)
    gaps = tl.load(parts_ptr + 2 * plane + tiles, mask=inside, other=-float("inf"))
    top = tl.max(tops, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    inverse = tl.load(inverse_ptr + row)
    inverse = tl.where(inverse == 0.0, 1.0, inverse)
    above = (tops - base) * inverse
    total = tl.sum(totals * tl.exp(above), axis=0)
    # a tile without finite logits has the maximum -inf, which its gap counts from 0
    scores = tl.where(tops == -float("inf"), -float("inf"), above + gaps)
    peak = tl.max(scores, axis=0)
    tile = tl.min(tl.where((scores == peak) & inside, tiles, TILES - 1), axis=0)
    token = tl.load(best_ptr + row * TILES + tile).to(tl.int64)
    if HAS_TOKEN:
        token = tl.load(tokens_ptr + row)
    z = tl.load(logits_ptr + row * stride_r + token).to(tl.float32)
    if not HAS_TOKEN:
        tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, (z - base) * inverse - tl.log(total))


def span_of(num_rows: int, num_tiles: int) -> int:
    """Tiles of a row that one program takes; it changes no result."""
    return triton.cdiv(num_tiles, min(num_tiles, max(1, BUSY_PROGRAMS // num_rows)))


def draw_tokens_triton(
    logits_RV: Tensor, sample_ids_R2: Tensor, draws_R: Tensor, rules: DrawRules
) -> tuple[Tensor, Tensor]:
    """`draw_tokens_reference` in two launches, one more where rules.cut is given."""
    return _launch(logits_RV, sample_ids_R2, draws_R, rules, None)


def _launch(
    logits_RV: Tensor,
    sample_ids_R2: Tensor,
    draws_R: Tensor,
    rules: DrawRules,
    tokens_R: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Draws, or gives the log-probabilities of tokens_R where that is given."""
    has_token = tokens_R is not None
    sample_ids_R2, draws_R = sample_ids_R2.contiguous(), draws_R.contiguous()
    logits_RV = _aligned(logits_RV)
    num_rows, vocab_size = logits_RV.shape
    device = logits_RV.device
    if tokens_R is None:
        tokens_R = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs_R = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows == 0:
        return tokens_R, logprobs_R
    num_tiles = triton.cdiv(vocab_size, BLOCK_V)
    span = span_of(num_rows, num_tiles)
    parts = torch.empty(3, num_rows, num_tiles, dtype=torch.float32, device=device)
    best = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=device)
    keys_R = last_R = best
    if rules.cut is not None:
        keys_R, last_R = find_cuts(
            logits_RV, draws_R, rules.inverse_temperatures_R, rules.held_ids_H, rules.min_draws_R,
            rules.cut,
        )  # fmt: skip
    _tiles_kernel[(num_rows, triton.cdiv(num_tiles, span))](
        logits_RV, parts, best, rules.inverse_temperatures_R, rules.seed_words_2,
        sample_ids_R2, draws_R, rules.held_ids_H, rules.min_draws_R, keys_R, last_R,
        logits_RV.stride(0), span, V=vocab_size, BLOCK_V=BLOCK_V, TILES=num_tiles,
        HELD=len(rules.held_ids_H), IS_CUT=rules.cut is not None, AHEAD=AHEAD, num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS, enable_fp_fusion=True,
    )  # fmt: skip
    _combine_kernel[(num_rows,)](
        logits_RV, parts, best, rules.inverse_temperatures_R, tokens_R, logprobs_R,
        logits_RV.stride(0), TILES=num_tiles, BLOCK_T=triton.next_power_of_2(num_tiles),
        HAS_TOKEN=has_token, num_warps=COMBINE_WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return tokens_R, logprobs_R


def draw_tokens(
    logits_RV: Tensor, sample_ids_R2: Tensor, draws_R: Tensor, rules: DrawRules
) -> tuple[Tensor, Tensor]:
    """Draws one token a row: (tokens [R] int64, logprobs [R] float32).

    logits [R, V] float32, rows at any stride. sample_ids_R2 [R, 2] int64 below 2^32 and draws_R [R]
    int64, the token's place in its completion, key the noise. Logits that are not finite give a
    log-probability of NaN. No host synchronisation and a fixed grid on a GPU.
    """
    chosen = draw_tokens_triton if uses_triton(logits_RV) else draw_tokens_reference
    return chosen(logits_RV, sample_ids_R2, draws_R, rules)


def _aligned(logits_RV: Tensor) -> Tensor:
    """The logits in rows that begin at aligned places; a copy where they do not.

    How a tile is loaded decides in which order it is added up: aligned rows are one case for all.
    """
    num_rows, vocab_size = logits_RV.shape
    if logits_RV.stride(1) == 1 and logits_RV.stride(0) % ALIGNED == 0:
        return logits_RV
    width = -(-vocab_size // ALIGNED) * ALIGNED
    rows = logits_RV.new_empty(num_rows, width)[:, :vocab_size]
    return rows.copy_(logits_RV)


def label_logprobs_reference(
    logits_RV: Tensor, labels_R: Tensor, inverse_temperature: float
) -> Tensor:
    """Log-probabilities [R] float32 of the labels under softmax(logits * inverse_temperature)."""
    scaled_RV = logits_RV.float() * torch.tensor(inverse_temperature, dtype=torch.float32)
    return torch.log_softmax(scaled_RV, dim=-1).gather(1, labels_R[:, None])[:, 0]


def label_logprobs_triton(
    logits_RV: Tensor, labels_R: Tensor, inverse_temperature: float
) -> Tensor:
    """`label_logprobs_reference` by the sampler's own launches: the bits that a draw records.

    The race is run in vain: that costs less than a second form of the same sums would in proof.
    """
    device, num_rows = logits_RV.device, len(logits_RV)
    zeros_R2 = torch.zeros(num_rows, 2, dtype=torch.int64, device=device)
    rules = DrawRules(
        inverse_temperatures_R=torch.full((num_rows,), inverse_temperature, device=device),
        seed_words_2=zeros_R2.new_zeros(2),
        held_ids_H=zeros_R2.new_empty(0),
        min_draws_R=zeros_R2.new_zeros(num_rows),
    )
    labels_R = labels_R.contiguous()
    return _launch(logits_RV, zeros_R2, zeros_R2[:, 0], rules, labels_R)[1]


def label_logprobs(logits_RV: Tensor, labels_R: Tensor, inverse_temperature: float) -> Tensor:
    """Log-probabilities [R] float32 of labels [R] int64 under softmax(logits *
    inverse_temperature), on a GPU to the bit as `draw_tokens` records them.
    """
    chosen = label_logprobs_triton if uses_triton(logits_RV) else label_logprobs_reference
    return chosen(logits_RV, labels_R, inverse_temperature)
