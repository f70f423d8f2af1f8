"""Rewards that look at nothing but the length of a completion, in tokens (its end token included).

Two of them need to know which completions are right: from the reward that decides on correctness
(`judged`), or, outside a run, from a column `correct`. Length shaping invites repetition; pair it
with `repetition`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparring.errors import RewardError

DEFAULT_BUFFER_SHARE = 5
"""soft_overlong's buffer is a fifth of the limit where none is given, as in DAPO (4,096 of 20,480).
"""


def soft_overlong(
    completion_ids: Sequence[Sequence[int]],
    trainer_state: Mapping[str, Any] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    max_tokens: int = 0,
    buffer_tokens: int = 0,
) -> list[float]:
    """DAPO's soft punishment of length (arXiv 2503.14476, eq. 13).

    0 up to max_tokens - buffer_tokens, from there linearly down to -1 at max_tokens, -1 beyond.
    max_tokens 0: the run's limit of completion tokens. buffer_tokens 0: a fifth of max_tokens.
    """
    limit = _limit("soft_overlong", max_tokens, trainer_state)
    buffer = buffer_tokens or max(1, limit // DEFAULT_BUFFER_SHARE)
    if not 0 < buffer <= limit:
        raise RewardError(
            f"reward 'soft_overlong': buffer_tokens = {buffer} is not allowed; "
            f"it lies between 1 and max_tokens = {limit}"
        )
    lengths = [len(ids) for ids in completion_ids]
    values = [min(0.0, max(-1.0, (limit - buffer - length) / buffer)) for length in lengths]
    if log_extra is not None:
        log_extra("reason", [f"{length} of {limit} tokens, buffer {buffer}" for length in lengths])
    return values


def cosine_length(
    completion_ids: Sequence[Sequence[int]],
    judged: Mapping[str, Sequence[float | None]] | None = None,
    correct: Sequence[Any] | None = None,
    trainer_state: Mapping[str, Any] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    max_tokens: int = 0,
    correct_by: str = "",
    correct_from: float = 1.0,
    right_at_zero: float = 1.0,
    right_at_limit: float = 0.5,
    wrong_at_zero: float = -1.0,
    wrong_at_limit: float = -0.5,
) -> list[float | None]:
    """A half cosine over the length, from the value at 0 tokens to the value at the limit (arXiv
    2502.03373).

    Right and wrong completions have their own pair of values; lengths beyond the limit count as the
    limit. None where correctness is not known. correct_by: the reward that decides (default: the
    run's required or first reward); a completion is right from `correct_from` on.
    """
    limit = _limit("cosine_length", max_tokens, trainer_state)
    right = _correctness("cosine_length", judged, correct, correct_by, correct_from)
    values: list[float | None] = []
    notes = []
    for ids, is_right in zip(completion_ids, right, strict=True):
        length = min(len(ids), limit)
        if is_right is None:
            values.append(None)
            notes.append("not known whether it is right")
            continue
        start, end = (
            (right_at_zero, right_at_limit) if is_right else (wrong_at_zero, wrong_at_limit)
        )
        values.append(end + (start - end) * (1.0 + math.cos(math.pi * length / limit)) / 2.0)
        notes.append(f"{'right' if is_right else 'wrong'}, {len(ids)} of {limit} tokens")
    if log_extra is not None:
        log_extra("reason", notes)
    return values


def group_length(
    completion_ids: Sequence[Sequence[int]],
    group_ids: Sequence[int],
    judged: Mapping[str, Sequence[float | None]] | None = None,
    correct: Sequence[Any] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    correct_by: str = "",
    correct_from: float = 1.0,
) -> list[float | None]:
    """Shorter than the rest of its group is better (Kimi k1.5, arXiv 2501.12599).

    0.5 - (length - shortest) / (longest - shortest) over the judged samples of the group for right
    completions; wrong ones get that or 0, whichever is less. A group of one length gets 0. None
    where correctness is not known.
    """
    right = _correctness("group_length", judged, correct, correct_by, correct_from)
    lengths: dict[int, list[int]] = {}
    for ids, group, is_right in zip(completion_ids, group_ids, right, strict=True):
        if is_right is not None:
            lengths.setdefault(group, []).append(len(ids))
    values: list[float | None] = []
    notes = []
    for ids, group, is_right in zip(completion_ids, group_ids, right, strict=True):
        if is_right is None:
            values.append(None)
            notes.append("not known whether it is right")
            continue
        shortest, longest = min(lengths[group]), max(lengths[group])
        spread = longest - shortest
        place = 0.5 - (len(ids) - shortest) / spread if spread else 0.0
        values.append(place if is_right else min(0.0, place))
        label = "right" if is_right else "wrong"
        notes.append(f"{label}, {len(ids)} tokens in a group of {shortest} to {longest}")
    if log_extra is not None:
        log_extra("reason", notes)
    return values


def _limit(name: str, max_tokens: int, trainer_state: Mapping[str, Any] | None) -> int:
    limit = max_tokens or int((trainer_state or {}).get("max_completion_tokens", 0))
    if limit < 1:
        raise RewardError(
            f"reward '{name}': max_tokens = {limit}; outside a run it needs a positive max_tokens"
        )
    return limit


def _correctness(
    name: str,
    judged: Mapping[str, Sequence[float | None]] | None,
    correct: Sequence[Any] | None,
    correct_by: str,
    correct_from: float,
) -> list[bool | None]:
    if judged:
        decisive = correct_by or next(iter(judged))
        if decisive not in judged:
            raise RewardError(
                f"reward '{name}': correct_by = '{correct_by}' is no other reward of this run; "
                f"the others: {', '.join(judged)}"
            )
        return [None if value is None else value >= correct_from for value in judged[decisive]]
    if correct is None:
        raise RewardError(
            f"reward '{name}' needs a reward that decides on correctness beside it, such as math, "
            "or a column 'correct'"
        )
    return [None if value is None else bool(value) for value in correct]
