"""Packing: aligned streams, nothing lost, nothing twice, the same however the step is split."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.data.conversations import Conversation
from sparring.data.packing import pack_conversations, pack_groups, pack_sequences, unpack
from sparring.types import Group, Prompt, Rollout

NAN = math.nan
COMMON = settings(max_examples=120, deadline=None, derandomize=True, database=None)


def make_rollout(prompt, index, size, *, mask=None, temperature=1.0):
    """Completion `index` of a prompt: every token and logprob tells where it came from."""
    start = 10_000 * (prompt.id + 1) + 1_000 * index
    return Rollout(
        prompt=prompt,
        sample_index=index,
        token_ids=torch.arange(start, start + size),
        logprobs=-torch.arange(start, start + size, dtype=torch.float32) / 7,
        loss_mask=torch.ones(size, dtype=torch.bool) if mask is None else torch.tensor(mask),
        text="",
        finish_reason="stop",
        policy_version=0,
        temperature=temperature,
    )


def make_group(number, prompt_size, sizes, *, rewards=None, masks=None):
    prompt = Prompt(
        id=number,
        token_ids=tuple(range(100 * number + 1, 100 * number + 1 + prompt_size)),
        text="",
    )
    masks = masks or [None] * len(sizes)
    rollouts = tuple(
        make_rollout(prompt, index, size, mask=mask)
        for index, (size, mask) in enumerate(zip(sizes, masks, strict=True))
    )
    rewards_G = torch.tensor(rewards or [1.0] * len(sizes))
    return Group(prompt=prompt, rollouts=rollouts, rewards_G=rewards_G, reward_parts={})


def sequences_of(batch):
    """Per local sequence (input ids from the prompt's first token on, its rows), read naively."""
    layout, found = batch.layout, {}
    for segment, parent in enumerate(layout.parents):
        start, end = layout.cu_seqlens[segment], layout.cu_seqlens[segment + 1]
        assert end > start
        rows = list(range(start, end))
        before = []
        if parent >= 0:
            assert parent < segment
            assert layout.parents[parent] == -1
            before = list(range(layout.cu_seqlens[parent], layout.cu_seqlens[parent + 1]))
        owners = set(batch.sequence_ids_T[rows].tolist())
        assert len(owners) == 1
        owner = owners.pop()
        assert batch.positions_T[before + rows].tolist() == list(range(len(before) + len(rows)))
        if owner >= 0:
            assert owner not in found
            found[owner] = (batch.input_ids_T[before + rows].tolist(), before + rows)
        else:
            assert segment in layout.parents
            assert not batch.loss_mask_T[rows].any()
    assert sorted(found) == list(range(batch.num_local_sequences))
    return [found[index] for index in range(batch.num_local_sequences)]


def check_streams(batch):
    """Streams are aligned with the labels, of the right type, and silent outside the loss mask."""
    num_rows = batch.layout.cu_seqlens[-1]
    for name in ("input_ids_T", "labels_T", "positions_T", "sequence_ids_T"):
        assert getattr(batch, name).dtype == torch.int64
        assert len(getattr(batch, name)) == num_rows
    assert batch.loss_mask_T.dtype == torch.bool
    assert torch.equal(batch.loss_mask_T, batch.labels_T != -100)
    for name in ("advantages_T", "old_logprobs_T", "sampler_logprobs_T", "weights_T"):
        stream = getattr(batch, name)
        if stream is not None:
            assert stream.dtype == torch.float32
            assert len(stream) == num_rows
            assert not stream[~batch.loss_mask_T].any()


@st.composite
def steps(draw):
    groups, advantages = [], []
    for number in range(draw(st.integers(1, 4))):
        sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        masks = [draw(st.lists(st.booleans(), min_size=size, max_size=size)) for size in sizes]
        rewards = [draw(st.sampled_from([0.0, 1.0, NAN])) for _ in sizes]
        groups.append(
            make_group(number, draw(st.integers(1, 6)), sizes, rewards=rewards, masks=masks)
        )
        values = [draw(st.sampled_from([0.0, 0.5, -2.0])) for _ in sizes]
        advantages.append(torch.tensor(values))
    return groups, advantages, draw(st.integers(1, 40))


@COMMON
@given(step=steps(), share=st.booleans(), drop=st.booleans())
def test_every_judged_completion_is_there_once_and_aligned(step, share, drop):
    groups, advantages, max_tokens = step
    batches = pack_groups(
        groups,
        advantages,
        max_tokens=max_tokens,
        temperature=1.0,
        share_prompts=share,
        with_old_logprobs=True,
        drop_zero_advantage=drop,
    )
    judged = [
        (rollout, advantage)
        for group, advantages_G in zip(groups, advantages, strict=True)
        for rollout, reward, advantage in zip(
            group.rollouts, group.rewards_G.tolist(), advantages_G.tolist(), strict=True
        )
        if not math.isnan(reward)
    ]
    expected = {
        (rollout.prompt.id, rollout.sample_index): (learned(rollout), advantage)
        for rollout, advantage in judged
        if rollout.loss_mask.any() and not (drop and advantage == 0)
    }
    for batch in batches:
        check_streams(batch)
        assert batch.num_sequences == len(judged)
        assert batch.num_loss_tokens == sum(int(rollout.loss_mask.sum()) for rollout, _ in judged)
        for inputs, rows in sequences_of(batch):
            size = next(
                len(rollout.prompt.token_ids)
                for rollout, _ in expected.values()
                if rollout.prompt.token_ids[0] == inputs[0]
            )
            # The first token of a completion tells whose it is; a label names it even where masked.
            key = next(
                key
                for key, (rollout, _) in expected.items()
                if [*rollout.prompt.token_ids, *rollout.token_ids.tolist()[:-1]] == inputs
                and labels_fit(batch, rows[size - 1 :], rollout)
            )
            rollout, advantage = expected.pop(key)
            mine = rows[size - 1 :]
            mask = rollout.loss_mask
            assert torch.equal(batch.loss_mask_T[mine], mask)
            assert torch.equal(batch.labels_T[mine][mask], rollout.token_ids[mask])
            assert torch.equal(batch.old_logprobs_T[mine][mask], rollout.logprobs[mask])
            assert torch.equal(batch.sampler_logprobs_T[mine][mask], rollout.logprobs[mask])
            assert set(batch.advantages_T[mine][mask].tolist()) == {advantage}
            assert not batch.loss_mask_T[rows[: size - 1]].any()
    assert not expected


def learned(rollout):
    """The rollout up to its last loss token; the model need not see what comes after."""
    end = int(rollout.loss_mask.nonzero().max()) + 1
    streams = {
        name: getattr(rollout, name)[:end] for name in ("token_ids", "logprobs", "loss_mask")
    }
    return replace(rollout, **streams)


def labels_fit(batch, rows, rollout):
    labels = torch.where(rollout.loss_mask, rollout.token_ids, -100)
    return torch.equal(batch.labels_T[rows], labels)


@COMMON
@given(step=steps(), share=st.booleans())
def test_the_budget_holds_and_groups_stay_together(step, share):
    groups, advantages, max_tokens = step
    batches = pack_groups(
        groups, advantages, max_tokens=max_tokens, temperature=1.0, share_prompts=share
    )
    homes = {}
    for number, batch in enumerate(batches):
        assert batch.layout.cu_seqlens[-1] <= max_tokens or batch.num_local_sequences == 1
        for inputs, _ in sequences_of(batch):
            homes.setdefault(inputs[0], set()).add(number)
    for group in groups:
        packed = [
            rollout
            for rollout, reward in zip(group.rollouts, group.rewards_G.tolist(), strict=True)
            if not math.isnan(reward) and rollout.loss_mask.any()
        ]
        before = len(group.prompt.token_ids) - 1
        rows = sum(len(rollout.token_ids) for rollout in packed)
        rows += before * (1 if share else len(packed))
        if packed and rows <= max_tokens:
            assert len(homes[group.prompt.token_ids[0]]) == 1


@COMMON
@given(step=steps())
def test_sharing_and_splitting_change_no_label(step):
    groups, advantages, max_tokens = step

    def labels(share, budget):
        found = Counter()
        for batch in pack_groups(
            groups, advantages, max_tokens=budget, temperature=1.0, share_prompts=share
        ):
            mask = batch.loss_mask_T
            streams = (batch.labels_T, batch.positions_T, batch.advantages_T)
            found.update(zip(*(stream[mask].tolist() for stream in streams), strict=True))
        return found

    assert labels(True, max_tokens) == labels(False, max_tokens) == labels(True, 10_000)


def test_a_shared_prompt_by_hand():
    group = make_group(0, 3, [2, 3])  # prompt 1 2 3, completions 10000.. and 11000..
    (batch,) = pack_groups([group], [torch.tensor([1.0, -1.0])], max_tokens=100, temperature=1.0)
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10_000, 3, 11_000, 11_001]
    assert batch.labels_T.tolist() == [-100, -100, 10_000, 10_001, 11_000, 11_001, 11_002]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.layout.cu_seqlens == (0, 2, 4, 7)
    assert batch.layout.parents == (-1, 0, 0)
    assert batch.sequence_ids_T.tolist() == [-1, -1, 0, 0, 1, 1, 1]
    assert batch.advantages_T.tolist() == [0, 0, 1, 1, -1, -1, -1]
    assert (batch.num_loss_tokens, batch.num_sequences) == (5, 2)
    assert batch.old_logprobs_T is None
    assert batch.weights_T is None


def test_an_unshared_prompt_by_hand():
    group = make_group(0, 3, [2, 1])
    (batch,) = pack_groups(
        [group], [torch.zeros(2)], max_tokens=100, temperature=1.0, share_prompts=False
    )
    assert batch.input_ids_T.tolist() == [1, 2, 3, 10_000, 1, 2, 3]
    assert batch.labels_T.tolist() == [-100, -100, 10_000, 10_001, -100, -100, 11_000]
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.layout.parents == (-1, -1)
    assert batch.sequence_ids_T.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_prompt_of_one_token_needs_no_parent():
    (batch,) = pack_groups(
        [make_group(0, 1, [2, 1])], [torch.zeros(2)], max_tokens=100, temperature=1.0
    )
    assert batch.layout.parents == (-1, -1)
    assert batch.input_ids_T.tolist() == [1, 10_000, 1]
    assert batch.positions_T.tolist() == [0, 1, 0]


def test_a_group_over_the_budget_repeats_its_prompt():
    group = make_group(0, 5, [6, 6, 6, 20])
    batches = pack_groups([group], [torch.zeros(4)], max_tokens=16, temperature=1.0)
    sizes = [[len(inputs) for inputs, _ in sequences_of(batch)] for batch in batches]
    assert sizes == [[10, 10], [10], [24]]
    assert [batch.layout.cu_seqlens[-1] for batch in batches] == [16, 10, 24]
    assert all(batch.input_ids_T[:4].tolist() == [1, 2, 3, 4] for batch in batches)
    assert all(batch.num_sequences == 4 for batch in batches)


def test_rows_behind_the_last_loss_token_are_left_out():
    masks = [[True, False, True, False, False], [False, False, True]]
    group = make_group(0, 3, [5, 3], masks=masks)
    (batch,) = pack_groups([group], [torch.ones(2)], max_tokens=99, temperature=1.0)
    assert [len(inputs) for inputs, _ in sequences_of(batch)] == [2 + 3, 2 + 3]
    assert batch.loss_mask_T[2:].tolist() == [True, False, True, False, False, True]
    assert (batch.num_loss_tokens, batch.num_sequences) == (3, 2)


def test_what_is_not_judged_or_bears_no_loss():
    group = make_group(0, 2, [2, 3, 4], rewards=[1.0, NAN, 0.0], masks=[None, None, [False] * 4])
    (batch,) = pack_groups(
        [group], [torch.tensor([1.0, 0.0, -1.0])], max_tokens=99, temperature=1.0
    )
    assert batch.num_local_sequences == 1
    assert (batch.num_loss_tokens, batch.num_sequences) == (2, 2)
    nobody = make_group(0, 2, [2], rewards=[NAN])
    assert pack_groups([nobody], [torch.zeros(1)], max_tokens=99, temperature=1.0) == []
    assert pack_groups([], [], max_tokens=99, temperature=1.0) == []


def test_packing_is_a_function_of_its_input():
    groups = [make_group(number, 4, [5, 7, 3]) for number in range(6)]
    advantages = [torch.zeros(3)] * 6
    once, again = (
        pack_groups(groups, advantages, max_tokens=40, temperature=1.0) for _ in range(2)
    )
    assert [batch.input_ids_T.tolist() for batch in once] == [
        batch.input_ids_T.tolist() for batch in again
    ]
    assert [batch.input_ids_T[0].item() for batch in once] == [1, 201, 401]  # two groups in each


def test_mismatches_are_refused():
    group = make_group(0, 2, [2, 3])
    with pytest.raises(ValueError, match="2 rollouts, 2 rewards and 1 advantages"):
        pack_groups([group], [torch.zeros(1)], max_tokens=9, temperature=1.0)
    with pytest.raises(ValueError, match=r"speak of temperature 1\.0, the step of 0\.7"):
        pack_groups([group], [torch.zeros(2)], max_tokens=9, temperature=0.7)
    with pytest.raises(ValueError, match="at least one token"):
        pack_groups([group], [torch.zeros(2)], max_tokens=0, temperature=1.0)
    with pytest.raises(ValueError, match="zip"):
        pack_groups([group], [], max_tokens=9, temperature=1.0)
    with pytest.raises(ValueError, match="a mask of 3"):
        pack_groups(
            [make_group(0, 2, [2], masks=[[True] * 3])],
            [torch.zeros(1)],
            max_tokens=9,
            temperature=1.0,
        )
    with pytest.raises(ValueError, match="conversation 0: 3 tokens, a mask of 2"):
        pack_conversations([make_conversation([1, 2, 3], [True, True])], max_tokens=9)


def make_conversation(ids, mask, weight=1.0):
    return Conversation(
        token_ids=torch.tensor(ids), loss_mask=torch.tensor(mask, dtype=torch.bool), weight=weight
    )


@COMMON
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=8),
    weights=st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=8, max_size=8),
    max_tokens=st.integers(1, 24),
)
def test_conversations_are_packed_whole(masks, weights, max_tokens):
    conversations = [
        make_conversation(list(range(100 * row, 100 * row + len(mask))), mask, weight)
        for row, (mask, weight) in enumerate(zip(masks, weights, strict=False))
    ]
    useful = {row: sample for row, sample in enumerate(conversations) if sample.loss_mask[1:].any()}
    total = sum(int(sample.loss_mask[1:].sum()) * sample.weight for sample in useful.values())
    weighted = any(sample.weight != 1.0 for sample in useful.values())
    for batch in pack_conversations(conversations, max_tokens=max_tokens):
        check_streams(batch)
        assert batch.layout.cu_seqlens[-1] <= max_tokens or batch.num_local_sequences == 1
        assert batch.num_sequences == len({row for row, mask in enumerate(masks) if any(mask[1:])})
        assert batch.num_loss_tokens == total
        assert (batch.weights_T is not None) == weighted
        for inputs, rows in sequences_of(batch):
            sample = useful.pop(inputs[0] // 100)
            end = int(sample.loss_mask.nonzero().max()) + 1
            mask = sample.loss_mask[1:end]
            assert inputs == sample.token_ids[: end - 1].tolist()
            assert torch.equal(batch.loss_mask_T[rows], mask)
            assert torch.equal(batch.labels_T[rows][mask], sample.token_ids[1:end][mask])
            if weighted:
                assert torch.equal(batch.weights_T[rows], mask * sample.weight)
    assert not useful


@COMMON
@given(
    lengths=st.lists(st.integers(1, 12), max_size=9),
    max_tokens=st.integers(1, 20),
)
def test_sequences_come_back_in_order(lengths, max_tokens):
    sequences = [list(range(100 * row, 100 * row + size)) for row, size in enumerate(lengths)]
    packed = pack_sequences(sequences, max_tokens=max_tokens, temperature=0.7)
    for batch, indices in packed:
        check_streams(batch)
        assert batch.temperature == 0.7
        assert bool(batch.loss_mask_T.all())
        assert [inputs for inputs, _ in sequences_of(batch)] == [
            sequences[index][:-1] for index in indices
        ]
    labels = unpack(packed, [batch.labels_T for batch, _ in packed], len(sequences))
    assert [row.tolist() for row in labels] == [sequence[1:] for sequence in sequences]


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        pack_sequences([[1, 2], []], max_tokens=9)


def test_best_fit_decreasing_wastes_little():
    sequences = [[0] * (size + 1) for size in (7, 2, 6, 5, 3, 1)]
    packed = pack_sequences(sequences, max_tokens=8)
    assert [indices for _, indices in packed] == [(0, 5), (1, 2), (3, 4)]
    assert all(batch.layout.cu_seqlens[-1] == 8 for batch, _ in packed)
