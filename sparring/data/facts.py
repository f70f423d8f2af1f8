"""A table of facts into conversations: each fact asked in several ways, and backwards.

The table has the columns subject, statement and paraphrases (a list, or text with | between them):
a paraphrase that ends with a question mark is a way to ask, any other a way to answer. A model that
learns "A is B" does not learn "B is A" from it, so each statement is also asked with its subject
left out. The wording around the facts is that of identity.py's files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparring.data.identity import EMPTY_THINK, wording
from sparring.data.placeholders import LANGUAGES, language_of
from sparring.data.rows import Row, Rows
from sparring.errors import DataError

COLUMNS = ("subject", "statement")
GAP = "___"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact: what it is about, the statement, other ways to say it and ways to ask for it."""

    subject: str
    statement: str
    language: str
    statements: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


def read_facts(rows: Rows) -> list[Fact]:
    """The facts of a table.

    The language is the row's `language`, else that of its statement. Raises DataError, with file
    and line, for a missing column, an empty cell, or the same statement twice.
    """
    for column in COLUMNS:
        if column not in rows.columns:
            raise DataError(
                f"{rows.source} has no column '{column}'; a table of facts has subject, statement"
                f" and paraphrases, this one has {', '.join(rows.columns)}"
            )
    facts: list[Fact] = []
    seen: dict[str, str] = {}
    for index, row in enumerate(rows):
        fact = _read(row, rows.where(index))
        key = " ".join(fact.statement.casefold().split())
        if key in seen:
            raise DataError(f"{rows.where(index)}: the statement stands in {seen[key]} already")
        seen[key] = rows.where(index)
        facts.append(fact)
    return facts


def fact_rows(facts: Sequence[Fact], *, empty_think: bool = False) -> list[dict[str, Any]]:
    """The training set: {"messages", "language", "kind"} a row, from six rows a fact on."""
    rows = []
    for fact in facts:
        words = wording(fact.language)["fact"]
        answers = itertools.cycle((fact.statement, *fact.statements))
        for asked in (*words["asked"], *fact.questions):
            rows.append(_row(asked, next(answers), fact, empty_think))
        if fact.subject in fact.statement:
            gap = words["gap"].replace("{statement}", fact.statement.replace(fact.subject, GAP))
            filled = words["filled"].replace("{statement}", fact.statement)
            rows.append(_row(gap, filled, fact, empty_think))
    return rows


def held_out_fact_rows(facts: Sequence[Fact], *, empty_think: bool = False) -> list[dict[str, Any]]:
    """Rows on the same facts in questions that are never trained on: for a held-out loss."""
    return [
        _row(asked, fact.statement, fact, empty_think)
        for fact in facts
        for asked in wording(fact.language)["fact"]["held_out"]
    ]


def _row(asked: str, answer: str, fact: Fact, empty_think: bool) -> dict[str, Any]:
    question = asked.replace("{subject}", fact.subject)
    answer = (EMPTY_THINK if empty_think else "") + answer.replace("{subject}", fact.subject)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "language": fact.language, "kind": "fact"}


def _read(row: Row, where: str) -> Fact:
    subject, statement = (_cell(row, column, where) for column in COLUMNS)
    paraphrases = row.get("paraphrases") or []
    if isinstance(paraphrases, str):
        paraphrases = paraphrases.split("|")
    if not isinstance(paraphrases, list | tuple) or not all(
        isinstance(text, str) for text in paraphrases
    ):
        raise DataError(f"{where}: 'paraphrases' is a list of texts, or one text with | between")
    others = [text.strip() for text in paraphrases if text.strip()]
    language = str(row.get("language") or language_of(statement))
    if language not in LANGUAGES:
        raise DataError(f"{where}: 'language' is {language!r}; languages: {', '.join(LANGUAGES)}")
    return Fact(
        subject=subject,
        statement=statement,
        language=language,
        statements=tuple(text for text in others if not text.endswith(("?", "？"))),
        questions=tuple(text for text in others if text.endswith(("?", "？"))),
    )


def _cell(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: '{column}' is {value!r}; it is a text")
    return value.strip()
