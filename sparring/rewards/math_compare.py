"""The order of verdicts on one answer: exact string, exact number, words, structures, formulas.

decide() settles what can be settled without a formula parser; for the rest it names the pairs that
a worker has to compare, all of which must be equal. Nothing here evaluates anything a model wrote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from sparring.rewards.arithmetic import ArithmeticFault, compute
from sparring.rewards.math_formula import (
    Pair,
    differ_in_case,
    exact_pair,
    has_ellipsis,
    may_be_structure,
    num_digits,
    rename_parameter,
    sides,
    split_name,
    split_unit,
    unfinished_work,
)
from sparring.rewards.math_normal import compact, normalise
from sparring.rewards.math_numbers import Number, parse_number
from sparring.rewards.math_structures import Structure, parse_structure
from sparring.rewards.math_text import choice_letter, is_text, plain_words, same_text

MAX_LITERAL_DIGITS = 24
"""A decimal or fraction with more digits than this could agree with an irrational number by search.
"""


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
    """verdict True or False with stage and reason; None: `pairs` decide, and all must be equal."""

    verdict: bool | None
    stage: str
    reason: str
    pairs: tuple[Pair, ...] = field(default=())


STAGES = ("string", "number", "text", "structure", "formula")
"""The order in which ways to compare are tried; the first that can decide does."""


def decide(answer: str, reference: str, policy: Policy) -> Decision:
    """Judge an extracted answer against an extracted reference."""
    answer, reference = normalise(answer), normalise(reference)
    if compact(answer) == compact(reference):
        return Decision(verdict=True, stage="string", reason="the same text")
    gold_name, gold_text = split_name(reference)
    gold = parse_number(gold_text)
    if gold is None and "=" in gold_text:
        gold = literal_of(gold_text)[1]
    if gold is not None:
        return _against_number(answer, gold, gold_name, policy)
    choice = choice_letter(reference)
    if choice is not None:
        return _against_choice(answer, *choice)
    if is_text(reference):
        equal = same_text(answer, reference)
        shown = f"'{plain_words(answer)[:60]}' and '{plain_words(reference)[:60]}'"
        return _text(equal, f"{'the same' if equal else 'different'} words: {shown}")
    return _compare(answer, reference, policy)


def literal_of(text: str) -> tuple[str, Number | None, str]:
    """Name, number and fault of a numeric answer: a literal, `name = literal`, or a chain that
    holds.
    """
    name, rest = split_name(text)
    while name and (inner := split_name(rest))[0]:
        rest = inner[1]
    parts = [side for side, _ in sides(rest)]
    number = parse_number(parts[-1])
    if number is None:
        return name, None, "the reference is a number, the answer is no literal number"
    for side in parts[:-1]:
        try:
            agrees = compute(side).value == number.value
        except ArithmeticFault:
            agrees = False
        if not agrees:
            return name, None, f"the sides of the chain do not agree: {text[:80]}"
    return name, number, ""


def compare_numbers(number: Number, gold: Number, policy: Policy) -> Decision:
    """Exact comparison of two literals under the policy."""
    if number.base != gold.base:
        return _number(False, "the number bases differ")
    if policy.fractions == "reduced" and not number.is_reduced and gold.is_reduced:
        return _number(False, "the fraction is not reduced")
    if number.is_mixed and not policy.mixed_numbers and not gold.is_mixed:
        return _number(False, "a mixed number, which the policy refuses")
    clash = _unit_clash(number.unit, gold.unit, policy)
    if clash:
        return _number(False, clash)
    if policy.percent == "match" and number.is_percent != gold.is_percent:
        return _number(False, "a percent sign on one side only")
    ours, theirs = number.value, gold.value
    if policy.percent == "value":
        ours = ours / 100 if number.is_percent else ours
        theirs = theirs / 100 if gold.is_percent else theirs
    if ours == theirs:
        return _number(True, f"equal numbers: {_show(theirs)}")
    within = Fraction(1, 2) / Fraction(10) ** (gold.places or 0)
    is_rounded = (
        policy.decimals == "rounded" and gold.places and number.is_percent == gold.is_percent
    )
    if is_rounded and abs(number.value - gold.value) <= within:
        return _number(True, f"equal within half a unit of place {gold.places}")
    return _number(False, f"{_show(ours)} is not {_show(theirs)}")


def _against_number(answer: str, gold: Number, gold_name: str, policy: Policy) -> Decision:
    name, number, fault = literal_of(answer.removeprefix("\\approx").strip())
    if number is None:
        return _number(False, fault)
    if gold_name and name and gold_name != name:
        return _number(False, f"a value of {name}, asked is one of {gold_name}")
    return compare_numbers(number, gold, policy)


def _against_choice(answer: str, letter: str, label: str) -> Decision:
    given = choice_letter(answer if len(answer) > 1 else answer.upper())
    if given is not None:
        return _text(given[0] == letter, f"choice {given[0]}, asked is {letter}")
    if label and same_text(answer, label):
        return _text(True, f"the text of choice {letter}")
    return _text(False, f"no choice letter, asked is {letter}")


def _compare(answer: str, reference: str, policy: Policy) -> Decision:
    """Judge normalised text against a reference that is neither words nor a plain number."""
    answer, reference = rename_parameter(answer, reference)
    if compact(answer) == compact(reference):
        return Decision(verdict=True, stage="string", reason="the same text")
    if is_text(answer):
        return _text(False, "words, asked is a formula")
    if has_ellipsis(reference) or has_ellipsis(answer):
        return _structure(False, "an ellipsis is compared as text, and the texts differ")
    gold_name, gold_value = split_name(reference)
    gold_shape = parse_structure(reference)
    if gold_shape is None and gold_name:
        gold_shape = parse_structure(gold_value)
    if gold_shape is not None:
        return _against_structure(answer, reference, gold_name, gold_shape, policy)
    if parse_structure(answer) is not None and "=" not in reference:
        return _structure(False, "several values, asked is one")
    return _formula(answer, reference, policy)


def _against_structure(
    answer: str, reference: str, gold_name: str, gold: Structure, policy: Policy
) -> Decision:
    shape = parse_structure(answer)
    if gold.kind in ("list", "set"):
        reference = _as_set(list(gold.parts))  # one spelling for the worker
    if shape is None:
        name, value = split_name(answer)
        if name and not (gold_name and gold_name != name):
            shape = parse_structure(value)
    if shape is None and gold.kind in ("list", "set") and len(gold.parts) == 1:
        return _part(answer, gold.parts[0], policy)
    if shape is None:
        if may_be_structure(answer):
            return _pairs(((reference, answer),))
        return _structure(False, f"a single value, asked is a {gold.kind}")
    kinds = {shape.kind, gold.kind}
    if kinds <= {"list", "set"} or (kinds == {"set"}):
        return _unordered(answer, reference, shape, gold, policy)
    if kinds == {"interval", "tuple"} and shape.brackets == gold.brackets:
        return _in_order(shape, gold, policy)
    if gold.kind == "tuple" and shape.kind == "assignments":
        return _in_order(shape, gold, policy)
    if shape.kind != gold.kind:
        if "union" in kinds or kinds == {"interval", "set"}:
            return _pairs(((reference, answer),))
        return _structure(False, f"a {shape.kind}, asked is a {gold.kind}")
    if gold.kind == "union":
        return _unordered(answer, reference, shape, gold, policy)
    if shape.brackets != gold.brackets:
        return _structure(False, f"brackets {shape.brackets}, asked are {gold.brackets}")
    if shape.num_columns != gold.num_columns or shape.names != gold.names:
        return _structure(False, f"another {gold.kind} than the one asked")
    return _in_order(shape, gold, policy)


def _in_order(shape: Structure, gold: Structure, policy: Policy) -> Decision:
    if len(shape.parts) != len(gold.parts):
        return _structure(False, f"{len(shape.parts)} parts, asked are {len(gold.parts)}")
    pairs: list[Pair] = []
    for part, wanted in zip(shape.parts, gold.parts, strict=True):
        decision = _part(part, wanted, policy)
        if decision.verdict is False:
            return _structure(False, f"part '{part[:40]}' for '{wanted[:40]}': {decision.reason}")
        pairs += decision.pairs
    return _pairs(tuple(pairs)) if pairs else _structure(True, "all parts are equal")


def _unordered(
    answer: str, reference: str, shape: Structure, gold: Structure, policy: Policy
) -> Decision:
    """Match the parts one to one; what only formulas can match goes to the worker."""
    is_set = "set" in (shape.kind, gold.kind)
    given, wanted = _distinct(shape.parts, is_set), _distinct(gold.parts, is_set)
    is_union = gold.kind == "union"
    if len(given) != len(wanted) and not is_union:
        return _structure(False, f"{len(given)} parts, asked are {len(wanted)}")
    left = list(wanted)
    open_parts: list[str] = []
    undecided = False
    for part in given:
        decisions = [_part(part, other, policy) for other in left]
        hit = next((i for i, decision in enumerate(decisions) if decision.verdict), None)
        if hit is not None:
            del left[hit]
            continue
        if not any(decision.verdict is None for decision in decisions) and not is_union:
            return _structure(False, f"'{part[:60]}' is none of the parts asked")
        undecided = True
        open_parts.append(part)
    if not undecided and not left:
        return _structure(True, "all parts are equal")
    if len(open_parts) == 1 and len(left) == 1 and not is_union:
        return _part(open_parts[0], left[0], policy)
    if is_union:
        return _pairs(((reference, answer),))
    return _pairs(((_as_set(left), _as_set(open_parts)),))


def _part(answer: str, reference: str, policy: Policy) -> Decision:
    """One part of a structure: the same order of verdicts again."""
    return decide(answer, reference, policy)


def _distinct(parts: tuple[str, ...], is_set: bool) -> list[str]:
    return list({compact(part): part for part in parts}.values()) if is_set else list(parts)


def _as_set(parts: list[str]) -> str:
    return "\\{" + ", ".join(parts) + "\\}"


def _formula(answer: str, reference: str, policy: Policy) -> Decision:
    answer, unit, is_percent = split_unit(answer)
    reference, gold_unit, gold_percent = split_unit(reference)
    clash = _unit_clash(unit, gold_unit, policy)
    if clash:
        return _false(clash)
    if is_percent != gold_percent and policy.percent != "ignore":
        if policy.percent == "match":
            return _false("a percent sign on one side only")
        answer = f"\\frac{{{answer}}}{{100}}" if is_percent else answer
        reference = f"\\frac{{{reference}}}{{100}}" if gold_percent else reference
    if compact(answer) == compact(reference):
        return Decision(verdict=True, stage="string", reason="the same text but for the unit")
    work = unfinished_work(answer, reference)
    if work:
        return _false(f"work that was not done: {work}")
    if differ_in_case(answer, reference):
        return _false("a variable in another case")
    return _equations(answer, reference)


def _equations(answer: str, reference: str) -> Decision:
    name, value = split_name(answer)
    gold_name, gold_value = split_name(reference)
    if "=" in reference and not gold_name:
        return _pairs(((reference, answer),))
    if gold_name and name and name != gold_name:
        return _pairs(((reference, answer),))
    if gold_name and not name and "=" in answer:
        return _pairs(((reference, answer),))
    gold = gold_value if gold_name else reference
    pairs: list[Pair] = []
    for side, is_approximate in sides(value if name else answer):
        number = parse_number(side)
        if number is not None and is_approximate and number.places is not None:
            pairs.append((gold, side, number.places))
        elif num_digits(side) > max(MAX_LITERAL_DIGITS, num_digits(gold)) and not _is_whole(number):
            return _false("an approximation with many digits")
        elif compact(side) != compact(gold):
            pairs.append((gold, side))
    if not pairs:
        return Decision(verdict=True, stage="string", reason="the same text after the name")
    return _pairs(tuple(pairs))


def _is_whole(number: Number | None) -> bool:
    return number is not None and number.value.denominator == 1


def _unit_clash(unit: str, gold_unit: str, policy: Policy) -> str:
    if policy.units == "ignore" or unit == gold_unit:
        return ""
    if policy.units == "one_side" and not (unit and gold_unit):
        return ""
    return f"unit '{unit or 'none'}', asked is '{gold_unit or 'none'}'"


def _pairs(pairs: tuple[Pair, ...]) -> Decision:
    return Decision(verdict=None, stage="formula", reason="", pairs=tuple(map(exact_pair, pairs)))


def _number(verdict: bool, reason: str) -> Decision:
    return Decision(verdict=verdict, stage="number", reason=reason)


def _text(verdict: bool, reason: str) -> Decision:
    return Decision(verdict=verdict, stage="text", reason=reason)


def _structure(verdict: bool, reason: str) -> Decision:
    return Decision(verdict=verdict, stage="structure", reason=reason)


def _false(reason: str) -> Decision:
    return Decision(verdict=False, stage="formula", reason=reason)


def _show(value: Fraction) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
