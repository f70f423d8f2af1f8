"""Words that belong to numbers: units, scales, numerals in Chinese and in English words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from sparring.rewards.math_normal import unwrap_text

MAX_UNIT_WORDS = 4
MAX_CJK_CHARACTERS = 6
MAX_NUMBER_WORDS = 10

_ALIASES = {
    "cm": "centimeter centimetre cms 厘米 公分",
    "mm": "millimeter millimetre 毫米",
    "km": "kilometer kilometre kms 千米 公里",
    "m": "meter metre 米",
    "in": "inch inches 英寸",
    "ft": "foot feet 英尺",
    "yd": "yard",
    "mi": "mile 英里",
    "kg": "kilogram kgs kilo 千克 公斤",
    "g": "gram 克",
    "mg": "milligram 毫克",
    "lb": "pound lbs",
    "oz": "ounce",
    "l": "liter litre 升",
    "ml": "milliliter millilitre 毫升",
    "s": "second sec secs 秒",
    "min": "minute mins 分钟",
    "h": "hour hr hrs 小时",
    "day": "天 日",
    "week": "周 星期",
    "year": "yr yrs 年 岁",
    "month": "个月",
    "dollar": "usd 美元 buck",
    "cent": "¢ 美分",
    "yuan": "元 块 人民币 rmb cny",
    "euro": "eur 欧元",
    "degree": "deg ^\\circ °  度",
    "person": "people 人 个人 名",
    "mph": "miles/hour mile/h mi/h",
    "rad": "radian 弧度",
    "unit": "单位",
    "pt": "point 分",
    "child": "children",
}
_CANONICAL = {
    alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases.split())
}
_LETTERS = frozenset(["m", "g", "s", "h", "l", "L", "N", "J", "W", "V", "K", "C", "F"])
_NOT_UNITS = frozenset(
    [
        "or",
        "and",
        "not",
        "is",
        "are",
        "to",
        "plus",
        "minus",
        "times",
        "of",
        "than",
        "if",
        "but",
        "by",
        "over",
        "divided",
        "equals",
        "equal",
        "no",
        "none",
        "wrong",
        "about",
        "approximately",
        "mod",
        "sin",
        "cos",
        "tan",
        "log",
        "ln",
        "exp",
        "sqrt",
        "pi",
        "e",
        "i",
        "max",
        "min",
        "gcd",
        "lcm",
        "lim",
        "sum",
        "choose",
        "或",
        "和",
        "不",
        "减",
        "加",
        "乘",
        "除",
    ]
)
_SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
    "trillion": 10**12, "百": 100, "千": 10**3, "万": 10**4,
    "百万": 10**6, "千万": 10**7, "亿": 10**8,
}  # fmt: skip
_SCALE = re.compile(
    r"(百万|千万|[百千万亿](?![克米瓦])|(?:dozen|hundred|thousand|million|billion|trillion)s?\b)",
    re.I,
)
_WORD = re.compile(r"[^\W\d_]+(?:\.(?=\s|$))?")
_CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_NO_CJK_UNIT = re.compile(r"[是不或和与减加乘除之非无没错对约零〇一二两三四五六七八九十百千万亿]")
_POWER = re.compile(r"\s*\^\s*\{?\s*([23])\s*\}?$")
_WRAPPED = re.compile(r"\\(?:text|mathrm|textrm|mbox|textnormal|rm|hbox|operatorname)\s*\{")
_ENGLISH = {
    word: value
    for value, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
        ]
    )
} | {
    word: 10 * value
    for value, word in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2
    )
}
_CHINESE_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {
    "〇": 0,
    "两": 2,
}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000}


def unit_of(text: str) -> str | None:
    r"""The canonical unit that `text` is ("cm^2", "\text{ square feet}", "apples"), None if it is
    none.

    Up to four words count as a unit, known or not; a bare single letter only if it is a usual unit,
    since it would otherwise be a variable.
    """
    text = text.strip()
    is_wrapped = bool(_WRAPPED.match(text))
    plain = _plain(text)
    if not plain:
        return ""
    power = _POWER.search(plain)
    exponent = power.group(1) if power else ""
    plain = plain[: power.start()].strip() if power else plain
    compound = re.split(r"\s*/\s*|\s+per\s+|每", plain)
    if len(compound) > 2:
        return None
    names = [_simple_unit(part, is_wrapped) for part in compound]
    if any(name is None or not name for name in names):
        return None
    name = "/".join(str(name) for name in names)
    name = _CANONICAL.get(name, name)
    if exponent and "^" in name:
        return None
    return f"{name}^{exponent}" if exponent else name


def scale_of(text: str) -> tuple[int, str]:
    """A scale word in front ("million", "万") as its factor, with what follows it; (1, text) for
    none.
    """
    match = _SCALE.match(text.strip())
    if not match:
        return 1, text
    word = match.group(1).lower()
    factor = _SCALES.get(word) or _SCALES[word.rstrip("s")]
    return factor, text.strip()[match.end() :]


def english_number(text: str) -> Fraction | None:
    """A number below a billion in English words ("two thousand and five"), None for other text."""
    words = [word for word in re.split(r"[\s-]+", text.strip().lower()) if word != "and"]
    if not 0 < len(words) <= MAX_NUMBER_WORDS:
        return None
    total = 0
    for name in ("million", "thousand"):
        if name in words:
            place = words.index(name)
            count = _below_thousand(words[:place])
            if not count:
                return None
            total += count * _SCALES[name]
            words = words[place + 1 :]
            if not words:
                return Fraction(total)
    rest = _below_thousand(words)
    return None if rest is None else Fraction(total + rest)


def _below_thousand(words: Sequence[str]) -> int | None:
    """0 to 999 from words without "and", None for anything else."""
    total = 0
    if len(words) > 1 and words[1] == "hundred" and 0 < _ENGLISH.get(words[0], 0) < 10:
        total, words = 100 * _ENGLISH[words[0]], words[2:]
        if not words:
            return total
    values = [_ENGLISH.get(word) for word in words]
    if len(values) == 1 and values[0] is not None:
        return total + values[0]
    if len(values) == 2 and values[0] is not None and values[1] is not None:
        tens, ones = values[0], values[1]
        return total + tens + ones if tens >= 20 and 0 < ones < 10 else None
    return None


def chinese_number(text: str) -> Fraction | None:
    """A whole number in Chinese numerals (一百二十三, 三万), None for other text."""
    text = text.strip()
    if not text or len(text) > 20:
        return None
    total = section = 0
    digit: int | None = None
    for character in text:
        if character in _CHINESE_DIGITS:
            if digit not in (None, 0):
                return None
            digit = _CHINESE_DIGITS[character]
        elif character in _CHINESE_SCALES:
            section += (1 if digit is None else digit) * _CHINESE_SCALES[character]
            digit = None
        elif character in "万亿":
            section += digit or 0
            if section == 0:
                return None
            total = (total + section) * (10**4 if character == "万" else 10**8)
            section, digit = 0, None
        else:
            return None
    return Fraction(total + section + (digit or 0))


def _plain(text: str) -> str:
    plain = unwrap_text(text).replace("\\,", " ").replace("^\\circ", " ^\\circ ")
    return " ".join(plain.split()).strip(" .")


def _simple_unit(text: str, is_wrapped: bool) -> str | None:
    power = _POWER.search(text)
    exponent = f"^{power.group(1)}" if power else ""
    text = text[: power.start()].strip() if power else text.strip()
    if text in ("^\\circ C", "^\\circ F"):
        return "degree" + text[-1]
    if text in _CANONICAL:
        return _CANONICAL[text] + exponent
    if _CJK.search(text) and (len(text) > MAX_CJK_CHARACTERS or _NO_CJK_UNIT.search(text)):
        return None
    words = text.split()
    if not 0 < len(words) <= MAX_UNIT_WORDS or not all(_WORD.fullmatch(word) for word in words):
        return None
    if any(word.lower() in _NOT_UNITS or word.lower() in _ENGLISH for word in words):
        return None
    if len(words) == 1 and len(text) == 1 and text.isascii() and not is_wrapped:
        return _CANONICAL.get(text, text) + exponent if text in _LETTERS else None
    lowered = [_singular(word.lower().rstrip(".")) for word in words]
    if lowered[0] in ("square", "sq", "平方") and len(lowered) > 1:
        return " ".join(lowered[1:]) + "^2"
    if lowered[0] in ("cubic", "cu") and len(lowered) > 1:
        return " ".join(lowered[1:]) + "^3"
    for prefix, power_of in (("平方", "^2"), ("立方", "^3")):
        if text.startswith(prefix) and len(text) > len(prefix):
            return _singular(text[len(prefix) :]) + power_of
    return " ".join(lowered) + exponent


def _singular(word: str) -> str:
    if word in _CANONICAL:
        return _CANONICAL[word]
    for ending, put in (("ies", "y"), ("ches", "ch"), ("xes", "x"), ("sses", "ss"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not word.endswith("ss"):
            singular = word[: len(word) - len(ending)] + put
            return _CANONICAL.get(singular, singular)
    return word
