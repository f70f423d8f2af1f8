"""Trying a reward on rows of a file before a run: rows in, rows with verdict and reason out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparring.errors import DataError
from sparring.rewards.calling import Verdict, call_all
from sparring.rewards.signatures import Samples
from sparring.rewards.verdicts import Reward

OWN_KEYS = ("completion", "prompt", "prefill", "completion_ids", "finish_reason", "group_id")
"""Keys of a row that are no data column. Only `completion` must be there."""


def judge_rows(
    reward: Reward, rows: Sequence[Mapping[str, Any]], *, explain: bool = False
) -> list[dict[str, Any]]:
    """Judge every row in one call; returns copies with `reward` (number or None) and `reason`
    added.

    A row has `completion` and whatever columns the reward takes, `reference` among them. Rows with
    the same `group_id`, or else the same `prompt`, are one group. explain adds the rest of what the
    reward logged for the row (for math: the extracted answer, where it stood, what decided). Raises
    DataError for a row without completion, RewardError where the reward cannot be called so.
    """
    if not rows:
        return []
    verdict = call_all([reward], samples_of_rows(rows), {})[reward.name]
    judged = []
    for index, row in enumerate(rows):
        value = verdict.values[index]
        extras = {name: values[index] for name, values in verdict.extras.items()}
        reason = extras.pop("reason", None) or _reason(reward.name, value, verdict)
        result = {**row, "reward": value, "reason": str(reason)}
        if explain:
            result["explain"] = extras
        judged.append(result)
    return judged


def samples_of_rows(rows: Sequence[Mapping[str, Any]]) -> Samples:
    """The batch that a reward sees for these rows."""
    for index, row in enumerate(rows):
        if not isinstance(row.get("completion"), str | list):
            raise DataError(
                f"row {index + 1} has no 'completion' (a string, or a list with one message); "
                f"its keys: {', '.join(row) or 'none'}"
            )
    names = dict.fromkeys(name for row in rows for name in row if name not in OWN_KEYS)
    has_ids = all(isinstance(row.get("completion_ids"), list) for row in rows)
    return Samples(
        prompts=[row.get("prompt", "") for row in rows],
        completions=[row["completion"] for row in rows],
        completion_ids=[list(row["completion_ids"]) for row in rows] if has_ids else None,
        prefills=[str(row.get("prefill") or "") for row in rows],
        finish_reasons=[row.get("finish_reason") for row in rows],
        group_ids=_group_ids(rows),
        columns={name: [row.get(name) for row in rows] for name in names},
    )


def _group_ids(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    seen: dict[str, int] = {}
    numbers = []
    for index, row in enumerate(rows):
        key = repr(row.get("group_id", row.get("prompt", index)))
        numbers.append(seen.setdefault(key, len(seen)))
    return numbers


def _reason(name: str, value: float | None, verdict: Verdict) -> str:
    if value is not None:
        return f"{name} returned {value:g}"
    if verdict.first_traceback:
        return f"error: {verdict.first_traceback.strip().splitlines()[-1]}"
    return ", ".join(verdict.reasons) or "None"
