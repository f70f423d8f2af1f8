"""What the start model makes of a recipe's prompts: the half of the advice that needs a model.

A few prompts, a group of completions each, judged by the recipe's rewards: how many are solved, and
how many groups GRPO could learn from. Nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparring.algorithms.advantages import has_signal
from sparring.recipe import Recipe
from sparring.rewards.verdicts import Reward
from sparring.rollout.sampler import Sampling
from sparring.train.evaluate import Measured, judging_reward, measure_prompts
from sparring.train.inference import open_policy, sampling_engine, template_of
from sparring.train.inputs import load_prompt_set
from sparring.train.pass_at_k import canonical_answer
from sparring.types import Group

OnProgress = Callable[[int, int, int], None]
Sample = Callable[[Recipe, Sequence[Reward], Sequence[int], int], Measured]
"""How rows are sampled: recipe, rewards, row indices and group size in, judged groups out."""

FORMAT_REWARDS = ("format", "tags")


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleFigures:
    """What the judged groups say.

    solved: mean share of right completions; prompts_solved: share of prompts with at least one.
    signal: share of groups whose completions earned different rewards; judging_signal: in which the
    judging reward differs. without_signal: row indices of groups in which it does not. reward_std:
    of all rewards; within_std: mean within groups. format: share of full credit of a format reward,
    None without one. distinct_answers: mean per group, None where the reward tells none.
    """

    num_prompts: int
    num_samples: int
    solved: float
    low: float
    high: float
    prompts_solved: float
    signal: float
    judging_signal: float
    without_signal: tuple[int, ...]
    truncated: float
    no_answer: float | None
    format: float | None
    reward_std: float
    within_std: float
    mean_tokens: float
    p95_tokens: float
    distinct_answers: float | None

    def as_measures(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sampled_prompts": self.num_prompts,
            "samples_per_prompt": self.num_samples,
            "solved": self.solved,
            "solved_low": self.low,
            "solved_high": self.high,
            "prompts_solved": self.prompts_solved,
            "groups_with_signal": self.signal,
            "groups_with_signal_of_judging_reward": self.judging_signal,
            "truncated": self.truncated,
            "no_answer": self.no_answer,
            "format": self.format,
            "reward_std": self.reward_std,
            "reward_std_within_groups": self.within_std,
            "mean_tokens": self.mean_tokens,
            "p95_tokens": self.p95_tokens,
            "distinct_answers_per_group": self.distinct_answers,
        }


def sample_policy(
    recipe: Recipe,
    rewards: Sequence[Reward],
    places: Sequence[int],
    num_samples: int,
    *,
    on_progress: OnProgress | None = None,
) -> Measured:
    """Sample and judge these rows with the recipe's model, as its rollouts would.

    Raises UserError for what cannot be loaded, RewardError where nothing could be judged.
    """
    section, data = recipe.model, recipe.data
    policy = open_policy(
        section.path,
        adapter=section.adapter or None,
        dtype=section.dtype,
        quantization=section.quantization,
    )
    template = template_of(
        policy.tokenizer, template=data.template, system_prompt=data.system_prompt
    )
    policy = policy.speaking(template)
    lenient = recipe.model_copy(update={"data": data.model_copy(update={"bad_rows": "skip"})})
    found = load_prompt_set(lenient, policy, data.train, data.split, template=template)
    wanted = set(places)
    prompts = [prompt for prompt in found.prompts if prompt.id in wanted]
    rollout = recipe.rollout
    engine = sampling_engine(
        policy,
        prompts,
        num_samples=num_samples,
        max_completion_tokens=rollout.max_completion_tokens,
        memory=recipe.run.memory,
    )
    sampling = Sampling(
        temperature=rollout.temperature or 1.0,
        max_completion_tokens=rollout.max_completion_tokens,
        stop=rollout.stop,
        seed=recipe.run.seed,
    )
    return measure_prompts(
        engine,
        prompts,
        rewards,
        sampling,
        num_samples=num_samples,
        greedy=False,
        on_progress=on_progress,
    )


def figures_of(measured: Measured, rewards: Sequence[Reward]) -> SampleFigures:
    """The figures of judged groups."""
    groups, evaluation = measured.groups, measured.evaluation
    name = judging_reward(rewards)
    judged = list(measured.shares.values())
    differs = [len(set(_numbers(group.reward_parts[name]))) > 1 for group in groups]
    signals = [has_signal(group) for group in groups]
    formats = [reward.name for reward in rewards if reward.source in FORMAT_REWARDS]
    everything = torch.cat([_judged(group) for group in groups])
    spreads = [
        float(_judged(group).std(correction=0)) for group in groups if len(_judged(group)) > 1
    ]
    return SampleFigures(
        num_prompts=len(groups),
        num_samples=evaluation.num_samples,
        solved=evaluation.accuracy,
        low=evaluation.low,
        high=evaluation.high,
        prompts_solved=sum(share > 0 for share in judged) / len(judged),
        signal=sum(signals) / len(signals),
        judging_signal=sum(differs) / len(differs),
        without_signal=tuple(
            group.prompt.id
            for group, differing in zip(groups, differs, strict=True)
            if not differing
        ),
        truncated=evaluation.truncated,
        no_answer=evaluation.no_answer,
        format=_full_share(groups, formats[0]) if formats and formats[0] != name else None,
        reward_std=float(everything.std(correction=0)) if len(everything) else 0.0,
        within_std=sum(spreads) / len(spreads) if spreads else 0.0,
        mean_tokens=evaluation.mean_tokens,
        p95_tokens=evaluation.p95_tokens,
        distinct_answers=_distinct(measured.rows) if evaluation.no_answer is not None else None,
    )


def _numbers(part: torch.Tensor) -> list[float]:
    numbers: list[float] = part[~part.isnan()].tolist()
    return numbers


def _judged(group: Group) -> torch.Tensor:
    rewards = group.rewards_G
    return rewards[~rewards.isnan()]


def _full_share(groups: Sequence[Group], name: str) -> float:
    values = torch.cat([group.reward_parts[name] for group in groups])
    values = values[~values.isnan()]
    return float((values >= 1.0).float().mean()) if len(values) else 0.0


def _distinct(rows: Sequence[Mapping[str, Any]]) -> float:
    answers: dict[int, set[str]] = {}
    for row in rows:
        found = answers.setdefault(row["prompt_id"], set())
        if row["answer"] is not None:
            found.add(canonical_answer(str(row["answer"])))
    return sum(map(len, answers.values())) / len(answers) if answers else 0.0
