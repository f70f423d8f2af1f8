"""Mistral 7B and its successors of the same shape: Llama with a sliding window over all layers."""

from __future__ import annotations

from sparring.models.families.family import Family, HfConfig, shared_config
from sparring.models.families.names import LLAMA_NAMES
from sparring.models.transformer import TransformerConfig


def config(hf: HfConfig) -> TransformerConfig:
    """Read a Mistral config.json; where sliding_window is not mentioned it is 4096, as in the
    first release.
    """
    window = int(hf.get("sliding_window", 4096) or 0)
    return shared_config(
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, **hf},
        family="mistral",
        windows=(window,) * int(hf.get("num_hidden_layers") or 0),
    )


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    config=config,
    weights=LLAMA_NAMES,
)
