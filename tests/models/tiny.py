"""Tiny models in Hugging Face's format, and ways to feed them: what the tests of models/ share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.layout import KVPool, PackedLayout, PagedLayout
from sparring.models.transformer import Decoder, new_kv_pool
from sparring.types import Batch

_SHAPE: Mapping[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "eos_token_id": 2,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _config(architecture: str, **changes: Any) -> dict[str, Any]:
    model_type = architecture.removesuffix("ForCausalLM").lower()
    return {**_SHAPE, "architectures": [architecture], "model_type": model_type, **changes}


CONFIGS: Mapping[str, dict[str, Any]] = {
    "llama2": _config("LlamaForCausalLM", num_key_value_heads=6, rope_theta=10000.0),
    "llama31": _config("LlamaForCausalLM", rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE),
    "llama32_tied_new_dialect": _config(
        "LlamaForCausalLM",
        tie_word_embeddings=True,
        head_dim=16,
        dtype="float32",
        rope_parameters={**_LLAMA3_ROPE, "factor": 32.0, "rope_theta": 500000.0},
    ),
    "llama_linear_rope": _config(
        "LlamaForCausalLM", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "llama_biases": _config("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "mistral": _config("MistralForCausalLM", sliding_window=None, rope_theta=1e6),
    "mistral_window": _config("MistralForCausalLM", sliding_window=24, rope_theta=1e4),
    "qwen2": _config(
        "Qwen2ForCausalLM",
        rope_theta=1e6,
        sliding_window=32,
        use_sliding_window=False,
        tie_word_embeddings=True,
    ),
    "qwen2_upper_layers_window": _config(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=20, max_window_layers=1
    ),
    "qwen2_layer_types": _config(
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "qwen3": _config("Qwen3ForCausalLM", head_dim=16, rope_theta=1e6, tie_word_embeddings=True),
    "qwen3_bias": _config("Qwen3ForCausalLM", head_dim=10, attention_bias=True),
}
"""config.json of tiny models: every family, both dialects, every option that changes the
arithmetic.
"""


def hugging_face_model(config: Mapping[str, Any], folder: Path, *, seed: int = 0) -> Any:
    """A float32 transformers model with random weights, saved with this very config.json in
    `folder`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    return model


def random_ids(lengths: Sequence[int], vocab_size: int, *, seed: int = 0) -> list[Tensor]:
    """Sequences of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in lengths]


def offsets(lengths: Sequence[int]) -> tuple[int, ...]:
    """Where each sequence begins when they are laid end to end, and where the last one ends."""
    sums = [0]
    for length in lengths:
        sums.append(sums[-1] + length)
    return tuple(sums)


def logits_of(
    model: Decoder, sequences: Sequence[Tensor], *, adapter: str | None = "policy"
) -> list[Tensor]:
    """Logits of each sequence, all packed into one forward pass."""
    lengths = [len(ids) for ids in sequences]
    bounds = offsets(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])
    layout = PackedLayout(cu_seqlens=bounds, parents=(-1,) * len(lengths))
    ids, positions = (x.to(model.device) for x in (torch.cat(list(sequences)), positions))
    logits = model.logits(model(ids, positions, layout, adapter=adapter))
    return list(logits.split(lengths))


def batch_of(
    prompts: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
    *,
    share: bool,
    temperature: float = 1.0,
) -> Batch:
    """A batch with one group of completions per prompt, the prompt computed once or with each."""
    ids, labels, positions, masks, sequences, parents, lengths = [], [], [], [], [], [], []
    count = 0

    def add(inputs: Tensor, wanted: Tensor, start: int, parent: int, sequence: int) -> None:
        ids.append(inputs)
        labels.append(wanted)
        positions.append(torch.arange(start, start + len(inputs)))
        masks.append(wanted >= 0)
        sequences.append(torch.full((len(inputs),), sequence))
        parents.append(parent)
        lengths.append(len(inputs))

    for prompt, group in zip(prompts, completions, strict=True):
        head, last = prompt[:-1], prompt[-1:]
        parent = -1
        if share and len(head):
            add(head, torch.full_like(head, -100), 0, -1, -1)
            parent = len(parents) - 1
        for completion in group:
            inputs = torch.cat([last, completion[:-1]])
            if share:
                add(inputs, completion, len(head), parent, count)
            else:
                unlabelled = torch.full_like(head, -100)
                add(torch.cat([head, inputs]), torch.cat([unlabelled, completion]), 0, -1, count)
            count += 1
    mask = torch.cat(masks)
    return Batch(
        input_ids_T=torch.cat(ids),
        labels_T=torch.cat(labels),
        positions_T=torch.cat(positions),
        layout=PackedLayout(cu_seqlens=offsets(lengths), parents=tuple(parents)),
        loss_mask_T=mask,
        sequence_ids_T=torch.cat(sequences),
        num_local_sequences=count,
        num_loss_tokens=float(mask.sum()),
        num_sequences=float(count),
        temperature=temperature,
    )


class PagedRows:
    """Sequences that grow in a pool of blocks, with block tables as an engine would keep them."""

    def __init__(self, model: Decoder, sequences: Sequence[Tensor], block_size: int) -> None:
        self.model, self.sequences, self.size = model, sequences, block_size
        counts = [-(-len(ids) // block_size) for ids in sequences]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)) + 1
        self.tables = torch.zeros(len(sequences), max(counts), dtype=torch.long)
        for row, (start, count) in enumerate(zip(offsets(counts), counts, strict=False)):
            self.tables[row, :count] = order[start : start + count]
        self.pool: KVPool = new_kv_pool(
            model.config, sum(counts) + 1, block_size, model.dtype, model.device
        )
        self.pool.data.fill_(float("nan"))  # what was never written must never be read
        self.pool.data[:, 0] = 0.0

    def step(self, pieces: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """Feed tokens start to stop of some rows, as (row, start, stop); logits of each piece."""
        device = self.model.device
        lengths = [stop - start for _, start, stop in pieces]
        positions = torch.cat([torch.arange(start, stop) for _, start, stop in pieces])
        ids = torch.cat([self.sequences[row][start:stop] for row, start, stop in pieces])
        slots = torch.cat(
            [
                self.tables[row][torch.arange(start, stop) // self.size] * self.size
                + torch.arange(start, stop) % self.size
                for row, start, stop in pieces
            ]
        )
        for block in (slots // self.size).unique():
            fresh = self.pool.data[:, block].isnan().all()
            if fresh:
                self.pool.data[:, block] = 0.0
        stops = [stop for _, _, stop in pieces]
        tables = self.tables[[row for row, _, _ in pieces]]
        used = -(-torch.tensor(stops) // self.size)
        tables[torch.arange(tables.shape[1]) >= used[:, None]] = 0
        layout = PagedLayout(
            cu_seqlens=offsets(lengths),
            kv_lengths=tuple(stops),
            kv_lengths_R=torch.tensor(stops, device=device),
            block_tables_RN=tables.to(device),
            slots_T=slots.to(device),
            block_size=self.size,
        )
        with torch.no_grad():
            hidden = self.model(ids.to(device), positions.to(device), layout, self.pool)
            logits = self.model.logits(hidden)
        return list(logits.split(lengths))
