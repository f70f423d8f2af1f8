"""One split of attention, in one order of sums wherever it is computed.

Keys lie on an absolute grid from position 0: splits of a fixed size, each cut into tiles of a fixed
size N. A tile gives (acc, peak, p): acc [E, M] = sum of v p with p [N, M] = 2^(s - peak); it knows
nothing of other tiles, so any program may compute it. A split merges its tiles in order, acc and p
alike, and then adds up p over N; splits are merged in order.
Decoding, prefill and the training forward of bitwise mode all call these functions, and no bit
depends on how many queries M a program holds: keys (and the values' head dimension) are the matrix
product's rows and queries its columns, so one kind of matrix instruction serves any number.
Contraction to fused multiply-add is off in every kernel that calls them (`OPTIONS`); where one is
meant, it is written. A tile that a query does not see changes none of its bits.
"""

from __future__ import annotations

import math

from sparring.kernels import INTERPRETED, jit, rounded, tl

LOG2_E = math.log2(math.e)

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""Launch options that decide the order of sums: the same for every kernel of this family."""


@jit
def product(a, b, acc):
    """acc + a b; the interpreter sums in float64, so that its library's order does not show."""
    if INTERPRETED:
        a, b = a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64)
        return acc + tl.dot(a, b).to(tl.float32)
    else:  # noqa: RET505 - Triton wants one type a branch
        return tl.dot(a, b, acc)


@jit
def scales_of(
    address_ptr, layer, num_blocks, kv_head, K: tl.constexpr, B: tl.constexpr, LIMIT: tl.constexpr
):  # fmt: skip
    """Where a head's scales of a layer begin; of a pool in 16 bits a pointer nobody reads from."""
    if LIMIT == 0:
        return address_ptr.to(tl.pointer_type(tl.float32))
    else:  # noqa: RET505
        scales_ptr = tl.load(address_ptr + 1).to(tl.pointer_type(tl.float32))
        scales_ptr = tl.multiple_of(scales_ptr, 16)
        return scales_ptr + (layer.to(tl.int64) * num_blocks * (2 * K) + kv_head) * B


@jit
def widened(x, dtype: tl.constexpr):
    """8-bit numbers in a 16-bit dtype, which holds each of them exactly."""
    if INTERPRETED:
        return rounded(x.to(tl.float32), dtype)
    else:  # noqa: RET505
        return x.to(dtype)


@jit
def whole_level(s):
    """The next whole number from s on, which probabilities 2^(s - level) are counted from.

    Levels of two tilings then differ by a power of two, which no rounding sees: a probability in 16
    bits has the same digits in every kernel, whatever its running maximum was. Totals are of the
    rounded ones, so that a key alone gives its value unchanged.
    """
    return tl.ceil(s)


@jit
def rounded_and_wide(p, dtype: tl.constexpr):
    """(p in dtype, those same numbers in float32); two at once on a card, where the compiler would
    convert one by one, at a quarter of the speed.
    """
    if INTERPRETED or dtype == tl.float32:
        used = rounded(p, dtype)
        return used, used.to(tl.float32)
    elif dtype == tl.bfloat16:  # noqa: RET505 - Triton wants one type a branch
        return tl.inline_asm_elementwise(
            """{
            cvt.rn.bf16x2.f32 $0, $4, $3;
            shl.b32 $1, $0, 16;
            and.b32 $2, $0, 0xffff0000;
            }""",
            "=r,=r,=r,f,f", [p], dtype=(tl.bfloat16, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.f16x2.f32 $0, $4, $3;
            mov.b32 {low, high}, $0;
            cvt.f32.f16 $1, low;
            cvt.f32.f16 $2, high;
            }""",
            "=r,=f,=f,f,f", [p], dtype=(tl.float16, tl.float32), is_pure=True, pack=2,
        )  # fmt: skip


@jit
def merge_factors(peak, peak_new):
    """(peak of both, factor of the old, factor of the new), all [M]; -inf marks an empty side."""
    above = tl.maximum(peak, peak_new)
    level = tl.where(above == -float("inf"), 0.0, above)
    return above, tl.exp2(peak - level), tl.exp2(peak_new - level)


@jit
def merged(acc, peak, total, acc_new, peak_new, total_new):
    """A split, or several, and the next one: (acc, peak, total) of both."""
    peak, keep, add = merge_factors(peak, peak_new)
    acc = tl.fma(acc_new, add[None, :], acc * keep[None, :])
    return acc, peak, tl.fma(total_new, add, total * keep)


@jit
def inverse(total):
    """1 / total [M], 0 where nothing was seen; out = acc times it."""
    return tl.where(total == 0.0, 0.0, tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total)))


@jit
def tile_scores(
    q, k, k_scale, v_scale, keys, positions, num_keys, scale, window, HAS_WINDOW: tl.constexpr,
    IS_SCALED: tl.constexpr,
):  # fmt: skip
    """One tile: q [E, M], k [N, E] -> p [N, M] rounded as values are multiplied by it, peak [M] and
    p in float32, which is added up at the end of a split: sums over a tile's keys wait for every
    warp. IS_SCALED: k and v are k_scale and v_scale [N] times what they hold.
    """
    N: tl.constexpr = k.shape[0]
    M: tl.constexpr = q.shape[1]
    s = product(k, q, tl.zeros([N, M], tl.float32))
    if IS_SCALED:
        s = s * k_scale[:, None]
    seen = (keys[:, None] <= positions[None, :]) & (keys < num_keys)[:, None]
    if HAS_WINDOW:
        seen = seen & (keys[:, None] > positions[None, :] - window)
    s = tl.where(seen, s, -float("inf"))
    peak = whole_level(tl.max(s, axis=0) * scale)
    level = tl.where(peak == -float("inf"), 0.0, peak)
    p = tl.exp2(tl.fma(s, scale, -level[None, :]))
    if IS_SCALED:
        wide = p
        used = rounded(p * v_scale[:, None], q.dtype)
    else:
        used, wide = rounded_and_wide(p, q.dtype)
    return used, peak, wide


@jit
def tile_sums(
    q, k, v, k_scale, v_scale, keys, positions, num_keys, scale, window, HAS_WINDOW: tl.constexpr,
    IS_SCALED: tl.constexpr,
):  # fmt: skip
    """`tile_scores` and v [N, E] -> acc [E, M], peak [M], p [N, M]."""
    used, peak, wide = tile_scores(
        q, k, k_scale, v_scale, keys, positions, num_keys, scale, window, HAS_WINDOW, IS_SCALED
    )
    acc = product(tl.trans(v), used, tl.zeros([v.shape[1], q.shape[1]], tl.float32))
    return acc, peak, wide


@jit
def no_tiles(BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What tiles are merged into: (acc, peak, p)."""
    return (
        tl.zeros([BLOCK_E, BLOCK_M], tl.float32),
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_N, BLOCK_M], tl.float32),
    )


@jit
def with_tile(acc, peak, total, acc_new, peak_new, p):
    """Tiles so far and the next one."""
    peak, keep, add = merge_factors(peak, peak_new)
    acc = tl.fma(acc_new, add[None, :], acc * keep[None, :])
    return acc, peak, tl.fma(p, add[None, :], total * keep[None, :])


@jit
def whole_total(p):
    """[M], the sum of [M, N] for an N of 16 or 64: sums of two, which have no order of their own,
    first of what a thread of a matrix product holds, then of a warp's.
    """
    M: tl.constexpr = p.shape[0]
    ROWS: tl.constexpr = p.shape[1] // 16
    tl.static_assert(ROWS == 1 or ROWS == 4)
    x = tl.sum(tl.reshape(p, [M, ROWS, 2, 8]), axis=2)
    x = tl.sum(tl.reshape(x, [M, ROWS, 2, 4]), axis=2)
    x = tl.sum(tl.reshape(x, [M, ROWS, 2, 2]), axis=2)
    x = tl.sum(x, axis=2)
    if ROWS == 1:
        return tl.reshape(x, [M])
    else:  # noqa: RET505 - Triton wants one type a branch
        return tl.sum(tl.sum(tl.reshape(x, [M, 2, 2]), axis=1), axis=1)


@jit
def _paged_tile(
    q, positions, k_ptr, v_ptr, scales_ptr, table_ptr, block, start, num_keys,
    scale, window, STRIDE: tl.constexpr, B: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """`tile_sums` of the tile at key `start`, which lies in `block` where tiles lie in one."""
    columns = tl.arange(0, BLOCK_E)
    keys = start + tl.arange(0, BLOCK_N)
    inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
    if B % BLOCK_N == 0:  # a tile lies in one block
        first = block * STRIDE + (start % B) * E
        at = first + (tl.arange(0, BLOCK_N) * E)[:, None] + columns[None, :]
        at_scale = block * (STRIDE // E) + start % B + tl.arange(0, BLOCK_N)
    else:
        blocks = tl.load(table_ptr + keys // B, mask=keys < num_keys, other=0).to(tl.int64)
        at = (blocks * STRIDE + (keys % B) * E)[:, None] + columns[None, :]
        at_scale = blocks * (STRIDE // E) + keys % B
    if LIMIT == 0:
        k = tl.load(k_ptr + at, mask=inside, other=0.0)
        v = tl.load(v_ptr + at, mask=inside, other=0.0)
        acc, peak, p = tile_sums(
            q, k, v, 0.0, 0.0, keys, positions, num_keys, scale, window, HAS_WINDOW, False
        )
    else:
        k = widened(tl.load(k_ptr + at, mask=inside, other=0.0), q.dtype)
        v = widened(tl.load(v_ptr + at, mask=inside, other=0.0), q.dtype)
        scale_at = scales_ptr + at_scale
        k_scale = tl.load(scale_at, mask=keys < num_keys, other=0.0)
        v_scale = tl.load(scale_at + STRIDE // E // 2, mask=keys < num_keys, other=0.0)
        acc, peak, p = tile_sums(
            q, k, v, k_scale, v_scale, keys, positions, num_keys, scale, window, HAS_WINDOW, True
        )
    return acc, peak, p


@jit
def paged_split(
    q, positions, k_ptr, v_ptr, scales_ptr, table_ptr, block, low, high, num_keys, scale, window,
    STRIDE: tl.constexpr, B: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Keys low..high of one split out of a pool's blocks, low on a tile's border and in `block`.

    k_ptr, v_ptr, scales_ptr: this head's part of the layer's block 0; STRIDE: elements from block
    to block; LIMIT > 0: they are 8-bit numbers with scales.
    q [BLOCK_E, BLOCK_M], positions [BLOCK_M]: a query sees keys up to its position.
    """
    acc, peak, total = no_tiles(BLOCK_E, BLOCK_M, BLOCK_N)
    # a tile's block is known a tile ahead, so that its keys can be under way two tiles ahead
    block = block.to(tl.int64)
    for start in range(low, high, BLOCK_N):
        acc_new, peak_new, p = _paged_tile(
            q, positions, k_ptr, v_ptr, scales_ptr, table_ptr, block, start, num_keys, scale,
            window, STRIDE, B, E, BLOCK_E, BLOCK_N, HAS_WINDOW, LIMIT,
        )  # fmt: skip
        acc, peak, total = with_tile(acc, peak, total, acc_new, peak_new, p)
        after = start + BLOCK_N
        block = tl.load(table_ptr + after // B, mask=after < high, other=0).to(tl.int64)
    return acc, peak, whole_total(tl.trans(total))


@jit
def _real_start(at, low, swapped, SPLIT: tl.constexpr):
    """Where the tile lies that comes at place `at` if the first two splits from `low` come the
    other way round; swapped: keys of the tiles of the second one, 0: they do not.
    """
    after_both = tl.where(at < low + swapped + SPLIT, -swapped, 0)
    return at + tl.where(at < low + swapped, SPLIT, after_both)


@jit
def paged_splits(
    q, positions, k_ptr, v_ptr, scales_ptr, table_ptr, block, partial_ptr, states_ptr,
    low, high, num_keys, scale, window, keeps_each, swapped, STRIDE: tl.constexpr,
    B: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """`paged_split` of every split from low to high, in one loop that always has keys under way.

    Returns (acc, total) of all of them merged in order; keeps_each: stores each split's numbers
    where the merging of a row reads them. partial_ptr, states_ptr: the row's and head's split 0.
    swapped > 0: so many keys of the second split, in whole tiles, come before the first split, and
    are held; while some programs read a prompt out of the L2 cache, others read keys of their own.
    """
    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_E)
    inside = (columns < E)[:, None] & (members < GROUP)[None, :]
    to = members[None, :] * E + columns[:, None]
    row_acc = tl.zeros([BLOCK_E, BLOCK_M], tl.float32)
    row_peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_total = tl.zeros([BLOCK_M], tl.float32)
    acc, peak, total = no_tiles(BLOCK_E, BLOCK_M, BLOCK_N)
    block = block.to(tl.int64)
    for at in range(low, high, BLOCK_N):
        start = _real_start(at, low, swapped, SPLIT)
        # a peak of -inf multiplies what the split before left by 0
        peak = tl.where(start % SPLIT == 0, -float("inf"), peak)
        acc_new, peak_new, p = _paged_tile(
            q, positions, k_ptr, v_ptr, scales_ptr, table_ptr, block, start, num_keys, scale,
            window, STRIDE, B, E, BLOCK_E, BLOCK_N, HAS_WINDOW, LIMIT,
        )  # fmt: skip
        acc, peak, total = with_tile(acc, peak, total, acc_new, peak_new, p)
        after = at + BLOCK_N
        next_start = _real_start(after, low, swapped, SPLIT)
        block = tl.load(table_ptr + next_start // B, mask=after < high, other=0).to(tl.int64)
        if ((start + BLOCK_N) % SPLIT == 0) | (start + BLOCK_N >= high):
            whole = whole_total(tl.trans(total))
            if keeps_each:
                split = start // SPLIT
                tl.store(partial_ptr + split * (GROUP * E) + to, acc, mask=inside)
                state_at = states_ptr + split * (2 * GROUP) + members
                tl.store(state_at, peak, mask=members < GROUP)
                tl.store(state_at + GROUP, whole, mask=members < GROUP)
            if at < low + swapped:
                row_acc, row_peak, row_total = acc, peak, whole
            else:
                if (swapped > 0) & (after == low + swapped + SPLIT):
                    row_acc, row_peak, row_total = merged(
                        acc, peak, whole, row_acc, row_peak, row_total
                    )
                else:
                    row_acc, row_peak, row_total = merged(
                        row_acc, row_peak, row_total, acc, peak, whole
                    )
    return row_acc, row_total


@jit
def packed_split(
    q, positions, k_ptr, v_ptr, stride_kt, stride_vt, parent_start, parent_length, start, low,
    high, num_keys, scale, window, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """`paged_split` over packed tensors: position j is token parent_start + j of the parent, and
    from parent_length on token start + j - parent_length. j times a stride fits 32 bits.
    """
    columns = tl.arange(0, BLOCK_E)
    acc, peak, total = no_tiles(BLOCK_E, BLOCK_M, BLOCK_N)
    own = start - parent_length
    for first in range(low, high, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        inside = (keys < num_keys)[:, None] & (columns < E)[None, :]
        if E > 128:  # one column of 64-bit numbers, not two: registers are short
            tokens = keys + tl.where(keys < parent_length, parent_start, own)
            at_k, at_v = tokens * stride_kt, tokens * stride_vt
        else:
            at_k = tl.where(keys < parent_length, parent_start * stride_kt, own * stride_kt)
            at_k += keys * stride_kt
            at_v = tl.where(keys < parent_length, parent_start * stride_vt, own * stride_vt)
            at_v += keys * stride_vt
        k = tl.load(k_ptr + at_k[:, None] + columns[None, :], mask=inside, other=0.0)
        v = tl.load(v_ptr + at_v[:, None] + columns[None, :], mask=inside, other=0.0)
        acc_new, peak_new, p = tile_sums(
            q, k, v, 0.0, 0.0, keys, positions, num_keys, scale, window, HAS_WINDOW, False
        )
        acc, peak, total = with_tile(acc, peak, total, acc_new, peak_new, p)
    return acc, peak, whole_total(tl.trans(total))


@jit
def ask_for_keys(
    k_ptr, v_ptr, tables_ptr, low, high, stride_block, B: tl.constexpr, E: tl.constexpr
):
    """Asks for the blocks of keys and values from `low` to `high` to come to the L2 cache."""
    LINES: tl.constexpr = B * E // 64  # of 128 bytes; the caller sees to a power of two
    line = tl.arange(0, LINES) * 64
    for block in tl.range(low // B, (high + B - 1) // B):
        at = tl.load(tables_ptr + block).to(tl.int64) * stride_block
        prefetch(k_ptr + at + line)
        prefetch(v_ptr + at + line)


@jit
def prefetch(at):
    """Asks for the cache lines at these places to come to the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
