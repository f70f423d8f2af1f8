"""What every text reward reads: prefill and completion as one string, with or without thinking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"


def full_texts(completions: Sequence[Any], prefills: Sequence[str] | None) -> list[str]:
    """Prefill + completion of each sample; a completion is a string or a list with one message."""
    texts = [completion_text(completion) for completion in completions]
    if prefills is None:
        return texts
    return [(prefill or "") + text for prefill, text in zip(prefills, texts, strict=True)]


def completion_text(completion: Any) -> str:
    """The text of a completion in either of its forms."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def after_thinking(text: str) -> str | None:
    """What follows the last </think>; the whole text without any think tag; None if thinking never
    ended.
    """
    end = text.rfind(THINK_CLOSE)
    start = text.rfind(THINK_OPEN)
    if start > end:
        return None
    return text if end < 0 else text[end + len(THINK_CLOSE) :]


def thinking(text: str) -> str:
    """What stands inside the think block (to the end, if it was never closed); "" without one."""
    start = text.find(THINK_OPEN)
    end = text.rfind(THINK_CLOSE)
    if start < 0 and end < 0:
        return ""
    begin = 0 if start < 0 else start + len(THINK_OPEN)
    return text[begin : end if end >= begin else len(text)]
