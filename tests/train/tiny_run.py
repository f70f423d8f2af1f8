"""A tiny checkpoint with a byte tokenizer, data and recipes, written into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sparring.models import checkpoint
from sparring.recipe import Recipe, build_recipe

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

REWARDS = '''
import os

def many_e(completions, **columns):
    """Share of the letter e: something that a random model can learn to write."""
    return [text.count("e") / max(1, len(text)) for text in completions]

def full_credit(completions):
    return [1.0 for _ in completions]

def nothing(completions):
    return [None for _ in completions]

def fails_later(completions, trainer_state):
    return [None if trainer_state.get("step", 0) >= 2 else 1.0 for _ in completions]

def wrong_length(completions):
    return [1.0]

def interrupts(completions, trainer_state):
    if trainer_state.get("step") == 2 and not os.path.exists(__file__ + ".done"):
        open(__file__ + ".done", "w").close()
        import signal
        os.kill(os.getpid(), signal.SIGTERM)
    return [text.count("e") / max(1, len(text)) for text in completions]
'''


def write_tokenizer(folder: Path, *, begins: bool = False) -> None:
    """A tokenizer of the 256 bytes and four special tokens; begins: it puts one before any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]}
    )
    if begins:
        begin = ("<|system|>", fast.convert_tokens_to_ids("<|system|>"))
        fast.bos_token = begin[0]
        fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin[0]} $A", special_tokens=[begin]
        )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def write_checkpoint(folder: Path, *, seed: int = 0, width: int = 32, tied: bool = True) -> Path:
    """A Llama of two layers with random weights, and its tokenizer."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 264,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "dtype": "float32",
    }
    model = checkpoint.build_model(config, dtype=torch.float32)
    model.init_weights(seed)
    write_tokenizer(folder)
    checkpoint.save_model(model, folder)
    return folder


def write_data(folder: Path) -> None:
    """Prompts for GRPO, conversations for SFT, and reward functions."""
    rows = [{"prompt": f"Say {n}.", "reference": str(n)} for n in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"prompt": f"Say {n}.", "completion": f"{n}!"} for n in range(12)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (folder / "rewards.py").write_text(REWARDS)


def grpo_tables(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """The tables of a small GRPO recipe in `folder`; `changes` are laid over the sections."""
    tables: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "prompts.jsonl")},
        "reward": [{"name": f"{folder}/rewards.py:many_e"}],
        "rollout": {"group_size": 4, "prompts_per_step": 3, "max_completion_tokens": 12},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 4},
        "run": {"dir": str(folder / "run"), "checkpoint_every": 2},
    }
    for section, values in changes.items():
        tables[section] = (tables.get(section, {}) | values) if isinstance(values, dict) else values
    return tables


def grpo_recipe(folder: Path, **changes: Any) -> Recipe:
    """The same as a recipe."""
    return build_recipe(grpo_tables(folder, **changes), command="grpo")


def sft_recipe(folder: Path, **changes: Any) -> Recipe:
    """A small SFT recipe in `folder`."""
    tables = grpo_tables(folder, data={"train": str(folder / "chats.jsonl")})
    del tables["rollout"], tables["reward"]
    tables["train"] = {"steps": 4, "conversations_per_step": 6}
    for section, values in changes.items():
        tables[section] = tables.get(section, {}) | values
    return build_recipe(tables, command="sft")
