"""How a token is drawn: counter-based noise, one exponential per vocabulary entry, one argmax.

The noise (kernels/philox.py) is keyed by what is drawn (seed, policy version, prompt, sample,
position, vocabulary index) and never by when or beside what: tokens do not depend on batch, order
or budget. This file holds the settings; the arithmetic is kernels/sampling.py.
No scheduling and no model lives here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.errors import UserError
from sparring.kernels.cut import CutRules
from sparring.kernels.philox import philox4x32
from sparring.kernels.sampling import DrawRules, draw_tokens

_MASK = 0xFFFFFFFF
_SAMPLE_ID_KEY = (0x53504152, 0x52494E47)
_MIN_TEMPERATURE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled; raises UserError where a value is not allowed.

    temperature: 0 is greedy. top_k (0: off), top_p in (0, 1] and min_p in [0, 1) cut the
    distribution after the temperature (kernels/cut.py). A completion has min_completion_tokens to
    max_completion_tokens tokens: before the minimum no end token is drawn and no stop string ends
    it. stop: strings that end a completion. seed: 0 to 2^64 - 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
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
        _require_number("min_p", self.min_p)
        if not 0 <= self.min_p < 1:
            raise UserError(
                f"min_p is {self.min_p}; allowed is at least 0 and less than 1. Set min_p = 0.0 to "
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
    def is_cut(self) -> bool:
        """Whether top_k, top_p or min_p keeps tokens from being drawn."""
        is_whole = self.top_k == 0 and self.top_p == 1 and self.min_p == 0
        return self.temperature > 0 and not is_whole

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


def sample_tokens(
    logits_RV: Tensor,
    sampling: Sampling,
    sample_ids_R2: Tensor,
    positions_R: Tensor,
    end_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one token a row: (tokens [R] int64, logprobs [R] float32).

    The token is the argmax over v of logits_v / temperature - log E_v, which draws from
    softmax(logits / temperature). The log-probability is that of the whole distribution, before any
    cut and whether or not end tokens were held back; greedy: of temperature 1. end_ids [number of
    ends] int64: tokens held back while positions_R is below min_completion_tokens.
    """
    rules = draw_rules(sampling, len(logits_RV), end_ids, logits_RV.device)
    return draw_tokens(logits_RV, sample_ids_R2, positions_R, rules)


def draw_rules(
    sampling: Sampling, num_rows: int, end_ids: Tensor | None, device: torch.device
) -> DrawRules:
    """What the sampling kernel reads, the same for `num_rows` rows, on the device.

    end_ids [number of ends] int64: tokens held back before min_completion_tokens.
    """
    inverse = 1.0 / sampling.temperature if sampling.temperature > 0 else 0.0
    words = [sampling.seed & _MASK, sampling.seed >> 32]
    cut = None
    if sampling.is_cut:
        cut = CutRules(
            top_k_R=torch.full((num_rows,), sampling.top_k, device=device),
            top_p_R=torch.full((num_rows,), sampling.top_p, dtype=torch.float64, device=device),
            min_p_R=torch.full((num_rows,), sampling.min_p, dtype=torch.float32, device=device),
        )
    if end_ids is None:
        end_ids = torch.empty(0, dtype=torch.int64)
    return DrawRules(
        inverse_temperatures_R=torch.full((num_rows,), inverse, dtype=torch.float32, device=device),
        seed_words_2=torch.tensor(words, dtype=torch.int64, device=device),
        held_ids_H=end_ids.to(device),
        min_draws_R=torch.full((num_rows,), sampling.min_completion_tokens, device=device),
        cut=cut,
    )


def end_id_tensor(stop_ids: Sequence[int], vocab_size: int, device: torch.device) -> Tensor | None:
    """The end tokens that the vocabulary holds, [number of ends] int64, or None without any."""
    known = sorted({token for token in stop_ids if 0 <= token < vocab_size})
    return torch.tensor(known, dtype=torch.int64, device=device) if known else None
