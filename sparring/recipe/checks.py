"""What types cannot say: recipe values that do not go together, and knobs against signatures."""

from __future__ import annotations

from collections.abc import Callable

from sparring.errors import RecipeError
from sparring.recipe.sections import AdvantageSection, Command, LossSection, Recipe
from sparring.recipe.source import Source
from sparring.recipe.toml_text import write_value

_ONLY_VALUE_YET = {
    "run.track": (),
}
"""Keys whose other values belong to parts that do not exist yet."""


def check(source: Source, recipe: Recipe, command: Command) -> None:
    """Raise RecipeError for the first value that `command` cannot run with, with the reason."""
    for key, only in _ONLY_VALUE_YET.items():
        if _get(recipe, key) != only:
            reason = f"this is not built yet; the only value so far is {write_value(only)}"
            raise _refusal(source, recipe, key, reason)
    if recipe.model.keep_16bit and recipe.model.quantization == "none":
        reason = "nothing is quantised; set [model] quantization = 'nf4'"
        raise _refusal(source, recipe, "model.keep_16bit", reason)
    limit, longest = recipe.model.max_tokens, recipe.rollout.max_completion_tokens
    if limit and command not in ("sft", "dpo", "advise", "plan") and limit <= longest:
        reason = (
            f"rollout.max_completion_tokens = {longest} leaves no room for a prompt (the limit of a"
            " prompt is max_tokens - max_completion_tokens)"
        )
        raise _refusal(source, recipe, "model.max_tokens", reason)
    if recipe.eval.every and not recipe.data.eval:
        reason = "there is nothing to evaluate on; set [data] eval"
        raise _refusal(source, recipe, "eval.every", reason)
    if command not in ("ppo", "eval", "advise", "plan"):
        _check_not_ppo(source, recipe, command)
    if command in ("grpo", "ppo", "advise"):
        _check_whole_distribution(source, recipe, command)
    _check_enough(source, recipe, command)
    if command in ("grpo", "ppo"):
        _check_rollouts(source, recipe, command)
    if not recipe.train.learn_truncated and command not in ("grpo", "advise", "plan"):
        reason = f"only grpo leaves cut completions out of its loss; {command} does not"
        raise _refusal(source, recipe, "train.learn_truncated", reason)
    if command == "grpo":
        _check_grpo(source, recipe)
    if command == "ppo":
        _check_ppo(source, recipe)
    if command in ("sft", "dpo") and recipe.advantage != AdvantageSection():
        reason = f"{command} has no advantages; remove the section"
        raise _refusal(source, recipe, "advantage.name", reason)
    if command == "dpo":
        _check_dpo(source, recipe)
    if command not in ("sft", "eval", "advise", "plan"):
        _check_not_sft(source, recipe, command)
    if command == "sft" and recipe.loss != LossSection(name="sft"):
        reason = "sft has one loss, 'sft', and it takes no knobs; remove the section"
        raise _refusal(source, recipe, "loss.name", reason)


def _check_not_ppo(source: Source, recipe: Recipe, command: Command) -> None:
    if recipe.value is not None:
        place = source.place(("value",))
        raise RecipeError(f"{place}: [value] is ppo's critic, and {command} has none; remove it")
    for key in ("train.passes", "train.mini_steps"):
        if _get(recipe, key) != 1 and command != "grpo":
            reason = f"{command} updates once a step; grpo and ppo go over their rollouts again"
            raise _refusal(source, recipe, key, reason)


def _check_not_sft(source: Source, recipe: Recipe, command: Command) -> None:
    for key in ("data.weight", "data.general", "data.placeholders"):
        if _get(recipe, key):
            raise _refusal(source, recipe, key, f"only sft reads it; {command} does not")


def _check_whole_distribution(source: Source, recipe: Recipe, command: Command) -> None:
    reason = (
        "log-probabilities are recorded before top_p, top_k and min_p cut the distribution, and"
        " the trainer's distribution is the whole one, so the loss would compare two different"
        f" policies; {command} samples with top_p = 1.0, top_k = 0 and min_p = 0.0. sparring eval"
        " and generate take them"
    )
    for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        if getattr(recipe.rollout, key) != off:
            raise _refusal(source, recipe, f"rollout.{key}", reason)


def _check_enough(source: Source, recipe: Recipe, command: Command) -> None:
    enough = recipe.rollout.enough_groups
    if enough and command not in ("grpo", "advise", "plan"):
        reason = f"only grpo leaves groups out of a step; {command} does not"
        raise _refusal(source, recipe, "rollout.enough_groups", reason)
    if enough > recipe.rollout.prompts_per_step:
        reason = f"a step has rollout.prompts_per_step = {recipe.rollout.prompts_per_step} groups"
        raise _refusal(source, recipe, "rollout.enough_groups", reason)


def _check_rollouts(source: Source, recipe: Recipe, command: Command) -> None:
    if recipe.rollout.temperature == 0.0:
        reason = "a greedy group is one completion written many times; take 1.0"
        raise _refusal(source, recipe, "rollout.temperature", reason)
    if recipe.train.mini_steps > recipe.rollout.prompts_per_step:
        reason = (
            f"a step has rollout.prompts_per_step = {recipe.rollout.prompts_per_step} groups, and a"
            " group is not split over updates"
        )
        raise _refusal(source, recipe, "train.mini_steps", reason)
    if all(reward.weight == 0.0 for reward in recipe.reward):
        place = source.place(("reward",))
        raise RecipeError(f"{place}: every [[reward]] has weight 0: there is nothing to learn from")
    if recipe.loss.name == "sft":
        reason = f"it learns from given answers; {command} takes any other loss"
        raise _refusal(source, recipe, "loss.name", reason)


def _check_grpo(source: Source, recipe: Recipe) -> None:
    if recipe.rollout.group_size == 1 and recipe.advantage.name != "none":
        reason = (
            f"advantage '{recipe.advantage.name}' measures a completion against its group,"
            " which takes at least 2; advantage 'none' takes rewards as they are"
        )
        raise _refusal(source, recipe, "rollout.group_size", reason)
    from sparring.algorithms.registry import build_advantage

    advantage = recipe.advantage
    _build_each(
        source,
        loss=lambda: _build_policy_loss(recipe),
        advantage=lambda: build_advantage(advantage.name, advantage.knobs),
    )


def _check_ppo(source: Source, recipe: Recipe) -> None:
    from sparring.algorithms.registry import build_estimator

    if recipe.loss.name == "gspo":
        reason = (
            "it needs one advantage a completion, and a critic gives one a token; take dapo, grpo,"
            " dr_grpo or cispo"
        )
        raise _refusal(source, recipe, "loss.name", reason)
    if recipe.loss.knobs.get("kl_coef"):
        place = source.place(("loss", "kl_coef"))
        raise RecipeError(
            f"{place}: [loss] kl_coef is not allowed: ppo has its KL term in the reward; set"
            " [advantage] kl_coef"
        )
    advantage = recipe.advantage
    _build_each(
        source,
        loss=lambda: _build_policy_loss(recipe),
        advantage=lambda: build_estimator(advantage.name, advantage.knobs),
    )


def _check_dpo(source: Source, recipe: Recipe) -> None:
    from sparring.algorithms.registry import build_preference_loss

    loss = recipe.loss
    _build_each(source, loss=lambda: build_preference_loss(loss.name, loss.knobs))


def _build_policy_loss(recipe: Recipe) -> object:
    from sparring.algorithms.registry import build_loss

    longest = recipe.rollout.max_completion_tokens
    return build_loss(recipe.loss.name, recipe.loss.knobs, max_completion_tokens=longest)


def _build_each(source: Source, **builders: Callable[[], object]) -> None:
    """Build each section's function once: a wrong knob shows before anything is loaded."""
    for section, build in builders.items():
        try:
            build()
        except RecipeError as error:
            keys = source.tables.get(section, {})
            named = [key for key in keys if f"'{key}'" in str(error) or f": {key} " in str(error)]
            place = source.place((section, *(named or ["name"])[:1]))
            raise RecipeError(f"{place}: {error}") from None


def _get(recipe: Recipe, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(recipe, section), name)


def _refusal(source: Source, recipe: Recipe, key: str, reason: str) -> RecipeError:
    section, _, name = key.partition(".")
    place = source.place((section, name))
    value = write_value(_get(recipe, key))
    return RecipeError(f"{place}: [{section}] {name} = {value} is not allowed: {reason}")
