"""Llama 2, 3, 3.1, 3.2 and models of the same shape, such as SmolLM and SmolLM2."""

from __future__ import annotations

from sparring.models.families.family import Family, HfConfig, shared_config
from sparring.models.families.names import LLAMA_NAMES
from sparring.models.transformer import TransformerConfig


def config(hf: HfConfig) -> TransformerConfig:
    """Read a Llama config.json."""
    bias = bool(hf.get("attention_bias", False))
    return shared_config(
        hf,
        family="llama",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


FAMILY = Family(name="llama", architecture="LlamaForCausalLM", config=config, weights=LLAMA_NAMES)
