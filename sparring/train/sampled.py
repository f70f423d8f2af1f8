"""What runs that sample have in common around their loop: prompts before it, accuracy beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparring.data.named import read_rows
from sparring.data.prompts import PromptSet, shared_prompts
from sparring.recipe import Recipe
from sparring.rewards.verdicts import Reward
from sparring.rollout.engine import Engine
from sparring.train.evaluate import evaluate
from sparring.train.inference import training_template
from sparring.train.inputs import evaluation_sampling, load_prompt_set
from sparring.train.interrupt import Interruptions
from sparring.train.metrics import rollout_rows
from sparring.train.policy import Policy
from sparring.train.row_kinds import ROWS_LOOKED_AT, warn_if_not_checkable
from sparring.train.session import Session


def open_prompts(
    recipe: Recipe,
    policy: Policy,
    session: Session,
    train: PromptSet | None = None,
    evaluation: PromptSet | None = None,
) -> tuple[Policy, PromptSet, PromptSet | None]:
    """The policy speaking the recipe's template, the prompts to train on, those to evaluate on.

    train, evaluation: prompts that are read already, in the template that the policy then speaks.
    Says what became of the rows, and warns of rows that no reward can teach and of evaluation
    prompts that are also trained on. Raises DataError or RecipeError.
    """
    data = recipe.data
    lines: list[str] = []
    if train is not None:
        policy = policy.speaking(train.template)
    else:
        template, lines = training_template(recipe, policy.tokenizer)
        policy = policy.speaking(template)
        rows = read_rows(data.train, split=data.split, limit=ROWS_LOOKED_AT, bad_rows="skip")
        train = load_prompt_set(recipe, policy, data.train, data.split, template=template)
        for line in warn_if_not_checkable(rows, data.prompt, data.reference):
            session.warn(line)
        if data.eval:
            evaluation = load_prompt_set(
                recipe, policy, data.eval, data.eval_split, template=template
            )
    for prompts in (train, evaluation):
        lines += prompts.report() if prompts else []
    for line in lines:
        session.say(line)
    if evaluation and (shared := shared_prompts(train, evaluation)):
        session.warn(
            f"{len(shared)} of {len(evaluation)} evaluation prompts are also training prompts"
            f" (the first: row {shared[0] + 1}): accuracy on them is memory"
        )
    return policy, train, evaluation


def measure_accuracy(
    recipe: Recipe,
    engine: Engine,
    prompts: PromptSet | None,
    rewards: Sequence[Reward],
    session: Session,
    interruptions: Interruptions,
    *,
    step: int,
    greedy: bool,
) -> dict[str, Any] | None:
    """Accuracy on the evaluation prompts, recorded and shown; None where the recipe names none."""
    if prompts is None:
        return None
    with session.phase("eval"), interruptions.interruptible():
        evaluation, groups = evaluate(
            engine,
            prompts.prompts[: recipe.eval.limit or None],
            rewards,
            evaluation_sampling(recipe),
            num_samples=recipe.eval.num_samples,
            greedy=greedy,
            on_progress=session.on_rollout,
        )
    session.log_evaluation(step, evaluation, rollout_rows(groups, None))
    return evaluation.as_dict()
