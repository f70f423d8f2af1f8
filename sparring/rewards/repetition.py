"""A penalty for text that repeats itself: repeated n-grams, and a loop at the end.

Counted on token ids, so that Chinese, code and English are treated alike; on text where there are
no ids, with single characters as units in scripts without spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

from sparring.errors import RewardError
from sparring.rewards.texts import completion_text

LOOP_WINDOW = 512
MIN_LOOP_UNITS = 48
MIN_LOOP_COPIES = 3

_UNIT = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f]|[^\W_]+|[^\w\s]"
)


def repetition(
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    n: int = 20,
    allowance: float = 0.15,
    max_penalty: float = -1.0,
    unit: Literal["tokens", "text"] = "tokens",
) -> list[float]:
    """0 for text that does not repeat itself, down to `max_penalty` for a loop.

    The share of n-grams that occurred before, beyond `allowance`, scaled to reach 1 where
    everything repeats; or the share of the last 512 units that one repeated period covers, if that
    is more. Short n-grams would punish length itself, hence n = 20. Fewer than n units give 0.
    """
    if n < 1 or not 0.0 <= allowance < 1.0 or max_penalty > 0.0:
        raise RewardError(
            f"reward 'repetition': n = {n}, allowance = {allowance}, max_penalty = {max_penalty}; "
            "allowed: n >= 1, 0 <= allowance < 1, max_penalty <= 0"
        )
    if unit == "tokens" and completion_ids is None:
        raise RewardError(
            "reward 'repetition' needs 'completion_ids', or unit = \"text\" to count words and "
            "characters"
        )
    values, notes = [], []
    for index, completion in enumerate(completions):
        units: Sequence[Hashable]
        if unit == "tokens" and completion_ids is not None:
            units = completion_ids[index]
        else:
            units = text_units(completion_text(completion))
        repeated, loop = repeated_share(units, n), loop_share(units)
        excess = max(0.0, repeated - allowance) / (1.0 - allowance)
        values.append(max_penalty * max(excess, loop if len(units) >= n else 0.0) + 0.0)
        notes.append(f"repeated {n}-grams {repeated:.2f}, loop at the end {loop:.2f}")
    if log_extra is not None:
        log_extra("reason", notes)
    return values


def repeated_share(units: Sequence[Hashable], n: int) -> float:
    """1 - distinct / all n-grams, 0 for fewer than n units."""
    total = len(units) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({tuple(units[i : i + n]) for i in range(total)}) / total


def loop_share(units: Sequence[Hashable]) -> float:
    """Share of the last 512 units that the best single period covers, counted back from the end.

    At least three copies and 48 units, else 0.
    """
    tail = list(units[-LOOP_WINDOW:])[::-1]
    best = 0
    for period, matched in enumerate(_prefix_matches(tail)):
        covered = period + matched
        if period and covered >= MIN_LOOP_COPIES * period and covered >= MIN_LOOP_UNITS:
            best = max(best, covered)
    return best / len(tail) if tail else 0.0


def text_units(text: str) -> list[str]:
    """Words, and single characters of scripts that write without spaces; punctuation apart."""
    return _UNIT.findall(text)


def _prefix_matches(units: Sequence[Hashable]) -> list[int]:
    """For each start, how many units match the beginning (the Z function, linear time)."""
    matches = [0] * len(units)
    left = right = 0
    for i in range(1, len(units)):
        if i < right:
            matches[i] = min(right - i, matches[i - left])
        while i + matches[i] < len(units) and units[matches[i]] == units[i + matches[i]]:
            matches[i] += 1
        if i + matches[i] > right:
            left, right = i, i + matches[i]
    return matches
