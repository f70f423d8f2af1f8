"""The memory of a run by part and the seconds of a step, before anything is loaded.

Two phases share one budget. While completions are written the KV pool is there; while weights are
updated it is not, and the pass lives in its bytes. Each phase is a tape of requests that mirrors
the code (plan_training.py, plan_rollout.py), played by a model of PyTorch's allocator. Numbers in,
numbers out: config.json and a recipe are read elsewhere, and no GPU is asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sparring.data.packing import best_fit
from sparring.errors import MemoryBudgetError
from sparring.rollout.engine import KERNEL_BLOCK_SIZE
from sparring.train.allocator import MIB, CachingAllocator, LimitReached
from sparring.train.cards import Card
from sparring.train.plan_job import (
    ADAPTERS,
    CONTEXT,
    CONTEXT_BYTES,
    CRITIC,
    PARTS,
    REFERENCE,
    SLACK,
    STREAMS,
    WEIGHTS,
    WORKSPACES,
    Job,
    Settings,
    Trained,
    Work,
    take_adapter,
    take_masters,
    take_moments,
    take_weights,
)
from sparring.train.plan_rollout import (
    kv_tokens,
    rows_at_once,
    take_graphs,
    take_rollout,
)
from sparring.train.plan_seconds import Seconds, step_seconds, training_seconds
from sparring.train.plan_training import (
    STREAM_BYTES,
    VALUE_STREAM_BYTES,
    MicroBatch,
    TrainingTape,
)
from sparring.train.tape import Peak, Tape, play

MODES = ("none", "selective", "layers")
"""Checkpointing, fastest first."""
MICRO_BATCH_TOKENS = (32768, 16384, 8192, 4096, 2048, 1024)
"""What a proposal chooses from."""
KV_SHARE = 0.98
"""Of what is left in the rollout phase: the rest is for requests of odd sizes."""
UNSEEN: Mapping[str, tuple[int, float]] = {
    "rollout": (32 * MIB, 0.005),
    "training": (64 * MIB, 0.01),
}
"""Reserved beyond what is played, in bytes and as a share, by phase: half-filled pages of loading,
rows and rules of decode steps, and requests that library calls make inside themselves."""
STEPS_PLAYED = 2
"""After the second step the allocator holds all that a run ever makes it reserve."""
BATCHES_PLAYED = 3
TIGHT, LEANING = 1.1, 1.05
"""Settings that only just fit must be faster by so much (at its limit the allocator gives pages
back and takes them again), and so must those that wait for the host's memory."""
PROPOSALS_TRIED = 4
"""Of the fastest training passes: the first whose rollout fits too is taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Bytes by part when most is there; total: what the card must have, context included.

    played: what the model of the allocator reserves; reserved: with what it does not see. is_tight:
    that would be more than the budget, and is counted up to it.
    """

    parts: Mapping[str, int]
    allocated: int
    played: int
    reserved: int
    is_tight: bool = False

    @property
    def total(self) -> int:
        """Reserved memory and the context."""
        return self.reserved + CONTEXT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job with its settings and what they take. budget: bytes in all, None for no limit."""

    job: Job
    settings: Settings
    budget: int | None
    rollout: Phase | None
    training: Phase
    seconds: Seconds | None
    card: Card | None

    @property
    def total(self) -> int:
        """Bytes of the larger phase."""
        return max(phase.total for phase in (self.rollout, self.training) if phase is not None)

    @property
    def fits(self) -> bool:
        """Whether both phases lie within the budget."""
        return self.budget is None or self.total <= self.budget


def workspace_bytes(arch: int) -> int:
    """cuBLAS' workspaces: one for the thread that goes forward, one for backward's."""
    return 2 * (32 * MIB if arch >= 90 else 8 * MIB + 128 * 1024)


def micro_batches(work: Work, max_tokens: int, *, exact: bool = False) -> list[MicroBatch]:
    """The micro-batches of a step, as data/packing.py fills them.

    exact: all lengths are those of `work`; otherwise they are the most that may come, and a
    micro-batch may be filled to the brim.
    """
    prompt, each = max(work.prompt_tokens - 1, 0), work.completion_tokens
    if not exact:
        rows = min(max(max_tokens, prompt + each), max(work.num_tokens, 1))
        # a group over the limit is split, and its prompt computed again for each part
        samples = max(1, min(work.group_size, (rows - prompt) // each))
        parts = -(-work.group_size // samples)
        total = work.prompts * (parts * prompt + work.group_size * each)
        num_groups = max(1, rows // (prompt + samples * each))
        loss_rows = max(1, min(rows - num_groups * prompt, work.num_completions * each))
        full = MicroBatch(rows=rows, loss_rows=loss_rows, groups=((prompt, samples),) * num_groups)
        left = total % rows
        rest = replace(full, rows=left, loss_rows=max(1, min(loss_rows, left)))
        return [full] * (total // rows) + ([rest] if left else [])
    split = best_fit([each] * work.group_size, max(max_tokens - prompt, 0))
    units = [len(chosen) for _ in range(work.prompts) for chosen in split]
    sizes = [prompt + samples * each for samples in units]
    found = []
    for chosen in best_fit(sizes, max_tokens):
        groups = tuple((prompt, units[i]) for i in chosen)
        rows = sum(sizes[i] for i in chosen)
        loss_rows = each * sum(samples for _, samples in groups)
        found.append(MicroBatch(rows=rows, loss_rows=loss_rows, groups=groups))
    return found


def predict(
    job: Job,
    settings: Settings,
    *,
    budget: int | None = None,
    card: Card | None = None,
    exact: bool = False,
) -> Plan:
    """What these settings take; raises MemoryBudgetError where the allocator finds no room.

    exact: see `micro_batches`. A KV pool of 0 bytes in `settings` becomes what is left for it.
    """
    arch = card.arch if card is not None else 90
    batches = micro_batches(job.work, settings.micro_batch_tokens, exact=exact)
    rollout = None
    if job.samples:
        if not settings.kv_bytes:
            settings = replace(settings, kv_bytes=kv_room(job, settings, budget, arch=arch))
        rollout = rollout_phase(job, settings, budget=budget, arch=arch)
    training = training_phase(job, settings, batches, budget=budget, arch=arch)
    seconds = None if card is None else step_seconds(job, settings, card, batches)
    return Plan(
        job=job, settings=settings, budget=budget, rollout=rollout, training=training,
        seconds=seconds, card=card,
    )  # fmt: skip


def training_phase(
    job: Job, settings: Settings, batches: Sequence[MicroBatch], *, budget: int | None, arch: int
) -> Phase:
    """Two steps' updates on top of all that stays."""
    tape = _resident(job, settings, arch)
    start = len(tape.events)
    largest = sorted(batches, key=lambda batch: -batch.rows)[:BATCHES_PLAYED]
    a_row = STREAM_BYTES + (VALUE_STREAM_BYTES if job.critic is not None else 0)
    streams = sum(batch.rows for batch in batches) * a_row
    for _ in range(STEPS_PLAYED):
        with tape.during(STREAMS, streams):
            for model, with_head in _trained(job):
                passes = TrainingTape(tape, model, settings)
                for number, batch in enumerate(largest):
                    passes.micro_batch(
                        replace(batch, has_gradients=number > 0), with_head=with_head
                    )
                passes.forget_gradients()
    return _played(tape, start, budget, "training")


def rollout_phase(job: Job, settings: Settings, *, budget: int | None, arch: int) -> Phase:
    """A rollout on top of all that stays, optimizer state included."""
    tape = _resident(job, settings, arch)
    start = len(tape.events)
    take_rollout(tape, job.policy, job.work, settings)
    return _played(tape, start, budget, "rollout")


def kv_room(job: Job, settings: Settings, budget: int | None, *, arch: int) -> int:
    """Bytes for the KV pool: what all rows could use, at most what the rollout phase leaves.

    Raises MemoryBudgetError where not even one completion of full length fits.
    """
    each = job.policy.kv_bytes_per_token
    wanted = max(job.work.num_completions, job.most_completions)
    useful = kv_tokens(job.work, min(settings.max_running, wanted)) * each
    if budget is None:
        return useful
    least = kv_tokens(job.work, 1) * each
    bare = rollout_phase(job, replace(settings, kv_bytes=1), budget=None, arch=arch)
    room = int((budget - bare.total) * KV_SHARE)
    block = KERNEL_BLOCK_SIZE * each
    room = min(useful, room) // block * block
    if room >= least:  # more rows at once have larger graphs
        filled = rollout_phase(job, replace(settings, kv_bytes=room), budget=None, arch=arch)
        room -= -(-max(0, filled.total - budget) // block) * block
    if room < least:
        raise MemoryBudgetError(
            f"{gib(budget)} leave {gib(max(0, room))} for keys and values, and one completion of"
            f" {job.work.prompt_tokens} + {job.work.completion_tokens} tokens needs {gib(least)};"
            f" everything else takes {gib(bare.total)} during a rollout"
        )
    return room


def propose(
    job: Job, wanted: Settings, *, budget: int, card: Card, exact: bool = False,
    modes: Sequence[str] = MODES, tokens: Sequence[int] = MICRO_BATCH_TOKENS,
    may_offload: bool = True,
) -> Plan:  # fmt: skip
    """The fastest settings that fit the budget; `wanted` gives what is not chosen.

    modes, tokens, may_offload: what may be chosen from. Raises MemoryBudgetError with the numbers
    of the smallest attempt where nothing fits.
    """
    refusals: list[MemoryBudgetError] = []
    wishes = _candidates(job, wanted, modes, tokens, may_offload)
    fitting = _fitting(job, wishes, budget, card, exact, refusals)
    for settings in itertools.islice(fitting, PROPOSALS_TRIED):
        plans = []
        for caches in _caching(job, wanted):
            try:
                plan = predict(
                    job, replace(settings, caches_weights=caches), budget=budget, card=card,
                    exact=exact,
                )  # fmt: skip
            except MemoryBudgetError as error:
                refusals.append(error)
                continue
            if plan.fits:
                plans.append(plan)
        if plans:
            return min(plans, key=_speed)
    reason = refusals[-1] if refusals else None
    raise MemoryBudgetError(_nothing_fits(job, wanted, budget, card, reason))


def _fitting(
    job: Job, wishes: Iterable[Settings], budget: int, card: Card, exact: bool,
    refusals: list[MemoryBudgetError],
) -> Iterator[Settings]:  # fmt: skip
    """Those whose training phase fits, fastest first; the others' refusals are noted."""
    ordered = []
    for settings in wishes:
        batches = micro_batches(job.work, settings.micro_batch_tokens, exact=exact)
        seconds = training_seconds(job, settings, card, batches)
        ordered.append((seconds * (LEANING if settings.offload else 1.0), settings, batches))
    ordered.sort(key=lambda wish: wish[0])
    tight: list[tuple[float, Settings]] = []
    for seconds, settings, batches in ordered:
        while tight and tight[0][0] <= seconds:
            yield tight.pop(0)[1]
        try:
            training = training_phase(job, settings, batches, budget=budget, arch=card.arch)
        except MemoryBudgetError as error:
            refusals.append(error)
            continue
        if training.total > budget:
            continue
        if training.is_tight:
            tight.append((seconds * TIGHT, settings))
        else:
            yield settings
    for _, settings in tight:
        yield settings


def _candidates(
    job: Job, wanted: Settings, modes: Sequence[str], tokens: Sequence[int], may_offload: bool
) -> Iterator[Settings]:
    """Settings to try; more tokens than a step has, or fewer than one sequence, are no others."""
    longest, shortest = job.work.num_tokens, job.work.prompt_tokens + job.work.completion_tokens
    ascending = sorted(tokens)
    small = [n for n in ascending if n < min(shortest, longest)][-1:]
    middle = [n for n in ascending if min(shortest, longest) <= n < longest]
    large = [n for n in ascending if n >= longest][:1]
    useful = [*large, *reversed(middle), *small]
    for offload in (wanted.offload, True) if may_offload and not wanted.offload else (False,):
        for mode in modes:
            if offload and not wanted.offload and mode == "none":
                continue
            for number in useful:
                yield replace(
                    wanted, checkpointing=mode, micro_batch_tokens=number, offload=offload
                )


def _caching(job: Job, wanted: Settings) -> tuple[bool, ...]:
    """Whether decoded weights may be kept during a rollout."""
    if not (job.policy.is_quantised and job.samples):
        return (False,)
    return (True, False) if wanted.caches_weights is None else (wanted.caches_weights,)


def _speed(plan: Plan) -> float:
    return plan.seconds.total if plan.seconds is not None else 0.0


def _nothing_fits(
    job: Job, wanted: Settings, budget: int, card: Card, refusal: MemoryBudgetError | None
) -> str:
    least = replace(
        wanted,
        checkpointing="layers",
        micro_batch_tokens=min(MICRO_BATCH_TOKENS),
        offload=True,
        kv_bytes=0,
    )
    plan = predict(job, least, card=card)
    listed = ", ".join(
        f"{part} {gib(plan.training.parts[part])}"
        for part in PARTS
        if plan.training.parts.get(part)
    )
    reason = f" ({refusal})" if refusal is not None else ""
    remedies = "give more memory"
    if not job.policy.is_quantised:
        remedies += ', quantise (model.quantization = "nf4")'
    if job.policy.is_full:
        remedies += ", train an adapter ([lora])"
    return (
        f"nothing fits into {gib(budget)}: the smallest training phase, checkpoints per layer on"
        f" the host and {least.micro_batch_tokens} tokens a micro-batch, takes"
        f" {gib(plan.training.total)}: {listed}{reason}; {remedies}, shorten completions or take a"
        " smaller model"
    )


def _resident(job: Job, settings: Settings, arch: int) -> Tape:
    """All that is there from the first step to the last."""
    tape = Tape()
    take_weights(tape, job.policy, WEIGHTS)
    take_adapter(tape, job.policy, ADAPTERS)
    if job.reference == "adapter":
        take_adapter(tape, job.policy, REFERENCE)
    if job.reference == "weights":
        take_weights(tape, job.policy, REFERENCE)
    take_masters(tape, job.policy)
    take_moments(tape, job.policy)
    if job.critic is not None:
        if not job.shares_trunk:
            take_weights(tape, job.critic, CRITIC)
        take_adapter(tape, job.critic, CRITIC)
        take_masters(tape, job.critic)
        take_moments(tape, job.critic)
        tape.take(CRITIC, (job.critic.config.width + 1) * 4)
    for _ in range(2):
        tape.take(WORKSPACES, workspace_bytes(arch) // 2)
    if job.samples:
        most = min(settings.max_running, max(job.work.num_completions, job.most_completions))
        each = job.policy.kv_bytes_per_token
        rows = rows_at_once(job.work, settings.kv_bytes, each, most)
        take_graphs(
            tape, job.policy, job.work, settings, rows, arch=arch,
            workspace=workspace_bytes(arch) // 2,
        )  # fmt: skip
    return tape


def _trained(job: Job) -> list[tuple[Trained, bool]]:
    """The models that are trained, and whether they have the policy's head."""
    found = [(job.policy, True)]
    if job.critic is not None:
        found.append((job.critic, False))
    return found


def _played(tape: Tape, start: int, budget: int | None, phase: str) -> Phase:
    limit = None if budget is None else budget - CONTEXT_BYTES
    try:
        peak: Peak = play(tape.events, CachingAllocator(limit, expandable=True), start)
    except LimitReached as refusal:
        free = play(tape.events, CachingAllocator(expandable=True), start)
        raise MemoryBudgetError(
            f"the {phase} phase needs {gib(free.allocated + CONTEXT_BYTES)} at once, of"
            f" {gib(budget or 0)}"
        ) from refusal
    unseen, share = UNSEEN[phase]
    reserved = peak.reserved + unseen + int(share * peak.reserved)
    is_tight = limit is not None and peak.reserved <= limit < reserved
    if limit is not None and is_tight:
        reserved = limit  # at its limit the allocator gives free pages back and goes on
    parts = dict(peak.parts)
    parts[SLACK] = reserved - peak.allocated
    parts[CONTEXT] = CONTEXT_BYTES
    return Phase(
        parts=parts, allocated=peak.allocated, played=peak.reserved, reserved=reserved,
        is_tight=is_tight,
    )  # fmt: skip


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"
