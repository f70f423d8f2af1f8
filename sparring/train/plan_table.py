"""A plan for people: a table by part, lines to paste, and PPO's bytes beside GRPO's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sparring.models.lora import PROJECTIONS
from sparring.train.plan import Phase, Plan, gib
from sparring.train.plan_job import PARTS, Job

GIB = 2**30


def table_lines(columns: Mapping[str, Phase | None]) -> list[str]:
    """Bytes by part in GiB, a column for each phase that is there."""
    phases = {name: phase for name, phase in columns.items() if phase is not None}
    width = max(12, *(len(name) + 2 for name in phases)) if phases else 12
    lines = [f"{'GiB':30}" + "".join(f"{name:>{width}}" for name in phases)]
    for part in PARTS:
        sizes = [phase.parts.get(part, 0) for phase in phases.values()]
        if any(size >= 5e-3 * GIB for size in sizes):
            shown = "".join(f"{_short(size):>{width}}" for size in sizes)
            lines.append(f"  {part:28}{shown}")
    totals = "".join(f"{_short(phase.total):>{width}}" for phase in phases.values())
    lines.append(f"  {'total':28}{totals}")
    return lines


def _short(size: float) -> str:
    return f"{size / GIB:.2f}" if size else "-"


def plan_lines(plan: Plan, title: str, whose: str = "") -> list[str]:
    """A plan: its settings, its two phases and its seconds; whose: where the budget comes from."""
    settings, job = plan.settings, plan.job
    head = (
        f"{title}: {settings.micro_batch_tokens} tokens a micro-batch, checkpointing"
        f' "{settings.checkpointing}"' + (", offload" if settings.offload else "")
    )
    lines = [head, *table_lines({"rollout": plan.rollout, "training": plan.training})]
    if plan.budget is not None:
        verdict = "fits" if plan.fits else "does NOT fit"
        lines.append(f"  {verdict} into {gib(plan.budget)}" + (f" ({whose})" if whose else ""))
    if plan.rollout is not None:
        tokens = settings.kv_bytes // job.policy.kv_bytes_per_token
        each = job.work.prompt_tokens / job.work.group_size + job.work.completion_tokens
        rows = min(job.work.num_completions, settings.max_running, int(tokens / each))
        cached = ", four-bit weights decoded for the rollout" if settings.caches_weights else ""
        lines.append(
            f"  KV pool: {tokens:,} tokens, {rows} of {job.work.num_completions}"
            f" completions of full length at once{cached}"
        )
    lines.append(seconds_line(plan))
    return lines


def seconds_line(plan: Plan) -> str:
    """Seconds of a step, and how they are known."""
    card, seconds = plan.card, plan.seconds
    if card is None or seconds is None:
        return "  seconds: no card is named (--card NAME)"
    source = "measured card" if card.is_measured else "estimate"
    sampled = f"rollout {seconds.prefill + seconds.decode:.2f} + " if plan.rollout else ""
    return (
        f"  seconds a step, completions of full length: {sampled}training {seconds.training:.2f} ="
        f" {seconds.total:.2f} on {card.name} ({source})"
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON: bytes by part and phase, settings, seconds."""
    card = plan.card
    phases = {"rollout": plan.rollout, "training": plan.training}
    return {
        "settings": asdict(plan.settings),
        "budget_bytes": plan.budget,
        "fits": plan.fits,
        "total_bytes": plan.total,
        "phases": {
            name: {"bytes": dict(phase.parts), "total_bytes": phase.total}
            for name, phase in phases.items()
            if phase is not None
        },
        "seconds": None
        if plan.seconds is None
        else {**asdict(plan.seconds), "total": plan.seconds.total},
        "card": None
        if card is None
        else {
            "name": card.name,
            "is_measured": card.is_measured,
            "source": card.source,
        },
    }


def algorithm_jobs(job: Job) -> dict[str, Job]:
    """The same policy and work under GRPO and under PPO with each kind of critic, by name.

    Critics are of the policy's own shape: an adapter and a head on its trunk (where the policy
    trains an adapter), or a 16-bit model of their own with an adapter or with all weights trained.
    """
    policy = job.policy
    grpo = replace(job, critic=None, shares_trunk=False, samples=False)
    own = replace(policy, has_head=False, is_quantised=False, keeps_16bit=frozenset(), head="16bit")
    jobs = {"GRPO": grpo}
    if policy.rank:
        everywhere = frozenset(PROJECTIONS)
        trunk = replace(policy, has_head=False, targets=everywhere)
        jobs["PPO, on trunk"] = replace(grpo, critic=trunk, shares_trunk=True)
        jobs["PPO, own, adapter"] = replace(grpo, critic=replace(own, targets=everywhere))
    jobs["PPO, own, all"] = replace(grpo, critic=replace(own, rank=0))
    return jobs


def compared(
    rows: Sequence[tuple[str, Mapping[str, Phase]]],
) -> list[str]:
    """A Markdown table: a row a model, a column an algorithm, GiB of the training phase."""
    names = list(rows[0][1])
    lines = [f"| model | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for title, phases in rows:
        cells = [f"{phase.total / GIB:.1f}" for phase in phases.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines
