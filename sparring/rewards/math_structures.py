r"""Answers with parts: lists, sets, tuples, intervals, unions, matrices and assignments.

Only the outer shape is read here; the parts stay text, and math_compare.py compares them one by
one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["list", "set", "tuple", "interval", "union", "matrix", "assignments"]

MAX_PARTS = 64

_SEPARATOR = re.compile(
    r",|;|\\text\s*\{\s*,?\s*(?:and|or|和|或)\s*\}|\s(?:and|or)\s|\\(?:lor|vee|land|wedge)(?![A-Za-z])|和|或|与|以及"
)
_OPENERS, _CLOSERS = ("(", "[", "{", "\\{", "\\langle"), (")", "]", "}", "\\}", "\\rangle")
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+(?:and|or)\s+|.", re.DOTALL)
_ENVIRONMENT = re.compile(
    r"\\begin\s*\{([pbB]?(?:small)?matrix|array)\}(?:\s*\{[clr|]*\})?(.*?)\\end\s*\{\1\}", re.DOTALL
)
_NAMED = re.compile(
    r"([A-Za-z](?:_\s*(?:\{[^{}]{1,8}\}|\w))?'*|\\[a-z]+)\s*=\s*(?![=])(.+)", re.DOTALL
)
_IN = re.compile(r"[A-Za-z](?:_\w)?\s*(?:\\in(?![A-Za-z])|\\isin(?![A-Za-z]))\s*")
_BUILDER = re.compile(r"[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid(?![A-Za-z])|\||:)")
_NAME = r"[A-Za-z](?:_(?:\w|\{\w+\}))?"
_LESS = r"(?P<{0}><|\\leq(?![A-Za-z])|\\lt(?![A-Za-z]))"
_MORE = r"(?P<{0}>>|\\geq(?![A-Za-z])|\\gt(?![A-Za-z]))"
_BOUND = r"[^<>=]{1,120}?"
_BETWEEN = re.compile(
    rf"(?P<low>{_BOUND})\s*{_LESS.format('a')}\s*{_NAME}\s*{_LESS.format('b')}\s*(?P<high>{_BOUND})"
)
_BETWEEN_DOWN = re.compile(
    rf"(?P<high>{_BOUND})\s*{_MORE.format('b')}\s*{_NAME}\s*{_MORE.format('a')}\s*(?P<low>{_BOUND})"
)
_BELOW = re.compile(rf"{_NAME}\s*{_LESS.format('b')}\s*(?P<high>{_BOUND})")
_BELOW_TURNED = re.compile(rf"(?P<high>{_BOUND})\s*{_MORE.format('b')}\s*{_NAME}")
_ABOVE = re.compile(rf"{_NAME}\s*{_MORE.format('a')}\s*(?P<low>{_BOUND})")
_ABOVE_TURNED = re.compile(rf"(?P<low>{_BOUND})\s*{_LESS.format('a')}\s*{_NAME}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """kind with its parts as text. brackets: of an interval or tuple, such as "[)". rows: of a
    matrix.
    """

    kind: Kind
    parts: tuple[str, ...]
    brackets: str = ""
    num_columns: int = 0
    names: tuple[str, ...] = field(default=())

    @property
    def is_ordered(self) -> bool:
        """Whether the order of the parts counts."""
        return self.kind in ("tuple", "interval", "matrix")


def parse_structure(text: str) -> Structure | None:
    """The structure that the whole of a normalised text is; None for a single thing."""
    text = _IN.sub("", text.strip(), count=1) if _IN.match(text.strip()) else text.strip()
    if text.count("\\pm") == 1 and not text.startswith("\\{") and len(split_top(text)) == 1:
        named = _NAMED.fullmatch(text)
        return Structure(kind="list", parts=tuple(_expanded([named.group(2) if named else text])))
    if re.fullmatch(r"\\mathbb\s*\{?\s*R\s*\}?", text):
        return Structure(kind="interval", parts=("-\\infty", "\\infty"), brackets="()")
    for reader in (_matrix, _bracketed, _inequality, _union, _bare_list):
        found = reader(text)
        if found is not None and len(found.parts) <= MAX_PARTS:
            return found
    return None


def split_top(text: str, separator: re.Pattern[str] = _SEPARATOR) -> list[str]:
    """Split where `separator` stands outside all brackets and environments."""
    pieces, start, depth = [], 0, 0
    for match in _tokens(text):
        token = match.group()
        if token in _OPENERS or token == "\\begin":
            depth += 1
        elif token in _CLOSERS or token == "\\end":
            depth -= 1
        elif depth == 0 and match.start() >= start:
            cut = separator.match(text, match.start())
            if cut and not _is_thousands(text, cut):
                pieces.append(text[start : match.start()])
                start = cut.end()
    return [piece.strip() for piece in [*pieces, text[start:]]]


def closes_at(text: str, start: int) -> int:
    """Index just after the bracket that closes the one at `start`, whatever its kind; -1 if none
    does.
    """
    depth = 0
    for match in _TOKEN.finditer(text, start):
        token = match.group()
        depth += (token in _OPENERS) - (token in _CLOSERS)
        if depth == 0:
            return match.end()
    return -1


def _tokens(text: str) -> Iterator[re.Match[str]]:
    return _TOKEN.finditer(text)


def _is_thousands(text: str, cut: re.Match[str]) -> bool:
    """Whether a comma groups digits: three follow, and other commas of the list have a space."""
    if cut.group() != "," or ", " not in text:
        return False
    return (
        bool(re.match(r"\d{3}(?!\d)", text[cut.end() :]))
        and text[cut.start() - 1 : cut.start()].isdigit()
    )


def _matrix(text: str) -> Structure | None:
    inner = text
    if text[:1] in "([" and closes_at(text, 0) == len(text) and "\\begin{array}" in text:
        inner = text[1:-1].strip()
    match = _ENVIRONMENT.fullmatch(inner)
    if match:
        rows = [row.strip() for row in re.split(r"\\\\(?:\[[^\]]*\])?", match.group(2))]
        table = [[cell.strip() for cell in row.split("&")] for row in rows if row.strip(" \\hline")]
    elif re.fullmatch(r"\[\s*\[.*\]\s*\]", text, re.DOTALL):
        rows = split_top(text[1:-1])
        if not all(row.startswith("[") and closes_at(row, 0) == len(row) for row in rows):
            return None
        table = [split_top(row[1:-1]) for row in rows]
    else:
        return None
    if not table or len({len(row) for row in table}) != 1:
        return None
    cells = tuple(cell for row in table for cell in row)
    return Structure(kind="matrix", parts=cells, num_columns=len(table[0]))


def _bracketed(text: str) -> Structure | None:
    if re.fullmatch(r"\][^\[\]]+,[^\[\]]+\[", text):
        text = f"({text[1:-1]})"
    if text.startswith("{") and closes_at(text, 0) == len(text) and len(split_top(text[1:-1])) > 1:
        text = "\\{" + text[1:-1] + "\\}"
    opening = next((mark for mark in ("\\langle", "\\{", "(", "[") if text.startswith(mark)), "")
    if not opening or closes_at(text, 0) != len(text):
        return None
    closing = next(mark for mark in ("\\rangle", "\\}", ")", "]", "}") if text.endswith(mark))
    inner = text[len(opening) : len(text) - len(closing)].strip()
    if opening == "\\{":
        builder = _BUILDER.match(inner)
        if builder:
            condition = inner[builder.end() :].strip()
            return _inequality(condition) or _union(condition)
        if re.search(r"\\mid(?![A-Za-z])|\||:", inner):
            return None
        parts = _expanded(split_top(inner)) if inner else []
        return Structure(kind="set", parts=tuple(parts))
    parts = split_top(inner, re.compile("[,;]"))
    if len(parts) < 2:
        return None
    if opening == "\\langle" or len(parts) != 2:
        return Structure(kind="tuple", parts=tuple(parts), brackets="()")
    low, high = parts
    left = "(" if "\\infty" in low else opening
    right = ")" if "\\infty" in high else closing
    kind: Kind = "tuple" if left + right == "()" and "\\infty" not in text else "interval"
    return Structure(kind=kind, parts=(low, high), brackets=left + right)


def _union(text: str) -> Structure | None:
    parts = split_top(text, re.compile(r"\\cup(?![A-Za-z])"))
    if len(parts) < 2:
        by_or = split_top(text, re.compile(r"\\text\s*\{\s*or\s*\}|\sor\s|或|\\lor(?![A-Za-z])"))
        intervals = [_inequality(part) for part in by_or]
        if len(by_or) < 2 or not all(intervals):
            return None
        parts = [_spelled(interval) for interval in intervals if interval]
    return Structure(kind="union", parts=tuple(parts))


def _spelled(interval: Structure) -> str:
    low, high = interval.parts
    return f"{interval.brackets[0]}{low},{high}{interval.brackets[1]}"


def _inequality(text: str) -> Structure | None:
    for pattern in (_BETWEEN, _BETWEEN_DOWN, _BELOW, _BELOW_TURNED, _ABOVE, _ABOVE_TURNED):
        match = pattern.fullmatch(text)
        if match:
            found = match.groupdict()
            low, high = found.get("low") or "-\\infty", found.get("high") or "\\infty"
            left = "[" if "eq" in (found.get("a") or "") else "("
            right = "]" if "eq" in (found.get("b") or "") else ")"
            if split_top(low) != [low.strip()] or split_top(high) != [high.strip()]:
                return None
            return Structure(
                kind="interval", parts=(low.strip(), high.strip()), brackets=left + right
            )
    return None


def _bare_list(text: str) -> Structure | None:
    parts = [part for part in split_top(text) if part]
    named = [_NAMED.fullmatch(part) for part in parts]
    names = tuple("".join(match.group(1).split()) for match in named if match)
    if len(parts) > 1 and len(names) == len(parts) and len(set(names)) == len(names):
        values = tuple(match.group(2).strip() for match in named if match)
        order = sorted(range(len(names)), key=lambda index: names[index])
        return Structure(
            kind="assignments",
            parts=tuple(values[index] for index in order),
            names=tuple(names[index] for index in order),
        )
    if len(set(names)) == 1:
        values = tuple(
            match.group(2).strip() if match else part
            for match, part in zip(named, parts, strict=True)
        )
        parts = list(values)
    expanded = _expanded(parts)
    return Structure(kind="list", parts=tuple(expanded)) if len(expanded) > 1 else None


def _expanded(parts: list[str]) -> list[str]:
    """Each part with one plus-minus sign as two parts."""
    expanded = []
    for part in parts:
        if part.count("\\pm") == 1:
            before, _, after = part.partition("\\pm")
            expanded += [
                f"{before.strip()} + {after.strip()}" if before.strip() else after.strip(),
                f"{before.strip()} - {after.strip()}".strip()
                if before.strip()
                else f"-{after.strip()}",
            ]
        else:
            expanded.append(part)
    return expanded
