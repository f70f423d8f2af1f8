"""The names that scripts for TRL and Unsloth use: they run with only their import lines changed.

A thin face: it turns arguments into a recipe and plain parts and calls the native loops. Every
argument is honoured or refused with the reason and the native way (tables of data in *_table.py);
where nothing depends on one, that is said once. Defaults are TRL's.
"""

from __future__ import annotations

from typing import Any

import torch

from sparring.compat.dpo import DPOTrainer
from sparring.compat.grpo import GRPOTrainer
from sparring.compat.grpo_table import GRPOConfig
from sparring.compat.loading import FastLanguageModel
from sparring.compat.model import LoraRequest, note_nothing_to_patch
from sparring.compat.sampling import SamplingParams
from sparring.compat.sft import SFTTrainer, train_on_responses_only
from sparring.compat.sft_table import DPOConfig, SFTConfig
from sparring.compat.sharegpt import (
    standardize_data_formats,
    standardize_sharegpt,
    unsloth_train,
)
from sparring.compat.templates import get_chat_template
from sparring.compat.transformers import (
    AutoModelForCausalLM,
    get_peft_model,
    prepare_model_for_kbit_training,
)

__all__ = [
    "AutoModelForCausalLM",
    "DPOConfig",
    "DPOTrainer",
    "FastLanguageModel",
    "FastModel",
    "GRPOConfig",
    "GRPOTrainer",
    "LoraRequest",
    "PatchDPOTrainer",
    "PatchFastRL",
    "SFTConfig",
    "SFTTrainer",
    "SamplingParams",
    "get_chat_template",
    "get_peft_model",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "prepare_model_for_kbit_training",
    "standardize_data_formats",
    "standardize_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]

FastModel = FastLanguageModel


def PatchFastRL(*_: Any, **__: Any) -> None:
    """Accepted; says once that nothing needs patching."""
    note_nothing_to_patch("PatchFastRL")


def PatchDPOTrainer(*_: Any, **__: Any) -> None:
    """Accepted; says once that nothing needs patching."""
    note_nothing_to_patch("PatchDPOTrainer")


def is_bfloat16_supported(*_: Any, **__: Any) -> bool:
    """Whether the first card has bfloat16 arithmetic."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


is_bf16_supported = is_bfloat16_supported
