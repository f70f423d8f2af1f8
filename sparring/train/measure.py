"""`sparring eval`: how good a model is on a recipe's evaluation data, alone or against one more.

Two models answer the same prompts under the same noise and are judged by the same rewards. Nothing
is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparring.errors import RecipeError, UserError
from sparring.recipe import Recipe, locate_model
from sparring.recipe.source import read_source
from sparring.rewards.verdicts import Reward
from sparring.runlog import FINAL, RECIPE
from sparring.train.evaluate import Measured, measure_prompts
from sparring.train.inference import open_policy, sampling_engine, system_prompt_note, template_of
from sparring.train.inputs import evaluation_sampling, load_prompt_set, load_rewards
from sparring.train.intervals import Comparison, compare
from sparring.train.plan_recipe import hold_budget
from sparring.train.policy import Policy, pick_device
from sparring.types import Prompt

BASE = "base"
"""The model to compare with: what the measured one was trained from."""

Say = Callable[[str], None]
OnProgress = Callable[[int, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """A measured model; where asked for, another on the same prompts, and the difference.

    comparison: the measured model less the other, over prompts that were judged for both.
    """

    measured: Measured
    other: Measured | None = None
    other_name: str = ""
    comparison: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the evaluation, `against` and `comparison` where there are any."""
        values = self.measured.evaluation.as_dict()
        if self.other is not None and self.comparison is not None:
            values["against"] = {"model": self.other_name, **self.other.evaluation.as_dict()}
            values["comparison"] = self.comparison.as_dict()
        return values

    def rows(self, name: str) -> list[dict[str, Any]]:
        """One JSON row a sample, of the measured model (called `name`) and then of the other."""
        rows = [{"model": name, **row} for row in self.measured.rows]
        others = self.other.rows if self.other is not None else []
        return rows + [{"model": self.other_name, **row} for row in others]


def measure(
    recipe: Recipe,
    *,
    against: str = "",
    say: Say,
    on_progress: OnProgress | None = None,
    secrets: Mapping[str, str] | None = None,
) -> Report:
    """Load model, rewards and evaluation prompts of the recipe, and evaluate once.

    A model that a run of Sparring wrote is asked in the template and with the system prompt that it
    was trained with, unless the recipe names others. against: "base", or a model to measure on the
    same prompts. say: takes lines for people. secrets: see `load_rewards`. Raises UserError, or
    RunError later.
    """
    rewards = load_rewards(recipe, secrets)
    try:
        section, data = recipe.model, recipe.data
        device = pick_device()
        if device.type == "cuda":
            hold_budget(recipe.run.memory, device, say)
        policy = open_policy(
            section.path,
            adapter=section.adapter or None,
            dtype=section.dtype,
            quantization=section.quantization,
        )
        template = template_of(
            policy.tokenizer, template=data.template, system_prompt=data.system_prompt
        )
        if note := system_prompt_note(policy.tokenizer, data.system_prompt):
            say(note)
        policy = policy.speaking(template)
        recipe = _within_context(recipe, policy, say)
        found = load_prompt_set(recipe, policy, data.eval, data.eval_split, template=template)
        for line in found.report():
            say(line)
        prompts = found.prompts[: recipe.eval.limit or None]
        measured = _measure(recipe, policy, prompts, rewards, on_progress)
        if not against:
            return Report(measured=measured)
        if against == BASE and policy.model.has_adapter():
            name = f"{section.path}, adapter off"
            other = _measure(recipe, policy, prompts, rewards, on_progress, adapter=None)
        else:
            name = locate_model(_base_of(section.path) if against == BASE else against)
            other = _measure_other(recipe, policy, name, prompts, rewards, say, on_progress)
        return Report(
            measured=measured,
            other=other,
            other_name=name,
            comparison=_compare(measured, other, num_samples=recipe.eval.num_samples),
        )
    finally:
        for reward in rewards:
            reward.close()


def _within_context(recipe: Recipe, policy: Policy, say: Say) -> Recipe:
    """The recipe; where it does not say how long completions may be, no longer than half of what
    the model takes, so that there is room for prompts.
    """
    limit = policy.max_tokens // 2
    rollout = recipe.rollout
    is_given = "max_completion_tokens" in rollout.model_fields_set
    if is_given or rollout.max_completion_tokens <= limit:
        return recipe
    say(
        f"the model takes {policy.max_tokens} tokens in all: completions of at most {limit}"
        " (--rollout.max_completion_tokens N sets another limit)"
    )
    shorter = rollout.model_copy(update={"max_completion_tokens": limit})
    return recipe.model_copy(update={"rollout": shorter})


def _measure(
    recipe: Recipe,
    policy: Policy,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    on_progress: OnProgress | None,
    *,
    adapter: str | None = "policy",
) -> Measured:
    engine = sampling_engine(
        policy,
        prompts,
        num_samples=recipe.eval.num_samples,
        max_completion_tokens=recipe.rollout.max_completion_tokens,
        adapter=adapter,
        memory=recipe.run.memory,
    )
    return measure_prompts(
        engine,
        prompts,
        rewards,
        evaluation_sampling(recipe),
        num_samples=recipe.eval.num_samples,
        on_progress=on_progress,
    )


def _measure_other(
    recipe: Recipe,
    policy: Policy,
    path: str,
    prompts: Sequence[Prompt],
    rewards: Sequence[Reward],
    say: Say,
    on_progress: OnProgress | None,
) -> Measured:
    """The other model on the same prompts, by token ids where both have the same vocabulary."""
    assert policy.template is not None, "the measured policy speaks by now"
    other = open_policy(path, dtype=recipe.model.dtype)
    if other.tokenizer.get_vocab() == policy.tokenizer.get_vocab():
        other = other.speaking(policy.template)
    else:
        data = recipe.data
        template = template_of(
            other.tokenizer, template=data.template, system_prompt=data.system_prompt
        )
        other = other.speaking(template)
        say(f"{path} has another tokenizer: it is asked in its own template")
        found = load_prompt_set(recipe, other, data.eval, data.eval_split, template=template)
        wanted = {prompt.id for prompt in prompts}
        prompts = [prompt for prompt in found.prompts if prompt.id in wanted]
    return _measure(recipe, other, prompts, rewards, on_progress)


def _compare(measured: Measured, other: Measured, *, num_samples: int) -> Comparison:
    new, old = _by_prompt(measured), _by_prompt(other)
    both = [prompt for prompt in new if prompt in old]
    if not both:
        raise UserError("no prompt was judged for both models, so they cannot be compared")
    return compare(
        [new[prompt] for prompt in both],
        [old[prompt] for prompt in both],
        num_samples=num_samples,
    )


def _by_prompt(measured: Measured) -> dict[int, float]:
    return {measured.groups[place].prompt.id: share for place, share in measured.shares.items()}


def _base_of(path: str) -> str:
    """The model that a run without an adapter was trained from, as its recipe names it."""
    folder = Path(path)
    for run in (folder, folder.parent if folder.name == FINAL else folder):
        if (run / RECIPE).is_file():
            model = read_source(str(run / RECIPE)).tables.get("model", {})
            return str(model.get("path", ""))
    raise RecipeError(
        f"{path} has no adapter to switch off and is no run directory, so its base is not known;"
        " name the model to compare with: --against MODEL"
    )
