"""Counter-based noise: Philox4x32-10 in integers, and the exponential variable made of a word.

Philox4x32-10 (Salmon et al., SC'11) maps a 128-bit counter and a 64-bit key to four 32-bit words;
the torch form and the Triton form give the same integers on every device. A word w becomes u = (w +
1/2) 2^-32, never 0 and never 1, and E = -log(1 - u), from 2^-33 to 23: nothing that 32 bits hold is
lost at either end. What keys the noise is decided by the callers.

The torch form of E works in float64. The Triton form works in float32 without losing an end: below
1/4 it is u times a polynomial in u (relative error 5e-9, beside rounding), so that E is as exact as
u; above, -ln 2 log2(1 - u) with the hardware's logarithm, whose absolute error of 2^-22 meets an E
of at least 0.28. From 1/2 up, 1 - u is made from the word's complement, an integer, and so keeps 24
bits down to 2^-33. E's relative error is below 2^-20 everywhere.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparring.kernels import INTERPRETED, jit, tl

__all__ = [
    "exp2_fast",
    "exponential",
    "log2_fast",
    "log_exponential",
    "noise_words",
    "philox4x32",
    "philox_words",
    "uniform",
]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Word = TypeVar("Word", int, Tensor)


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]
) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words of a 128-bit counter: Philox4x32 with 10 rounds.

    The words of counter and key are Python integers or int64 tensors that broadcast, each below
    2^32. A product of two such words may wrap around in int64; its upper half is then still right
    after the mask.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) & _MASK) ^ (c1 ^ k0)
        c2 = ((product0 >> 32) & _MASK) ^ (c3 ^ k1)
        c1 = product1 & _MASK
        c3 = product0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise_words(
    key: tuple[int, int] | tuple[Tensor, Tensor],
    sample_ids_R2: Tensor,
    positions_R: Tensor,
    vocab_size: int,
) -> Tensor:
    """[R, V] int64 random words in [0, 2^32): one for each row and vocabulary index.

    key: the seed's lower and upper word. sample_ids_R2 [R, 2] int64; positions_R [R] int64: the
    token's place in its completion, from 0. Word v of a row is output v % 4 of the counter (v // 4,
    position, sample id).
    """
    num_rows = positions_R.shape[0]
    quads = torch.arange((vocab_size + 3) // 4, device=positions_R.device)
    counter = (
        quads[None, :],
        positions_R[:, None],
        sample_ids_R2[:, 0:1],
        sample_ids_R2[:, 1:2],
    )
    words = philox4x32(counter, key)  # type: ignore[arg-type]
    return torch.stack(words, dim=-1).view(num_rows, -1)[:, :vocab_size]


def log_exponential(words: Tensor) -> Tensor:
    """log E in float32 for exponentially distributed E, from 32-bit words; computed in float64."""
    uniform = (words.double() + 0.5) * 2.0**-32
    return torch.log(-torch.log1p(-uniform)).float()


@jit
def wrapped_sum(word, constant: tl.constexpr):
    """word + constant modulo 2^32, uint32."""
    return (word.to(tl.uint64) + constant).to(tl.uint32)


@jit
def philox_words(quads, position, id0, id1, key0, key1):
    """The four words of the counters (quads, position, id0, id1), all uint32."""
    c0 = quads.to(tl.uint32)
    c1 = position
    c2 = id0
    c3 = id1
    for i in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ wrapped_sum(key0, i * 0x9E3779B9)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ wrapped_sum(key1, i * 0xBB67AE85)
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
    return c0, c1, c2, c3


@jit
def uniform(words):
    """u = (word + 1/2) 2^-32 in float32; for words above 2^31 the last bits are rounded off."""
    return words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@jit
def log2_fast(x):
    """log2 to an absolute 2^-22 in (1/2, 2) and a relative 2^-22 elsewhere."""
    if INTERPRETED:
        return tl.log2(x)
    else:  # noqa: RET505 - Triton wants one type a branch
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def exp2_fast(x):
    """2^x to a relative 2^-22; 0 below 2^-126."""
    if INTERPRETED:
        return tl.exp2(x)
    else:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@jit
def exponential(words):
    """E = -log(1 - u) in float32 from uint32 words, to a relative 2^-20 at both ends."""
    is_upper = words >= 0x80000000
    f = uniform(tl.where(is_upper, words ^ 0xFFFFFFFF, words))
    series = 0.3339090645313263 * f + 0.08952038735151291
    series = series * f + 0.21425245702266693
    series = series * f + 0.2486901879310608
    series = series * f + 0.3333897590637207
    series = series * f + 0.49999910593032837
    series = series * f + 1.0
    other = log2_fast(tl.where(is_upper, f, 1.0 - f)) * -0.6931471805599453
    return tl.where(words < 0x40000000, series * f, other)
