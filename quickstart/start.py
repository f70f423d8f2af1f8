"""The model that the quickstart policy starts from: its shape, and seeded random weights.

Written as a Hugging Face checkpoint of the Qwen3 architecture, which the product then trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

NUM_LAYERS = 3
WIDTH = 192
HIDDEN = 640
NUM_HEADS = 4
NUM_KEY_VALUE_HEADS = 2
HEAD_SIZE = 32
MAX_TOKENS = 512
SPREAD = 0.06
"""Standard deviation of the first weights: 1 / sqrt(WIDTH), rounded down."""


def model_config(*, vocabulary_size: int, end_id: int, pad_id: int) -> dict[str, Any]:
    """config.json of the policy: 1.4 million parameters with a vocabulary of 768."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": vocabulary_size,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KEY_VALUE_HEADS,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end_id,
        "pad_token_id": pad_id,
        "torch_dtype": "float32",
    }


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights under their Hugging Face names; the same seed gives the same values everywhere.

    Normal with standard deviation SPREAD, smaller where a layer writes into the residual stream;
    norms are ones.
    """
    generator = torch.Generator().manual_seed(seed)
    quiet = SPREAD / (2 * config["num_hidden_layers"]) ** 0.5

    def normal(rows: int, columns: int, spread: float = SPREAD) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * spread

    width, hidden, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    weights = {"model.embed_tokens.weight": normal(config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": torch.ones(width),
            prefix + "self_attn.q_proj.weight": normal(query, width),
            prefix + "self_attn.k_proj.weight": normal(key, width),
            prefix + "self_attn.v_proj.weight": normal(key, width),
            prefix + "self_attn.q_norm.weight": torch.ones(size),
            prefix + "self_attn.k_norm.weight": torch.ones(size),
            prefix + "self_attn.o_proj.weight": normal(width, query, quiet),
            prefix + "post_attention_layernorm.weight": torch.ones(width),
            prefix + "mlp.gate_proj.weight": normal(hidden, width),
            prefix + "mlp.up_proj.weight": normal(hidden, width),
            prefix + "mlp.down_proj.weight": normal(width, hidden, quiet),
        }
    return weights | {"model.norm.weight": torch.ones(width)}


def write_start(directory: Path, *, vocabulary_size: int, end_id: int, pad_id: int) -> None:
    """Write config.json, generation_config.json and model.safetensors into an existing folder."""
    config = model_config(vocabulary_size=vocabulary_size, end_id=end_id, pad_id=pad_id)
    generation = {"eos_token_id": end_id, "pad_token_id": pad_id, "do_sample": True}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(random_weights(config, 0), directory / "model.safetensors", {"format": "pt"})
