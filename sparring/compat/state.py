"""What a script reads of a run while and after it: state, history and the outcome of train().

Everything is taken from the run directory's own records; nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from sparring.runlog import StepRecord, read_evaluations, read_steps

NAMES = {
    "gradient_norm": "grad_norm",
    "completion_tokens": "completions/mean_length",
    "max_completion_tokens": "completions/max_length",
    "truncated": "completions/clipped_ratio",
    "clip_low_fraction": "clip_ratio/low_mean",
    "clip_high_fraction": "clip_ratio/high_mean",
    "mismatch_mean": "sampling/sampling_logp_difference/mean",
    "mismatch_max": "sampling/sampling_logp_difference/max",
    "logprobs/chosen": "logps/chosen",
    "logprobs/rejected": "logps/rejected",
}
"""Our names of numbers -> TRL's; others keep theirs."""


NO_UPDATE = {"loss": 0.0, "grad_norm": 0.0}
"""What a step had in which no group had a signal: nothing was changed."""


class TrainOutput(NamedTuple):
    """What train() returns, as in transformers."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@dataclass
class TrainerState:
    """Where a run stands: steps done and in all, epochs, and a row for each logged step."""

    global_step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    num_train_epochs: float = 0.0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    is_world_process_zero: bool = True
    is_local_process_zero: bool = True


def history(
    run: Path,
    *,
    every: int,
    is_first_logged: bool,
    steps_per_epoch: float,
    updates_per_step: int = 1,
) -> list[dict[str, Any]]:
    """Rows of log_history: the means over each window of `every` steps, and the evaluations.

    every 0: no rows of steps. updates_per_step: a row's "step" counts updates, as TRL's does.
    """
    records = read_steps(run)
    rows: list[dict[str, Any]] = []
    window: list[StepRecord] = []
    for record in records:
        window.append(record)
        is_first = is_first_logged and record.step == 1
        if every and (record.step % every == 0 or is_first):
            row = _means(window)
            place = record.step * updates_per_step
            rows.append({**row, "epoch": record.step / steps_per_epoch, "step": place})
            window = []
    for evaluation in read_evaluations(run):
        values = {
            f"eval_{NAMES.get(name, name)}": value
            for name, value in evaluation.values.items()
            if isinstance(value, int | float)
        }
        step = evaluation.step
        place = step * updates_per_step
        rows.append({**values, "epoch": step / steps_per_epoch, "step": place})
    return sorted(rows, key=lambda row: row["step"])


def _means(window: Sequence[StepRecord]) -> dict[str, Any]:
    """A window's numbers under TRL's names; a number that no step had is None."""
    totals: dict[str, list[float]] = {}
    for record in window:
        for name, value in _renamed(record.metrics).items():
            totals.setdefault(name, [])
            if value is not None:
                totals[name].append(value)
    found: dict[str, Any] = {
        name: sum(values) / len(values) if values else None for name, values in totals.items()
    }
    return NO_UPDATE | found


def _renamed(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    renamed: dict[str, float | None] = {}
    for name, value in metrics.items():
        if name.startswith("reward/"):
            reward, _, rest = name.removeprefix("reward/").partition("/")
            renamed[rest if rest else f"rewards/{reward}/mean"] = value
        else:
            renamed[NAMES.get(name, name)] = value
    groups, silent = metrics.get("groups"), metrics.get("groups_without_signal")
    if groups and silent is not None:
        renamed["frac_reward_zero_std"] = silent / groups
    return renamed


def mean_loss(run: Path) -> float:
    """The mean of the steps' losses; NaN where no step had one."""
    losses = [record.metrics.get("loss") for record in read_steps(run)]
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else math.nan
