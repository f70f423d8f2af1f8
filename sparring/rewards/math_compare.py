"""The order of verdicts on one answer: exact string, exact number, structures, then formulas.

decide() settles what can be settled without a formula parser; for the rest it names the pairs that a
worker has to compare. Nothing here evaluates anything a model wrote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from sparring.rewards.arithmetic import ArithmeticFault, compute
from sparring.rewards.math_normal import compact, normalise
from sparring.rewards.math_numbers import Number, parse_number

_NAME = re.compile(
    r"(?:[A-Za-z]{1,3}|\\[a-zA-Z]+|[A-Za-z\u4e00-\u9fff][A-Za-z \u4e00-\u9fff]{0,30}"
    r"|\\(?:text|mathrm)\s*\{[^{}]*\})"
    r"(?:'{1,3}|_\s*(?:\{[^{}]{1,12}\}|[A-Za-z0-9]))*(?:\s*\(\s*[A-Za-z0-9, ]{1,12}\s*\))?"
)
_RELATION = re.compile(r"(?<![<>!\\])=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How answers are compared where sources disagree; see MathReward for the meanings."""

    percent: Literal["value", "match", "ignore"] = "value"
    units: Literal["one_side", "match", "ignore"] = "one_side"
    fractions: Literal["any", "reduced"] = "any"
    decimals: Literal["exact", "rounded"] = "exact"
    mixed_numbers: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """verdict True, False or None with stage and reason; or pairs that are all to be compared first."""

    verdict: bool | None
    stage: str
    reason: str
    pairs: tuple[tuple[str, str], ...] = field(default=())


def decide(answer: str, reference: str, policy: Policy) -> Decision:
    """Judge an extracted answer against an extracted reference."""
    answer, reference = normalise(answer), normalise(reference)
    if compact(answer) == compact(reference):
        return Decision(verdict=True, stage="string", reason="the same text")
    gold_name, gold_text = split_name(reference)
    gold = parse_number(gold_text)
    if gold is not None:
        return _against_number(answer, gold, gold_name, policy)
    return Decision(verdict=None, stage="formula", reason="", pairs=((reference, answer),))


def split_name(text: str) -> tuple[str, str]:
    """("x", "7") for "x = 7", ("", text) where there is no name = value."""
    match = _NAME.match(text)
    if match:
        rest = text[match.end() :].lstrip()
        if rest.startswith("=") or rest.startswith("\\approx"):
            return compact(match.group()), rest.removeprefix("=").removeprefix("\\approx").strip()
    return "", text


def literal_of(text: str) -> tuple[str, Number | None, str]:
    """Name, number and fault of a numeric answer: a literal, `name = literal`, or a chain that holds."""
    name, rest = split_name(text)
    while name and (inner := split_name(rest))[0]:
        rest = inner[1]
    sides = [side.strip() for side in _RELATION.split(rest)]
    number = parse_number(sides[-1])
    if number is None:
        return name, None, "the answer is no literal number"
    for side in sides[:-1]:
        try:
            agrees = compute(side).value == number.value
        except ArithmeticFault:
            agrees = False
        if not agrees:
            return name, None, f"the sides of the chain do not agree: {text}"
    return name, number, ""


def _against_number(answer: str, gold: Number, gold_name: str, policy: Policy) -> Decision:
    name, number, fault = literal_of(answer.removeprefix("\\approx").strip())
    if number is None:
        return Decision(verdict=False, stage="number", reason=fault)
    if gold_name and name and gold_name != name:
        return _number(False, f"the value of {name}, asked was {gold_name}")
    return compare_numbers(number, gold, policy)


def compare_numbers(number: Number, gold: Number, policy: Policy) -> Decision:
    """Exact comparison of two literals under the policy."""
    if number.base != gold.base:
        return _number(False, "the number bases differ")
    if policy.fractions == "reduced" and not number.is_reduced and gold.is_reduced:
        return _number(False, "the fraction is not reduced")
    if number.is_mixed and not policy.mixed_numbers and not gold.is_mixed:
        return _number(False, "a mixed number, which the policy refuses")
    if policy.units == "match" and number.unit != gold.unit:
        return _number(False, f"unit '{number.unit}' where '{gold.unit}' is asked")
    if policy.units == "one_side" and number.unit and gold.unit and number.unit != gold.unit:
        return _number(False, f"unit '{number.unit}' where '{gold.unit}' is asked")
    if policy.percent == "match" and number.is_percent != gold.is_percent:
        return _number(False, "a percent sign on one side only")
    ours, theirs = number.value, gold.value
    if policy.percent == "value":
        ours = ours / 100 if number.is_percent else ours
        theirs = theirs / 100 if gold.is_percent else theirs
    if ours == theirs:
        return _number(True, "equal numbers")
    if policy.decimals == "rounded" and gold.places and number.is_percent == gold.is_percent:
        if abs(number.value - gold.value) <= Fraction(1, 2) / Fraction(10) ** gold.places:
            return _number(True, f"equal within half a unit of place {gold.places}")
    return _number(False, f"{_show(ours)} is not {_show(theirs)}")


def _number(verdict: bool, reason: str) -> Decision:
    return Decision(verdict=verdict, stage="number", reason=reason)


def _show(value: Fraction) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
