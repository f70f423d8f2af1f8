"""Answers in words: choice letters, names, yes and no, and prose in any script."""

from __future__ import annotations

import re
import unicodedata

from sparring.rewards.math_normal import unwrap_text

_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|选项?)\s*:?\s*(?:is\s+)?)?"
    r"(?:\(\s*(?P<bracketed>[A-Ja-j])\s*\)|(?P<bare>[A-Ja-j])(?=\s*[.):]|$))"
    r"\s*[.):]?\s*(?P<rest>.*)",
    re.DOTALL | re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_CLOCK = re.compile(r"\d{1,2}:\d\d\s*[ap]\.?\s?m", re.IGNORECASE)
_FORMULA_SIGNS = re.compile(r"[\\^_=<>+*{}|]|\d\s*/|/\s*\d")
_NO_WORDS = frozenset(
    [
        "and",
        "or",
        "和",
        "或",
        "与",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "sqrt",
        "pi",
        "arcsin",
        "arccos",
        "arctan",
        "max",
        "min",
        "gcd",
        "lcm",
        "inf",
        "mod",
    ]
)
_SHORT_WORDS = frozenset(
    ["yes", "no", "odd", "even", "true", "none", "one", "two", "six", "ten", "red", "all", "both"]
)
_ARTICLES = ("the ", "a ", "an ")


def choice_letter(text: str) -> tuple[str, str] | None:
    """The letter of a multiple-choice answer, upper case, and the text beside it; None if it is
    none.

    "C", "(c)", "C. 12 metres", "Option C", "选C". A lower-case letter alone is a variable, not a
    choice.
    """
    plain = unwrap_text(text).strip().strip('"').strip()
    match = _LETTER.fullmatch(plain)
    if match is None:
        return None
    letter = str(match.group("bracketed") or match.group("bare"))
    rest = str(match.group("rest")).strip()
    if rest and match.group("bare") and plain.startswith(letter) and rest[0] in "=+-*/^_<>(,":
        return None
    return (letter.upper(), rest) if letter.isupper() or len(plain) > 1 else None


def is_text(text: str) -> bool:
    """Whether a reference is words and not mathematics."""
    plain = unwrap_text(text)
    if _CLOCK.match(plain):
        return True
    words = [word for word in _WORD.findall(plain) if word.lower() not in _NO_WORDS]
    if not words or _FORMULA_SIGNS.search(plain):
        return False
    if plain != text or any(not word.isascii() for word in words):
        return True
    longest = max(words, key=len)
    if len(longest) > 3 or len(words) > 2:
        return True
    return longest.lower() in _SHORT_WORDS or (longest[0].isupper() and longest[1:].islower())


def same_text(answer: str, reference: str) -> bool:
    """Equality of words: without case, articles, hyphens, quotes, end marks and repeated spaces."""
    return plain_words(answer) == plain_words(reference)


def plain_words(text: str) -> str:
    """The normal form that same_text compares."""
    plain = unicodedata.normalize("NFKC", unwrap_text(text)).casefold()
    plain = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", plain)
    plain = re.sub(r"[\"'“”‘’`*]", "", plain)
    plain = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", plain)
    plain = re.sub(r"^(?:答案?|解)\s*[:：]\s*", "", plain.strip())
    plain = " ".join(plain.split()).strip(" .,;:!?。，；：！？")
    for article in _ARTICLES:
        plain = plain.removeprefix(article)
    cjk = r"[\u3040-\u30ff\u3400-\u9fff]"
    return re.sub(rf"(?<={cjk})\s+|\s+(?={cjk})", "", plain)
