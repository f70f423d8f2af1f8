"""What types cannot say: recipe values that do not go together, and knobs against signatures."""

from __future__ import annotations

from collections.abc import Callable

from sparring.errors import RecipeError
from sparring.recipe.sections import AdvantageSection, Command, LossSection, Recipe
from sparring.recipe.source import Source
from sparring.recipe.toml_text import write_value

_ONLY_VALUE_YET = {
    "model.quantization": "none",
    "train.checkpointing": "none",
    "run.bitwise": False,
    "run.track": (),
}
"""Keys whose other values belong to parts that do not exist yet."""


def check(source: Source, recipe: Recipe, command: Command) -> None:
    """Raise RecipeError for the first value that `command` cannot run with, with the reason."""
    for key, only in _ONLY_VALUE_YET.items():
        if _get(recipe, key) != only:
            reason = f"this is not built yet; the only value so far is {write_value(only)}"
            raise _refusal(source, recipe, key, reason)
    limit, longest = recipe.model.max_tokens, recipe.rollout.max_completion_tokens
    if limit and command != "sft" and limit <= longest:
        reason = (
            f"rollout.max_completion_tokens = {longest} leaves no room for a prompt (the limit of a"
            " prompt is max_tokens - max_completion_tokens)"
        )
        raise _refusal(source, recipe, "model.max_tokens", reason)
    if recipe.eval.every and not recipe.data.eval:
        reason = "there is nothing to evaluate on; set [data] eval"
        raise _refusal(source, recipe, "eval.every", reason)
    if command == "grpo":
        _check_grpo(source, recipe)
    if command == "sft":
        if recipe.loss != LossSection(name="sft"):
            reason = "sft has one loss, 'sft', and it takes no knobs; remove the section"
            raise _refusal(source, recipe, "loss.name", reason)
        if recipe.advantage != AdvantageSection():
            reason = "sft has no advantages; remove the section"
            raise _refusal(source, recipe, "advantage.name", reason)


def _check_grpo(source: Source, recipe: Recipe) -> None:
    reason = (
        "log-probabilities are recorded before top_p and top_k cut the distribution, so the loss"
        " would compare two different policies; grpo samples with top_p = 1.0 and top_k = 0"
    )
    if recipe.rollout.top_p < 1.0:
        raise _refusal(source, recipe, "rollout.top_p", reason)
    if recipe.rollout.top_k > 0:
        raise _refusal(source, recipe, "rollout.top_k", reason)
    if recipe.rollout.temperature == 0.0:
        reason = "a greedy group is one completion written many times; take 1.0"
        raise _refusal(source, recipe, "rollout.temperature", reason)
    if recipe.rollout.group_size == 1 and recipe.advantage.name != "none":
        reason = (
            f"advantage '{recipe.advantage.name}' measures a completion against its group,"
            " which takes at least 2; advantage 'none' takes rewards as they are"
        )
        raise _refusal(source, recipe, "rollout.group_size", reason)
    if all(reward.weight == 0.0 for reward in recipe.reward):
        place = source.place(("reward",))
        raise RecipeError(f"{place}: every [[reward]] has weight 0: there is nothing to learn from")
    if recipe.loss.name == "sft":
        reason = "it learns from given answers; grpo takes any other loss"
        raise _refusal(source, recipe, "loss.name", reason)
    _check_knobs(source, recipe)


def _check_knobs(source: Source, recipe: Recipe) -> None:
    """Build loss and advantage once: a wrong name or knob shows before anything is loaded."""
    from sparring.algorithms.registry import build_advantage, build_loss

    longest = recipe.rollout.max_completion_tokens
    loss, advantage = recipe.loss, recipe.advantage
    builders: dict[str, Callable[[], object]] = {
        "loss": lambda: build_loss(loss.name, loss.knobs, max_completion_tokens=longest),
        "advantage": lambda: build_advantage(advantage.name, advantage.knobs),
    }
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
