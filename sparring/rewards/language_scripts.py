"""Counting words by Unicode script, once code, formulas and links are gone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

LATIN_LANGUAGES = frozenset(
    {
        "cs", "da", "de", "en", "es", "et", "fi", "fr", "hr", "hu", "id", "it", "lt", "lv", "nl",
        "no", "pl", "pt", "ro", "sk", "sl", "sv", "sw", "tl", "tr", "vi",
    }
)  # fmt: skip
"""Languages in Latin script: the script alone does not tell them apart."""

SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LATIN_LANGUAGES, ("Latin",)),
    "zh": ("Han",),
    "ja": ("Japanese",),
    "ko": ("Hangul",),
    "ru": ("Cyrillic",), "uk": ("Cyrillic",), "bg": ("Cyrillic",), "sr": ("Cyrillic",),
    "el": ("Greek",),
    "he": ("Hebrew",),
    "ar": ("Arabic",), "fa": ("Arabic",), "ur": ("Arabic",),
    "hi": ("Devanagari",), "mr": ("Devanagari",), "ne": ("Devanagari",),
    "bn": ("Bengali",),
    "ta": ("Tamil",),
    "te": ("Telugu",),
    "th": ("Thai",),
    "ka": ("Georgian",),
    "hy": ("Armenian",),
}  # fmt: skip
"""Language codes and the scripts whose words count for them. Japanese is kana, and Han beside kana.
"""

_MARK = r"[\u0300-\u036f'’]"
_RUNS = {
    "Latin": r"[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
    r"\uff21-\uff3a\uff41-\uff5a]",
    "Cyrillic": r"[\u0400-\u052f\u1c80-\u1c8f]",
    "Greek": r"[\u0370-\u03ff\u1f00-\u1fff]",
    "Hebrew": r"[\u0590-\u05ff\ufb1d-\ufb4f]",
    "Arabic": r"[\u0610-\u061a\u0620-\u065f\u066e-\u06d3\u06d5-\u06ef\u06fa-\u06ff\u0750-\u077f"
    r"\ufb50-\ufdff\ufe70-\ufeff\u200c]",
    "Devanagari": r"[\u0900-\u0963\u0970-\u097f\u200c\u200d]",
    "Bengali": r"[\u0980-\u09e3\u09f0-\u09ff]",
    "Tamil": r"[\u0b80-\u0be5]",
    "Telugu": r"[\u0c00-\u0c65]",
    "Georgian": r"[\u10a0-\u10ff\u1c90-\u1cbf]",
    "Armenian": r"[\u0531-\u058a]",
    "Hangul": r"[\u1100-\u11ff\u3131-\u318e\uac00-\ud7af]",
}
_CHARACTERS = {
    "Han": r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f\u3005\u3007]",
    "Kana": r"[\u3041-\u3096\u30a1-\u30fa\u30fc\uff66-\uff9d]",
    "Thai": r"[\u0e01-\u0e3a\u0e40-\u0e4e]",
}
_WORD = re.compile(
    "|".join(
        [rf"(?P<{script}>{run}(?:{run}|{_MARK})*)" for script, run in _RUNS.items()]
        + [f"(?P<{script}>{character})" for script, character in _CHARACTERS.items()]
    )
)
_NOT_WORDS = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`"
    r"|\$\$.*?(?:\$\$|\Z)|\$[^$\n]{1,400}\$|\\\[.*?(?:\\\]|\Z)|\\\(.*?(?:\\\)|\Z)"
    r"|\\begin\{[^}\n]{0,40}\}.*?(?:\\end\{[^}\n]{0,40}\}|\Z)"
    r"|(?:https?://|www\.)\S+|[\w.+-]{1,64}@[\w-]{1,64}\.[\w.-]{1,64}|</?[A-Za-z_|][^<>\n]{0,80}>"
    r"|\\[A-Za-z]+(?:\{[^{}\n]{0,200}\}){0,2}",
    re.DOTALL,
)
_NOTATION = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "lim",
        "max",
        "min",
        "mod",
        "gcd",
        "lcm",
        "det",
        "arg",
        "deg",
        "rad",
        "cm",
        "mm",
        "km",
        "kg",
        "mg",
        "ml",
        "def",
        "abc",
        "abcd",
        "ab",
        "bc",
        "cd",
        "ac",
        "ad",
        "bd",
        "aime",
        "ai",
    ]
)
"""Latin letters that any language writes alike in mathematics; single letters are left out too."""

_SEGMENT = re.compile(r"[^。！？!?\n；]*[。！？!?\n；]*")
_HAN_ALONE = 10
"""So many Han characters in a sentence without any kana are Chinese, also in a Japanese text."""


def count_scripts(text: str) -> Counter[str]:
    """Words by script ("Latin", "Han", "Japanese", ...): runs of letters, characters for Han, kana
    and Thai.
    """
    counts: Counter[str] = Counter()
    undecided = 0
    for segment in _SEGMENT.findall(strip_notation(text)):
        found: Counter[str] = Counter()
        for match in _WORD.finditer(segment):
            script = str(match.lastgroup)
            word = match.group()
            if script in ("Latin", "Greek") and (len(word) == 1 or word.lower() in _NOTATION):
                continue
            found[script] += 1
        kana, han = found.pop("Kana", 0), found.pop("Han", 0)
        if kana:
            found["Japanese"] = kana + han
        elif han >= _HAN_ALONE:
            found["Han"] = han
        else:
            undecided += han
        counts += found
    if undecided:
        counts["Japanese" if counts["Japanese"] > counts["Han"] else "Han"] += undecided
    return +counts


def strip_notation(text: str) -> str:
    """`text` without code, LaTeX, links, addresses and tags."""
    return _NOT_WORDS.sub(" ", text)


def latin_passages(text: str, min_characters: int) -> Iterator[tuple[str, int]]:
    """Runs of sentences with their number of Latin words, each of `min_characters` or more but the
    last.
    """
    passage, words = "", 0
    for segment in _SEGMENT.findall(re.sub(r"(?<=[.;])\s", "\n", strip_notation(text))):
        latin = [match.group() for match in _WORD.finditer(segment) if match.lastgroup == "Latin"]
        counted = [word for word in latin if len(word) > 1 and word.lower() not in _NOTATION]
        if not counted:
            continue
        passage += " ".join(latin) + ". "
        words += len(counted)
        if len(passage) >= min_characters:
            yield passage, words
            passage, words = "", 0
    if words:
        yield passage, words
