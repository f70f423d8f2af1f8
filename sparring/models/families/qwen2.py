"""Qwen2, Qwen2.5 and R1-Distill-Qwen: Llama with a bias on queries, keys and values."""

from __future__ import annotations

from sparring.models.families.family import (
    Family,
    HfConfig,
    qwen_windows,
    shared_config,
)
from sparring.models.families.names import LLAMA_NAMES
from sparring.models.transformer import TransformerConfig


def config(hf: HfConfig) -> TransformerConfig:
    """Read a Qwen2 config.json."""
    return shared_config(hf, family="qwen2", qkv_bias=True, windows=qwen_windows(hf))


FAMILY = Family(name="qwen2", architecture="Qwen2ForCausalLM", config=config, weights=LLAMA_NAMES)
