r"""One spelling for one meaning: normal forms of answers in LaTeX, plain text and Unicode.

Nothing here changes a value: what is dropped is white space, size commands, style and delimiters.
"""

from __future__ import annotations

import re
import unicodedata

from sparring.rewards.math_extract import closing_brace

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT_RUN = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-",
    "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "≈": r"\approx ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ", "±": r"\pm ",
    "…": r"\ldots ", "⋯": r"\ldots ", "、": ",", "。": ".", "⁄": "/", "∠": r"\angle ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[A-Za-z]))")
_VULGAR = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5),
    "⅗": (3, 5), "⅘": (4, 5), "⅙": (1, 6), "⅚": (5, 6), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8),
    "⅞": (7, 8),
}  # fmt: skip
_SPACES = re.compile(
    r"\\(?:quad|qquad|thinspace|medspace|displaystyle|textstyle|limits|nonumber|enspace)(?![A-Za-z])"
    r"|(?<!\\)\\[,;:> ]|~|(?<!\\)\\(?=\n)"
)
_SIZES = re.compile(r"\\(?:left|right|bigg?[lrm]?|Bigg?[lrm]?|middle)(?![A-Za-z])\.?")
_RENAMED = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "le": "leq", "ge": "geq", "ne": "neq",
    "leqslant": "leq", "geqslant": "geq", "dots": "ldots", "cdots": "ldots", "lbrace": "{",
    "rbrace": "}", "degree": "^\\circ", "to": "rightarrow", "varnothing": "emptyset",
    "lvert": "|", "rvert": "|", "textstyle": "", "infin": "infty", "dbinom": "binom",
    "tbinom": "binom", "simeq": "approx", "lbrack": "[", "rbrack": "]",
}  # fmt: skip
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_STYLE = re.compile(
    r"\\(?:textbf|textit|emph|underline|bm|boldsymbol|mathbf|mathit|mathsf|displaylines)\s*\{"
)
_BARE_FRACTION = re.compile(r"\\frac\s*(\d|[A-Za-z](?![A-Za-z]))\s*(\d|[A-Za-z](?![A-Za-z])|\{)")
_FRACTION_THEN_DIGIT = re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d|[A-Za-z](?![A-Za-z]))")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\d|[A-Za-z](?![A-Za-z]))")
_TEXT_WRAPPER = re.compile(r"\\(?:text|mathrm|textrm|mbox|textnormal|operatorname|rm|hbox)\s*\{")
_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_THOUSANDS = re.compile(r",(?:\\!)+\s*")
_NATURAL_LOG = re.compile(r"\\log\s*_\s*(?:e|\{\s*e\s*\})(?![A-Za-z])")
_EMPTY_SET = re.compile(r"\\\{\s*\\\}")
_PLAIN_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_PLAIN_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)")
_PLAIN_FUNCTION = re.compile(
    r"(?<![A-Za-z\\{])(arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp)(?![A-Za-z])"
)
_LONG_EXPONENT = re.compile(r"([\^_])\s*(-?\d{2,}|-\d)")
_PLAIN_EXPONENT = re.compile(r"\^\s*\(([^()]*)\)")
_CIRCLE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)")


def normalise(text: str) -> str:
    """The answer without delimiters, style, sizes and odd characters; still LaTeX or plain text."""
    text = _unicode(text).strip()
    text = _strip_markdown(text)
    text = _strip_dollars(text)
    text = (
        _THOUSANDS.sub(",", text.replace("{,}", ","))
        .replace("\\!", "")
        .replace(r"\%", "%")
        .replace("\\\n", " ")
    )
    text = _SPACES.sub(" ", text)
    text = _SIZES.sub("", text)
    text = _COMMAND.sub(_rename, text)
    text = _unwrap(_STYLE, text)
    text = _plain_to_latex(_CIRCLE.sub(r"^\\circ ", text))
    for _ in range(3):
        text = _BARE_FRACTION.sub(_brace_fraction, text)
        text = _FRACTION_THEN_DIGIT.sub(r"\1{\2}", text)
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text)
    text = " ".join(text.split())
    text = text.rstrip(" .,;。，；:") if not text.endswith("\\") else text
    return _strip_dollars(_unwrap_whole(text))


def compact(text: str) -> str:
    """A normal form for equality of strings: normalised text without white space, but between
    digits.
    """
    return _SPACE.sub("", text)


def unwrap_text(text: str) -> str:
    r"""`text` with every \text{...}, \mathrm{...} replaced by a space and its content."""
    return " ".join(_unwrap(_TEXT_WRAPPER, text, before=" ", after=" ").split())


def is_wrapped_text(text: str) -> bool:
    r"""Whether the whole is one \text{...}."""
    match = _TEXT_WRAPPER.match(text)
    return bool(match) and closing_brace(text, match.end() - 1) == len(text) - 1 if match else False


def _unicode(text: str) -> str:
    for character, (above, below) in _VULGAR.items():
        if character in text:
            text = text.replace(character, rf"\frac{{{above}}}{{{below}}}")
    text = _SUPERSCRIPT_RUN.sub(lambda run: "^{" + run.group().translate(_SUPERSCRIPTS) + "}", text)
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match.group(1) or match.group(2)}}}", text)
    text = _SYMBOL.sub(lambda match: _SYMBOLS[match.group()], text)
    return unicodedata.normalize("NFKC", text)


def _strip_markdown(text: str) -> str:
    for mark in ("**", "__", "`"):
        while len(text) > 2 * len(mark) and text.startswith(mark) and text.endswith(mark):
            text = text[len(mark) : -len(mark)].strip()
    return text


def _strip_dollars(text: str) -> str:
    r"""Drop math delimiters; a dollar sign that stands alone is a currency and becomes \$."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        long_enough = len(text) > len(opening) + len(closing)
        is_wrapped = long_enough and text.startswith(opening) and text.endswith(closing)
        is_escaped = closing == "$" and inner.endswith("\\")
        if is_wrapped and opening not in inner and not is_escaped:
            text = inner.strip()
    if re.match(r"[-+]?\s*\$\s*[-+]?[\d.]", text) and text.count("$") == 1:
        return text.replace("$", r"\$")
    kept = re.sub(r"\\\$", "\x00", text)
    kept = re.sub(r"\\[()\[\]]|\$", " ", kept) if kept.count("$") % 2 == 0 else kept
    return kept.replace("\x00", r"\$").strip()


def _plain_to_latex(text: str) -> str:
    """Spellings of plain text (sqrt(2), x**10, 2pi) as LaTeX; x^10 means x^{10} to everybody."""
    text = text.replace("**", "^").replace(">=", "\\geq ").replace("<=", "\\leq ")
    text = _PLAIN_PI.sub(r"\\pi ", text)
    text = _PLAIN_FUNCTION.sub(r"\\\1 ", text)
    text = _NATURAL_LOG.sub(r"\\ln ", text)
    text = _PLAIN_ROOT.sub(r"\\sqrt{\1}", text)
    text = _PLAIN_EXPONENT.sub(r"^{\1}", text)
    text = _LONG_EXPONENT.sub(r"\1{\2}", text)
    return _EMPTY_SET.sub(r"\\emptyset ", text)


def _rename(match: re.Match[str]) -> str:
    new = _RENAMED.get(match.group(1))
    if new is None:
        return match.group()
    return new if new == "" or (not new[0].isalpha() and new not in "{}") else "\\" + new


def _brace_fraction(match: re.Match[str]) -> str:
    second = match.group(2)
    return rf"\frac{{{match.group(1)}}}" + (second if second == "{" else f"{{{second}}}")


def _unwrap_whole(text: str) -> str:
    match = re.match(r"\\(?:mathrm|mathbf|textrm|mbox|hbox)\s*\{|\{", text)
    if match is None or text.startswith("{\\") or "," in text:
        return text
    is_whole = closing_brace(text, match.end() - 1) == len(text) - 1
    return text[match.end() : -1].strip() if is_whole else text


def _unwrap(opening: re.Pattern[str], text: str, before: str = "", after: str = "") -> str:
    position = 0
    for _ in range(20):
        match = opening.search(text, position)
        if match is None:
            break
        end = closing_brace(text, match.end() - 1)
        if end < 0:
            break
        text = text[: match.start()] + before + text[match.end() : end] + after + text[end + 1 :]
        position = match.start()
    return text
