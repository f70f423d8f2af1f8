"""`sparring pairs`: pairs for DPO out of a run's own rollouts and rewards.

Of each prompt of a step the completion with the highest reward is chosen and the one with the
lowest rejected. Prompts are written as the run's data has them, so that a dpo recipe with the same
template asks the same question again. Nothing is trained here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring.data.chat import parse_messages
from sparring.data.rows import Rows, load_rows
from sparring.errors import DataError, RunDirectoryError
from sparring.recipe import locate
from sparring.recipe.source import read_source
from sparring.runlog import holds_run, read_rollouts, rollout_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class PairReport:
    """The rows of pairs, and why other groups gave none.

    rows: prompt, chosen, rejected, their rewards, prompt_id and step. num_groups: prompts of steps
    looked at. num_close: groups whose best and worst differ by no more than the margin. num_alike:
    groups whose best and worst are the same text. num_small: groups with fewer than two completions
    that were judged and ended by themselves.
    """

    rows: tuple[dict[str, Any], ...]
    num_groups: int
    num_close: int
    num_alike: int
    num_small: int

    def line(self) -> str:
        """What became of the groups, for people."""
        reasons = {
            "the same reward, or within the margin": self.num_close,
            "the same text": self.num_alike,
            "fewer than two judged and finished completions": self.num_small,
        }
        left_out = [f"{number:,} with {reason}" for reason, number in reasons.items() if number]
        rest = f"; left out: {', '.join(left_out)}" if left_out else ""
        return f"{len(self.rows):,} pairs of {self.num_groups:,} groups{rest}"


def pairs_of_run(run: str, *, margin: float = 0.0) -> PairReport:
    """The pairs in the rollouts of a run directory, in the order of its steps.

    margin: the best reward must be higher than the worst by more than this. A completion that was
    cut by the length limit, was not judged or has no text is left out: DPO would add an end token
    to it. Raises RunDirectoryError where there is no run or it has no rollouts, DataError where the
    run's data is gone or has changed.
    """
    if not (math.isfinite(margin) and margin >= 0):
        raise DataError(f"margin is {margin}; it is a number of at least 0")
    steps = rollout_steps(run)
    if not holds_run(run) or not steps:
        what = "holds no rollouts (sft and dpo write none)" if holds_run(run) else "holds no run"
        raise RunDirectoryError(
            f"{Path(run).absolute()} {what}; give the directory of a run of grpo or ppo"
        )
    rows, column = _data_of_run(run)
    found: list[dict[str, Any]] = []
    counts = {"groups": 0, "close": 0, "alike": 0, "small": 0}
    for step in steps:
        for group in _groups(read_rollouts(run, step)):
            counts["groups"] += 1
            ended = [row for row in group if _is_usable(row)]
            if len(ended) < 2:
                counts["small"] += 1
                continue
            best = max(ended, key=lambda row: float(row["reward"]))
            worst = min(ended, key=lambda row: float(row["reward"]))
            if float(best["reward"]) - float(worst["reward"]) <= margin:
                counts["close"] += 1
            elif best["completion"].strip() == worst["completion"].strip():
                counts["alike"] += 1
            else:
                found.append(_pair(best, worst, _prompt(rows, column, best), step))
    return PairReport(
        rows=tuple(found),
        num_groups=counts["groups"],
        num_close=counts["close"],
        num_alike=counts["alike"],
        num_small=counts["small"],
    )


def _data_of_run(run: str) -> tuple[Rows, str]:
    """The training rows of the run's recipe, and the column of their prompts."""
    tables = read_source(run).tables
    data = tables["data"]
    rows = load_rows(locate(data["train"]), split=data["split"], bad_rows=data["bad_rows"])
    return rows, str(data["prompt"])


def _groups(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(int(row["prompt_id"]), []).append(row)
    yield from groups.values()


def _is_usable(row: Mapping[str, Any]) -> bool:
    is_judged = row["reward"] is not None
    return is_judged and row["finish_reason"] == "stop" and bool(row["completion"].strip())


def _prompt(rows: Rows, column: str, rollout: Mapping[str, Any]) -> Any:
    """The prompt as the data has it; DataError where it is not what the rollout answered."""
    index = int(rollout["prompt_id"])
    value = rows[index].get(column) if index < len(rows) else None
    if value is not None:
        is_text = isinstance(value, str)
        said = value if is_text else parse_messages(value)[-1]["content"]
        if said.strip() in rollout["prompt"]:
            return value
    raise DataError(
        f"row {index + 1} of {rows.source} is not what the run asked in its prompt {index}: the"
        " data has changed since; bring back the file that the run's recipe.toml names"
    )


def _pair(
    best: Mapping[str, Any], worst: Mapping[str, Any], prompt: Any, step: int
) -> dict[str, Any]:
    def side(row: Mapping[str, Any]) -> Any:
        text = row.get("prefill", "") + row["completion"]
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    return {
        "prompt": prompt,
        "chosen": side(best),
        "rejected": side(worst),
        "reward_chosen": best["reward"],
        "reward_rejected": worst["reward"],
        "prompt_id": best["prompt_id"],
        "step": step,
    }
