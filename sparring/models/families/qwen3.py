"""Qwen3, dense sizes: Llama with an RMSNorm on every query and key head, and a head size of its
own.
"""

from __future__ import annotations

from sparring.models.families.family import (
    Family,
    HfConfig,
    qwen_windows,
    shared_config,
)
from sparring.models.families.names import LLAMA_NAMES
from sparring.models.transformer import TransformerConfig

_NAMES = {
    **LLAMA_NAMES,
    "layers.{}.q_norm": ("model.layers.{}.self_attn.q_norm.weight",),
    "layers.{}.k_norm": ("model.layers.{}.self_attn.k_norm.weight",),
}


def config(hf: HfConfig) -> TransformerConfig:
    """Read a Qwen3 config.json; where head_dim is not mentioned it is 128."""
    bias = bool(hf.get("attention_bias", False))
    return shared_config(
        {"head_dim": 128, **hf},
        family="qwen3",
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        windows=qwen_windows(hf),
    )


FAMILY = Family(name="qwen3", architecture="Qwen3ForCausalLM", config=config, weights=_NAMES)
