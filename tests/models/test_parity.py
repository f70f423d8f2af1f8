"""Every family gives the numbers of transformers: packed, paged, scored, in both dialects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparring.models.checkpoint import load_model
from sparring.models.transformer import Decoder
from tests.models.tiny import (
    CONFIGS,
    PagedRows,
    batch_of,
    hugging_face_model,
    logits_of,
    random_ids,
)

LENGTHS = (1, 2, 3, 17, 64, 131, 300)

SUPPORTED = (
    "DeepSeek-R1-Distill-Qwen-1.5B",
    "Llama-3.1-8B",
    "Llama-3.1-8B-Instruct",
    "Llama-3.2-1B-Instruct",
    "Llama-3.2-3B-Instruct",
    "Mistral-7B-Instruct-v0.2",
    "Mistral-7B-Instruct-v0.3",
    "Qwen2-1.5B-Instruct",
    "Qwen2.5-0.5B",
    "Qwen2.5-0.5B-Instruct",
    "Qwen2.5-1.5B-Instruct",
    "Qwen2.5-7B-Instruct",
    "Qwen3-0.6B",
    "Qwen3-1.7B",
    "Qwen3-32B",
    "Qwen3-4B",
    "Qwen3-8B",
    "SmolLM2-135M",
)


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def assert_same_logprobs(model: Decoder, theirs, sequences) -> None:
    with torch.no_grad():
        ours = logits_of(model, sequences)
        for ids, logits in zip(sequences, ours, strict=True):
            expected = logprobs(theirs(ids[None]).logits[0])
            assert torch.isfinite(logits).all()
            torch.testing.assert_close(logprobs(logits), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_forward_agrees_with_transformers(name: str, tmp_path: Path):
    theirs = hugging_face_model(CONFIGS[name], tmp_path)
    model = load_model(tmp_path, dtype="float32")
    assert_same_logprobs(model, theirs, random_ids(LENGTHS, 97))


@pytest.mark.parametrize("name", ["mistral_window", "qwen2_upper_layers_window", "qwen3"])
def test_chunked_prefill_and_decode_agree_with_transformers(name: str, tmp_path: Path):
    theirs = hugging_face_model(CONFIGS[name], tmp_path)
    model = load_model(tmp_path, dtype="float32")
    sequences = random_ids((70, 5, 33, 64), 97)
    rows = PagedRows(model, sequences, block_size=16)
    pieces = [
        [(0, 0, 40), (1, 0, 4), (3, 0, 20)],
        [(0, 40, 69), (1, 4, 5), (2, 0, 32), (3, 20, 63)],
        [(0, 69, 70), (2, 32, 33), (3, 63, 64)],
    ]
    with torch.no_grad():
        expected = [logprobs(theirs(ids[None]).logits[0]) for ids in sequences]
    for step in pieces:
        for (row, start, stop), logits in zip(step, rows.step(step), strict=True):
            torch.testing.assert_close(
                logprobs(logits), expected[row][start:stop], atol=1e-4, rtol=0
            )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_score_agrees_with_transformers_and_is_zero_elsewhere(temperature: float, tmp_path: Path):
    theirs = hugging_face_model(CONFIGS["qwen2"], tmp_path)
    model = load_model(tmp_path, dtype="float32")
    model.head_chunk_rows = 7
    prompts = random_ids((5, 1), 97)
    completions = [random_ids((9, 3), 97, seed=1), random_ids((1, 20), 97, seed=2)]
    batch = batch_of(prompts, completions, share=True, temperature=temperature)
    with torch.no_grad():
        scores = model.score(batch)
        expected_logprobs, expected_entropy = [], []
        for prompt, group in zip(prompts, completions, strict=True):
            for completion in group:
                ids = torch.cat([prompt, completion])
                rows = theirs(ids[None]).logits[0, len(prompt) - 1 : -1] / temperature
                expected_logprobs.append(logprobs(rows).gather(1, completion[:, None]).squeeze(1))
                expected_entropy.append(torch.distributions.Categorical(logits=rows).entropy())
    mask = batch.loss_mask_T
    assert scores.logprobs_T.dtype == torch.float32
    torch.testing.assert_close(
        scores.logprobs_T[mask], torch.cat(expected_logprobs), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        scores.entropy_T[mask], torch.cat(expected_entropy), atol=1e-4, rtol=0
    )
    assert not scores.logprobs_T[~mask].any()
    assert not scores.entropy_T[~mask].any()


def test_logprobs_do_not_depend_on_the_company(tmp_path: Path):
    hugging_face_model(CONFIGS["llama31"], tmp_path)
    model = load_model(tmp_path, dtype="float32")
    sequences = random_ids((31, 8, 100, 57, 1, 32, 33), 97)
    with torch.no_grad():
        together = [logprobs(logits) for logits in logits_of(model, sequences)]
        order = [6, 2, 4, 0]
        some = [logprobs(logits) for logits in logits_of(model, [sequences[i] for i in order])]
        alone = [logprobs(logits_of(model, [ids])[0]) for ids in sequences]
    for index, logits in enumerate(together):
        torch.testing.assert_close(logits, alone[index], atol=1e-5, rtol=0)
    for index, logits in zip(order, some, strict=True):
        torch.testing.assert_close(logits, alone[index], atol=1e-5, rtol=0)


@pytest.mark.shared
@pytest.mark.parametrize("name", SUPPORTED)
def test_shrunken_real_configs_agree_with_transformers(name: str, shared_dir: Path, tmp_path: Path):
    config = json.loads((shared_dir / "configs" / f"{name}.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shrunken = {
        **config,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8 if heads % 8 == 0 else heads // kv_heads * 2,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    shrunken.pop("layer_types", None)
    shrunken["head_dim"] = 16
    if shrunken["model_type"] == "qwen2" or heads % 8:
        shrunken.pop("head_dim")
        shrunken["hidden_size"] = 16 * shrunken["num_attention_heads"]
    if config.get("rope_scaling"):
        scaling = {**config["rope_scaling"], "original_max_position_embeddings": 64}
        shrunken["rope_scaling"] = scaling
    theirs = hugging_face_model(shrunken, tmp_path)
    model = load_model(tmp_path, dtype="float32")
    assert_same_logprobs(model, theirs, random_ids((1, 40, 300), 128))
