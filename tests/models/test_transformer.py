"""The decoder's own promises: sizes, scoring edges, checkpointing, memory of the head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparring.errors import CheckpointError
from sparring.models.checkpoint import build_model, family_of
from sparring.models.families import mistral, qwen2, qwen3
from sparring.models.lora import LoraConfig
from sparring.models.transformer import kv_bytes_per_token, new_kv_pool
from tests.models.tiny import CONFIGS, batch_of, random_ids


def test_the_pool_takes_the_bytes_that_are_promised():
    config = build_model(CONFIGS["qwen3"], dtype=torch.float32).config
    for dtype in (torch.float32, torch.bfloat16):
        pool = new_kv_pool(config, 7, 16, dtype, torch.device("cpu"))
        assert pool.data.nbytes == 7 * 16 * kv_bytes_per_token(config, dtype)
        assert pool.data.shape == (2, 7, 2, 2, 16, 16)
        assert (pool.num_blocks, pool.block_size) == (7, 16)
        assert not pool.data.any()


def test_a_batch_without_labels_scores_zero_and_has_no_gradient():
    model = build_model(CONFIGS["llama2"], dtype=torch.float32)
    model.init_weights(0)
    batch = batch_of(random_ids((4,), 97), [random_ids((3,), 97)], share=False)
    batch = replace(batch, loss_mask_T=torch.zeros_like(batch.loss_mask_T))
    scores = model.score(batch)
    assert not scores.logprobs_T.any()
    scores.logprobs_T.sum().backward()
    assert not model.norm.grad.any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_the_head_chunk_changes_no_number(lora: bool, tied: bool):
    config = {**CONFIGS["qwen2"], "tie_word_embeddings": tied}
    batch = batch_of(random_ids((6,), 97), [random_ids((7, 15), 97)], share=True, temperature=1.3)
    results = []
    for chunk_rows in (1000, 1, 4):
        model = build_model(config, dtype=torch.float64)
        model.init_weights(0)
        model.head_chunk_rows = chunk_rows
        if lora:
            model.add_adapter(LoraConfig(rank=2))
        scores = model.score(batch)
        (scores.logprobs_T * torch.linspace(-1, 2, len(scores.logprobs_T))).sum().backward()
        gradients = [p.grad for _, p in sorted(model.trainable_parameters().items())]
        results.append((scores.logprobs_T.detach(), scores.entropy_T, *gradients))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_adapters_by_name():
    model = build_model(CONFIGS["llama2"], dtype=torch.float32)
    model.init_weights(0)
    batch = batch_of(random_ids((4,), 97), [random_ids((3,), 97)], share=False)
    with torch.no_grad():
        assert torch.equal(
            model.score(batch).logprobs_T, model.score(batch, adapter=None).logprobs_T
        )
    with pytest.raises(AssertionError, match="no adapter called 'reference'"):
        model.score(batch, adapter="reference")
    model.add_adapter(LoraConfig())
    with pytest.raises(AssertionError, match="already"):
        model.add_adapter(LoraConfig())


def test_random_weights_depend_on_the_seed_alone():
    models = [build_model(CONFIGS["qwen2"], dtype=torch.float32) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        model.init_weights(seed)
    first, same, other = (m.layers[1].gate_up.base.weight for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert abs(first.std().item() - 0.02) < 0.002
    assert torch.equal(models[0].norm, torch.ones(48))
    assert not models[0].layers[0].qkv.bias.any()


def test_what_a_config_leaves_out_is_as_in_transformers():
    shape = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
    }
    from transformers import MistralConfig, Qwen2Config, Qwen3Config

    for family, theirs in (
        (mistral, MistralConfig(**shape)),
        (qwen2, Qwen2Config(**shape)),
        (qwen3, Qwen3Config(**shape)),
    ):
        ours = family.config(shape if family is mistral else {**shape, "num_key_value_heads": 8})
        assert ours.windows == ((theirs.sliding_window or 0),) * 3
        assert ours.norm_eps == theirs.rms_norm_eps
        assert ours.head_size == getattr(theirs, "head_dim", 8)
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.tied_head == theirs.tie_word_embeddings
        if family is mistral:
            assert ours.num_kv_heads == theirs.num_key_value_heads
            assert ours.max_tokens == theirs.max_position_embeddings


def test_windows_by_layer():
    def windows(**changes: object) -> tuple[int, ...]:
        config = {**CONFIGS["qwen2"], "num_hidden_layers": 4, **changes}
        return family_of(config).config(config).windows

    on = {"use_sliding_window": True, "sliding_window": 9}
    assert windows(sliding_window=9) == (0, 0, 0, 0)
    assert windows(**on, max_window_layers=3) == (0, 0, 0, 9)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(**on, layer_types=kinds) == (9, 0, 9, 0)
    assert windows(layer_types=kinds) == (0, 0, 0, 0)
    with pytest.raises(CheckpointError, match=r"layer_types has 3 entries for 4 layers"):
        windows(layer_types=kinds[:3])
    with pytest.raises(CheckpointError, match=r"unknown kinds: \['linear_attention'\]"):
        windows(layer_types=["linear_attention"] * 4)
