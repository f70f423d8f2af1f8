"""SFT: learn given answers, token by token.

It is the way to teach who the model is and what a thing is; GRPO teaches how to think.

    step:  conversations -> packing -> train_step

The loss is the mean over all loss tokens of the step: neither packing nor micro-batches change it.
"""

from __future__ import annotations

from typing import Any

from sparring.algorithms.losses import sft as sft_loss
from sparring.data.conversations import ConversationSet
from sparring.data.packing import pack_conversations
from sparring.errors import Interrupted, RunError
from sparring.recipe import Recipe
from sparring.train.demonstrations import load_dialogues, load_training_rows, shown_answers
from sparring.train.inference import training_template
from sparring.train.interrupt import Interruptions
from sparring.train.optimizer import Optimizer, build_optimizer
from sparring.train.order import rows_of_step
from sparring.train.plan_recipe import fit_memory
from sparring.train.policy import Policy, take_policy
from sparring.train.session import Session, open_session
from sparring.train.step import score_loss, train_step


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    policy: Policy | None = None,
    rows: ConversationSet | None = None,
    held_out: ConversationSet | None = None,
) -> dict[str, Any]:
    """Run SFT as the recipe says and return the summary that is written into the run directory.

    policy, rows: what the caller holds already, in place of what the recipe names (and then only
    records); held_out goes with rows, whose template is the policy's. Raises UserError for wrong
    input before anything is trained, RunError for a failure later, Interrupted after a signal, with
    a checkpoint of the last whole step.
    """
    with Interruptions() as interruptions, open_session(recipe, "sft", resume=resume) as session:
        recipe = fit_memory(recipe, "sft", session.say, policy)
        policy = take_policy(recipe, policy)
        if rows is not None:
            policy = policy.speaking(rows.template)
            for line in [*rows.report(), *(held_out.report() if held_out else [])]:
                session.say(line)
        else:
            policy, rows, held_out = _read(recipe, policy, session)
        session.describe(policy)
        optimizer = build_optimizer(
            policy.model.trainable_parameters(),
            name=recipe.optimizer.name,
            learning_rate=recipe.optimizer.learning_rate,
            betas=recipe.optimizer.betas,
            weight_decay=recipe.optimizer.weight_decay,
            schedule=recipe.optimizer.schedule,
            warmup_steps=recipe.optimizer.warmup_steps,
            num_steps=recipe.train.steps,
            compute_dtype=policy.model.dtype,
        )
        start = session.restore(policy.model, optimizer)
        _steps(recipe, policy, rows, held_out, optimizer, session, interruptions, start)
        losses = {} if held_out is None else {"eval_loss": held_out_loss(recipe, policy, held_out)}
        with session.phase("eval"), interruptions.interruptible():
            session.show_answers(
                recipe.train.steps, shown_answers(recipe, policy, held_out or rows)
            )
        session.save_final(policy)
        return session.finish(losses)


def _read(
    recipe: Recipe, policy: Policy, session: Session
) -> tuple[Policy, ConversationSet, ConversationSet | None]:
    """The policy speaking the recipe's template, what it learns from, and what is held out."""
    template, lines = training_template(recipe, policy.tokenizer)
    policy = policy.speaking(template)
    for line in lines:
        session.say(line)
    rows = load_training_rows(recipe, policy, say=session.say)
    if not recipe.data.eval:
        return policy, rows, None
    source, split = recipe.data.eval, recipe.data.eval_split
    return policy, rows, load_dialogues(recipe, policy, source, split, say=session.say)


def _steps(
    recipe: Recipe,
    policy: Policy,
    rows: ConversationSet,
    held_out: ConversationSet | None,
    optimizer: Optimizer,
    session: Session,
    interruptions: Interruptions,
    start: int,
) -> None:
    """The loop: one optimizer step a turn, from `start` to train.steps."""
    section = recipe.train
    try:
        for step in range(start, section.steps):
            with session.phase("train"):
                conversations = rows_of_step(
                    rows.conversations,
                    step=step,
                    per_step=section.conversations_per_step,
                    seed=recipe.run.seed,
                    in_order=rows.is_ordered,
                )
                batches = pack_conversations(conversations, max_tokens=section.micro_batch_tokens)
                update = train_step(
                    policy.model,
                    batches,
                    sft_loss,
                    optimizer,
                    max_grad_norm=recipe.optimizer.max_grad_norm,
                )
            session.log_step(step + 1, {}, update, None)
            if session.checkpoint_due(step + 1):
                session.checkpoint(step + 1, policy.model, optimizer)
            every = recipe.eval.every
            if held_out is not None and every and (step + 1) % every == 0:
                with session.phase("eval"):
                    loss = held_out_loss(recipe, policy, held_out)
                session.log_eval_loss(step + 1, loss)
                if step + 1 < section.steps:
                    with session.phase("eval"), interruptions.interruptible():
                        session.show_answers(step + 1, shown_answers(recipe, policy, held_out))
            interruptions.check()
    except (Interrupted, RunError):
        session.checkpoint(optimizer.step_count, policy.model, optimizer)
        raise


def held_out_loss(recipe: Recipe, policy: Policy, rows: ConversationSet) -> float:
    """Mean loss a token over the first eval.limit held-out conversations (0: all)."""
    conversations = rows.conversations[: recipe.eval.limit or None]
    batches = pack_conversations(conversations, max_tokens=recipe.train.micro_batch_tokens)
    return score_loss(policy.model, batches, sft_loss)
