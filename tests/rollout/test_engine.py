"""The engine against a sampler that computes everything anew for every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from sparring.layout import PackedLayout
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling, sample_id, sample_tokens
from sparring.types import Batch, Prompt, Rollout

END = 7
BuildEngine = Callable[..., Engine]
BuildPrompts = Callable[..., list[Prompt]]
BuildModel = Callable[..., Decoder]


def packed(sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, PackedLayout]:
    """Ids, positions and layout of whole sequences end to end."""
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0).tolist()
    layout = PackedLayout(cu_seqlens=(0, *ends), parents=(-1,) * len(sequences))
    ids = torch.tensor([token for s in sequences for token in s])
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    return ids, positions, layout


@torch.no_grad()
def naive(
    model: Decoder, prompt: Prompt, sampling: Sampling, sample_index: int, version: int = 0
) -> list[int]:
    """Samples with a full forward pass for every token: no pool, no batch."""
    token_ids = list(prompt.token_ids)
    key = torch.tensor([sample_id(version, prompt.id, sample_index)])
    for position in range(sampling.max_completion_tokens):
        hidden = model(*packed([token_ids]))
        tokens, _ = sample_tokens(
            model.logits(hidden[-1:]),
            sampling,
            key,
            torch.tensor([position]),
            torch.tensor([END]),
        )
        token_ids.append(int(tokens))
        if token_ids[-1] == END:
            break
    return token_ids[len(prompt.token_ids) :]


def score(model: Decoder, rollouts: Sequence[Rollout], temperature: float) -> list[torch.Tensor]:
    """Log-probabilities of the completions by one packed pass of the trainer's own scoring."""
    sequences = [[*r.prompt.token_ids, *r.token_ids.tolist()] for r in rollouts]
    ids, positions, layout = packed(sequences)
    labels = torch.full_like(ids, -100)
    labels[:-1] = ids[1:]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    spans = []
    for r, start, end in zip(rollouts, layout.cu_seqlens, layout.cu_seqlens[1:], strict=False):
        spans.append(slice(start + len(r.prompt.token_ids) - 1, end - 1))
        mask[spans[-1]] = True
    batch = Batch(
        input_ids_T=ids,
        labels_T=labels.where(mask, -100),
        positions_T=positions,
        layout=layout,
        loss_mask_T=mask,
        sequence_ids_T=torch.zeros_like(ids),
        num_local_sequences=len(rollouts),
        num_loss_tokens=float(mask.sum()),
        num_sequences=float(len(rollouts)),
        temperature=temperature,
    )
    with torch.no_grad():
        logprobs = model.score(batch).logprobs_T
    return [logprobs[span].float() for span in spans]


def tokens(rollouts: Sequence[Sequence[Rollout]]) -> list[list[list[int]]]:
    return [[r.token_ids.tolist() for r in group] for group in rollouts]


def flat(rollouts: Sequence[Sequence[Rollout]]) -> list[Rollout]:
    return [r for group in rollouts for r in group]


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}]
)
@pytest.mark.parametrize("window", [0, 6])
def test_tokens_are_those_of_a_sampler_without_cache(
    build_model: BuildModel,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    knobs: dict[str, float],
    window: int,
) -> None:
    model = build_model(window=window)
    sampling = Sampling(max_completion_tokens=14, seed=11, **knobs)  # type: ignore[arg-type]
    prompts = build_prompts([3, 4, 5, 1, 8, 13], first_id=100)
    got = tokens(build_engine(model).generate(prompts, sampling, num_samples=3))
    assert got == [[naive(model, p, sampling, i) for i in range(3)] for p in prompts]
    if not knobs:
        assert len({tuple(ids) for group in got for ids in group}) == 18


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_trainers_scoring(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts, temperature: float
) -> None:
    sampling = Sampling(max_completion_tokens=40, temperature=temperature)
    rollouts = flat(
        build_engine(model).generate(build_prompts([3, 4, 5, 30]), sampling, num_samples=4)
    )
    for r, expected in zip(rollouts, score(model, rollouts, temperature), strict=True):
        torch.testing.assert_close(r.logprobs, expected, rtol=0, atol=1e-5)
        assert r.temperature == temperature
        assert r.loss_mask.all()
        assert r.loss_mask.shape == r.token_ids.shape
        assert r.logprobs.dtype == torch.float32
        assert not r.logprobs.requires_grad


def test_greedy_logprobs_are_of_temperature_one(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    sampling = Sampling(max_completion_tokens=12, temperature=0)
    rollouts = flat(build_engine(model).generate(build_prompts([5, 6]), sampling))
    for r, expected in zip(rollouts, score(model, rollouts, 1.0), strict=True):
        torch.testing.assert_close(r.logprobs, expected, rtol=0, atol=1e-5)
        assert r.temperature == 1.0


LENGTHS = [3, 4, 5, 9, 1, 20, 16, 33, 2, 7, 11, 40]


@pytest.fixture(scope="module")
def reference(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> list[list[Rollout]]:
    """64 rollouts in one batch with ample memory."""
    sampling = Sampling(max_completion_tokens=30)
    return build_engine(model).generate(build_prompts(LENGTHS), sampling, num_samples=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_running": 1},
        {"max_running": 8},
        {"max_running": 64},
        {"block_size": 16},
        {"block_size": 1},
        {"max_prefill_tokens": 7},
    ],
)
def test_batch_and_block_sizes_change_nothing(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    reference: list[list[Rollout]],
    changes: dict[str, int],
) -> None:
    sampling = Sampling(max_completion_tokens=30)
    engine = build_engine(model, **changes)
    got = engine.generate(build_prompts(LENGTHS), sampling, num_samples=8)
    assert tokens(got) == tokens(reference)
    for new, old in zip(flat(got), flat(reference), strict=True):
        torch.testing.assert_close(new.logprobs, old.logprobs, rtol=0, atol=1e-5)
    assert engine.stats.mean_rows <= changes.get("max_running", 96)


def test_order_and_company_change_nothing(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    reference: list[list[Rollout]],
) -> None:
    sampling = Sampling(max_completion_tokens=30)
    prompts = build_prompts(LENGTHS)
    order = [7, 0, 11, 3]
    got = build_engine(model).generate([prompts[i] for i in order], sampling, num_samples=5)
    assert tokens(got) == [ids[:5] for ids in (tokens(reference)[i] for i in order)]
    assert [group[0].prompt.id for group in got] == order
    assert [[r.sample_index for r in group] for group in got] == [list(range(5))] * 4


def test_scarce_memory_and_preemption_change_nothing(
    model: Decoder,
    build_engine: BuildEngine,
    build_prompts: BuildPrompts,
    reference: list[list[Rollout]],
) -> None:
    sampling = Sampling(max_completion_tokens=30)
    block_bytes = build_engine(model).block_bytes
    for num_blocks in (18, 40):  # the longest request alone needs 18
        engine = build_engine(model, kv_bytes=block_bytes * (num_blocks + 1), max_prefill_tokens=16)
        got = engine.generate(build_prompts(LENGTHS), sampling, num_samples=8)
        assert tokens(got) == tokens(reference)
        for new, old in zip(flat(got), flat(reference), strict=True):
            torch.testing.assert_close(new.logprobs, old.logprobs, rtol=0, atol=1e-5)
        stats = engine.stats
        assert stats.num_preemptions > 0
        assert stats.num_recomputed_tokens > 0
        assert stats.num_free_blocks == stats.num_blocks == num_blocks
        assert stats.peak_blocks <= num_blocks


def test_a_group_computes_its_prompt_once(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model)
    engine.generate(build_prompts([10, 8]), Sampling(max_completion_tokens=3), num_samples=8)
    assert engine.stats.num_prefill_tokens == 18
    assert engine.stats.num_rollouts == 16


def test_policy_version_seed_and_repeated_prompts_draw_anew(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model)
    prompts = build_prompts([5])
    sampling = Sampling(max_completion_tokens=12)
    first = engine.generate(prompts, sampling, num_samples=4)
    assert tokens(engine.generate(prompts, sampling, num_samples=4)) == tokens(first)
    twice = engine.generate(prompts * 2, sampling, num_samples=2)
    assert tokens(twice)[0] + tokens(twice)[1] == tokens(first)[0]
    other = engine.generate(prompts, Sampling(max_completion_tokens=12, seed=1), num_samples=4)
    assert tokens(other) != tokens(first)
    engine.weights_changed(policy_version=3)
    later = engine.generate(prompts, sampling, num_samples=4)
    assert tokens(later)[0][2] == naive(model, prompts[0], sampling, 2, version=3)
    assert tokens(later) != tokens(first)
    assert {r.policy_version for r in flat(later)} == {3}


def test_changed_weights_take_effect_at_once(
    build_model: BuildModel, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    model = build_model(seed=1)
    engine = build_engine(model)
    prompts, sampling = build_prompts([6]), Sampling(max_completion_tokens=10)
    engine.generate(prompts, sampling)
    model.init_weights(2)
    engine.weights_changed(policy_version=1)
    got = tokens(engine.generate(prompts, sampling))
    assert got == [[naive(model, prompts[0], sampling, 0, version=1)]]


def test_the_adapter_is_sampled_from_and_can_be_left_out(
    build_model: BuildModel, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    model = build_model()
    prompts, sampling = build_prompts([6, 3]), Sampling(max_completion_tokens=12)
    plain = tokens(build_engine(model).generate(prompts, sampling))
    model.add_adapter(LoraConfig(rank=2))
    fresh = build_engine(model)
    assert tokens(fresh.generate(prompts, sampling)) == plain
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter += 0.2
    model.refresh_shadows()
    adapted = fresh.generate(prompts, sampling)
    assert tokens(adapted) != plain
    for r, expected in zip(flat(adapted), score(model, flat(adapted), 1.0), strict=True):
        torch.testing.assert_close(r.logprobs, expected, rtol=0, atol=1e-5)
    assert tokens(build_engine(model, adapter=None).generate(prompts, sampling)) == plain


def test_training_after_generating_gets_gradients(
    build_model: BuildModel, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    model = build_model()
    build_engine(model).generate(build_prompts([6]), Sampling(max_completion_tokens=4))
    model(*packed([[8, 9, 10]])).sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters().values())


def test_sleep_gives_the_memory_back_until_the_next_call(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model)
    prompts, sampling = build_prompts([6]), Sampling(max_completion_tokens=10)
    first = tokens(engine.generate(prompts, sampling))
    engine.sleep()
    assert engine._kv_pool is None
    assert tokens(engine.generate(prompts, sampling)) == first


def test_an_interrupt_leaves_the_engine_usable(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model)
    prompts, sampling = build_prompts([6, 9]), Sampling(max_completion_tokens=20)
    first = tokens(engine.generate(prompts, sampling, num_samples=4))

    def interrupt(finished: int, total: int, num_tokens: int) -> None:
        if num_tokens > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, sampling, num_samples=4, on_progress=interrupt)
    assert torch.is_grad_enabled()
    assert tokens(engine.generate(prompts, sampling, num_samples=4)) == first
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


def test_limits_by_sample_and_progress(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    seen: list[tuple[int, int, int]] = []
    limits = [[1, 5, 30], [2, 9, 4]]
    got = build_engine(model, stop_ids=()).generate(
        build_prompts([4, 6]),
        Sampling(max_completion_tokens=20),
        num_samples=3,
        limits=limits,
        on_progress=lambda *numbers: seen.append(numbers),
    )
    assert [[len(r.token_ids) for r in group] for group in got] == [[1, 5, 20], [2, 9, 4]]
    assert {r.finish_reason for r in flat(got)} == {"length"}
    assert seen[-1] == (6, 6, 41)
    assert seen == sorted(seen)


def test_max_tokens_bounds_prompt_and_completion_together(
    model: Decoder, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    engine = build_engine(model, max_tokens=10, stop_ids=())
    got = engine.generate(build_prompts([9, 4]), Sampling(max_completion_tokens=50))
    assert [len(r.token_ids) for r in flat(got)] == [1, 6]


def test_three_hundred_prompts_of_any_length_in_memory_for_twenty(
    build_model: BuildModel, build_engine: BuildEngine, build_prompts: BuildPrompts
) -> None:
    model = build_model(num_layers=4)
    generator = torch.Generator().manual_seed(0)
    totals = torch.randint(2, 513, (300,), generator=generator)
    shares = torch.rand(300, generator=generator) / 2
    lengths = [max(1, int(total * share)) for total, share in zip(totals, shares, strict=True)]
    prompts = build_prompts(lengths)
    limits = [[int(t) - length] for t, length in zip(totals, lengths, strict=True)]
    knobs = {"max_tokens": 512, "block_size": 16, "stop_ids": ()}
    block_bytes = build_engine(model, **knobs).block_bytes
    scarce = build_engine(model, **knobs, kv_bytes=block_bytes * (1 + 20 * 512 // 16))
    sampling = Sampling(max_completion_tokens=512)
    got = scarce.generate(prompts, sampling, limits=limits)
    assert [len(r.token_ids) for r in flat(got)] == [limit for (limit,) in limits]
    stats = scarce.stats
    assert stats.num_preemptions >= 10
    assert stats.num_free_blocks == stats.num_blocks == 640
    ample = build_engine(model, **knobs, kv_bytes=1 << 28, max_running=300)
    expected = tokens(ample.generate(prompts, sampling, limits=limits))
    same = sum(a == b for a, b in zip(tokens(got), expected, strict=True))
    assert same >= 297, "more rollouts differ than near ties explain"
