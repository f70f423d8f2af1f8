"""From rollouts to groups with rewards: every reward function is called here and nowhere else.

All functions of a batch run side by side, each under its own wall clock. What a function raises,
does not answer in time, or answers with NaN or infinity becomes None for those samples, counted by
reward and reason; an answer that breaks the contract stops the run. How a reward is made is
load_reward; how a single call is made is in calling.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparring.errors import RewardError, RunError
from sparring.rewards.calling import Runtime, Verdict, call_all
from sparring.rewards.registry import RewardFunction, find
from sparring.rewards.signatures import Samples, fit
from sparring.types import Group, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward function with its place in the recipe.

    gate: the name of another reward; this one counts only where that one is positive. required: a
    sample that this reward cannot judge has no reward at all. timeout_seconds: wall clock of one
    call over the whole batch. isolate: the function lives in a worker process of its own, which
    alone imports it. source: the name as the recipe writes it. is_fitted: the knobs are already
    part of `function` (an object built from them, or a worker that holds them). is_optional: where
    it has no value the others stand in for it, and it may have none in a whole batch. is_inline: it
    is called in the caller's own thread and without a clock, for functions that need the main
    thread.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    required: bool = False
    gate: str = ""
    timeout_seconds: float = 30.0
    isolate: bool = False
    knobs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    is_fitted: bool = False
    is_optional: bool = False
    is_inline: bool = False
    runtime: Runtime = field(default_factory=Runtime, repr=False)

    def close(self) -> None:
        """End what the reward keeps running: event loop, worker processes."""
        self.runtime.close()
        close = getattr(self.function, "close", None)
        if callable(close):
            close()


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """What one reward did in one batch.

    mean, std: over the judged samples (NaN where there are none). reasons: how many samples got
    None, by reason. first_traceback: of the first error, "" if there was none. extras, metrics:
    what the function logged through log_extra (one entry a sample) and log_metric.
    """

    name: str
    num_samples: int
    num_judged: int
    mean: float
    std: float
    seconds: float
    reasons: Mapping[str, int]
    first_traceback: str
    metrics: Mapping[str, float]
    extras: Mapping[str, list[Any]]

    def warning(self) -> str:
        """One line on what was not judged, "" where everything was."""
        if not self.reasons:
            return ""
        counted = ", ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        missing = self.num_samples - self.num_judged
        return f"reward '{self.name}' gave no verdict on {missing} of {self.num_samples}: {counted}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Groups with rewards, and a report by reward name."""

    groups: list[Group]
    reports: dict[str, RewardReport]


def load_reward(
    name: str,
    *,
    knobs: Mapping[str, Any] | None = None,
    weight: float = 1.0,
    required: bool = False,
    gate: str = "",
    timeout_seconds: float = 30.0,
    isolate: bool = False,
) -> Reward:
    """Find a reward by name ("math") or place ("file.py:function") and fit it with its knobs.

    A class is built here, from its knobs. With isolate the function is imported by its worker
    process alone. Raises RewardError for a name that leads nowhere, an unknown knob or a value of
    the wrong type.
    """
    if timeout_seconds <= 0:
        raise RewardError(f"reward '{name}': timeout_seconds = {timeout_seconds} must be positive")
    knobs = dict(knobs or {})
    runtime = Runtime()
    found: RewardFunction | None = None
    function: RewardFunction
    if isolate:
        short, function = runtime.isolate(name, knobs)
    else:
        found, short = find(name)
        function = fit(short, found, knobs)
    return Reward(
        name=short,
        function=function,
        weight=float(weight),
        required=required,
        gate=gate,
        timeout_seconds=float(timeout_seconds),
        isolate=isolate,
        knobs=knobs,
        source=name,
        is_fitted=isolate or isinstance(found, type),
        runtime=runtime,
    )


def judge(
    rollouts: Sequence[Sequence[Rollout]],
    rewards: Sequence[Reward],
    *,
    trainer_state: Mapping[str, Any] | None = None,
    is_first_batch: bool = True,
) -> Judgement:
    """Call every reward on every rollout and add the values up.

    rollouts: per prompt the samples of its group. A sample's reward is the weighted sum of the
    values that are there, NaN where a required reward (the first one, if none is marked) has none,
    or where no reward has one.
    Raises RewardError for a broken contract; where a reward judged nothing at all: RewardError in
    the first batch (the set-up is wrong), RunError later.
    """
    check_rewards(rewards)
    groups = [tuple(group) for group in rollouts if len(group)]
    if not groups:
        return Judgement(groups=[], reports={})
    samples = samples_of(groups)
    verdicts = call_all(rewards, samples, trainer_state or {})
    reports = {reward.name: _report(reward, verdicts[reward.name]) for reward in rewards}
    for reward in rewards:
        _require_some(reward, reports[reward.name], is_first_batch=is_first_batch)
    totals = combine(rewards, {name: verdict.values for name, verdict in verdicts.items()})
    judged, start = [], 0
    for group in groups:
        end = start + len(group)
        parts = {
            name: torch.tensor([_nan(value) for value in verdict.values[start:end]])
            for name, verdict in verdicts.items()
        }
        judged.append(
            Group(
                prompt=group[0].prompt,
                rollouts=group,
                rewards_G=torch.tensor([_nan(value) for value in totals[start:end]]),
                reward_parts=parts,
            )
        )
        start = end
    return Judgement(groups=judged, reports=reports)


def check_rewards(rewards: Sequence[Reward]) -> None:
    """Raise RewardError for no rewards, two of one name, or a gate that is none of the others."""
    if not rewards:
        raise RewardError("there is no reward to judge with; add a [[reward]] table")
    names = [reward.name for reward in rewards]
    for name in names:
        if names.count(name) > 1:
            raise RewardError(f"two rewards are called '{name}'; names must differ")
    for reward in rewards:
        if reward.gate and _gate_of(reward, rewards) is None:
            others = ", ".join(name for name in names if name != reward.name) or "none"
            raise RewardError(
                f"reward '{reward.name}': gate = '{reward.gate}' is no other reward of this run; "
                f"the others: {others}"
            )


def combine(
    rewards: Sequence[Reward], values: Mapping[str, Sequence[float | None]]
) -> list[float | None]:
    """The weighted sum of each sample, None where a required reward has no value.

    A gated reward adds nothing where its gate is zero or negative, and counts as None where its
    gate is None. If no reward is marked required, the first is, unless it is optional.
    """
    first = [] if rewards[0].is_optional else [rewards[0].name]
    required = [reward.name for reward in rewards if reward.required] or first
    gates = {reward.name: _gate_of(reward, rewards) for reward in rewards}
    totals: list[float | None] = []
    for index in range(len(values[rewards[0].name])):
        total, is_judged, is_missing = 0.0, False, False
        for reward in rewards:
            value = values[reward.name][index]
            gate = gates[reward.name]
            if value is not None and gate is not None:
                opening = values[gate][index]
                value = None if opening is None else (value if opening > 0 else 0.0)
            if value is not None:
                total += reward.weight * value
                is_judged = True
            elif reward.name in required:
                is_missing = True
        totals.append(total if is_judged and not is_missing else None)
    return totals


def samples_of(groups: Sequence[Sequence[Rollout]]) -> Samples:
    """The flat batch that reward functions see, in the order of `groups`."""
    flat = [(index, rollout) for index, group in enumerate(groups) for rollout in group]
    names: dict[str, None] = {}
    for _, rollout in flat:
        names.update(dict.fromkeys(rollout.prompt.columns))
    is_chat = [rollout.prompt.messages is not None for _, rollout in flat]
    return Samples(
        prompts=[
            [dict(message) for message in rollout.prompt.messages or ()]
            if chat
            else rollout.prompt.text
            for chat, (_, rollout) in zip(is_chat, flat, strict=True)
        ],
        completions=[
            [{"role": "assistant", "content": rollout.text}] if chat else rollout.text
            for chat, (_, rollout) in zip(is_chat, flat, strict=True)
        ],
        completion_ids=[rollout.token_ids.tolist() for _, rollout in flat],
        prefills=[rollout.prompt.prefill for _, rollout in flat],
        finish_reasons=[rollout.finish_reason for _, rollout in flat],
        group_ids=[index for index, _ in flat],
        columns={name: [rollout.prompt.columns.get(name) for _, rollout in flat] for name in names},
    )


def _gate_of(reward: Reward, rewards: Sequence[Reward]) -> str | None:
    for other in rewards:
        if reward.gate and other is not reward and reward.gate in (other.name, other.source):
            return other.name
    return None


def _report(reward: Reward, verdict: Verdict) -> RewardReport:
    judged = torch.tensor([value for value in verdict.values if value is not None]).double()
    return RewardReport(
        name=reward.name,
        num_samples=len(verdict.values),
        num_judged=len(judged),
        mean=float(judged.mean()) if len(judged) else float("nan"),
        std=float(judged.std(correction=0)) if len(judged) else float("nan"),
        seconds=verdict.seconds,
        reasons=verdict.reasons,
        first_traceback=verdict.first_traceback,
        metrics=verdict.metrics,
        extras=verdict.extras,
    )


def _require_some(reward: Reward, report: RewardReport, *, is_first_batch: bool) -> None:
    if report.num_judged or (reward.is_optional and report.reasons.keys() == {"None"}):
        return
    counted = ", ".join(f"{count} {reason}" for reason, count in report.reasons.items())
    trace = f"\nfirst error:\n{report.first_traceback}" if report.first_traceback else ""
    message = (
        f"reward '{report.name}' judged none of {report.num_samples} completions ({counted}); "
        f"training on that would be training on noise; try it alone with "
        f"`sparring reward {reward.source or reward.name} --input FILE.jsonl`{trace}"
    )
    raise RewardError(message) if is_first_batch else RunError(message)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value
