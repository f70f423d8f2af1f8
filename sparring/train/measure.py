"""`sparring eval`: how good a model is on the evaluation data of a recipe. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable

from sparring.recipe import Recipe
from sparring.train.evaluate import Evaluation, evaluate
from sparring.train.inference import open_policy, sampling_engine, template_of
from sparring.train.inputs import evaluation_sampling, load_prompt_set, load_rewards
from sparring.types import Group


def measure(
    recipe: Recipe,
    *,
    say: Callable[[str], None],
    on_progress: Callable[[int, int, int], None] | None = None,
) -> tuple[Evaluation, list[Group]]:
    """Load model, rewards and evaluation prompts of the recipe, and evaluate once.

    A model that a run of Sparring wrote is asked in the template that it was trained with, unless
    the recipe names one. say: takes lines for people. Raises UserError, or RunError later.
    """
    rewards = load_rewards(recipe)
    try:
        section, data = recipe.model, recipe.data
        policy = open_policy(section.path, adapter=section.adapter or None, dtype=section.dtype)
        template = template_of(
            policy.tokenizer, template=data.template, system_prompt=data.system_prompt
        )
        found = load_prompt_set(recipe, policy, data.eval, data.eval_split, template=template)
        for line in found.report():
            say(line)
        prompts = found.prompts[: recipe.eval.limit or None]
        engine = sampling_engine(
            policy.speaking(template),
            num_rollouts=len(prompts) * recipe.eval.num_samples,
            max_tokens=min(policy.max_tokens, found.longest + recipe.rollout.max_completion_tokens),
        )
        return evaluate(
            engine,
            prompts,
            rewards,
            evaluation_sampling(recipe),
            num_samples=recipe.eval.num_samples,
            on_progress=on_progress,
        )
    finally:
        for reward in rewards:
            reward.close()
