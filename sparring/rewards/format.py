"""Is the completion laid out as asked: one think block, then one answer?

Both rewards read prefill + completion, so a template that already opens <think> changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from sparring.rewards.texts import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    full_texts,
)

Layout = Literal["think_answer", "think"]


def format_reward(
    completions: Sequence[Any],
    prefills: Sequence[str] | None = None,
    finish_reasons: Sequence[str | None] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    layout: Layout = "think_answer",
    mode: Literal["strict", "lenient"] = "strict",
    allow_empty_thinking: bool = False,
) -> list[float]:
    """1.0 where the layout holds, else 0.0.

    layout "think_answer": one <think> block, then one <answer> block; "think": one <think> block,
    then text. strict: nothing but white space before, between and after the blocks, each tag
    exactly once and in order, both bodies not blank, the completion not cut by the length limit.
    lenient: text around and between the blocks is allowed. allow_empty_thinking: for models that
    may skip it.
    """
    texts = full_texts(completions, prefills)
    reasons = [
        fault(text, layout=layout, is_strict=mode == "strict", allow_empty=allow_empty_thinking)
        for text in texts
    ]
    for index, finish in enumerate(finish_reasons or ()):
        if finish == "length" and not reasons[index]:
            reasons[index] = "cut by the length limit"
    if log_extra is not None:
        log_extra("reason", [reason or f"the {layout} layout holds" for reason in reasons])
    return [0.0 if reason else 1.0 for reason in reasons]


def tags(
    completions: Sequence[Any],
    prefills: Sequence[str] | None = None,
    log_extra: Callable[..., None] | None = None,
) -> list[float]:
    """Partial credit while the layout is being learnt: 0.25 for each of the four tags.

    A tag counts if it occurs exactly once and after the last one that counts; a closing tag only
    after a body that is not blank. Full credit asks for the lenient layout of `format`.
    """
    values, notes = [], []
    for text in full_texts(completions, prefills):
        counted: list[str] = []
        position = 0
        for tag in (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE):
            place = text.find(tag)
            if place < position or text.count(tag) != 1:
                continue
            is_close = tag.startswith("</")
            if is_close and not text[position:place].strip():
                continue
            counted.append(tag)
            position = place + len(tag)
        is_whole = not fault(text, layout="think_answer", is_strict=False, allow_empty=False)
        values.append(0.25 * (len(counted) if is_whole else min(3, len(counted))))
        notes.append("counted: " + (" ".join(counted) or "no tag"))
    if log_extra is not None:
        log_extra("reason", notes)
    return values


def fault(text: str, *, layout: Layout, is_strict: bool, allow_empty: bool) -> str:
    """What is wrong with the layout of `text`, "" if nothing is."""
    wanted = [THINK_OPEN, THINK_CLOSE]
    if layout == "think_answer":
        wanted += [ANSWER_OPEN, ANSWER_CLOSE]
    places = []
    for tag in wanted:
        count = text.count(tag)
        if count != 1:
            return f"{tag} occurs {count} times, once is asked"
        places.append(text.find(tag))
    if places != sorted(places):
        return f"the tags are not in the order {' '.join(wanted)}"
    ends = [place + len(tag) for place, tag in zip(places, wanted, strict=True)]
    if not allow_empty and not text[ends[0] : places[1]].strip():
        return "the think block is blank"
    last = text[ends[1] :] if layout == "think" else text[ends[2] : places[3]]
    if not last.strip():
        return "the answer is blank"
    if not is_strict:
        return ""
    if text[: places[0]].strip():
        return f"there is text before {THINK_OPEN}"
    if layout == "think_answer":
        if text[ends[1] : places[2]].strip():
            return "there is text between the think and the answer block"
        if text[ends[3] :].strip():
            return f"there is text after {ANSWER_CLOSE}"
    return ""
