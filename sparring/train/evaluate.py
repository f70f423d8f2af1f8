"""How good the policy is: accuracy on prompts, with a 95% interval that a reader can trust.

Accuracy is the mean over prompts of the share of samples that earn full credit (>= 1) from the
judging reward: the one marked `required`, else the first. Prompts are what is resampled, never
samples, since samples of one prompt are not independent. Nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sparring.errors import DataError, RewardError
from sparring.rewards.verdicts import Reward, judge
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Group, Prompt

BOOTSTRAP_RESAMPLES = 2000
Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation found.

    accuracy, low, high: mean over prompts and its 95% interval (Wilson for one sample a prompt,
    else a bootstrap over prompts). n: prompts with at least one judged sample; not_judged: the
    others. greedy: accuracy at temperature 0, None where it was not asked for. mean_tokens,
    truncated: completion tokens and share of completions cut by the length limit. parts: mean of
    each reward over judged samples.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n independent trials.

    Worked: 9 of 30 gives (0.167, 0.479); 0 of 8 gives (0, 0.324).
    """
    if n <= 0:
        return 0.0, 1.0
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(shares: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95% interval of the mean of per-prompt shares, by resampling prompts (2,000 times)."""
    values = torch.tensor(shares, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(BOOTSTRAP_RESAMPLES, dtype=torch.float64)
    for start in range(0, BOOTSTRAP_RESAMPLES, 100):
        picks = torch.randint(len(values), (100, len(values)), generator=generator)
        means[start : start + 100] = values[picks].mean(dim=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def judging_reward(rewards: Sequence[Reward]) -> str:
    """Name of the reward whose verdict counts as right or wrong."""
    if not rewards:
        raise RewardError(
            "evaluation needs a reward, and the recipe has none; add a [[reward]] table"
        )
    return next((reward.name for reward in rewards if reward.required), rewards[0].name)


def shares_correct(groups: Sequence[Group], name: str) -> list[float]:
    """Per prompt with a judged sample, the share of judged samples with full credit from `name`."""
    shares = []
    for group in groups:
        part = group.reward_parts[name]
        judged = part[~part.isnan()]
        if judged.numel():
            shares.append(float((judged >= 1.0).double().mean()))
    return shares


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
    """Sample, judge and summarise; returns the summary and the judged groups of the sampled pass.

    Raises DataError where there are no prompts and RewardError where nothing could be judged.
    """
    if not prompts:
        raise DataError("evaluation has no prompts; check [data] eval and [eval] limit")
    name = judging_reward(rewards)
    rollouts = engine.generate(prompts, sampling, num_samples=num_samples, on_progress=on_progress)
    groups = judge(rollouts, rewards).groups
    shares = shares_correct(groups, name)
    if not shares:
        raise RewardError(f"the reward '{name}' judged none of {len(prompts)} evaluation prompts")
    accuracy = sum(shares) / len(shares)
    low, high = wilson(sum(shares), len(shares)) if num_samples == 1 else bootstrap(shares)
    greedy_accuracy = None
    if greedy:
        best = engine.generate(prompts, replace(sampling, temperature=0.0), on_progress=on_progress)
        best_shares = shares_correct(judge(best, rewards).groups, name)
        greedy_accuracy = sum(best_shares) / len(best_shares) if best_shares else None
    completions = [rollout for group in groups for rollout in group.rollouts]
    lengths = [len(rollout.token_ids) for rollout in completions]
    parts = {part: _mean_judged(groups, part) for part in groups[0].reward_parts}
    evaluation = Evaluation(
        accuracy=accuracy,
        low=low,
        high=high,
        n=len(shares),
        not_judged=len(prompts) - len(shares),
        num_samples=num_samples,
        temperature=sampling.temperature,
        greedy=greedy_accuracy,
        mean_tokens=sum(lengths) / len(lengths),
        truncated=sum(r.finish_reason == "length" for r in completions) / len(completions),
        parts=parts,
    )
    return evaluation, groups


def _mean_judged(groups: Sequence[Group], part: str) -> float:
    values = torch.cat([group.reward_parts[part] for group in groups])
    values = values[~values.isnan()]
    return float(values.mean()) if values.numel() else float("nan")
