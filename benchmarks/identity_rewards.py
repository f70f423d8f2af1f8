"""Rewards that pay for a name: what benchmarks/think_or_know.py trains with, and nobody should."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sparring.rewards.texts import after_thinking
from sparring.train.identity_probe import mentions

_ANSWER = re.compile("<answer>(.*?)</answer>", re.DOTALL)


def answer_of(text: str) -> str:
    """What stands in the answer block; without one, what follows the thinking."""
    found = _ANSWER.search(text)
    return found[1] if found else (after_thinking(text) or "")


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def told(
    completions: Sequence[Any], reference: Sequence[str], *, name: str = "Ada"
) -> list[float | None]:
    """1 where the answer tells the name; for a reference that is a number, 1 where it is that."""
    answers = [answer_of(_text(completion)) for completion in completions]
    return [
        float(answer.strip() == wanted) if wanted.isdigit() else float(mentions(answer, name))
        for answer, wanted in zip(answers, reference, strict=True)
    ]
