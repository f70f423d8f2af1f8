"""Literals: the numbers that can be read off a text without working anything out.

Integers, decimals, repeating decimals, fractions, mixed numbers, powers of ten, numerals in Chinese
and small ones in English words, with a percent sign, a unit or a currency. Values are exact
fractions. "2+3" or "2^{10}" is work that was not done, and no literal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from sparring.rewards.math_normal import is_wrapped_text, unwrap_text
from sparring.rewards.math_words import chinese_number, english_number, scale_of, unit_of

MAX_EXPONENT = 400

_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)"
_PLAIN = rf"(?:{_INTEGER}(?:\.\d+)?(?!\d)|\.\d+)"
_SIGNED = r"\s*[-+]?\s*\d+(?:\.\d+)?\s*"
_MANTISSA = re.compile(
    rf"(?P<repeat>\d*\.\d*\\overline\s*\{{\d+\}})"
    rf"|(?P<mixed>\d+)\s*\\frac\s*\{{\s*(?P<mixed_above>\d+)\s*\}}\s*\{{\s*(?P<mixed_below>\d+)\s*\}}"
    rf"|(?P<mixed2>\d+)\s+(?P<mixed2_above>\d+)\s*/\s*(?P<mixed2_below>\d+)(?![\d.])"
    rf"|\\frac\s*\{{(?P<above>{_SIGNED})\}}\s*\{{(?P<below>{_SIGNED})\}}"
    rf"|(?P<slash_above>{_PLAIN})\s*/\s*(?P<slash_below>{_SIGNED.strip()})(?![\d.,]*\d)"
    rf"|(?P<plain>{_PLAIN})"
)
_POWER_OF_TEN = re.compile(
    r"\s*(?:(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<braced>[-+]?\d{1,4})\s*\}|(?P<bare>-?\d{1,4}))"
    r"|[eE](?P<e>[-+]?\d{1,4})(?![A-Za-z\d]))"
)
_ONLY_POWER = re.compile(r"10\s*\^\s*(?:\{\s*(?P<braced>[-+]?\d{1,4})\s*\}|(?P<bare>\d))(?![\d^])")
_SIGN = re.compile(r"\s*([-+])\s*")
_CURRENCY = re.compile(
    r"\s*(\\\$|\$|€|£|¥|￥|₹|₩|US\\?\$|USD(?=\s*\d)|RMB(?=\s*\d)|\\pounds?|\\euro)\s*", re.I
)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:percent|per cent|percentage|pct)\b|个?百分点)", re.I)
_BASE = re.compile(
    r"(?P<digits>[0-9A-Za-z]+)\s*_\s*(?:\{\s*(?P<braced>\d{1,2})\s*\}|(?P<bare>\d))$"
)
_CHINESE_FRACTION = re.compile(r"(.{1,10})分之(.{1,10})")
_CHINESE_PERCENT = re.compile(r"百分之(.+)")
_CURRENCIES = {
    "\\$": "dollar", "$": "dollar", "us$": "dollar", "us\\$": "dollar", "usd": "dollar",
    "€": "euro", "\\euro": "euro", "£": "pound", "\\pounds": "pound", "\\pound": "pound",
    "¥": "yuan", "￥": "yuan", "rmb": "yuan", "₹": "rupee", "₩": "won",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A literal. value: as written, percent sign and unit apart (scale words are multiplied in).

    places: decimal places as written, None for fractions. is_reduced: False for a fraction that can
    be cancelled. unit: canonical name, "" for none. base: of a numeral like 1011_2 (digits then
    kept in `digits`), 0 for ordinary numbers.
    """

    value: Fraction
    places: int | None = None
    is_reduced: bool = True
    is_mixed: bool = False
    is_percent: bool = False
    unit: str = ""
    base: int = 0
    digits: str = ""


def parse_number(text: str) -> Number | None:
    """The literal that the whole of a normalised text is, or None."""
    text = unwrap_text(text) if is_wrapped_text(text.strip()) else text.strip()
    based = _BASE.fullmatch(text)
    if based:
        base = int(based.group("braced") or based.group("bare"))
        digits = based.group("digits").lstrip("0").upper() or "0"
        return _in_base(digits, base)
    sign, rest = _leading_sign(text)
    currency = _CURRENCY.match(rest)
    unit = ""
    if currency:
        unit = _CURRENCIES[currency.group(1).lower()]
        inner_sign, rest = _leading_sign(rest[currency.end() :])
        sign *= inner_sign
    number, rest = _mantissa(rest)
    if number is None:
        number, rest = _worded(rest)
    if number is None:
        return None
    number = replace(number, value=sign * number.value)
    return _with_suffix(number, rest, unit)


def _in_base(digits: str, base: int) -> Number | None:
    try:
        value = int(digits, base) if 2 <= base <= 36 else None
    except ValueError:
        return None
    return None if value is None else Number(value=Fraction(value), base=base, digits=digits)


def _leading_sign(text: str) -> tuple[int, str]:
    match = _SIGN.match(text)
    if not match:
        return 1, text.strip()
    return (-1 if match.group(1) == "-" else 1), text[match.end() :]


def _mantissa(text: str) -> tuple[Number | None, str]:
    only_power = _ONLY_POWER.match(text)
    if only_power:
        exponent = int(only_power.group("braced") or only_power.group("bare"))
        if abs(exponent) <= MAX_EXPONENT:
            return Number(value=Fraction(10) ** exponent), text[only_power.end() :]
    match = _MANTISSA.match(text)
    if match is None:
        return None, text
    number = _read(match.groupdict())
    rest = text[match.end() :]
    power = _POWER_OF_TEN.match(rest)
    if number is not None and power:
        exponent = int(power.group("braced") or power.group("bare") or power.group("e"))
        if abs(exponent) > MAX_EXPONENT:
            return None, text
        scaled = number.value * Fraction(10) ** exponent
        places = None if number.places is None else max(0, number.places - exponent)
        return replace(number, value=scaled, places=places), rest[power.end() :]
    return number, rest


def _read(parts: dict[str, str | None]) -> Number | None:
    if parts["repeat"]:
        return _repeating(parts["repeat"])
    for key in ("mixed", "mixed2"):
        whole, above, below = parts[key], parts[f"{key}_above"], parts[f"{key}_below"]
        if whole is not None and above is not None and below is not None:
            if int(below) == 0 or int(above) >= int(below):
                return None
            fraction = Fraction(int(above), int(below))
            is_reduced = fraction.denominator == int(below)
            return Number(value=int(whole) + fraction, is_reduced=is_reduced, is_mixed=True)
    above, below = parts["above"] or parts["slash_above"], parts["below"] or parts["slash_below"]
    if above is not None and below is not None:
        top, bottom = _plain(above), _plain(below)
        if bottom == 0:
            return None
        value = top / bottom
        is_reduced = value.denominator == abs(bottom) and bottom != 1
        return Number(value=value, is_reduced=is_reduced)
    plain = (parts["plain"] or "").replace(",", "").replace(" ", "")
    return Number(value=Fraction(plain), places=len(plain.partition(".")[2]))


def _plain(text: str) -> Fraction:
    return Fraction("".join(text.replace(",", "").split()))


def _repeating(text: str) -> Number:
    whole, _, decimals = text.partition(".")
    fixed, _, cycle = decimals.partition("\\overline")
    cycle = cycle.strip(" {}")
    shift = Fraction(10) ** len(fixed)
    head = Fraction(int((whole or "0") + fixed), 1) / shift
    return Number(value=head + Fraction(int(cycle), (10 ** len(cycle) - 1)) / shift)


def _worded(text: str) -> tuple[Number | None, str]:
    plain = unwrap_text(text)
    percent = _CHINESE_PERCENT.fullmatch(plain)
    value = chinese_number(percent.group(1)) if percent else None
    if value is not None:
        return Number(value=value, is_percent=True), ""
    part = _CHINESE_FRACTION.fullmatch(plain)
    if part:
        below, above = chinese_number(part.group(1)), chinese_number(part.group(2))
        return (Number(value=above / below) if above is not None and below else None), ""
    for reader in (chinese_number, english_number):
        value = reader(plain)
        if value is not None:
            return Number(value=value), ""
    head = re.match(r"[零〇一二两三四五六七八九十百千万亿]+", plain)
    if head:
        value = chinese_number(head.group())
        if value is not None and unit_of(plain[head.end() :]):
            return Number(value=value), plain[head.end() :]
    words = re.match(r"([A-Za-z]+(?:-[A-Za-z]+)?)\s+(.+)", plain)
    if words and (value := english_number(words.group(1))) is not None:
        return Number(value=value), words.group(2)
    return None, text


def _with_suffix(number: Number, rest: str, unit: str) -> Number | None:
    rest = rest.strip()
    percent = _PERCENT.match(unwrap_text(rest)) if rest else None
    if percent:
        number = replace(number, is_percent=True)
        rest = unwrap_text(rest)[percent.end() :].strip()
        if rest:
            return None
    elif rest:
        scale, after = scale_of(unwrap_text(rest))
        if scale != 1:
            number = replace(number, value=number.value * scale, places=None)
            rest = after.strip()
    if rest:
        suffix = unit_of(rest)
        if suffix is None or (unit and suffix not in ("", unit)):
            return None
        unit = unit or suffix
    return replace(number, unit=unit)
