"""TOML with a memory of lines: read text and know where each key stands, write tables back exactly.

The standard library reads TOML without line numbers and does not write it. No recipe is known
here.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from typing import Any

from sparring.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Where a value stands: ("run", "dir"), or ("reward", 0, "name") in the first [[reward]]."""

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_.\s-]|"[^"\n]*"|'[^'\n]*')+?)\s*=""")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_QUOTES = re.compile(r'"{3}|\'{3}')


def read_toml(text: str, *, source: str) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    """The tables of `text`, and for each table and key the line (from 1) on which it stands.

    Raises RecipeError with `source` and the line where the text is not TOML.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\s*\(at line (\d+), column \d+\)", str(error))
        line = found.group(1) if found else str(text.count("\n") + 1)
        reason = str(error).replace(found.group(0), "") if found else str(error)
        raise RecipeError(f"{source}:{line}: this is not TOML: {reason}") from error
    return tables, _lines(text)


def read_value(text: str) -> Any:
    """`text` as one TOML value, or `text` itself where it is none."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if list(found) == ["value"] else text


def write_toml(tables: Mapping[str, Any]) -> str:
    """TOML text that reads back as `tables`: a table a key, or a list of tables.

    Values may be text, numbers, truth values, lists of these, and (inline) mappings.
    """
    blocks = []
    for name, table in tables.items():
        many = isinstance(table, Sequence) and not isinstance(table, str)
        for entry in table if many else [table]:
            header = f"[[{_key(name)}]]" if many else f"[{_key(name)}]"
            lines = [f"{_key(key)} = {write_value(value)}" for key, value in entry.items()]
            blocks.append("\n".join([header, *lines]))
    return "\n\n".join(blocks) + "\n"


def write_value(value: Any) -> str:
    """One value as TOML writes it. Raises TypeError for a value that TOML cannot hold."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {write_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(write_value(item) for item in value) + "]"
    raise TypeError(f"TOML has no way to write {value!r} ({type(value).__name__})")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else write_value(name)


def _lines(text: str) -> dict[KeyPath, int]:
    lines: dict[KeyPath, int] = {}
    counts: dict[str, int] = {}
    table: KeyPath = ()
    open_quotes = ""
    for number, line in enumerate(text.split("\n"), start=1):
        if open_quotes:
            open_quotes = _still_open(line, open_quotes)
            continue
        if header := _HEADER.match(line):
            table = _split_key(header.group(2))
            if header.group(1) == "[[":
                name = header.group(2)
                counts[name] = counts.get(name, -1) + 1
                table = (*table, counts[name])
            lines.setdefault(table, number)
        elif key := _KEY.match(line):
            path = (*table, *_split_key(key.group(1)))
            for length in range(len(table) + 1, len(path) + 1):
                lines.setdefault(path[:length], number)
        open_quotes = _still_open(line, "")
    return lines


def _split_key(dotted: str) -> KeyPath:
    parts = re.findall(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""", dotted)
    return tuple(part.strip("\"'") for part in parts)


def _still_open(line: str, quotes: str) -> str:
    """The triple quote that is open at the end of `line`, given the one open at its start."""
    for found in _QUOTES.finditer(line):
        if not quotes:
            quotes = found.group(0)
        elif found.group(0) == quotes:
            quotes = ""
    return quotes
