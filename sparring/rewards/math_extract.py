"""Finding the final answer in a completion, and the gold answer in a reference. No judging here.

Only text after the thinking counts. Braces are matched by counting, in one pass, so that no input
takes more than linear time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sparring.rewards.texts import ANSWER_CLOSE, ANSWER_OPEN, after_thinking

Source = Literal["answer", "boxed", "hash", "answer_is", "bare", "last"]
"""Where an answer may stand: an <answer> block, a box, a #### line, after "answer is", a completion
that is nothing but the answer, and (a way to guess) the last expression of the text."""

DEFAULT_SOURCES: tuple[Source, ...] = ("answer", "boxed", "hash", "answer_is", "bare")

MAX_ANSWER_CHARACTERS = 500
MAX_REFERENCE_CHARACTERS = 2000
MAX_BARE_CHARACTERS = 120

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_ANSWER_IS = re.compile(
    r"(?:\banswer\s{0,4}(?:\*{0,2}\s{0,4}(?:is|are|equals|[:=])|\*{1,2}:)"
    r"|答案\s{0,4}\*{0,2}\s{0,4}(?:是|为|[:：=]))"
    r"\s{0,4}(?:is\b|[:：])?\s{0,4}\*{0,2}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|[。！？；]")
_MATH_SPAN = re.compile(
    r"\\\((.{1,500}?)\\\)|\\\[(.{1,500}?)\\\]|\$\$([^$]{1,500})\$\$|\$([^$\n]{1,500})\$", re.S
)
_LAST_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?%?")


@dataclass(frozen=True, slots=True)
class Extracted:
    """An answer with the source it came from; text None: there is none, and `reason` says why."""

    text: str | None
    source: str
    reason: str = ""


def extract(text: str, sources: Sequence[Source], *, several_boxes: str = "last") -> Extracted:
    """The final answer of a completion (prefill included): the first of `sources` that is there
    decides.

    several_boxes "last": the last box counts; "agree": boxes that differ are no answer.
    """
    body = after_thinking(text)
    if body is None:
        return Extracted(None, "", "the thinking never ends")
    for source in sources:
        found = _from_source(body, source, several_boxes)
        if found is None:
            continue
        if found.text is None:
            return found
        answer = found.text.strip()
        if not answer:
            return Extracted(None, source, "the answer is empty")
        if len(answer) > MAX_ANSWER_CHARACTERS:
            return Extracted(None, source, f"the answer has {len(answer)} characters")
        return Extracted(answer, found.source)
    return Extracted(None, "", f"no answer found (looked for: {', '.join(sources)})")


def gold(reference: object) -> tuple[str | None, str]:
    """The gold answer inside a reference and "", or None and why the reference cannot be judged.

    A reference with a #### line is what follows it; one with a box is the last box.
    """
    if isinstance(reference, bool) or not isinstance(reference, str | int | float):
        return None, f"the reference is {type(reference).__name__}, not text or a number"
    text = str(reference).strip()
    hashed = _after_hash(text)
    if hashed is not None:
        text = hashed
    else:
        box = last_box(text)
        if box is not None and box.text:
            text = box.text.strip()
    if not text:
        return None, "the reference is empty"
    if len(text) > MAX_REFERENCE_CHARACTERS:
        return None, f"the reference has {len(text)} characters"
    return text, ""


def last_box(text: str) -> Extracted | None:
    r"""The last \boxed or \fbox, None without one; its text is None if it is never closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    while start >= 0:
        match = _BOX.match(text, start)
        if match:
            return _box_at(text, match.end())
        start = max(text.rfind("\\boxed", 0, start), text.rfind("\\fbox", 0, start))
    return None


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`, -1 if there is none; escaped ones do not
    count.
    """
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.S).finditer(text, start):
        token = match.group()
        depth += (token == "{") - (token == "}")
        if depth == 0:
            return match.start()
    return -1


def _from_source(body: str, source: Source, several_boxes: str) -> Extracted | None:
    if source == "answer":
        block = _answer_block(body)
        if block is None:
            return None
        inner = last_box(block) or _phrase(block, _after_hash(block), "answer")
        return (
            Extracted(inner.text, "answer", inner.reason) if inner else Extracted(block, "answer")
        )
    if source == "boxed":
        return _boxed(body, several_boxes)
    if source == "hash":
        return _phrase(body, _after_hash(body), "hash", is_phrase=False)
    if source == "answer_is":
        return _phrase(body, None, "answer_is")
    if source == "bare":
        line = body.strip()
        is_bare = 0 < len(line) <= MAX_BARE_CHARACTERS and "\n" not in line
        return Extracted(line, "bare") if is_bare and len(line.split()) <= 8 else None
    return _last_expression(body)


def _answer_block(body: str) -> str | None:
    end = body.rfind(ANSWER_CLOSE)
    start = body.rfind(ANSWER_OPEN, 0, end) if end >= 0 else -1
    return body[start + len(ANSWER_OPEN) : end].strip() if start >= 0 else None


def _boxed(body: str, several_boxes: str) -> Extracted | None:
    box = last_box(body)
    if box is None or several_boxes == "last" or box.text is None:
        return box
    contents = {
        "".join((_box_at(body, match.end()).text or "").split()) for match in _BOX.finditer(body)
    }
    if len(contents) > 1:
        return Extracted(None, "boxed", "several boxes that differ")
    return box


def _box_at(text: str, position: int) -> Extracted:
    while position < len(text) and text[position].isspace():
        position += 1
    if position >= len(text):
        return Extracted(None, "boxed", "the box is empty")
    if text[position] != "{":
        token = re.compile(r"\\[A-Za-z]+|\\.|\S").match(text, position)
        assert token is not None, "the position holds no white space"
        return Extracted(token.group(), "boxed")
    end = closing_brace(text, position)
    if end < 0:
        return Extracted(None, "boxed", "the box is never closed")
    return Extracted(text[position + 1 : end], "boxed")


def _after_hash(text: str) -> str | None:
    place = text.rfind("####")
    return None if place < 0 else text[place + 4 :].strip().partition("\n")[0].strip()


def _phrase(
    body: str, ready: str | None, source: str, *, is_phrase: bool = True
) -> Extracted | None:
    if ready is not None:
        return Extracted(ready, source)
    if not is_phrase:
        return None
    last = None
    for match in _ANSWER_IS.finditer(body):
        last = match
    if last is None:
        return None
    rest = body[last.end() : last.end() + 4 * MAX_ANSWER_CHARACTERS].strip()
    math = _MATH_SPAN.match(rest)
    if math:
        return Extracted(next(group for group in math.groups() if group is not None), source)
    line = rest.partition("\n")[0]
    end = _SENTENCE_END.search(line)
    return Extracted((line[: end.start()] if end else line).strip(" *"), source)


def _last_expression(body: str) -> Extracted | None:
    tail = body[-4 * MAX_ANSWER_CHARACTERS :]
    spans = list(_MATH_SPAN.finditer(tail))
    numbers = list(_LAST_NUMBER.finditer(tail))
    if spans and (not numbers or numbers[-1].start() < spans[-1].end()):
        return Extracted(next(g for g in spans[-1].groups() if g is not None), "last")
    return Extracted(numbers[-1].group(), "last") if numbers else None
