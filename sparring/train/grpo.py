"""GRPO: sample a group of completions per prompt, judge them, reinforce what beat its own group.

    step:  prompts -> engine -> rewards -> advantages -> packing -> train_step -> the same weights

(Group Relative Policy Optimization, arXiv 2402.03300.) Every update is on-policy, one for each
batch of rollouts, made by the very weights that are trained, unless the recipe asks for several
(train.passes, train.mini_steps). The loop is `_steps`;
what surrounds it opens the run, measures before and after, and sees that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from sparring.algorithms.advantages import judged_counts, min_judged
from sparring.algorithms.registry import (
    Advantage,
    Loss,
    build_advantage,
    build_loss,
    find_advantage,
    find_loss,
    knob_defaults,
)
from sparring.data.packing import pack_groups
from sparring.data.prompts import PromptSet
from sparring.errors import Interrupted, RunError
from sparring.kernels import Capability
from sparring.models.reference import Reference
from sparring.recipe import Recipe
from sparring.rewards.verdicts import Reward, judge
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.inputs import (
    load_optimizer,
    load_rewards,
    sandbox_levels,
    trainer_state,
    updates_per_step,
)
from sparring.train.interrupt import Interruptions
from sparring.train.memory import give_back_free_pages
from sparring.train.metrics import Watch, rollout_metrics, rollout_rows
from sparring.train.mismatch import check_mismatch, mismatch
from sparring.train.optimizer import Optimizer
from sparring.train.order import rows_of_step
from sparring.train.plan_recipe import fit_memory
from sparring.train.policy import Policy, build_engine, build_reference_policy, take_policy
from sparring.train.sampled import measure_accuracy, open_prompts
from sparring.train.session import Session, open_session
from sparring.train.step import StepMetrics, mean_of_updates, train_step, with_old_logprobs
from sparring.types import Group, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the loop uses, built once from the recipe."""

    policy: Policy
    engine: Engine
    rewards: list[Reward]
    train: PromptSet
    eval: PromptSet | None
    advantage: Advantage
    min_judged: int
    loss: Loss
    kl_coef: float
    reference: Reference | None
    optimizer: Optimizer
    sampling: Sampling


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    secrets: Mapping[str, str] | None = None,
    capability: Capability | None = None,
    policy: Policy | None = None,
    rewards: Sequence[Reward] = (),
    prompts: PromptSet | None = None,
    eval_prompts: PromptSet | None = None,
) -> dict[str, Any]:
    """Run GRPO as the recipe says and return the summary that is written into the run directory.

    secrets: see `load_rewards`. capability: see `build_policy`. policy, rewards, prompts: what the
    caller holds already, in place of what the recipe names (and then only records); eval_prompts
    goes with prompts, whose template is the policy's. With evaluation data the summary holds
    accuracy before and after, with 95% intervals. Raises UserError for wrong input before anything
    is trained, RunError for a failure later, Interrupted after a signal; whenever training had
    begun, a checkpoint of the last whole step is there.
    """
    with Interruptions() as interruptions, open_session(recipe, "grpo", resume=resume) as session:
        recipe = fit_memory(recipe, "grpo", session.say, policy)
        judges = list(rewards) or load_rewards(recipe, secrets)
        session.record_sandbox(sandbox_levels(judges))
        try:
            loaded = take_policy(recipe, policy, capability=capability)
            speaking, train_set, eval_set = open_prompts(
                recipe, loaded, session, prompts, eval_prompts
            )
            parts = _build(recipe, session, judges, speaking, train_set, eval_set)
            start = session.restore(parts.policy.model, parts.optimizer)
            parts.engine.weights_changed(policy_version=start)
            measure = partial(
                measure_accuracy,
                recipe,
                parts.engine,
                parts.eval,
                judges,
                session,
                interruptions,
            )
            before = session.remembered("before")
            if before is None and start == 0:
                before = measure(step=0, greedy=True)
                session.remember("before", before)
            _steps(recipe, parts, session, interruptions, start, measure)
            after = measure(step=recipe.train.steps, greedy=True)
        finally:
            for reward in judges:
                reward.close()
        session.save_final(parts.policy)
        return session.finish({"before": before, "after": after} if after else {})


def _steps(
    recipe: Recipe,
    parts: Parts,
    session: Session,
    interruptions: Interruptions,
    start: int,
    measure: Callable[..., Any],
) -> None:
    """The loop: one optimizer step a turn, from `start` to train.steps."""
    engine, watch, rollout = parts.engine, Watch(), recipe.rollout
    whole: int | None = start  # the steps done; None while the updates of one are under way
    try:
        for step in range(start, recipe.train.steps):
            with session.phase("rollout"), interruptions.interruptible():
                give_back_free_pages()
                prompts = rows_of_step(
                    parts.train.prompts,
                    step=step,
                    per_step=rollout.prompts_per_step,
                    seed=recipe.run.seed,
                    in_order=parts.train.is_ordered,
                )
                rollouts = engine.generate(
                    prompts,
                    parts.sampling,
                    num_samples=rollout.group_size,
                    on_progress=session.on_rollout,
                    enough=_enough(recipe, parts.rewards, step),
                )
            with session.phase("reward"), interruptions.interruptible():
                state = trainer_state(recipe, step)
                rollouts = [group for group in rollouts if group]
                judgement = judge(
                    rollouts, parts.rewards, trainer_state=state, is_first_batch=step == start
                )
            with session.phase("train"):
                engine.make_room()
                give_back_free_pages()
                groups = _judged(judgement.groups, parts.min_judged)
                advantages = parts.advantage(groups)
                whole = None
                update = _learn(recipe, parts, groups, advantages)
                whole = step + 1
                engine.weights_changed(policy_version=step + 1)
            metrics = rollout_metrics(judgement.groups, judgement.reports, engine.stats)
            metrics["groups_dropped"] = len(judgement.groups) - len(groups)
            for line in watch.look(judgement.groups, metrics):
                session.warn(line)
            for report in judgement.reports.values():
                session.report_reward(report)
            session.log_step(step + 1, metrics, update, judgement.groups)
            session.write_rollouts(step + 1, rollout_rows(groups, advantages))
            if session.checkpoint_due(step + 1):
                session.checkpoint(step + 1, parts.policy.model, parts.optimizer)
            every = recipe.eval.every
            if every and (step + 1) % every == 0 and step + 1 < recipe.train.steps:
                measure(step=step + 1, greedy=False)
            interruptions.check()
    except (Interrupted, RunError):
        if whole is None and updates_per_step(recipe) == 1:
            whole = parts.optimizer.step_count  # an update that failed has changed nothing
        if whole is not None:
            session.checkpoint(whole, parts.policy.model, parts.optimizer)
        raise


def _learn(
    recipe: Recipe, parts: Parts, groups: Sequence[Group], advantages: Sequence[Tensor]
) -> StepMetrics | None:
    """The updates of a step: one, or train.passes over train.mini_steps parts of the groups.

    Each part's loss divides by its own counts. Where there are several updates, the ratio is to the
    policy before the first of them, whose log-probabilities take a pass; None: nothing to learn.
    """
    section, model, optimizer = recipe.train, parts.policy.model, parts.optimizer
    reference = parts.reference.logprobs if parts.reference else None
    split = [
        pack_groups(
            groups[number :: section.mini_steps],
            advantages[number :: section.mini_steps],
            max_tokens=section.micro_batch_tokens,
            temperature=recipe.rollout.temperature,
            drop_zero_advantage=parts.kl_coef == 0.0,
            learn_truncated=section.learn_truncated,
        )
        for number in range(section.mini_steps)
    ]
    before: dict[str, float] = {}
    if updates_per_step(recipe) > 1:
        split = [with_old_logprobs(model, batches) for batches in split]
        every = [batch for batches in split for batch in batches]
        old = [batch.old_logprobs_T for batch in every if batch.old_logprobs_T is not None]
        before = mismatch(old, every)
        check_mismatch(before, section.max_mismatch_kl)
        split = [[replace(b, sampler_logprobs_T=None) for b in batches] for batches in split]
        if reference is not None:  # once for all passes
            split = [[replace(b, ref_logprobs_T=reference(b)) for b in part] for part in split]
            reference = None
    updates = []
    for batches in split * section.passes:
        if not batches:
            optimizer.skip_step()
            continue
        updates.append(
            train_step(
                model,
                batches,
                parts.loss,
                optimizer,
                max_grad_norm=recipe.optimizer.max_grad_norm,
                reference=reference,
                max_mismatch_kl=section.max_mismatch_kl,
            )
        )
    if not updates:
        return None
    update = mean_of_updates(updates)
    return replace(update, values={**update.values, **before})


def _enough(
    recipe: Recipe, rewards: list[Reward], step: int
) -> Callable[[int, list[Rollout]], bool] | None:
    """Whether so many complete groups have rewards that differ; None where all are wanted.

    Only whole groups are left out, never single completions: but those that end first are short
    ones, so a step sees fewer long answers than the policy writes.
    """
    wanted = recipe.rollout.enough_groups
    if not wanted:
        return None
    with_signal = []

    def enough(place: int, rollouts: list[Rollout]) -> bool:
        state = trainer_state(recipe, step)
        (group,) = judge([rollouts], rewards, trainer_state=state).groups
        judged = group.rewards_G[~group.rewards_G.isnan()]
        if len(judged) and bool((judged != judged[0]).any()):
            with_signal.append(place)
        return len(with_signal) >= wanted

    return enough


def _build(
    recipe: Recipe,
    session: Session,
    rewards: list[Reward],
    policy: Policy,
    train: PromptSet,
    evaluation: PromptSet | None,
) -> Parts:
    rollout = recipe.rollout
    settings = {"max_completion_tokens": rollout.max_completion_tokens}
    loss = build_loss(recipe.loss.name, recipe.loss.knobs, **settings)
    kl_coef = float(
        recipe.loss.knobs.get(
            "kl_coef", knob_defaults(find_loss(recipe.loss.name)).get("kl_coef", 0.0)
        )
    )
    most = rollout.prompts_per_step * rollout.group_size
    if evaluation:
        most = max(most, len(evaluation) * recipe.eval.num_samples)
    session.describe(policy)
    optimizer = load_optimizer(
        recipe,
        policy.model.trainable_parameters(),
        policy.model.dtype,
        updates_per_step=updates_per_step(recipe),
    )
    return Parts(
        policy=policy,
        engine=build_engine(recipe, policy, most_rollouts=most),
        rewards=rewards,
        train=train,
        eval=evaluation,
        advantage=build_advantage(recipe.advantage.name, recipe.advantage.knobs),
        min_judged=min_judged(find_advantage(recipe.advantage.name)),
        loss=loss,
        kl_coef=kl_coef,
        reference=build_reference_policy(policy, kl_coef),
        optimizer=optimizer,
        sampling=Sampling(
            temperature=rollout.temperature,
            max_completion_tokens=rollout.max_completion_tokens,
            stop=rollout.stop,
            seed=recipe.run.seed,
        ),
    )


def _judged(groups: list[Group], fewest: int) -> list[Group]:
    """The groups that have enough judged samples to learn from."""
    counts = judged_counts(groups)
    return [group for group, count in zip(groups, counts, strict=True) if count >= fewest]
