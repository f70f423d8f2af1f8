"""Attention plans against a naive mask over all tokens, in float64, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparring.layout import KVPool, PackedLayout, PagedLayout
from sparring.models import attention_packed, attention_paged
from sparring.models.attention import plan_attention
from sparring.models.attention_paged import _cut
from sparring.models.checkpoint import build_model
from tests.models.tiny import CONFIGS, PagedRows, batch_of, logits_of, offsets, random_ids

HEADS, KV_HEADS, SIZE = 6, 2, 8

LAYOUTS = {
    "one token": ((1,), (-1,)),
    "plain": ((7, 1, 30, 12, 12), (-1,) * 5),
    "one group": ((9, 4, 1, 20), (-1, 0, 0, 0)),
    "groups of unlike prompts": (
        (3, 5, 6, 40, 9, 33, 1, 10, 2),
        (-1, 0, 0, -1, 3, 3, -1, 6, -1),
    ),
    "parent without children": ((5, 6, 3), (-1, -1, 1)),
}


def naive(q: Tensor, k: Tensor, v: Tensor, layout: PackedLayout, window: int) -> Tensor:
    """Attention of all tokens over all tokens under one mask [T, T]."""
    num_tokens = layout.cu_seqlens[-1]
    position = torch.empty(num_tokens, dtype=torch.long)
    mask = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    for segment, parent in enumerate(layout.parents):
        own = slice(layout.cu_seqlens[segment], layout.cu_seqlens[segment + 1])
        length = own.stop - own.start
        before = 0
        if parent >= 0:
            theirs = slice(layout.cu_seqlens[parent], layout.cu_seqlens[parent + 1])
            before = theirs.stop - theirs.start
            mask[own, theirs] = True
        position[own] = torch.arange(before, before + length)
        mask[own, own] = torch.ones(length, length, dtype=torch.bool).tril()
    if window:
        mask &= position[:, None] - position[None, :] < window
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("the,she->hts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights, v)


def streams(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(
            num_tokens, heads, SIZE, dtype=torch.float64, generator=generator
        ).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize("max_scores", [1 << 24, 60])
@pytest.mark.parametrize("window", [0, 1, 6, 1000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed_attention_and_its_gradients_equal_the_naive_ones(
    name: str, window: int, max_scores: int, monkeypatch
):
    monkeypatch.setattr(attention_packed, "MAX_SCORES", max_scores)
    lengths, parents = LAYOUTS[name]
    layout = PackedLayout(cu_seqlens=offsets(lengths), parents=parents)
    inputs = streams(sum(lengths))
    weight = torch.randn(sum(lengths), HEADS, SIZE, dtype=torch.float64)
    expected = naive(*inputs, layout, window)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    out = plan_attention(layout, None, torch.device("cpu")).attend(*inputs, 0, window)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_buckets_hold_every_segment_once_and_little_padding():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 128, (200,), generator=generator).tolist()
    parents = [0] * 100 + torch.randint(20, 60, (100,), generator=generator).tolist()
    buckets = attention_packed._bucket_segments(lengths, parents)
    assert sorted(itertools.chain(*buckets)) == list(range(200))
    padded = sum(len(members) * max(lengths[s] for s in members) for members in buckets)
    assert padded < 1.33 * sum(lengths)
    assert len(buckets) < 60


Unit = tuple[int, slice]
"""A prompt by number and which of its completions stand behind one copy of it."""
WHOLE: list[Unit] = [(i, slice(0, 4)) for i in range(4)]
SPLIT: list[Unit] = [(0, slice(0, 1)), *WHOLE[1:], (0, slice(1, 4)), (2, slice(4, 4))]


@pytest.mark.parametrize("name", ["llama31", "mistral_window", "qwen3"])
@pytest.mark.parametrize("mode", ["none", "layers", "selective"])
def test_a_shared_prompt_gives_the_loss_and_gradients_of_separate_prompts(name: str, mode: str):
    """Also where a group is split and its prompt laid down twice."""
    model = build_model(CONFIGS[name], dtype=torch.float64)
    model.init_weights(0)
    model.set_checkpointing(mode)
    prompts = random_ids((11, 1, 40, 2), 97)
    completions = [random_ids((3, 9, 1, 30), 97, seed=seed) for seed in range(4)]
    generator = torch.Generator().manual_seed(7)
    weights = [
        [torch.randn(len(c), dtype=torch.float64, generator=generator) for c in group]
        for group in completions
    ]

    def computed(units: list[Unit], *, share: bool) -> dict[str, Tensor]:
        chosen = [(prompts[i], completions[i][some], weights[i][some]) for i, some in units]
        heads, groups, factors = zip(*chosen, strict=True)
        batch = batch_of(heads, groups, share=share, temperature=0.8)
        scores = model.score(batch)
        factor = torch.cat([one for group in factors for one in group])
        loss = (scores.logprobs_T[batch.loss_mask_T] * factor).sum()
        model.zero_grad()
        loss.backward()
        entropy = (scores.entropy_T[batch.loss_mask_T] * factor).sum()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        return {"loss": loss.detach(), "entropy": entropy.detach(), **found}

    separate = computed(WHOLE, share=False)
    for together in (computed(WHOLE, share=True), computed(SPLIT, share=True)):
        for key, want in separate.items():
            assert want.abs().max() > 0, key
            assert (together[key] - want).norm() <= 1e-12 * want.norm(), key


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("name", ["llama2", "mistral_window", "qwen3"])
def test_prefill_in_pieces_and_decode_equal_the_packed_forward(name: str, block_size: int):
    model = build_model(CONFIGS[name], dtype=torch.float64)
    model.init_weights(0)
    sequences = random_ids((30, 1, 17, 16, 45), 97)
    with torch.no_grad():
        expected = logits_of(model, sequences)
    rows = PagedRows(model, sequences, block_size)
    done = [0] * len(sequences)
    for sizes in ((13, 1, 16, 5, 20), (9, 0, 0, 5, 20), (1, 0, 1, 1, 1), (1, 0, 0, 1, 1)):
        pieces = [(r, done[r], done[r] + size) for r, size in enumerate(sizes) if size]
        for (row, start, stop), logits in zip(pieces, rows.step(pieces), strict=True):
            torch.testing.assert_close(logits, expected[row][start:stop], atol=1e-11, rtol=0)
            done[row] = stop


def test_rows_may_share_the_blocks_of_a_prompt():
    model = build_model(CONFIGS["llama2"], dtype=torch.float64)
    model.init_weights(0)
    prompt, *ends = random_ids((8, 3, 3, 3), 97)
    sequences = [torch.cat([prompt, end]) for end in ends]
    rows = PagedRows(model, sequences, block_size=4)
    rows.tables[1:, :2] = rows.tables[0, :2]
    with torch.no_grad():
        expected = logits_of(model, sequences)
    rows.step([(0, 0, 8)])
    for token in range(8, 11):
        for row, logits in enumerate(rows.step([(r, token, token + 1) for r in range(3)])):
            torch.testing.assert_close(logits[0], expected[row][token], atol=1e-11, rtol=0)


@pytest.mark.parametrize("max_scores", [1 << 24, 64])
def test_decode_rows_of_unlike_contexts_keep_their_order(max_scores: int, monkeypatch):
    monkeypatch.setattr(attention_paged, "MAX_SCORES", max_scores)
    monkeypatch.setattr(attention_paged, "_CALL_BLOCKS", 1)
    generator = torch.Generator().manual_seed(3)
    kv_lengths = (5, 60, 1, 33, 2, 61, 16)
    pool = KVPool(
        data=torch.randn(1, 40, 2, KV_HEADS, 4, SIZE, dtype=torch.float64, generator=generator)
    )
    counts = [-(-n // 4) for n in kv_lengths]
    tables = torch.zeros(7, max(counts), dtype=torch.long)
    free = iter(torch.randperm(39, generator=generator).tolist() * 3)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([next(free) + 1 for _ in range(count)])
    tables[:, 0] = torch.arange(1, 8)
    last = torch.tensor(kv_lengths) - 1
    q, k, v = (t.detach() for t in streams(7))
    before = pool.data.clone()
    slots = torch.arange(32, 39) * 4
    layout = PagedLayout(
        cu_seqlens=tuple(range(8)),
        kv_lengths=kv_lengths,
        kv_lengths_R=torch.tensor(kv_lengths),
        block_tables_RN=tables,
        slots_T=slots,
        block_size=4,
    )
    with torch.no_grad():
        out = plan_attention(layout, pool, torch.device("cpu")).attend(q, k, v, 0, 0)
    assert torch.equal(pool.data[0, 32:39, 0, :, 0], k)
    assert torch.equal(pool.data[0, 32:39, 1, :, 0], v)
    untouched = torch.ones_like(before, dtype=torch.bool)
    untouched[0, 32:39, :, :, 0] = False
    assert torch.equal(pool.data[untouched], before[untouched])
    for row in range(7):
        blocks = pool.data[0, tables[row]]
        keys, values = (blocks[:, i].transpose(1, 2).flatten(0, 1)[: last[row] + 1] for i in (0, 1))
        keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
        weights = (torch.einsum("he,she->hs", q[row], keys) * SIZE**-0.5).softmax(-1)
        expected = torch.einsum("hs,she->he", weights, values)
        torch.testing.assert_close(out[row], expected, atol=1e-12, rtol=0)


def test_cut_finds_the_cheapest_runs():
    sizes, counts = [1, 2, 3, 10, 11, 40], [5, 70, 2, 30, 1, 9]

    def cost(runs: list[list[int]]) -> int:
        number = dict(zip(sizes, counts, strict=True))
        return sum(
            run[-1] * sum(number[n] for n in run) + attention_paged._CALL_BLOCKS for run in runs
        )

    every = []
    for marks in itertools.product((False, True), repeat=len(sizes) - 1):
        runs = [[sizes[0]]]
        for size, mark in zip(sizes[1:], marks, strict=True):
            runs.append([size]) if mark else runs[-1].append(size)
        every.append(cost(runs))
    found = _cut(sizes, counts)
    assert list(itertools.chain(*found)) == sizes
    assert cost(found) == min(every)


def test_attention_over_blocks_refuses_to_pretend_a_gradient():
    model = build_model(CONFIGS["llama2"], dtype=torch.float32)
    rows = PagedRows(model, random_ids((3,), 97), block_size=4)
    layout = PagedLayout(
        cu_seqlens=(0, 1),
        kv_lengths=(1,),
        kv_lengths_R=torch.tensor([1]),
        block_tables_RN=rows.tables,
        slots_T=rows.tables[0, :1] * 4,
        block_size=4,
    )
    with pytest.raises(AssertionError, match="gradient"):
        model(torch.tensor([1]), torch.tensor([0]), layout, rows.pool)
