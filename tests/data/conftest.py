"""Tiny tokenizers, made in the test itself: byte-level BPE, any text round-trips."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

LINES = [
    "What is 3 + 4? The answer is 7.",
    "Tom has 12 apples and eats 5. How many are left?",
    "<think>\nfirst add, then check\n</think>\n\n<answer>42</answer>",
    "user assistant system question answer hello world",
    "三加四等于几？答案是七。",
]


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """make_tokenizer(chat_template=None, begin=False, end="<|im_end|>"): a fresh tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]

    def make(
        chat_template: str | None = None, *, begin: bool = False, end: str | None = "<|im_end|>"
    ) -> Any:
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        raw.train_from_iterator(LINES, trainer)
        if begin:
            raw.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))]
            )
        kind = {"eos_token": end} if end else {}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<|endoftext|>", bos_token="<s>", **kind
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def chatml() -> str:
    """The plainest template there is."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.fixture
def rewriting() -> str:
    """ChatML that drops the thinking of every assistant turn but the last, as Qwen3 does."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
        "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% else %}{% set said = m.content %}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ said }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
