"""get_chat_template: a tokenizer with the chat template that a script names.

Templates are the tokenizers' own; a name of a family is held to the marks that its template has.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from sparring.data.chat import TEMPLATES
from sparring.errors import UserError

MARKS: Mapping[str, str] = {
    "chatml": "<|im_start|>",
    "qwen": "<|im_start|>",
    "yi": "<|im_start|>",
    "llama": "<|start_header_id|>",
    "mistral": "[INST]",
    "gemma": "<start_of_turn>",
    "phi-3": "<|assistant|>",
    "phi-4": "<|im_sep|>",
    "zephyr": "<|assistant|>",
    "unsloth": ">>> Assistant",
    "vicuna": "ASSISTANT:",
    "alpaca": "### Response",
}
"""How a family's name begins -> what its template writes."""

_ROLES = {"role": "role", "content": "content", "user": "user", "assistant": "assistant"}


def get_chat_template(
    tokenizer: Any,
    chat_template: Any = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> Any:
    """A copy of the tokenizer that writes conversations in the named template.

    chat_template: "chatml", "think" or "think-open" (Sparring's), the name of a family, whose own
    template the tokenizer must have, or (Jinja text, end token). map_eos_token: the end of a turn
    becomes the end token. Raises UserError.
    """
    if mapping is not None and dict(mapping) != _ROLES:
        raise UserError(
            "get_chat_template: mapping is refused: rows of from/value (ShareGPT) are read as they"
            " are by SFTTrainer; for tokenizer.apply_chat_template give role and content"
        )
    if system_message is not None:
        raise UserError(
            "get_chat_template: system_message is refused: put a system message into the rows;"
            " native way: [data] system_prompt, which final/ remembers"
        )
    tokenizer = copy.deepcopy(tokenizer)
    if isinstance(chat_template, list | tuple):
        text, end = chat_template
        tokenizer.chat_template = text
        if map_eos_token and end not in (None, "eos_token"):
            _set_end(tokenizer, end)
        return tokenizer
    own = tokenizer.chat_template or ""
    mark = next((mark for name, mark in MARKS.items() if chat_template.startswith(name)), None)
    if mark is not None and mark in own:
        return tokenizer
    if chat_template in TEMPLATES:
        tokenizer.chat_template = TEMPLATES[chat_template]
        if chat_template == "chatml" and map_eos_token:
            _set_end(tokenizer, "<|im_end|>")
        return tokenizer
    found = "one of another family" if own else "none"
    raise UserError(
        f"get_chat_template: '{chat_template}' is refused: templates are the tokenizers' own, and"
        f" this one has {found}; give (Jinja text, end token), or one of"
        f" {', '.join(TEMPLATES)}; native way: [data] template = FILE.jinja"
    )


def _set_end(tokenizer: Any, end: str) -> None:
    index = tokenizer.convert_tokens_to_ids(end)
    if index is None or index == tokenizer.unk_token_id:
        raise UserError(
            f"get_chat_template: the tokenizer has no token {end!r}, and an embedding is not made"
            " larger; take a template of tokens that it has"
        )
    tokenizer.eos_token = end
