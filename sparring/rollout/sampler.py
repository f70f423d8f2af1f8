"""How a token is drawn: counter-based noise, one exponential per vocabulary entry, one argmax.

The noise is Philox4x32-10 (Salmon et al., SC'11) in plain integer arithmetic, so that any device
can give the same integers. It is keyed by what is drawn (seed, policy version, prompt, sample,
position, vocabulary index) and never by when or beside what: tokens do not depend on batch, order
or budget.
No scheduling and no model lives here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sparring.errors import UserError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_SAMPLE_ID_KEY = (0x53504152, 0x52494E47)
_MIN_TEMPERATURE = 1e-3
_MAX_CHUNK_ENTRIES = 1 << 22

Word = TypeVar("Word", int, Tensor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled; raises UserError where a value is not allowed.

    temperature: 0 is greedy. top_p in (0, 1] and top_k (0: off) cut the distribution after the
    temperature. A completion has min_completion_tokens to max_completion_tokens tokens: before the
    minimum no end token is drawn and no stop string ends it. stop: strings that end a completion.
    seed: 0 to 2^64 - 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_completion_tokens: int
    min_completion_tokens: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _require_number("temperature", self.temperature)
        if self.temperature != 0 and not _MIN_TEMPERATURE <= self.temperature < math.inf:
            raise UserError(
                f"temperature is {self.temperature}; allowed are 0 (greedy) and finite numbers "
                f"from {_MIN_TEMPERATURE} up. Set temperature = 0 for the most likely token."
            )
        _require_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}; allowed is more than 0 and at most 1. Set top_p = 1.0 to "
                "keep the whole distribution."
            )
        _require_int("top_k", self.top_k, 0, None, "Set top_k = 0 to keep the whole distribution.")
        _require_int(
            "max_completion_tokens",
            self.max_completion_tokens,
            1,
            None,
            "Set how many tokens a completion may have.",
        )
        _require_int(
            "min_completion_tokens",
            self.min_completion_tokens,
            0,
            self.max_completion_tokens,
            "It cannot exceed max_completion_tokens.",
        )
        _require_int("seed", self.seed, 0, (1 << 64) - 1, "Choose another seed.")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise UserError(
                f"stop is {self.stop!r}; it must be a tuple of non-empty strings, for example "
                'stop = ("\\nQuestion:",).'
            )

    @property
    def logprob_temperature(self) -> float:
        """The temperature that recorded log-probabilities speak of: 1 for greedy."""
        return self.temperature if self.temperature > 0 else 1.0


def _require_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise UserError(f"{name} is {value!r}; it must be a number.")


def _require_int(name: str, value: object, low: int, high: int | None, remedy: str) -> None:
    allowed = f"an integer from {low}" + (" up" if high is None else f" to {high}")
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if not is_int or not low <= value or (high is not None and value > high):  # type: ignore[operator]
        raise UserError(f"{name} is {value!r}; it must be {allowed}. {remedy}")


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int]
) -> tuple[Word, Word, Word, Word]:
    """Four random 32-bit words of a 128-bit counter: Philox4x32 with 10 rounds.

    The counter's words are Python integers or int64 tensors that broadcast, each below 2^32. A
    product of two such words may wrap around in int64; its upper half is then still right after the
    mask.
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


def sample_id(policy_version: int, prompt_id: int, sample_index: int) -> tuple[int, int]:
    """The two 32-bit words that key the noise of one completion."""
    counter = (
        policy_version & _MASK,
        prompt_id & _MASK,
        (prompt_id >> 32) & _MASK,
        sample_index & _MASK,
    )
    first, second, _, _ = philox4x32(counter, _SAMPLE_ID_KEY)
    return first, second


def noise_words(seed: int, sample_ids_R2: Tensor, positions_R: Tensor, vocab_size: int) -> Tensor:
    """[R, V] int64 random words in [0, 2^32): one for each row and vocabulary index.

    sample_ids_R2 [R, 2] int64 from `sample_id`; positions_R [R] int64: the token's place in its
    completion, from 0. Word v of a row is output v % 4 of the counter (v // 4, position, sample id)
    under the key (seed's lower word, upper word).
    """
    num_rows = positions_R.shape[0]
    quads = torch.arange((vocab_size + 3) // 4, device=positions_R.device)
    counter = (
        quads[None, :],
        positions_R[:, None],
        sample_ids_R2[:, 0:1],
        sample_ids_R2[:, 1:2],
    )
    words = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=-1).view(num_rows, -1)[:, :vocab_size]


def log_exponential(words: Tensor) -> Tensor:
    """log E in float32 for exponentially distributed E, from 32-bit words.

    u = (word + 1/2) / 2^32 is never 0 and never 1; E = -log(1 - u). Computed in float64, so that
    both tails keep what 32 bits hold: E from 2^-33 to 23.
    """
    uniform = (words.double() + 0.5) * 2.0**-32
    return torch.log(-torch.log1p(-uniform)).float()


def sample_tokens(
    logits_RV: Tensor,
    sampling: Sampling,
    sample_ids_R2: Tensor,
    positions_R: Tensor,
    end_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row: (tokens [R] int64, logprobs [R] float32).

    The token is the argmax over v of logprob_v - log E_v, which draws from softmax(logits /
    temperature). The log-probability is that of the whole distribution, before top-k and top-p and
    whether or not end tokens were held back; greedy: of temperature 1. end_ids [number of ends]
    int64: tokens held back while positions_R is below min_completion_tokens.
    """
    num_rows, vocab_size = logits_RV.shape
    rows = max(1, _MAX_CHUNK_ENTRIES // vocab_size)
    if num_rows <= rows:
        return _sample_chunk(logits_RV, sampling, sample_ids_R2, positions_R, end_ids)
    parts = [
        _sample_chunk(
            logits_RV[start : start + rows],
            sampling,
            sample_ids_R2[start : start + rows],
            positions_R[start : start + rows],
            end_ids,
        )
        for start in range(0, num_rows, rows)
    ]
    return torch.cat([tokens for tokens, _ in parts]), torch.cat([lp for _, lp in parts])


def _sample_chunk(
    logits_RV: Tensor,
    sampling: Sampling,
    sample_ids_R2: Tensor,
    positions_R: Tensor,
    end_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits_RV = logits_RV.float()
    if sampling.logprob_temperature != 1.0:
        logits_RV = logits_RV / sampling.logprob_temperature
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    scores_RV = logprobs_RV
    if end_ids is not None and sampling.min_completion_tokens > 0:
        is_early_R = positions_R < sampling.min_completion_tokens
        scores_RV = logprobs_RV.clone()
        scores_RV[:, end_ids] = scores_RV[:, end_ids].masked_fill(is_early_R[:, None], -math.inf)
    if sampling.temperature > 0:
        if sampling.top_k or sampling.top_p < 1:
            scores_RV = _cut(scores_RV, top_k=sampling.top_k, top_p=sampling.top_p)
        words_RV = noise_words(sampling.seed, sample_ids_R2, positions_R, logits_RV.shape[1])
        scores_RV = scores_RV - log_exponential(words_RV)
    tokens_R = scores_RV.argmax(dim=-1)
    return tokens_R, logprobs_RV.gather(1, tokens_R[:, None])[:, 0]


def _cut(logprobs_RV: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Log-probabilities with -inf outside the top_k likeliest and the smallest set of share top_p.

    The likeliest token always stays. Of equals the lower index comes first.
    """
    sorted_RV, order_RV = logprobs_RV.sort(dim=-1, descending=True, stable=True)
    is_cut_RV = torch.zeros_like(sorted_RV, dtype=torch.bool)
    if top_p < 1:
        probs_RV = torch.softmax(sorted_RV.double(), dim=-1)
        is_cut_RV = (probs_RV.cumsum(dim=-1) - probs_RV) >= top_p
    if top_k:
        is_cut_RV[:, top_k:] = True
    is_cut_RV[:, 0] = False
    is_cut_RV = torch.empty_like(is_cut_RV).scatter_(1, order_RV, is_cut_RV)
    return logprobs_RV.masked_fill(is_cut_RV, -math.inf)


def end_id_tensor(stop_ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
    """The end tokens that the vocabulary holds, [number of ends] int64, or None without any."""
    known = sorted({token for token in stop_ids if 0 <= token < vocab_size})
    return torch.tensor(known, dtype=torch.int64, device=device) if known else None
