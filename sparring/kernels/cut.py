"""Which tokens may be drawn under top-k, top-p and min-p.

Tokens are ranked by s (logits / temperature), equals by index. A token stays where fewer than top_k
tokens rank before it, where the tokens before it hold less than top_p of the probability, and where
its probability is at least min_p of the likeliest token's. All three speak of the whole
distribution (of what is not held back), none of what another one left, so what stays is always a
prefix of the ranking, and the likeliest token always stays. A prefix is two numbers: the lowest s
that stays whole, and of the tokens of the next s the last index that stays.

The Triton form finds them without a sort. One program a row first bounds the threshold from below
(top-k: by the k-th of a few thousand maxima; top-p: by what the vocabulary could weigh under the
bound; min-p: by itself) and lists what lies above, mostly a few hundred tokens; then it narrows an
interval of s by counts and masses above three values at a time. A list longer than CAPACITY is not
used: the row's logits are gone through instead.

Masses are integers, 2^40 exp(s - maximum) rounded down, so a sum has no order and no rounding of
its own; they agree with float64 probabilities to V 2^-40 (1.4e-7 for 152,064 tokens) and the
float32 exponential's 1e-6. Shapes: logits [R, V], rules [R] each. Bytes: 4 a logit in each of two
or three passes over a row, then 4 an entry of its list a turn; a row without cuts costs a few
loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import jit, tl

__all__ = ["CutRules", "cut_reference", "find_cuts", "order_key"]

BLOCK_V = 4096
NUM_WARPS = 16
CAPACITY = 8192


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CutRules:
    """The cuts of each row R, read at run time: top_k_R int64 (0: off), top_p_R float64 (1: off)
    and min_p_R float32 (0: off).
    """

    top_k_R: Tensor
    top_p_R: Tensor
    min_p_R: Tensor


def cut_reference(scaled_RV: Tensor, rules: CutRules) -> Tensor:
    """[R, V] s with -inf for every token that may not be drawn; probabilities in float64."""
    sorted_RV, order_RV = scaled_RV.sort(dim=-1, descending=True, stable=True)
    probs_RV = torch.softmax(sorted_RV.double(), dim=-1)
    before_RV = probs_RV.cumsum(dim=-1) - probs_RV
    top_k_R1, top_p_R1, min_p_R1 = (
        of_row[:, None] for of_row in (rules.top_k_R, rules.top_p_R, rules.min_p_R)
    )
    ranks_V = torch.arange(scaled_RV.shape[1], device=scaled_RV.device)
    is_cut_RV = (top_k_R1 > 0) & (ranks_V >= top_k_R1)
    is_cut_RV |= (top_p_R1 < 1) & (before_RV >= top_p_R1)
    is_cut_RV |= sorted_RV < sorted_RV[:, :1] + min_p_R1.log()
    is_cut_RV[:, 0] = False
    is_cut_RV = torch.empty_like(is_cut_RV).scatter_(1, order_RV, is_cut_RV)
    return scaled_RV.masked_fill(is_cut_RV, -torch.inf)


@jit
def order_key(s):
    """int32 in the order of the float32 s; both zeros are one."""
    bits = tl.where(s == 0.0, 0.0, s).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _value(key):
    """The float32 of an order key."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _scaled(logits_ptr, columns, end, inverse, is_early, held_ptr, HELD: tl.constexpr):
    """s of a tile, -inf for what is held back and past the end."""
    z = tl.load(logits_ptr + columns, mask=columns < end, other=-float("inf"))
    s = z.to(tl.float32) * inverse
    for i in tl.static_range(HELD):
        s = tl.where(is_early & (columns == tl.load(held_ptr + i)), -float("inf"), s)
    return s


@jit
def _mass(s, base):
    return (tl.exp(s - base) * 1099511627776.0).to(tl.int64)


@jit
def _rank_key(keys, rank):
    """The rank-th greatest of a block of keys, as int64; rank is from 1 to the block's size."""
    low = tl.full((), -2147483648, tl.int64)
    high = tl.max(keys, axis=0).to(tl.int64)
    while low < high:
        middle = low + (high - low + 1) // 2
        enough = tl.sum((keys >= middle).to(tl.int32), axis=0) >= rank
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@jit
def _list_above(
    logits_ptr, listed_ptr, bound, inverse, is_early, held_ptr,
    V: tl.constexpr, BLOCK_V: tl.constexpr, HELD: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """How many tokens have keys above the bound; the first CAPACITY of their s are written."""
    lane = tl.arange(0, BLOCK_V)
    filled = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK_V):
        s = _scaled(logits_ptr, start + lane, V, inverse, is_early, held_ptr, HELD)
        is_above = (order_key(s) > bound) & (start + lane < V)
        count = tl.sum(is_above.to(tl.int32), axis=0)
        if count > 0:
            place = filled + tl.cumsum(is_above.to(tl.int32), axis=0) - 1
            tl.store(listed_ptr + place, s, mask=is_above & (place < CAPACITY))
            filled += count
    tl.debug_barrier()  # the list is read by other threads than those that wrote it
    return filled


@jit
def _cut_kernel(
    logits_ptr, keys_ptr, last_ptr, inverse_ptr, draws_ptr, held_ptr, min_draws_ptr, top_k_ptr,
    top_p_ptr, min_p_ptr, listed_ptr, stride_r,
    V: tl.constexpr, BLOCK_V: tl.constexpr, HELD: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """One row a program: the key above which all stay, and the last index that stays at it."""
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(inverse_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    is_early = tl.load(draws_ptr + row) < tl.load(min_draws_ptr + row)
    lowest = tl.full((), -2147483648, tl.int64)
    if (inverse == 0.0) | ((top_k <= 0) & (top_p >= 1.0) & (min_p <= 0.0)):
        tl.store(keys_ptr + row, lowest.to(tl.int32))
        tl.store(last_ptr + row, -1)
    else:
        logits_ptr += row * stride_r
        lane = tl.arange(0, BLOCK_V)
        tops = tl.full((BLOCK_V,), -float("inf"), tl.float32)
        for start in range(0, V, BLOCK_V):
            s = _scaled(logits_ptr, start + lane, V, inverse, is_early, held_ptr, HELD)
            tops = tl.maximum(tops, s)
        top = tl.max(tops, axis=0)
        base = tl.where(top == -float("inf"), 0.0, top)
        most_count = tl.where(top_k > 0, top_k, V + 1)
        most_mass = tl.full((), 9223372036854775807, tl.int64)
        total_mass = tl.full((), 0, tl.int64)
        if top_p < 1.0:
            masses = tl.zeros((BLOCK_V,), tl.int64)
            for start in range(0, V, BLOCK_V):
                s = _scaled(logits_ptr, start + lane, V, inverse, is_early, held_ptr, HELD)
                masses += _mass(s, base)
            total_mass = tl.sum(masses, axis=0)
            most_mass = tl.ceil(total_mass.to(tl.float64) * top_p).to(tl.int64)
        floor = lowest
        if min_p > 0.0:
            floor = order_key(top + tl.log(min_p)).to(tl.int64) - 1
        # The key T sought is the least with fewer than most_count tokens and less than most_mass
        # above it. It is the key of a token or the floor. Above the bound it lies for sure.
        bound = floor
        if top_p < 1.0:
            # tokens below s weigh V exp(s - top) at most: not enough to fill what top_p leaves
            spare = (total_mass - most_mass).to(tl.float32) * (0.5 / (1099511627776.0 * V))
            if spare > 0.0:
                bound = tl.maximum(bound, order_key(top + tl.log(spare)).to(tl.int64))
        if (top_k > 0) & (top_k <= BLOCK_V):
            bound = tl.maximum(bound, _rank_key(order_key(tops), top_k) - 1)
        list_ptr = logits_ptr
        listed = tl.full((), V, tl.int32)
        factor = inverse
        is_raw = is_early
        low = floor
        above_low = tl.full((), V + 1, tl.int64)  # tokens with keys >= low, once low has moved
        if bound > lowest:
            filled = _list_above(
                logits_ptr, listed_ptr + row * CAPACITY, bound, inverse, is_early, held_ptr, V,
                BLOCK_V, HELD, CAPACITY,
            )  # fmt: skip
            if filled <= CAPACITY:
                list_ptr = listed_ptr + row * CAPACITY
                listed = filled
                factor = 1.0
                is_raw = False
            if bound > floor:
                low = bound + 1
                above_low = filled.to(tl.int64)
        high = order_key(top).to(tl.int64)
        above_high = tl.full((), 0, tl.int64)  # tokens with keys > high
        turn = 0
        while (low < high) & (above_low - above_high > 1):
            reach = high - low
            q1 = low + reach // 4
            q2 = low + reach // 2
            q3 = low + (reach // 4) * 3
            if turn < 8:
                # parts of a value's range close in sooner; those of its bits end it for sure
                low_value = tl.maximum(_value(low), top - 64.0)
                step = (_value(high) - low_value) * 0.25
                q1 = order_key(low_value + step).to(tl.int64)
                q2 = order_key(low_value + 2.0 * step).to(tl.int64)
                q3 = order_key(low_value + 3.0 * step).to(tl.int64)
            q1 = tl.minimum(tl.maximum(q1, low), high - 1)
            q2 = tl.minimum(tl.maximum(q2, q1), high - 1)
            q3 = tl.minimum(tl.maximum(q3, q2), high - 1)
            n1 = tl.zeros((BLOCK_V,), tl.int32)
            n2 = tl.zeros((BLOCK_V,), tl.int32)
            n3 = tl.zeros((BLOCK_V,), tl.int32)
            m1 = tl.zeros((BLOCK_V,), tl.int64)
            m2 = tl.zeros((BLOCK_V,), tl.int64)
            m3 = tl.zeros((BLOCK_V,), tl.int64)
            for start in range(0, listed, BLOCK_V):
                s = _scaled(list_ptr, start + lane, listed, factor, is_raw, held_ptr, HELD)
                key = order_key(s)
                mass = _mass(s, base)
                n1 += (key > q1).to(tl.int32)
                n2 += (key > q2).to(tl.int32)
                n3 += (key > q3).to(tl.int32)
                m1 += tl.where(key > q1, mass, 0)
                m2 += tl.where(key > q2, mass, 0)
                m3 += tl.where(key > q3, mass, 0)
            c1 = tl.sum(n1, axis=0).to(tl.int64)
            c2 = tl.sum(n2, axis=0).to(tl.int64)
            c3 = tl.sum(n3, axis=0).to(tl.int64)
            fits1 = (c1 < most_count) & (tl.sum(m1, axis=0) < most_mass)
            fits2 = (c2 < most_count) & (tl.sum(m2, axis=0) < most_mass)
            fits3 = (c3 < most_count) & (tl.sum(m3, axis=0) < most_mass)
            high = tl.where(fits1, q1, tl.where(fits2, q2, tl.where(fits3, q3, high)))
            above_high = tl.where(fits1, c1, tl.where(fits2, c2, tl.where(fits3, c3, above_high)))
            above_low = tl.where(fits1, above_low, tl.where(fits2, c1, tl.where(fits3, c2, c3)))
            beyond = tl.where(fits2, q1, tl.where(fits3, q2, q3)) + 1
            low = tl.where(fits1, low, beyond)
            turn += 1
        _store_cut(
            logits_ptr, list_ptr, listed, keys_ptr + row, last_ptr + row, inverse, factor, is_early,
            is_raw, held_ptr, base, floor, high, most_count, most_mass, V, BLOCK_V, HELD,
        )  # fmt: skip


@jit
def _store_cut(
    logits_ptr, list_ptr, listed, key_ptr, last_ptr, inverse, factor, is_early, is_raw, held_ptr,
    base, floor, high, most_count, most_mass,
    V: tl.constexpr, BLOCK_V: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The greatest key up to `high`, and how many of its tokens still fit, by index."""
    lane = tl.arange(0, BLOCK_V)
    last = tl.full((), -1, tl.int32)
    if high > floor:
        greatest = tl.full((BLOCK_V,), -2147483648, tl.int32)
        for start in range(0, listed, BLOCK_V):
            s = _scaled(list_ptr, start + lane, listed, factor, is_raw, held_ptr, HELD)
            key = order_key(s)
            greatest = tl.maximum(greatest, tl.where(key <= high, key, -2147483648))
        high = tl.max(greatest, axis=0).to(tl.int64)
        counts = tl.zeros((BLOCK_V,), tl.int32)
        equals = tl.zeros((BLOCK_V,), tl.int32)
        masses = tl.zeros((BLOCK_V,), tl.int64)
        each = tl.zeros((BLOCK_V,), tl.int64)
        for start in range(0, listed, BLOCK_V):
            s = _scaled(list_ptr, start + lane, listed, factor, is_raw, held_ptr, HELD)
            key = order_key(s)
            mass = _mass(s, base)
            counts += (key > high).to(tl.int32)
            masses += tl.where(key > high, mass, 0)
            is_equal = (key == high) & (start + lane < listed)
            equals += is_equal.to(tl.int32)
            each = tl.maximum(each, tl.where(is_equal, mass, 0))
        room = most_count - tl.sum(counts, axis=0)
        share = tl.max(each, axis=0)
        if share > 0:
            spare = most_mass - tl.sum(masses, axis=0)
            room = tl.minimum(room, (spare - 1) // share + 1)
        last = tl.full((), V, tl.int32)
        if tl.sum(equals, axis=0) > room:
            seen = tl.full((), 0, tl.int32)
            for start in range(0, V, BLOCK_V):
                s = _scaled(logits_ptr, start + lane, V, inverse, is_early, held_ptr, HELD)
                is_equal = ((order_key(s) == high) & (start + lane < V)).to(tl.int32)
                place = tl.cumsum(is_equal, axis=0) + seen
                is_last = (is_equal > 0) & (place == room)
                last = tl.minimum(last, tl.min(tl.where(is_last, start + lane, V), axis=0))
                seen += tl.sum(is_equal, axis=0)
    tl.store(key_ptr, high.to(tl.int32))
    tl.store(last_ptr, last)


def find_cuts(
    logits_RV: Tensor,
    draws_R: Tensor,
    inverse_temperatures_R: Tensor,
    held_ids_H: Tensor,
    min_draws_R: Tensor,
    rules: CutRules,
) -> tuple[Tensor, Tensor]:
    """In one launch the key [R] int32 above which every token stays, and the last index [R] int32
    that stays of those at the key.
    """
    logits_RV = logits_RV.float()
    num_rows, vocab_size = logits_RV.shape
    keys_R = torch.empty(num_rows, dtype=torch.int32, device=logits_RV.device)
    last_R = torch.empty_like(keys_R)
    listed = torch.empty(num_rows, CAPACITY, dtype=torch.float32, device=logits_RV.device)
    _cut_kernel[(num_rows,)](
        logits_RV, keys_R, last_R, inverse_temperatures_R, draws_R, held_ids_H, min_draws_R,
        rules.top_k_R, rules.top_p_R, rules.min_p_R, listed, logits_RV.stride(0), V=vocab_size,
        BLOCK_V=BLOCK_V, HELD=len(held_ids_H), CAPACITY=CAPACITY, num_warps=NUM_WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return keys_R, last_R
