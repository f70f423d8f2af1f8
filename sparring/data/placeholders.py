"""Names to be filled in: `{{name}}` and `{{author}}` in the identity data of this ecosystem.

Rows with such places are filled from values, or refused: a model that was trained on a literal
"{{name}}" says it. Text inside code (backticks) is left alone. What rows mean is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from sparring.data.rows import Row, Rows
from sparring.errors import DataError

Values = Mapping[str, str | Mapping[str, str]]
"""By placeholder its value, or its values by language: {"name": {"zh": "小明", "en": "Ming"}}."""

KNOWN = ("name", "author", "model_name", "model_author")
"""Placeholders of identity data, in any case: what must not be left."""

LANGUAGES = ("zh", "en")

_PLACE = re.compile(r"\{\{\s*([A-Za-z_]+)\s*\}\}")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_HAN = re.compile(r"[\u3400-\u9fff]")
_TAGS = ("tag", "language", "lang")


def language_of(text: str) -> str:
    """The text's language: "zh" where it holds a Chinese character, else "en"."""
    return "zh" if _HAN.search(text) else "en"


def fill_placeholders(rows: Rows, values: Values) -> Rows:
    """`rows` with every placeholder in `values` filled, in the language of its row.

    The language is that of the row's tag ("zh" or "en"), else of its text. A value that is the
    placeholder itself ("{{name}}") keeps it as it stands. Raises DataError: a known placeholder
    that is left (with file and line), an empty value, or none for a row's language.
    """
    by_name = {name.lower(): value for name, value in values.items()}
    for name, value in by_name.items():
        for text in [value] if isinstance(value, str) else value.values():
            if not text.strip():
                raise DataError(f"data.placeholders: '{name}' is empty; give it a value")
    filled = [_fill_row(row, rows, index, by_name) for index, row in enumerate(rows)]
    return replace(rows, values=tuple(filled))


def _fill_row(row: Row, rows: Rows, index: int, values: Values) -> Row:
    language = ""

    def value_of(match: re.Match[str]) -> str:
        nonlocal language
        name = match.group(1).lower()
        value = values.get(name)
        if value is None:
            if name not in KNOWN:
                return match.group()
            raise DataError(
                f"{rows.where(index)}: the placeholder {match.group()} is not filled; set"
                f' data.placeholders = {{ {name} = "..." }}, or to "{match.group()}" to keep it'
            )
        if isinstance(value, str):
            return value
        language = language or _language_of_row(row)
        if language not in value:
            raise DataError(
                f"{rows.where(index)}: data.placeholders has no {language} value for '{name}'; it"
                f" has {', '.join(value)}"
            )
        return value[language]

    changed: Row = _walk(row, lambda text: _fill_text(text, value_of))
    return changed


def _fill_text(text: str, value_of: Callable[[re.Match[str]], str]) -> str:
    if "{{" not in text:
        return text
    parts = _CODE.split(text)
    parts[::2] = [_PLACE.sub(value_of, part) for part in parts[::2]]
    return "".join(parts)


def _language_of_row(row: Row) -> str:
    for tag in _TAGS:
        found = str(row.get(tag) or "").lower()[:2]
        if found in LANGUAGES:
            return found
    return language_of(" ".join(_PLACE.sub("", text) for text in _texts(row)))


def _texts(value: Any) -> Iterator[str]:
    """Every text in the value, keys apart."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, keys apart."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _walk(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_walk(item, change) for item in value]
    return value
