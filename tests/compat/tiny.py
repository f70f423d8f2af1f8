"""A tiny Qwen2 with a byte tokenizer and a chat template, as scripts load it."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparring.models import checkpoint

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path, *, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A Qwen2 of two layers with random weights; widths are whole blocks of NF4."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 264,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.08,
        "dtype": "float32",
    }
    model = checkpoint.build_model(config, dtype=torch.float32)
    model.init_weights(seed)
    write_tokenizer(folder, template)
    checkpoint.save_model(model, folder)
    return folder


def write_tokenizer(folder: Path, template: str | None) -> None:
    """The 256 bytes and the marks of turns; <|im_end|> is the end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)


def as_messages(text: str) -> list[dict[str, str]]:
    """One user's message."""
    return [{"role": "user", "content": text}]
