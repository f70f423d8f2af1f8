"""What a recipe names, opened: prompts, rewards, the optimizer, and how an evaluation samples.

The loops and `sparring eval` share these; each is one call below train/ with the recipe's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparring.data.chat import ChatTemplate
from sparring.data.named import read_rows
from sparring.data.prompts import PromptSet, load_prompts
from sparring.errors import RecipeError, RewardError
from sparring.recipe import Recipe
from sparring.rewards.verdicts import Reward, check_rewards, load_reward
from sparring.rollout.sampler import Sampling
from sparring.train.optimizer import Optimizer, build_optimizer
from sparring.train.policy import Policy

EVAL_SEED = 20_240_201
"""Noise of evaluations: the same for every run seed, so that all runs roll the same dice."""


def load_rewards(recipe: Recipe, secrets: Mapping[str, str] | None = None) -> list[Reward]:
    """The recipe's rewards, checked together; the caller closes them. Raises RewardError.

    secrets: values of the variables that rewards name in api_key_env, read by the command line.
    """
    rewards: list[Reward] = []
    try:
        for section in recipe.reward:
            rewards.append(
                load_reward(
                    section.name,
                    knobs=section.knobs,
                    weight=section.weight,
                    required=section.required,
                    gate=section.gate,
                    timeout_seconds=section.timeout_seconds,
                    isolate=section.isolate,
                )
            )
            give_secret(rewards[-1], secrets or {})
        check_rewards(rewards)
    except Exception:
        for reward in rewards:
            reward.close()
        raise
    return rewards


def give_secret(reward: Reward, secrets: Mapping[str, str]) -> None:
    """Hand a reward that names a variable its value; RewardError where that was not set."""
    variable = getattr(reward.function, "api_key_env", "")
    if not variable:
        return
    if variable not in secrets:
        raise RewardError(
            f"reward '{reward.name}': the variable {variable} (api_key_env) is not set; set it in"
            f" the shell that starts the run: export {variable}=..."
        )
    reward.function.set_api_key(secrets[variable])  # type: ignore[attr-defined]


def sandbox_levels(rewards: Sequence[Reward]) -> dict[str, Any]:
    """By reward, the level of the sandbox that contains what it runs; empty where nothing runs."""
    levels = {reward.name: getattr(reward.function, "level", None) for reward in rewards}
    return {name: level.to_json() for name, level in levels.items() if level is not None}


def trainer_state(recipe: Recipe, step: int) -> dict[str, int]:
    """What rewards may know of the run: steps done, steps in all, the limit of a completion."""
    return {
        "step": step,
        "max_steps": recipe.train.steps,
        "max_completion_tokens": recipe.rollout.max_completion_tokens,
    }


def updates_per_step(recipe: Recipe) -> int:
    """Optimizer updates on the rollouts of one step."""
    return recipe.train.passes * recipe.train.mini_steps


def load_optimizer(
    recipe: Recipe,
    parameters: Mapping[str, nn.Parameter],
    compute_dtype: torch.dtype,
    *,
    updates_per_step: int = 1,
    learning_rate: float = 0.0,
) -> Optimizer:
    """The recipe's optimizer over these parameters; learning_rate 0: the recipe's."""
    section = recipe.optimizer
    return build_optimizer(
        parameters,
        name=section.name,
        learning_rate=learning_rate or section.learning_rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        num_steps=recipe.train.steps * updates_per_step,
        compute_dtype=compute_dtype,
    )


def max_prompt_tokens(recipe: Recipe, policy: Policy) -> int:
    """Tokens that are left for a prompt; RecipeError where there are none."""
    limit = policy.max_tokens - recipe.rollout.max_completion_tokens
    if limit < 1:
        raise RecipeError(
            f"[rollout] max_completion_tokens = {recipe.rollout.max_completion_tokens} leaves no"
            f" room for a prompt: the model takes {policy.max_tokens} tokens in all; set it to"
            f" {max(1, policy.max_tokens // 2)} (--rollout.max_completion_tokens"
            f" {max(1, policy.max_tokens // 2)}), or raise [model] max_tokens if the checkpoint"
            " allows it"
        )
    return limit


def load_prompt_set(
    recipe: Recipe,
    policy: Policy,
    source: str,
    split: str,
    *,
    template: ChatTemplate | None = None,
) -> PromptSet:
    """The prompts of one data set as the recipe reads them. Raises DataError or RecipeError.

    template: a conversation format already built, in place of the recipe's.
    """
    data = recipe.data
    return load_prompts(
        read_rows(source, split=split, bad_rows=data.bad_rows),
        policy.tokenizer,
        prompt_column=data.prompt,
        reference_column=data.reference,
        template=template or data.template,
        system_prompt="" if template else data.system_prompt,
        max_prompt_tokens=max_prompt_tokens(recipe, policy),
        bad_rows=data.bad_rows,
    )


def evaluation_sampling(recipe: Recipe) -> Sampling:
    """How evaluations of this recipe sample: always with the same noise."""
    return Sampling(
        temperature=recipe.eval.temperature,
        top_p=recipe.rollout.top_p,
        top_k=recipe.rollout.top_k,
        min_p=recipe.rollout.min_p,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
        stop=recipe.rollout.stop,
        seed=EVAL_SEED,
    )
