"""What a step of GRPO tells: numbers for the log, rows for the rollout files, and warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparring.algorithms.advantages import has_signal
from sparring.rewards.verdicts import RewardReport
from sparring.rollout.engine import EngineStats
from sparring.types import Group

STEPS_WITHOUT_SIGNAL = 20
TRUNCATED_SHARE = 0.5


def rollout_metrics(
    groups: Sequence[Group], reports: Mapping[str, RewardReport], stats: EngineStats
) -> dict[str, float]:
    """Means over the step's completions: reward and its parts, lengths, shares, engine figures."""
    rewards = torch.cat([group.rewards_G for group in groups])
    judged = rewards[~rewards.isnan()]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = torch.tensor([float(len(rollout.token_ids)) for rollout in rollouts])
    metrics = {
        "reward": float(judged.mean()) if len(judged) else math.nan,
        "reward_std": float(judged.std(correction=0)) if len(judged) else math.nan,
        "completion_tokens": float(lengths.mean()),
        "max_completion_tokens": float(lengths.max()),
        "truncated": sum(r.finish_reason == "length" for r in rollouts) / len(rollouts),
        "groups": len(groups),
        "groups_without_signal": sum(not has_signal(group) for group in groups),
        "not_judged": float(rewards.isnan().sum()),
        "rows_in_flight": stats.mean_rows,
        "preemptions": stats.num_preemptions,
        "recomputed_tokens": stats.num_recomputed_tokens,
    }
    for name, report in reports.items():
        metrics[f"reward/{name}"] = report.mean
        metrics |= {f"reward/{name}/{key}": value for key, value in report.metrics.items()}
    return metrics


def rollout_rows(
    groups: Sequence[Group], advantages: Sequence[Tensor] | None
) -> list[dict[str, Any]]:
    """One JSON row a completion: prompt, completion, rewards by name, advantage, finish reason."""
    rows = []
    for index, group in enumerate(groups):
        for sample, rollout in enumerate(group.rollouts):
            parts = {name: _number(part[sample]) for name, part in group.reward_parts.items()}
            rows.append(
                {
                    "prompt_id": group.prompt.id,
                    "sample": rollout.sample_index,
                    "prompt": group.prompt.text,
                    "prefill": group.prompt.prefill,
                    "completion": rollout.text,
                    "reward": _number(group.rewards_G[sample]),
                    "rewards": parts,
                    "advantage": None if advantages is None else float(advantages[index][sample]),
                    "finish_reason": rollout.finish_reason,
                    "num_tokens": len(rollout.token_ids),
                    "policy_version": rollout.policy_version,
                    "reference": group.prompt.columns.get("reference"),
                }
            )
    return rows


def _number(value: Tensor) -> float | None:
    return None if bool(value.isnan()) else float(value)


class Watch:
    """Warnings about a run that looks alive but cannot learn, each said once per spell.

    by_group: a completion is measured against its own group, so that groups need a signal.
    """

    def __init__(self, *, by_group: bool = True) -> None:
        self._by_group = by_group
        self._steps_without_signal = 0
        self._truncation_said = False

    def look(self, groups: Sequence[Group], metrics: Mapping[str, float]) -> list[str]:
        """The warnings that this step gives rise to."""
        warnings = []
        if not self._by_group or any(has_signal(group) for group in groups):
            self._steps_without_signal = 0
        else:
            self._steps_without_signal += 1
        if self._steps_without_signal == STEPS_WITHOUT_SIGNAL:
            mean = metrics["reward"]
            warnings.append(
                f"no group had a signal for {STEPS_WITHOUT_SIGNAL} steps: all completions of a"
                f" prompt earned the same (mean reward {mean:.3g}), so nothing is learned; take"
                " easier problems if rewards are low, harder ones if they are high, a larger"
                " rollout.group_size, or look at what `sparring reward` says of a few completions"
            )
        too_long = metrics["truncated"] > TRUNCATED_SHARE
        if too_long and not self._truncation_said:
            warnings.append(
                f"{metrics['truncated']:.0%} of the completions were cut by the length limit; raise"
                " rollout.max_completion_tokens, or ask for shorter answers"
            )
        self._truncation_said = too_long
        return warnings
