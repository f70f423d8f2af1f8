"""The reward `countdown`: an expression that uses the given numbers and equals the target.

The expression is walked as a syntax tree (arithmetic.py), never run: + - * / and brackets, no
powers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

from sparring.errors import RewardError
from sparring.rewards.arithmetic import ArithmeticFault, compute
from sparring.rewards.math_extract import Extracted, extract
from sparring.rewards.math_normal import normalise
from sparring.rewards.texts import after_thinking, full_texts

MAX_EXPRESSION_CHARACTERS = 300

_TIMES_LETTER = re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])")


def countdown(
    completions: Sequence[Any],
    numbers: Sequence[Any],
    target: Sequence[Any],
    prefills: Sequence[str] | None = None,
    log_extra: Callable[..., None] | None = None,
    *,
    use: Literal["all", "some"] = "all",
    expression_credit: float = 0.0,
) -> list[float | None]:
    """1.0 where the expression uses each given number exactly once and equals the target, else 0.0.

    The expression stands in an <answer> block, a box, after "answer is" or alone; a trailing "= n"
    is allowed where n is its value. use "some": each number at most once. expression_credit: for a
    well-formed expression with the right numbers and another value. None where a row's numbers or
    target cannot be read.
    """
    if not 0.0 <= expression_credit < 1.0:
        raise RewardError(
            f"reward 'countdown': expression_credit = {expression_credit} is not allowed; "
            "it lies between 0 and 1, 1 excluded"
        )
    values: list[float | None] = []
    notes: list[str] = []
    answers: list[str | None] = []
    texts = full_texts(completions, prefills)
    for text, given, wanted in zip(texts, numbers, target, strict=True):
        pool, goal = _numbers(given), _numbers([wanted])
        if not pool or goal is None:
            values.append(None)
            notes.append(f"numbers {given!r} or target {wanted!r} cannot be read")
            answers.append(None)
            continue
        found = _expression(text)
        value, note = _judge(found, pool, goal[0], use, expression_credit)
        values.append(value)
        notes.append(note)
        answers.append(found.text)
    if log_extra is not None:
        log_extra("reason", notes)
        log_extra("answer", answers)
    return values


def _expression(text: str) -> Extracted:
    found = extract(text, ("answer", "boxed", "answer_is"))
    body = after_thinking(text)
    if found.text is None and not found.source and body is not None:
        line = body.strip()
        if line and "\n" not in line and len(line) <= MAX_EXPRESSION_CHARACTERS:
            return Extracted(line, "bare")
    return found


def _judge(
    found: Extracted, pool: list[Fraction], goal: Fraction, use: str, credit: float
) -> tuple[float, str]:
    if found.text is None:
        return 0.0, found.reason
    text = _TIMES_LETTER.sub("*", normalise(found.text))
    expression, _, claimed = text.partition("=")
    try:
        computed = compute(expression)
        if "=" in text and compute(claimed).value != computed.value:
            return 0.0, f"the expression is {computed.value}, not {claimed.strip()}"
    except ArithmeticFault as fault:
        return 0.0, str(fault)
    used, allowed = Counter(computed.literals), Counter(pool)
    if used - allowed or (use == "all" and used != allowed):
        shown = ", ".join(str(number) for number in computed.literals)
        return 0.0, f"it uses {shown}; given are {', '.join(map(str, pool))}"
    if computed.value != goal:
        return credit, f"the expression is {computed.value}, the target {goal}"
    return 1.0, f"the expression is {goal}"


def _numbers(given: Any) -> list[Fraction] | None:
    """Whole numbers or decimals as fractions, from a list or from text such as "3, 5, 7"."""
    if isinstance(given, str):
        given = re.findall(r"-?\d+(?:\.\d+)?", given)
    if not isinstance(given, list | tuple):
        return None
    numbers = []
    for item in given:
        if isinstance(item, bool) or not isinstance(item, int | float | str):
            return None
        try:
            numbers.append(Fraction(str(item).strip()))
        except (ValueError, ZeroDivisionError):
            return None
    return numbers
