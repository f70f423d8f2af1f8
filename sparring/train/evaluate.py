"""How good the policy is: accuracy, pass@k and maj@k on prompts, with intervals one can trust.

Accuracy (avg@n) is the mean over prompts of the share of samples that earn full credit (>= 1) from
the judging reward: the one marked `required`, else the first. Prompts are what is resampled, never
samples, since samples of one prompt are not independent. Nothing here trains.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sparring.errors import DataError, RewardError
from sparring.rewards.verdicts import Reward, RewardReport, judge
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.intervals import interval_of
from sparring.train.pass_at_k import canonical_answer, ks_up_to, majority_at_k, pass_at_k
from sparring.types import Group, Prompt

_RIGHT = "\x00right"
"""The class of all right answers in a vote, however they are spelt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation found.

    accuracy, low, high: mean over prompts and its 95% interval (Wilson for one sample a prompt,
    else a bootstrap over prompts). n: prompts with at least one judged sample; not_judged: the
    others. pass_at, majority_at: by k, as text, {"value", "low", "high"} over the prompts with at
    least k judged samples; majority_at is empty where the reward tells no extracted answer. greedy:
    accuracy at temperature 0, None where it was not asked for. no_answer: share of samples in which
    no answer was found, None where the reward does not tell. truncated: share cut by the length
    limit; accuracy_finished: of the others. mean_tokens, p95_tokens: of completions; *_right and
    *_wrong: means of those. A number is None where it is of nothing. parts: mean of each reward
    over judged samples.
    """

    accuracy: float
    low: float
    high: float
    n: int
    not_judged: int
    num_samples: int
    temperature: float
    greedy: float | None
    mean_tokens: float
    truncated: float
    parts: dict[str, float]
    pass_at: dict[str, dict[str, float]]
    majority_at: dict[str, dict[str, float]]
    no_answer: float | None
    accuracy_finished: float | None
    p95_tokens: float
    mean_tokens_right: float | None
    mean_tokens_wrong: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measured:
    """An evaluation with what it rests on.

    groups: the judged samples. shares: by place in groups, where a sample was judged, the share
    that is right. rows: one JSON row a sample, with the extracted answer and the verdict's reason.
    """

    evaluation: Evaluation
    groups: list[Group]
    shares: dict[int, float]
    rows: list[dict[str, Any]]


def judging_reward(rewards: Sequence[Reward]) -> str:
    """Name of the reward whose verdict counts as right or wrong."""
    if not rewards:
        raise RewardError(
            "evaluation needs a reward, and the recipe has none; add a [[reward]] table"
        )
    return next((reward.name for reward in rewards if reward.required), rewards[0].name)


def shares_correct(groups: Sequence[Group], name: str) -> list[float]:
    """Per prompt with a judged sample, the share of judged samples with full credit from `name`."""
    return list(_shares_by_prompt(groups, name).values())


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    greedy: bool = True,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> tuple[Evaluation, list[Group]]:
    """`measure_prompts` without its rows: the summary and the judged groups of the sampled pass."""
    found = measure_prompts(
        engine,
        prompts,
        rewards,
        sampling,
        num_samples=num_samples,
        greedy=greedy,
        on_progress=on_progress,
    )
    return found.evaluation, found.groups


def measure_prompts(
    engine: Engine,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    sampling: Sampling,
    *,
    num_samples: int = 1,
    greedy: bool = True,
    on_progress: Callable[[int, int, int], None] | None = None,
) -> Measured:
    """Sample, judge and summarise.

    Raises DataError where there are no prompts and RewardError where nothing could be judged.
    """
    if not prompts:
        raise DataError("evaluation has no prompts; check [data] eval and [eval] limit")
    name = judging_reward(rewards)
    with _same_dice(engine):
        rollouts = engine.generate(
            prompts, sampling, num_samples=num_samples, on_progress=on_progress
        )
    is_first = engine.policy_version == 0
    judgement = judge(rollouts, rewards, is_first_batch=is_first)
    greedy_accuracy = None
    if greedy:
        best = engine.generate(prompts, replace(sampling, temperature=0.0), on_progress=on_progress)
        best_shares = shares_correct(judge(best, rewards, is_first_batch=is_first).groups, name)
        greedy_accuracy = sum(best_shares) / len(best_shares) if best_shares else None
    return summarise(
        judgement.groups, judgement.reports[name], sampling=sampling, greedy=greedy_accuracy
    )


@contextmanager
def _same_dice(engine: Engine) -> Iterator[None]:
    """Sample as if the policy were at version 0: version keys the noise, and evaluations of one
    policy before and after training, or of its saved weights, are to differ by the weights alone.
    """
    version = engine.policy_version
    engine.weights_changed(policy_version=0)
    try:
        yield
    finally:
        engine.weights_changed(policy_version=version)


def summarise(
    groups: Sequence[Group], report: RewardReport, *, sampling: Sampling, greedy: float | None
) -> Measured:
    """What judged groups say; report: of the judging reward, with what it noted of each sample.

    Raises RewardError where nothing was judged.
    """
    name = report.name
    shares = _shares_by_prompt(groups, name)
    if not shares:
        raise RewardError(f"the reward '{name}' judged none of {len(groups)} evaluation prompts")
    num_samples = max(len(group.rollouts) for group in groups)
    values = list(shares.values())
    low, high = interval_of(values, num_samples=num_samples)
    rows = sample_rows(groups, report, sampling=sampling)
    lengths = sorted(row["num_tokens"] for row in rows)
    finished = [row["correct"] for row in rows if row["finish_reason"] != "length"]
    tells_answers = "answer" in report.extras
    evaluation = Evaluation(
        accuracy=math.fsum(values) / len(values),
        low=low,
        high=high,
        n=len(values),
        not_judged=len(groups) - len(values),
        num_samples=num_samples,
        temperature=sampling.temperature,
        greedy=greedy,
        mean_tokens=sum(lengths) / len(lengths),
        truncated=sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        parts={part: _mean_judged(groups, part) for part in groups[0].reward_parts},
        pass_at=_by_k(num_samples, rows, _pass_at),
        majority_at=_by_k(num_samples, rows, _majority_at) if tells_answers else {},
        no_answer=_mean([row["answer"] is None for row in rows]) if tells_answers else None,
        accuracy_finished=_mean([right for right in finished if right is not None]),
        p95_tokens=float(lengths[min(len(lengths) - 1, math.ceil(0.95 * len(lengths)) - 1)]),
        mean_tokens_right=_mean([row["num_tokens"] for row in rows if row["correct"] is True]),
        mean_tokens_wrong=_mean([row["num_tokens"] for row in rows if row["correct"] is False]),
    )
    return Measured(evaluation=evaluation, groups=list(groups), shares=shares, rows=rows)


def sample_rows(
    groups: Sequence[Group], report: RewardReport, *, sampling: Sampling
) -> list[dict[str, Any]]:
    """One JSON row a sample: what was asked, written, extracted and decided, and why.

    correct: True or False by the reward of `report`, None where it did not judge.
    """
    rows: list[dict[str, Any]] = []
    for group in groups:
        ids = " ".join(map(str, group.prompt.token_ids)).encode()
        prompt_hash = hashlib.blake2b(ids, digest_size=8).hexdigest()
        parts = {name: part.tolist() for name, part in group.reward_parts.items()}
        for sample, rollout in enumerate(group.rollouts):
            value = parts[report.name][sample]
            row = {
                "prompt_id": group.prompt.id,
                "sample": rollout.sample_index,
                "seed": sampling.seed,
                "prompt": group.prompt.text,
                "prompt_hash": prompt_hash,
                "completion": rollout.text,
                "reference": group.prompt.columns.get("reference"),
                "correct": None if math.isnan(value) else value >= 1.0,
                "rewards": {name: _number(part[sample]) for name, part in parts.items()},
                "finish_reason": rollout.finish_reason,
                "num_tokens": len(rollout.token_ids),
            }
            noted = {key: values[len(rows)] for key, values in report.extras.items()}
            rows.append({"answer": None, **noted, **row})
    return rows


def _by_k(
    num_samples: int,
    rows: Sequence[Mapping[str, Any]],
    measure: Callable[[Sequence[Mapping[str, Any]], int], float],
) -> dict[str, dict[str, float]]:
    """Mean and interval over prompts, for each k that some prompt has judged samples for."""
    judged: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["correct"] is not None:
            judged.setdefault(row["prompt_id"], []).append(row)
    found = {}
    for k in ks_up_to(num_samples):
        values = [measure(samples, k) for samples in judged.values() if len(samples) >= k]
        if values:
            low, high = interval_of(values, num_samples=num_samples)
            found[str(k)] = {"value": math.fsum(values) / len(values), "low": low, "high": high}
    return found


def _pass_at(samples: Sequence[Mapping[str, Any]], k: int) -> float:
    return pass_at_k(len(samples), sum(row["correct"] for row in samples), k)


def _majority_at(samples: Sequence[Mapping[str, Any]], k: int) -> float:
    return majority_at_k([_vote(row) for row in samples], _RIGHT, k)


def _vote(row: Mapping[str, Any]) -> str | None:
    if row["correct"]:
        return _RIGHT
    return None if row["answer"] is None else canonical_answer(str(row["answer"]))


def _shares_by_prompt(groups: Sequence[Group], name: str) -> dict[int, float]:
    shares = {}
    for index, group in enumerate(groups):
        part = group.reward_parts[name]
        judged = part[~part.isnan()]
        if judged.numel():
            shares[index] = float((judged >= 1.0).double().mean())
    return shares


def _mean_judged(groups: Sequence[Group], part: str) -> float:
    values = torch.cat([group.reward_parts[part] for group in groups])
    values = values[~values.isnan()]
    return float(values.mean()) if values.numel() else float("nan")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
