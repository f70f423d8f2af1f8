"""PPO: a critic says what to expect before each token; what beat the expectation is reinforced.

    step:  prompts -> engine -> rewards -> values -> advantages -> several updates of both

(Proximal Policy Optimization, arXiv 1707.06347, with generalised advantage estimation, arXiv
1506.02438.) It is what GRPO replaces: the group's mean is its baseline, PPO trains a second model
for one. A step samples once and goes over its rollouts `passes` times; each pass splits them into
`mini_steps` parts, the same in every pass, and updates policy and critic on one part after another,
each with an optimizer of its own. Advantages are whitened over all rollouts of the step; losses
divide by the counts of their part. The KL term, where there is one, is in the reward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring.algorithms.advantages import judged_counts
from sparring.algorithms.registry import Estimator, Loss, build_estimator, build_loss
from sparring.algorithms.value import clipped
from sparring.data.packing import pack_rewarded
from sparring.data.prompts import PromptSet
from sparring.errors import CheckpointError, Interrupted, RunError
from sparring.models.memory import free_bytes
from sparring.models.reference import Reference
from sparring.models.value import Critic, load_critic, share_trunk
from sparring.recipe import Recipe
from sparring.rewards.verdicts import Reward, judge
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.inputs import load_optimizer, load_rewards, sandbox_levels, trainer_state
from sparring.train.interrupt import Interruptions
from sparring.train.memory import give_back_free_pages
from sparring.train.metrics import Watch, rollout_metrics, rollout_rows
from sparring.train.mismatch import check_mismatch, mismatch
from sparring.train.optimizer import Optimizer
from sparring.train.order import rows_of_step
from sparring.train.plan_recipe import fit_memory
from sparring.train.policy import (
    Policy,
    build_engine,
    build_policy,
    build_reference_policy,
    set_memory_saving,
)
from sparring.train.sampled import measure_accuracy, open_prompts
from sparring.train.session import Session, open_session
from sparring.train.step import (
    StepMetrics,
    mean_of_updates,
    to_device,
    train_step,
    with_old_logprobs,
)
from sparring.types import Batch, Group

VALUE_PART, VALUE_WEIGHTS = "value", "trainable.safetensors"
VALUE_OPTIMIZER, VALUE_NUMBERS = "optimizer.safetensors", "optimizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything the loop uses, built once from the recipe."""

    policy: Policy
    engine: Engine
    rewards: list[Reward]
    train: PromptSet
    eval: PromptSet | None
    loss: Loss
    optimizer: Optimizer
    reference: Reference | None
    critic: Critic
    value_loss: Loss
    value_optimizer: Optimizer
    estimator: Estimator
    sampling: Sampling


def train(
    recipe: Recipe, *, resume: bool = False, secrets: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run PPO as the recipe says and return the summary that is written into the run directory.

    secrets: see `load_rewards`. With evaluation data the summary holds accuracy before and after,
    with 95% intervals. Raises UserError for wrong input before anything is trained,
    MemoryBudgetError for a critic that does not fit among them, RunError for a failure later,
    Interrupted after a signal; checkpoints are of whole steps.
    """
    with Interruptions() as interruptions, open_session(recipe, "ppo", resume=resume) as session:
        recipe = fit_memory(recipe, "ppo", session.say)
        rewards = load_rewards(recipe, secrets)
        session.record_sandbox(sandbox_levels(rewards))
        try:
            parts = _build(recipe, session, rewards)
            start = session.restore(parts.policy.model, parts.optimizer)
            _restore_value(parts, session)
            parts.engine.weights_changed(policy_version=start)
            measure = partial(
                measure_accuracy,
                recipe,
                parts.engine,
                parts.eval,
                rewards,
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
            for reward in rewards:
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
    """The loop: one batch of rollouts and its updates a turn, from `start` to train.steps."""
    engine, watch, rollout = parts.engine, Watch(by_group=False), recipe.rollout
    value_part = {VALUE_PART: partial(_save_value, parts)}
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
                )
                rollouts = engine.generate(
                    prompts,
                    parts.sampling,
                    num_samples=rollout.group_size,
                    on_progress=session.on_rollout,
                )
            with session.phase("reward"), interruptions.interruptible():
                state = trainer_state(recipe, step)
                judgement = judge(
                    rollouts, parts.rewards, trainer_state=state, is_first_batch=step == start
                )
            with session.phase("train"):
                parts.engine.make_room()
                give_back_free_pages()
                counts = judged_counts(judgement.groups)
                groups = [g for g, n in zip(judgement.groups, counts, strict=True) if n]
                split, values = _experience(recipe, parts, groups)
                whole = None
                update, value_update = _learn(recipe, parts, split, step)
                whole = step + 1
                engine.weights_changed(policy_version=step + 1)
            metrics = rollout_metrics(judgement.groups, judgement.reports, engine.stats)
            metrics["groups_dropped"] = len(judgement.groups) - len(groups)
            del metrics["groups_without_signal"]  # the critic is the baseline, not the group
            metrics |= values | _value_metrics(value_update)
            for line in watch.look(judgement.groups, metrics):
                session.warn(line)
            for report in judgement.reports.values():
                session.report_reward(report)
            session.log_step(step + 1, metrics, update, judgement.groups)
            session.write_rollouts(step + 1, rollout_rows(groups, None))
            if session.checkpoint_due(step + 1):
                session.checkpoint(step + 1, parts.policy.model, parts.optimizer, value_part)
            every = recipe.eval.every
            if every and (step + 1) % every == 0 and step + 1 < recipe.train.steps:
                measure(step=step + 1, greedy=False)
            interruptions.check()
    except (Interrupted, RunError):
        if whole is not None:
            session.checkpoint(whole, parts.policy.model, parts.optimizer, value_part)
        raise


def _experience(
    recipe: Recipe, parts: Parts, groups: Sequence[Group]
) -> tuple[list[list[Batch]], dict[str, float]]:
    """The rollouts as the batches of each mini-step, with all that the updates need.

    Values, log-probabilities and the reference's are those of the models as they stand, before the
    first update of the step. Where there is one update alone and no KL term, the update itself
    finds the old log-probabilities, and no pass is made for them.
    """
    model, critic = parts.policy.model, parts.critic
    split, batches, rewards = [], [], []
    for number in range(min(recipe.train.mini_steps, len(groups))):
        packed = pack_rewarded(
            groups[number :: recipe.train.mini_steps],
            max_tokens=recipe.train.micro_batch_tokens,
            temperature=recipe.rollout.temperature,
        )
        split.append(len(packed))
        batches += [to_device(batch, model.device) for batch, _ in packed]
        rewards += [rewards_S for _, rewards_S in packed]
    if not _is_on_policy(recipe) or parts.reference is not None:
        batches = with_old_logprobs(model, batches)
    with torch.no_grad():
        batches = [replace(b, old_values_T=critic.score(b).values_T) for b in batches]
        if parts.reference is not None:
            reference = parts.reference.logprobs
            batches = [replace(b, ref_logprobs_T=reference(b)) for b in batches]
    batches = parts.estimator(batches, rewards)
    rest = iter(batches)
    found = [[next(rest) for _ in range(size)] for size in split]
    values = _experience_metrics(batches)
    check_mismatch(values, recipe.train.max_mismatch_kl)
    return [part for part in found if part], values


def _is_on_policy(recipe: Recipe) -> bool:
    """Whether a step is one update, of the very policy that sampled."""
    return recipe.train.passes * recipe.train.mini_steps == 1


def _learn(
    recipe: Recipe, parts: Parts, split: Sequence[Sequence[Batch]], step: int
) -> tuple[StepMetrics | None, StepMetrics | None]:
    """Several passes over the parts of a step's rollouts, both models one update a part."""
    updates, value_updates = [], []
    max_grad_norm = recipe.optimizer.max_grad_norm
    for number in range(recipe.train.passes):
        for index in _order(recipe.train.mini_steps, step, number, seed=recipe.run.seed):
            if index >= len(split):  # fewer groups than usual were judged: the schedules go on
                parts.optimizer.skip_step()
                parts.value_optimizer.skip_step()
                continue
            # The KL term is in the advantages; of the sampler only an update without a pass before
            # it can tell, and a critic never.
            policy_batches = [replace(batch, ref_logprobs_T=None) for batch in split[index]]
            batches = [replace(batch, sampler_logprobs_T=None) for batch in policy_batches]
            updates.append(
                train_step(
                    parts.policy.model,
                    policy_batches if batches[0].old_logprobs_T is None else batches,
                    parts.loss,
                    parts.optimizer,
                    max_grad_norm=max_grad_norm,
                    max_mismatch_kl=recipe.train.max_mismatch_kl,
                )
            )
            with parts.critic.alone():
                value_updates.append(
                    train_step(
                        parts.critic,
                        batches,
                        parts.value_loss,
                        parts.value_optimizer,
                        max_grad_norm=max_grad_norm,
                    )
                )
    if not updates:
        return None, None
    return mean_of_updates(updates), mean_of_updates(value_updates)


def _order(size: int, step: int, number: int, *, seed: int) -> list[int]:
    """In which order pass `number` of a step takes its parts: a function of its arguments alone."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step * 1009 + number) % 2**63)
    return torch.randperm(size, generator=generator).tolist()


def _experience_metrics(batches: Sequence[Batch]) -> dict[str, float]:
    """Before this step's updates: what the critic was worth, KL to the reference, mismatch.

    Means over tokens; mismatch of trainer and sampler is that of mismatch.py.
    """

    def tokens(name: str) -> Tensor:
        streams = [getattr(batch, name)[batch.loss_mask_T] for batch in batches]
        return torch.cat(streams).double().cpu()

    if not batches:
        return {}
    returns, values = tokens("returns_T"), tokens("old_values_T")
    spread = float(returns.var(correction=0))
    left = float((returns - values).var(correction=0))
    found = {
        "returns": float(returns.mean()),
        "value/explained": 1.0 - left / spread if spread > 0 else 0.0,
    }
    if any(batch.old_logprobs_T is None for batch in batches):
        return found
    old = [batch.old_logprobs_T for batch in batches if batch.old_logprobs_T is not None]
    found |= mismatch(old, batches)
    if batches[0].ref_logprobs_T is not None:
        found["kl"] = float((tokens("old_logprobs_T") - tokens("ref_logprobs_T")).mean())
    return found


def _value_metrics(update: StepMetrics | None) -> dict[str, float]:
    if update is None:
        return {}
    return {
        "value/loss": update.loss,
        "value/gradient_norm": update.gradient_norm,
        "value/learning_rate": update.learning_rate,
        "value/seconds": update.seconds,
        **{f"value/{name}": value for name, value in update.values.items()},
    }


def _save_value(parts: Parts, folder: Path) -> None:
    """The critic's part of a checkpoint: its weights and its optimizer's state."""
    weights = {n: p.detach().contiguous() for n, p in parts.critic.trainable_parameters().items()}
    save_file(weights, folder / VALUE_WEIGHTS)
    optimizer = parts.value_optimizer
    tensors = {name: tensor.contiguous() for name, tensor in optimizer.state_tensors().items()}
    save_file(tensors, folder / VALUE_OPTIMIZER)
    text = json.dumps(optimizer.state_numbers()) + "\n"
    (folder / VALUE_NUMBERS).write_text(text, encoding="utf-8")


def _restore_value(parts: Parts, session: Session) -> None:
    """The critic as the checkpoint has it, where the run goes on from one."""
    folder = session.part(VALUE_PART)
    if folder is None:
        return
    saved, trained = load_file(folder / VALUE_WEIGHTS), parts.critic.trainable_parameters()
    if saved.keys() != trained.keys():
        differing = ", ".join(sorted(saved.keys() ^ trained.keys())[:5])
        raise CheckpointError(
            f"{folder}: the critic is that of another [value] section; {differing} ... stand on"
            " one side only"
        )
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
    parts.critic.refresh_shadows()
    numbers = json.loads((folder / VALUE_NUMBERS).read_text(encoding="utf-8"))
    parts.value_optimizer.load_state(load_file(folder / VALUE_OPTIMIZER), numbers)


def _build(recipe: Recipe, session: Session, rewards: list[Reward]) -> Parts:
    policy, train_set, evaluation = open_prompts(recipe, build_policy(recipe), session)
    rollout, model = recipe.rollout, policy.model
    session.describe(policy)
    kl_coef = float(recipe.advantage.knobs.get("kl_coef", 0.0))
    reference = build_reference_policy(policy, kl_coef)
    updates = recipe.train.passes * recipe.train.mini_steps
    learned = model.trainable_parameters()
    optimizer = load_optimizer(recipe, learned, model.dtype, updates_per_step=updates)
    critic = _build_critic(recipe, policy, session)
    assert recipe.value is not None, "a ppo recipe has a [value] section"
    value_optimizer = load_optimizer(
        recipe,
        critic.trainable_parameters(),
        critic.trunk.dtype,
        updates_per_step=updates,
        learning_rate=recipe.value.learning_rate,
    )
    most = rollout.prompts_per_step * rollout.group_size
    if evaluation:
        most = max(most, len(evaluation) * recipe.eval.num_samples)
    return Parts(
        policy=policy,
        engine=build_engine(recipe, policy, most_rollouts=most),
        rewards=rewards,
        train=train_set,
        eval=evaluation,
        loss=build_loss(
            recipe.loss.name,
            recipe.loss.knobs,
            max_completion_tokens=rollout.max_completion_tokens,
        ),
        optimizer=optimizer,
        reference=reference,
        critic=critic,
        value_loss=partial(clipped, clip=recipe.value.clip),
        value_optimizer=value_optimizer,
        estimator=build_estimator(recipe.advantage.name, recipe.advantage.knobs),
        sampling=Sampling(
            temperature=rollout.temperature,
            max_completion_tokens=rollout.max_completion_tokens,
            stop=rollout.stop,
            seed=recipe.run.seed,
        ),
    )


def _build_critic(recipe: Recipe, policy: Policy, session: Session) -> Critic:
    """The critic of [value], if it fits beside the policy and what training the policy takes."""
    section, model = recipe.value, policy.model
    assert section is not None, "a ppo recipe has a [value] section"
    held = sum(p.numel() * p.dtype.itemsize for p in model.parameters())
    if recipe.run.memory == "auto":
        free = free_bytes(model.device)
    else:
        free = int(recipe.run.memory) - held
    # AdamW's moments and a float32 gradient are still to come; 16-bit masters are there already.
    free -= sum(12 * p.numel() for p in model.trainable_parameters().values())
    seed = (recipe.run.seed + 1) % 2**63
    if section.path:
        critic = load_critic(
            section.path,
            rank=section.rank,
            seed=seed,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device,
            free=free,
            capability=model.capability,
        )
        set_memory_saving(critic.trunk, recipe)
    else:
        critic = share_trunk(model, rank=section.rank, seed=seed, free=free)
    trained = sum(p.numel() for p in critic.trainable_parameters().values())
    where = section.path or "the policy's own trunk"
    session.say(f"critic on {where}: {trained:,} parameters trained")
    return critic
