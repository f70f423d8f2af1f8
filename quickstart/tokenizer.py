"""The quickstart's tokenizer: byte-level BPE trained on the generator's own text.

All 256 bytes are tokens and nothing is normalised, so every text comes back as it was. Digits are
single tokens. The four think and answer tags are one token each but not special: they survive where
special tokens are dropped from decoded text.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quickstart.datasets import draw_problems

VOCABULARY_SIZE = 768
PAD, END = "<|endoftext|>", "<|end|>"
SPECIAL = (PAD, "<|system|>", "<|user|>", "<|assistant|>", END)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

# Words with the character before them, digits one by one, punctuation, white space.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.role == 'assistant' and message.reasoning_content is string -%}"
    "{{- '<think>' + message.reasoning_content + '</think>' -}}"
    "{%- endif -%}"
    "{{- message.content + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def train_tokenizer(seed: int, *, num_problems: int = 20_000) -> PreTrainedTokenizerFast:
    """Train on the prompts of `num_problems` problems that are not held out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(SPECIAL) - len(TAGS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    problems = itertools.islice(draw_problems(seed, held_out=False), num_problems)
    tokenizer.train_from_iterator((problem.prompt for problem in problems), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    build: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    return wrapped


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, with the chat template inside the latter.

    The class is named as transformers 4 and 5 both know it.
    """
    tokenizer.save_pretrained(directory, save_jinja_files=False)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
