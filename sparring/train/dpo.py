"""DPO: learn from pairs which of two answers is the better one, without rewards or rollouts.

    step:  pairs -> packing -> reference log-probabilities -> train_step

(Direct Preference Optimization, arXiv 2305.18290; which loss is a choice of the recipe, see
algorithms/preference.py.) The reference is the policy at step 0: the model with its adapter off. A
step's loss is the mean over its pairs, and the two sides of a pair share their context in one
micro-batch, so neither packing nor micro-batches change it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparring.algorithms.registry import Loss, build_preference_loss
from sparring.data.packing import pack_pairs
from sparring.data.pairs import PairSet, load_pairs
from sparring.data.rows import load_rows
from sparring.errors import Interrupted, RunError
from sparring.models.reference import Reference, build_reference
from sparring.recipe import Recipe
from sparring.train.inference import training_template
from sparring.train.inputs import load_optimizer
from sparring.train.interrupt import Interruptions
from sparring.train.optimizer import Optimizer
from sparring.train.order import rows_of_step
from sparring.train.plan_recipe import fit_memory
from sparring.train.policy import Policy, take_policy
from sparring.train.session import Session, open_session
from sparring.train.step import score_values, train_step

SHOWN = "rewards/accuracies"
"""The share of pairs whose chosen side gained more over the reference than the rejected one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the loop uses, built once from the recipe; reference: None where not used."""

    policy: Policy
    train: PairSet
    eval: PairSet | None
    loss: Loss
    reference: Reference | None
    optimizer: Optimizer


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    pairs: PairSet | None = None,
    eval_pairs: PairSet | None = None,
) -> dict[str, Any]:
    """Run DPO as the recipe says and return the summary that is written into the run directory.

    policy, pairs: what the caller holds already, in place of what the recipe names (and then only
    records); eval_pairs goes with pairs, whose template is the policy's. With evaluation data the
    summary holds their loss and the share of pairs told apart. Raises UserError for wrong input
    before anything is trained, RunError for a failure later, Interrupted after a signal, with a
    checkpoint of the last whole step.
    """
    with Interruptions() as interruptions, open_session(recipe, "dpo", resume=resume) as session:
        recipe = fit_memory(recipe, "dpo", session.say, policy)
        policy = take_policy(recipe, policy)
        if pairs is not None:
            policy = policy.speaking(pairs.template)
            for line in [*pairs.report(), *(eval_pairs.report() if eval_pairs else [])]:
                session.say(line)
        else:
            policy, pairs, eval_pairs = _read(recipe, policy, session)
        parts = _build(recipe, session, policy, pairs, eval_pairs)
        start = session.restore(parts.policy.model, parts.optimizer)
        _steps(recipe, parts, session, interruptions, start)
        found = {} if parts.eval is None else held_out(recipe, parts, parts.eval)
        session.save_final(parts.policy)
        return session.finish({f"eval_{name}": value for name, value in found.items()})


def _steps(
    recipe: Recipe, parts: Parts, session: Session, interruptions: Interruptions, start: int
) -> None:
    """The loop: one optimizer step a turn, from `start` to train.steps."""
    section, model = recipe.train, parts.policy.model
    try:
        for step in range(start, section.steps):
            with session.phase("train"):
                pairs = rows_of_step(
                    parts.train.pairs,
                    step=step,
                    per_step=section.pairs_per_step,
                    seed=recipe.run.seed,
                    in_order=parts.train.is_ordered,
                )
                update = train_step(
                    model,
                    pack_pairs(pairs, max_tokens=section.micro_batch_tokens),
                    parts.loss,
                    parts.optimizer,
                    max_grad_norm=recipe.optimizer.max_grad_norm,
                    reference=parts.reference.logprobs if parts.reference else None,
                )
            session.log_step(step + 1, {"accuracy": update.values[SHOWN]}, update, None)
            if session.checkpoint_due(step + 1):
                session.checkpoint(step + 1, model, parts.optimizer)
            every = recipe.eval.every
            if parts.eval is not None and every and (step + 1) % every == 0:
                with session.phase("eval"):
                    found = held_out(recipe, parts, parts.eval)
                session.log_eval_loss(step + 1, found.pop("loss"), found)
            interruptions.check()
    except (Interrupted, RunError):
        session.checkpoint(parts.optimizer.step_count, model, parts.optimizer)
        raise


def held_out(recipe: Recipe, parts: Parts, pairs: PairSet) -> dict[str, float]:
    """Loss, accuracy and margin on the first eval.limit held-out pairs (0: all)."""
    found = score_values(
        parts.policy.model,
        pack_pairs(
            pairs.pairs[: recipe.eval.limit or None], max_tokens=recipe.train.micro_batch_tokens
        ),
        parts.loss,
        reference=parts.reference.logprobs if parts.reference else None,
    )
    return {
        "loss": found["loss"],
        "accuracy": found[SHOWN],
        "margin": found["rewards/margins"],
    }


def _read(
    recipe: Recipe, policy: Policy, session: Session
) -> tuple[Policy, PairSet, PairSet | None]:
    """The policy speaking the recipe's template, the pairs to learn from and those held out."""
    template, lines = training_template(recipe, policy.tokenizer)
    policy = policy.speaking(template)
    for line in lines:
        session.say(line)
    train = _load(recipe, policy, session, recipe.data.train, recipe.data.split)
    evaluation = None
    if recipe.data.eval:
        evaluation = _load(recipe, policy, session, recipe.data.eval, recipe.data.eval_split)
    return policy, train, evaluation


def _build(
    recipe: Recipe,
    session: Session,
    policy: Policy,
    train: PairSet,
    evaluation: PairSet | None,
) -> Parts:
    loss = build_preference_loss(recipe.loss.name, recipe.loss.knobs)
    session.describe(policy)
    return Parts(
        policy=policy,
        train=train,
        eval=evaluation,
        loss=loss,
        reference=None if loss.keywords.get("reference_free") else build_reference(policy.model),
        optimizer=load_optimizer(recipe, policy.model.trainable_parameters(), policy.model.dtype),
    )


def _load(recipe: Recipe, policy: Policy, session: Session, source: str, split: str) -> PairSet:
    data = recipe.data
    pairs = load_pairs(
        load_rows(source, split=split, bad_rows=data.bad_rows),
        policy.tokenizer,
        template=policy.template or data.template,
        prompt_column=data.prompt,
        max_tokens=policy.max_tokens,
        bad_rows=data.bad_rows,
    )
    for line in pairs.report():
        session.say(line)
    return pairs
