r"""What has to be known of a formula before a parser sees it: names, sides, units, unfinished work.

Each guard stands for something that Math-Verify 0.9.0 takes for equal and that is not.
"""

from __future__ import annotations

import re

from sparring.rewards.math_normal import compact
from sparring.rewards.math_words import unit_of

Pair = tuple[str, str] | tuple[str, str, int]
"""A reference and an answer in LaTeX; with a number, the answer is a decimal rounded to that many
places.
"""

_NAME = re.compile(
    r"(?:[A-Za-z]{1,3}|\\(?!frac|sqrt|text|mathrm|begin|infty|pi(?![A-Za-z])|pm|left)[a-zA-Z]+"
    r"|[A-Za-z\u4e00-\u9fff][A-Za-z \u4e00-\u9fff]{0,30}"
    r"|\\(?:text|mathrm|operatorname)\s*\{[^{}]{1,40}\})"
    r"(?:'{1,3}|_\s*(?:\{[^{}]{1,12}\}|[A-Za-z0-9])|\^\{?-1\}?(?=\s*\())*"
    r"(?:\s*\(\s*[A-Za-z0-9, ]{1,12}\s*\))?"
)
_ANGLE = re.compile(
    r"(?:\\angle|\\triangle|m\s*\\angle|\\overline|\\vec)\s*\{?\s*[A-Z]{1,3}\s*\}?\s*=\s*"
)
_TUPLE_OF_NAMES = re.compile(
    r"\(\s*[A-Za-z](?:_\w)?(?:\s*,\s*[A-Za-z](?:_\w)?){1,5}\s*\)\s*=\s*(?=[(\[])"
)
_SIDES = re.compile(
    r"(?<![<>!:\\])=|\\approx(?![A-Za-z])|\\equiv(?![A-Za-z])|\\sim(?:eq)?(?![A-Za-z])"
)
_LETTER = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_DECIMAL = re.compile(r"(?<![\d.])\d*\.\d{1,40}(?![\d.])")
_DIGITS = re.compile(r"[\d.]+")
_ELLIPSIS = re.compile(r"\\ldots(?![A-Za-z])|\.\.\.")
_WORK = re.compile(
    r"\\(?:sum|int|iint|oint|prod|lim|max|min|sup|inf|gcd|lcm|det|bmod|pmod|mod)(?![A-Za-z])"
    r"|\\frac\s*\{\s*d\s*\}\s*\{\s*d[a-z]\s*\}|(?<![A-Za-z])(?:lcm|gcd|max|min)\s*\("
)
_SET_SIGNS = re.compile(
    r"\\(?:cup|cap|setminus|mathbb|in|neq|backslash|mid|emptyset|infty)(?![A-Za-z])|[<>|]|\\[lg]eq|\\\{|\bR\b"
)
_TRAILING_UNIT = re.compile(
    r"(?P<core>.*?)\s*(?P<unit>(?:\\(?:text|mathrm|textrm|mbox)\s*\{[^{}]{1,40}\}\s*(?:\^\s*\{?\s*[23]\s*\}?)?"
    r"|\^\\circ\s*[CF]?|\s[a-z]{2,12}(?:\s*\^\s*\{?[23]\}?)?|[\u4e00-\u9fff]{1,6}))",
    re.DOTALL,
)
_CONDITION = re.compile(
    r"\s*,?\s*\(?\s*(?:\\text\s*\{\s*(?:,\s*)?(?:where|for|with)?\s*\}|\bwhere\b|\bfor\b|其中)?\s*"
    r"(?P<name>[a-z])\s*(?:\\in(?![A-Za-z])\s*(?:\\mathbb\s*\{?\s*Z\s*\}?|\\mathbf\s*\{?\s*Z\s*\}?|Z|\\Z)"
    r"|(?:\\text\s*\{)?\s*is an(?:y)? integer\s*\}?|为整数|是整数)\s*\)?$"
)


def exact_pair(pair: Pair) -> Pair:
    """The pair with every decimal as a fraction, so that nothing is compared as a float."""
    reference, answer = (_DECIMAL.sub(_as_fraction, text) for text in pair[:2])
    return (reference, answer) if len(pair) == 2 else (reference, answer, pair[2])


def num_digits(text: str) -> int:
    """Digits of the longest number in the text."""
    return max((len(run.replace(".", "")) for run in _DIGITS.findall(text)), default=0)


def _as_fraction(match: re.Match[str]) -> str:
    whole, _, decimals = match.group().partition(".")
    return f"\\frac{{{int(whole + decimals)}}}{{{10 ** len(decimals)}}}"


def split_name(text: str) -> tuple[str, str]:
    """("x", "7") for "x = 7", ("(x,y)", ...) for a tuple of names, ("", text) without `name =
    value`.
    """
    whole = _TUPLE_OF_NAMES.match(text) or _ANGLE.match(text)
    if whole:
        return compact(whole.group()).rstrip("="), text[whole.end() :].strip()
    match = _NAME.match(text)
    if match:
        rest = text[match.end() :].lstrip()
        for sign in ("=", "\\approx"):
            if rest.startswith(sign) and not rest.startswith("=="):
                return compact(match.group()), rest.removeprefix(sign).strip()
    return "", text


def sides(text: str) -> list[tuple[str, bool]]:
    """The sides of a chain of equalities; True for one that stands after an approximation sign."""
    parts, start, is_approximate = [], 0, False
    for match in _SIDES.finditer(text):
        parts.append((text[start : match.start()].strip(), is_approximate))
        is_approximate = is_approximate or match.group() != "="
        start = match.end()
    parts.append((text[start:].strip(), is_approximate))
    return parts


def split_unit(text: str) -> tuple[str, str, bool]:
    """A formula, its trailing unit ("" for none) and whether a percent sign ends it."""
    if text.endswith("%"):
        return text[:-1].strip(), "", True
    if re.match(r"\\\$\s*[\d\\(]", text):
        return text[2:].strip(), "dollar", False
    match = _TRAILING_UNIT.fullmatch(text)
    if (
        match
        and match.group("core").strip()
        and not match.group("core").rstrip().endswith(("=", ","))
    ):
        unit = unit_of(match.group("unit"))
        if unit:
            return match.group("core").strip(), unit, False
    return text, "", False


def unfinished_work(answer: str, reference: str) -> str:
    r"""An operator of the answer that only restates the question ("\int"), "" if there is none.

    The reference may use it too; then it is no fault.
    """
    known = {compact(match.group()) for match in _WORK.finditer(reference)}
    for match in _WORK.finditer(answer):
        if compact(match.group()) not in known:
            return match.group()
    return ""


def differ_in_case(answer: str, reference: str) -> bool:
    """Whether a variable of the answer is one of the reference in the other case."""
    ours = {match.group() for match in _LETTER.finditer(answer) if len(match.group()) == 1}
    theirs = {match.group() for match in _LETTER.finditer(reference) if len(match.group()) == 1}
    return any(letter not in theirs and letter.swapcase() in theirs for letter in ours)


def has_ellipsis(text: str) -> bool:
    """Whether part of a list is left out; such lists are compared as text."""
    return bool(_ELLIPSIS.search(text))


def may_be_structure(text: str) -> bool:
    """Whether a formula may stand for a set: set signs, relations, infinity."""
    return bool(_SET_SIGNS.search(text))


def rename_parameter(answer: str, reference: str) -> tuple[str, str]:
    r"""Both without a condition such as ", k \in \mathbb{Z}", the integer named alike in both."""
    theirs, ours = _CONDITION.search(reference), _CONDITION.search(answer)
    if theirs:
        reference = reference[: theirs.start()].strip()
    if ours:
        answer = answer[: ours.start()].strip()
    if theirs and ours:
        old, new = (
            rf"(?<![A-Za-z\\]){found.group('name')}(?![A-Za-z])" for found in (ours, theirs)
        )
        if not re.search(new, answer):
            answer = re.sub(old, theirs.group("name"), answer)
    return answer, reference
