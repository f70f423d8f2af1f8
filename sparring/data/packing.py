"""Samples into micro-batches of packed tokens: the one place where labels are shifted.

A packed sample is a context that bears no loss and a completion. Row t of every stream speaks of
labels_T[t], the token that follows input_ids_T[t], so a sample of n tokens has n - 1 rows: its last
token is a label and never an input. A group's prompt may be laid down once, as a parent segment of
all but its last token; each completion then is a child segment of

    inputs     prompt[-1]  c_0  ...  c_{R-2}
    labels     c_0         c_1  ...  c_{R-1}
    positions  P-1         P    ...  P+R-2

Counts (num_loss_tokens, num_sequences) are those of everything handed in, the same in every batch
returned, so a loss that divides by them does not depend on how the step was split. Nothing is cut
but the rows behind a sample's last loss token, which cannot change the loss: a sample longer than
max_tokens has a micro-batch to itself. Same input, same output. Which samples there are is decided
elsewhere (prompts.py, conversations.py, the rewards).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparring.data.conversations import Conversation
from sparring.data.pairs import Pair
from sparring.errors import DataError
from sparring.layout import PackedLayout
from sparring.types import Batch, Group, Rollout

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

IGNORED = -100


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sample:
    """A completion: ids [R], mask [R] (True: bears loss), and what its tokens carry."""

    ids: Ints
    mask: Bools
    advantage: float = 0.0
    logprobs: Floats | None = None
    reward: float = 0.0
    weight: float = 1.0
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Unit:
    """Samples that stay in one micro-batch: they go on from the same context [P], P >= 1."""

    context: Ints
    samples: tuple[_Sample, ...]
    is_shared: bool

    @property
    def num_rows(self) -> int:
        rows = sum(len(sample.ids) for sample in self.samples)
        copies = 1 if self.is_shared else len(self.samples)
        return rows + copies * (len(self.context) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Streams:
    """Which optional streams a batch carries, and the counts of the whole step."""

    num_loss_tokens: float
    num_sequences: float
    temperature: float = 1.0
    from_rollouts: bool = False  # advantages and the sampler's log-probabilities
    old_logprobs: bool = False
    weights: bool = False


def pack_groups(
    groups: Sequence[Group],
    advantages: Sequence[Tensor],
    *,
    max_tokens: int,
    temperature: float,
    share_prompts: bool = True,
    with_old_logprobs: bool = False,
    drop_zero_advantage: bool = False,
    learn_truncated: bool = True,
) -> list[Batch]:
    """Micro-batches of at most `max_tokens` rows for one optimizer step.

    advantages: per group [G], spread over the tokens of each completion. A group stays in one
    micro-batch; one that does not fit is split between completions and its prompt repeated.
    share_prompts: lay each prompt down once; without it every completion has its own copy.
    drop_zero_advantage: leave out completions whose advantage is exactly 0, which is right only for
    losses without a term that does not scale with the advantage. sampler_logprobs_T is what the
    rollout engine recorded; with_old_logprobs: old_logprobs_T is the same. learn_truncated False: a
    completion that the limit cut bears no loss (DAPO's overlong filtering, arXiv 2503.14476).

    A rollout with a NaN reward is left out altogether. Every other one counts in num_sequences and
    its loss mask in num_loss_tokens, also where it is dropped or bears no loss. The list is empty
    where no row bears loss. Raises ValueError where lengths or temperatures do not match.
    """
    units, streams = _group_units(
        groups,
        advantages,
        max_tokens=max_tokens,
        temperature=temperature,
        share_prompts=share_prompts,
        drop_zero_advantage=drop_zero_advantage,
        learn_truncated=learn_truncated,
    )
    streams = replace(streams, old_logprobs=with_old_logprobs)
    return [_build_batch(chosen, streams) for chosen in _fill(units, max_tokens)]


def pack_rewarded(
    groups: Sequence[Group], *, max_tokens: int, temperature: float, share_prompts: bool = True
) -> list[tuple[Batch, Tensor]]:
    """As `pack_groups` before there are advantages: with each batch its rewards [S] float32.

    One reward a local sequence, in their order; advantages_T is None.
    """
    units, streams = _group_units(
        groups,
        [torch.zeros(len(group.rollouts)) for group in groups],
        max_tokens=max_tokens,
        temperature=temperature,
        share_prompts=share_prompts,
        drop_zero_advantage=False,
    )
    packed = []
    for chosen in _fill(units, max_tokens):
        rewards = [sample.reward for unit in chosen for sample in unit.samples]
        batch = replace(_build_batch(chosen, streams), advantages_T=None)
        packed.append((batch, torch.tensor(rewards)))
    return packed


def pack_pairs(pairs: Sequence[Pair], *, max_tokens: int) -> list[Batch]:
    """Micro-batches of at most `max_tokens` rows for one step of learning from pairs.

    Local sequences 2k and 2k + 1 are the chosen and the rejected completion of a pair, behind one
    copy of their context. A pair is never split: one with more than max_tokens rows has a
    micro-batch to itself. num_sequences counts completions, two a pair; weights_T is 1 on the loss
    tokens of what was chosen, 0 on those of what was rejected, and num_loss_tokens its sum.
    """
    units, num_loss_tokens = [], 0
    for pair in pairs:
        sides = (
            (pair.chosen_ids, pair.chosen_mask, 1.0),
            (pair.rejected_ids, pair.rejected_mask, 0.0),
        )
        samples = tuple(
            _Sample(ids=ids.numpy(), mask=mask.numpy(), weight=weight)
            for ids, mask, weight in sides
        )
        num_loss_tokens += int(np.count_nonzero(samples[0].mask))
        units.append(_Unit(context=pair.context_ids.numpy(), samples=samples, is_shared=True))
    streams = _Streams(
        num_loss_tokens=float(num_loss_tokens), num_sequences=2.0 * len(pairs), weights=True
    )
    return [_build_batch(chosen, streams) for chosen in _fill(units, max_tokens)]


def _group_units(
    groups: Sequence[Group],
    advantages: Sequence[Tensor],
    *,
    max_tokens: int,
    temperature: float,
    share_prompts: bool,
    drop_zero_advantage: bool,
    learn_truncated: bool = True,
) -> tuple[list[_Unit], _Streams]:
    """The judged rollouts of a step as units, and what their batches carry."""
    units: list[_Unit] = []
    num_loss_tokens, num_sequences = 0, 0
    for group, advantages_G in zip(groups, advantages, strict=True):
        if not len(group.rollouts) == len(group.rewards_G) == len(advantages_G):
            raise ValueError(
                f"prompt {group.prompt.id}: {len(group.rollouts)} rollouts, "
                f"{len(group.rewards_G)} rewards and {len(advantages_G)} advantages"
            )
        samples: list[_Sample] = []
        for rollout, advantage, reward in zip(
            group.rollouts, advantages_G.tolist(), group.rewards_G.tolist(), strict=True
        ):
            if math.isnan(reward):
                continue
            sample = _rollout_sample(rollout, advantage, reward, temperature)
            if not learn_truncated and rollout.finish_reason == "length":
                sample = replace(sample, mask=np.zeros_like(sample.mask))
            loss_tokens = int(np.count_nonzero(sample.mask))
            num_sequences += 1
            num_loss_tokens += loss_tokens
            if loss_tokens and not (drop_zero_advantage and advantage == 0.0):
                samples.append(sample)
        if samples:
            context = np.asarray(group.prompt.token_ids, dtype=np.int64)
            units += _split_group(context, samples, max_tokens, share_prompts)
    streams = _Streams(
        num_loss_tokens=float(num_loss_tokens),
        num_sequences=float(num_sequences),
        temperature=temperature,
        from_rollouts=True,
    )
    return units, streams


def pack_conversations(conversations: Sequence[Conversation], *, max_tokens: int) -> list[Batch]:
    """Micro-batches of at most `max_tokens` rows for one step of supervised training.

    num_sequences counts conversations with a token to learn. Where any weight is not 1, weights_T
    carries it on each loss token and num_loss_tokens is the sum of weights_T over the step, so that
    the sum of weight x loss over it is the weighted mean.
    """
    samples: list[tuple[Ints, _Sample]] = []
    num_loss_tokens = 0.0
    for index, conversation in enumerate(conversations):
        ids, mask = conversation.token_ids.numpy(), conversation.loss_mask.numpy()
        if ids.shape != mask.shape:
            raise ValueError(f"conversation {index}: {len(ids)} tokens, a mask of {len(mask)}")
        loss_tokens = int(np.count_nonzero(mask[1:]))
        if not loss_tokens:
            continue
        num_loss_tokens += loss_tokens * conversation.weight
        end = _loss_end(mask)
        sample = _Sample(ids=ids[1:end], mask=mask[1:end], weight=conversation.weight, index=index)
        samples.append((ids[:1], sample))
    streams = _Streams(
        num_loss_tokens=num_loss_tokens,
        num_sequences=float(len(samples)),
        weights=any(sample.weight != 1.0 for _, sample in samples),
    )
    units = [_Unit(context=first, samples=(rest,), is_shared=True) for first, rest in samples]
    return [_build_batch(chosen, streams) for chosen in _fill(units, max_tokens)]


def pack_sequences(
    sequences: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 1.0
) -> list[tuple[Batch, tuple[int, ...]]]:
    """Micro-batches in which every token but each sequence's first is a label.

    With each batch comes which sequences it holds: its local sequence k is sequence indices[k] of
    the call; `unpack` puts what was computed back in order. A sequence of one token has nothing to
    score and is in no batch. Raises DataError (a ValueError) for an empty one.
    """
    units: list[_Unit] = []
    num_loss_tokens = 0
    for index, sequence in enumerate(sequences):
        ids = np.asarray(sequence, dtype=np.int64)
        if not len(ids):
            raise DataError(f"sequence {index} is empty; a sequence has at least one token")
        if len(ids) == 1:
            continue
        sample = _Sample(ids=ids[1:], mask=np.ones(len(ids) - 1, dtype=np.bool_), index=index)
        units.append(_Unit(context=ids[:1], samples=(sample,), is_shared=True))
        num_loss_tokens += len(ids) - 1
    streams = _Streams(
        num_loss_tokens=float(num_loss_tokens),
        num_sequences=float(len(units)),
        temperature=temperature,
    )
    return [
        (_build_batch(chosen, streams), tuple(unit.samples[0].index for unit in chosen))
        for chosen in _fill(units, max_tokens)
    ]


def unpack(
    packed: Sequence[tuple[Batch, tuple[int, ...]]], values: Sequence[Tensor], num_sequences: int
) -> list[Tensor]:
    """Per sequence of a `pack_sequences` call its rows [len - 1] of `values`, one [T] a batch."""
    dtype = values[0].dtype if values else torch.float32
    device = values[0].device if values else None
    rows = [torch.empty(0, dtype=dtype, device=device) for _ in range(num_sequences)]
    for (batch, indices), values_T in zip(packed, values, strict=True):
        offsets = batch.layout.cu_seqlens
        for local, index in enumerate(indices):
            rows[index] = values_T[offsets[local] : offsets[local + 1]]
    return rows


def _rollout_sample(
    rollout: Rollout, advantage: float, reward: float, temperature: float
) -> _Sample:
    ids, mask = rollout.token_ids.numpy(), rollout.loss_mask.numpy()
    if ids.shape != mask.shape or rollout.logprobs.shape != rollout.token_ids.shape:
        raise ValueError(
            f"prompt {rollout.prompt.id}, sample {rollout.sample_index}: {len(ids)} tokens, "
            f"{len(rollout.logprobs)} logprobs, a mask of {len(mask)}"
        )
    if rollout.temperature != temperature:
        raise ValueError(
            f"prompt {rollout.prompt.id}, sample {rollout.sample_index}: its logprobs speak of "
            f"temperature {rollout.temperature}, the step of {temperature}"
        )
    end = _loss_end(mask)
    return _Sample(
        ids=ids[:end],
        mask=mask[:end],
        advantage=advantage,
        reward=reward,
        logprobs=rollout.logprobs.numpy()[:end],
    )


def _loss_end(mask: Bools) -> int:
    """Where the last token that bears loss ends: nothing before it can see what comes after."""
    return int(mask.nonzero()[0][-1]) + 1 if mask.any() else 0


def _split_group(
    context: Ints, samples: Sequence[_Sample], max_tokens: int, share_prompts: bool
) -> Iterator[_Unit]:
    """The group as one unit, or as few as fit the budget, each with the context again."""
    repeated = len(context) - 1
    if share_prompts:
        room = max_tokens - repeated
        sizes = [len(sample.ids) for sample in samples]
    else:
        room = max_tokens
        sizes = [len(sample.ids) + repeated for sample in samples]
    for chosen in best_fit(sizes, max(room, 0)):
        yield _Unit(
            context=context,
            samples=tuple(samples[index] for index in chosen),
            is_shared=share_prompts,
        )


def _fill(units: Sequence[_Unit], max_tokens: int) -> list[list[_Unit]]:
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a micro-batch holds at least one token")
    chosen = best_fit([unit.num_rows for unit in units], max_tokens)
    return [[units[index] for index in indices] for indices in chosen]


def best_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: indices into `sizes`, bin by bin, each bin in the order of the input.

    A size over `room` has a bin of its own. Bins are ordered by their first index; equal sizes are
    placed in input order, so the result is a function of the sizes alone.
    """
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (room left, bin), ascending
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        at = bisect.bisect_left(spaces, (sizes[index], -1))
        if at < len(spaces):
            left, number = spaces.pop(at)
            bins[number].append(index)
        else:
            left, number = room, len(bins)
            bins.append([index])
        if left > sizes[index]:
            bisect.insort(spaces, (left - sizes[index], number))
    return sorted(sorted(indices) for indices in bins)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Plan:
    """Where everything goes, per segment S: rows of context, then rows of a completion.

    contexts: the context rows themselves. heads_S, tails_S: rows of context and of completion (0
    for a parent). offsets_S: position of the first row. owners_S: local sequence, -1 for a parent.
    firsts: per completion the token that predicts its first.
    """

    samples: list[_Sample]
    contexts: list[Ints]
    firsts: list[int]
    heads_S: Ints
    tails_S: Ints
    offsets_S: Ints
    owners_S: Ints
    parents: tuple[int, ...]


def _plan(units: Sequence[_Unit]) -> _Plan:
    samples: list[_Sample] = []
    contexts: list[Ints] = []
    firsts: list[int] = []
    segments: list[tuple[int, int, int, int, int]] = []  # head, tail, offset, owner, parent
    nothing = np.empty(0, dtype=np.int64)
    for unit in units:
        before, last = unit.context[:-1], int(unit.context[-1])
        parent = -1
        if unit.is_shared and len(before):
            parent = len(segments)
            contexts.append(before)
            segments.append((len(before), 0, 0, -1, -1))
        head, offset = (0, len(before)) if unit.is_shared else (len(before), 0)
        for sample in unit.samples:
            contexts.append(nothing if unit.is_shared else before)
            segments.append((head, len(sample.ids), offset, len(samples), parent))
            firsts.append(last)
            samples.append(sample)
    heads_S, tails_S, offsets_S, owners_S, parents_S = np.array(segments, dtype=np.int64).T
    return _Plan(
        samples=samples,
        contexts=contexts,
        firsts=firsts,
        heads_S=heads_S,
        tails_S=tails_S,
        offsets_S=offsets_S,
        owners_S=owners_S,
        parents=tuple(parents_S.tolist()),
    )


def _build_batch(units: Sequence[_Unit], streams: _Streams) -> Batch:
    """Lay the units end to end, whole segments at a time: nothing here runs once a token."""
    plan = _plan(units)
    samples = plan.samples
    lengths_S = plan.heads_S + plan.tails_S
    ends_S = np.cumsum(lengths_S)
    starts_S = ends_S - lengths_S
    num_rows = int(ends_S[-1])
    # Two runs a segment: its context, then its completion.
    runs = np.stack([plan.heads_S, plan.tails_S], axis=1).reshape(-1)
    in_completion_T = np.repeat(np.tile(np.array([False, True]), len(lengths_S)), runs)
    labels = np.concatenate([sample.ids for sample in samples])
    mask = np.concatenate([sample.mask for sample in samples])
    sizes = plan.tails_S[plan.tails_S > 0]
    inputs = np.empty_like(labels)
    inputs[1:] = labels[:-1]
    inputs[np.cumsum(sizes) - sizes] = plan.firsts
    input_ids_T = np.empty(num_rows, dtype=np.int64)
    input_ids_T[~in_completion_T] = np.concatenate(plan.contexts)
    input_ids_T[in_completion_T] = inputs
    labels_T = np.full(num_rows, IGNORED, dtype=np.int64)
    labels_T[in_completion_T] = np.where(mask, labels, IGNORED)
    loss_mask_T = np.zeros(num_rows, dtype=np.bool_)
    loss_mask_T[in_completion_T] = mask

    def spread(values: Floats) -> Tensor:
        stream_T = np.zeros(num_rows, dtype=np.float32)
        stream_T[in_completion_T] = np.where(mask, values, np.float32(0))
        return torch.from_numpy(stream_T)

    def spread_each(values: Sequence[float]) -> Tensor:
        return spread(np.repeat(np.array(values, dtype=np.float32), sizes))

    advantages_T = sampler_logprobs_T = None
    if streams.from_rollouts:
        advantages_T = spread_each([sample.advantage for sample in samples])
        logprobs = [sample.logprobs for sample in samples if sample.logprobs is not None]
        sampler_logprobs_T = spread(np.concatenate(logprobs))
    return Batch(
        input_ids_T=torch.from_numpy(input_ids_T),
        labels_T=torch.from_numpy(labels_T),
        positions_T=torch.from_numpy(
            np.arange(num_rows) - np.repeat(starts_S - plan.offsets_S, lengths_S)
        ),
        layout=PackedLayout(cu_seqlens=(0, *ends_S.tolist()), parents=plan.parents),
        loss_mask_T=torch.from_numpy(loss_mask_T),
        sequence_ids_T=torch.from_numpy(np.repeat(plan.owners_S, lengths_S)),
        num_local_sequences=len(samples),
        num_loss_tokens=streams.num_loss_tokens,
        num_sequences=streams.num_sequences,
        temperature=streams.temperature,
        advantages_T=advantages_T,
        old_logprobs_T=sampler_logprobs_T if streams.old_logprobs else None,
        sampler_logprobs_T=sampler_logprobs_T,
        weights_T=spread_each([s.weight for s in samples]) if streams.weights else None,
    )
