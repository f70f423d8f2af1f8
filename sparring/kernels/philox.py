"""Counter-based noise: Philox4x32-10 in integers, and the exponential variable made of a word.

Philox4x32-10 (Salmon et al., SC'11) maps a 128-bit counter and a 64-bit key to four 32-bit words;
the torch form and the Triton form give the same integers on every device. A word w becomes u = (w +
1/2) 2^-32, never 0 and never 1, and E = -log(1 - u), from 2^-33 to 23: nothing that 32 bits hold is
lost at either end. What keys the noise is decided by the callers.

The torch form of E works in float64. The Triton form works in float32 without losing an end: below
1/2, u carries its 24 bits, v = 1 - u is rounded once, and what the rounding took, (1 - v) - u, is
exact and enters to first order: E = -(log v + lost / v). From 1/2 up, 1 - u is made from the word's
complement, an integer, so that it keeps its own 24 bits down to 2^-33. Either way E's relative
error is below 2^-20.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparring.kernels import jit, tl

__all__ = ["exponential", "log_exponential", "noise_words", "philox4x32", "philox_words"]

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
def philox_words(quads, position, id0, id1, key0, key1):
    """The four words of the counters (quads, position, id0, id1), uint32; all words are uint64."""
    c0 = quads.to(tl.uint64)
    c1 = position
    c2 = id0
    c3 = id1
    mask: tl.constexpr = 0xFFFFFFFF
    for i in tl.static_range(10):
        product0 = c0 * 0xD2511F53
        product1 = c2 * 0xCD9E8D57
        c0 = (product1 >> 32) ^ c1 ^ ((key0 + i * 0x9E3779B9) & mask)
        c2 = (product0 >> 32) ^ c3 ^ ((key1 + i * 0xBB67AE85) & mask)
        c1 = product1 & mask
        c3 = product0 & mask
    return c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32)


@jit
def uniform(words):
    """u = (word + 1/2) 2^-32 in float32; for words above 2^31 the last bits are rounded off."""
    return words.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@jit
def exponential(words):
    """E = -log(1 - u) in float32 from uint32 words, to a relative 2^-20 at both ends."""
    is_upper = words >= 0x80000000
    u = uniform(words)
    v = tl.where(is_upper, uniform(words ^ 0xFFFFFFFF), 1.0 - u)
    lost = tl.where(is_upper, 0.0, (1.0 - v) - u)
    return -(tl.log(v) + lost / v)
