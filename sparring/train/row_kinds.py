"""What the rows of a data set call for, read off the rows alone: can a program check the answer?

A row is checkable (GRPO can learn from it), about who the model is, a fact, other text (all three
are for SFT or a system prompt), or a pair of answers (DPO). Patterns for Chinese and English decide
on questions, the parsers of the math reward on answers. No model and no reward is asked here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sparring.data.rows import Row, Rows
from sparring.rewards.math_extract import extract, gold
from sparring.rewards.math_normal import normalise
from sparring.rewards.math_numbers import parse_number
from sparring.rewards.math_text import choice_letter, is_text
from sparring.rewards.texts import after_thinking
from sparring.train.pass_at_k import canonical_answer
from sparring.train.question_patterns import (
    FACT_QUESTION,
    IDENTITY_ANSWER,
    IDENTITY_QUESTION,
    WHEN_QUESTION,
)

Kind = Literal["checkable", "identity", "fact", "text", "pair"]

ROWS_LOOKED_AT = 2000
"""Of a data set, for warnings at the start of a run."""
FEW_ROWS = 5
"""Statements fewer than this are told in a system prompt; training on them would not hold."""
REPEATED_SHARE = 0.9
MINOR_SHARE, MINOR_ROWS = 0.02, 3
"""Rows of a kind matter from this share on, if they are this many or a tenth of a small set."""
LONGEST_WORD_ANSWER = 3
LONGEST_IDENTITY_QUESTION = 160

_QUESTION_COLUMNS = ("prompt", "question", "instruction", "query", "problem", "input")
_ANSWER_COLUMNS = ("reference", "completion", "output", "response", "answer", "solution")
_TEST_COLUMNS = ("tests", "test", "test_list", "test_cases", "unit_tests")

_YES_AND_NO = frozenset(["yes", "no", "true", "false", "是", "否", "不是", "对", "不对", "是的"])
_SENTENCE = re.compile(r"[.!?](?:\s|$)|[。！？]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKind:
    """What one row calls for. answer: its final answer in one spelling, or its text."""

    kind: Kind
    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSurvey:
    """What all rows call for.

    kinds: one a row, in order. repeated: share of the checkable rows that have the most frequent
    answer; top: that answer. num_answers, num_statements: distinct ones of the checkable rows and
    of the others.
    """

    kinds: tuple[RowKind, ...]
    repeated: float
    top: str
    num_answers: int
    num_statements: int

    def count(self, *kinds: Kind) -> int:
        """Rows of these kinds."""
        return sum(row.kind in kinds for row in self.kinds)

    def places(self, *kinds: Kind) -> list[int]:
        """Indices of the rows of these kinds."""
        return [index for index, row in enumerate(self.kinds) if row.kind in kinds]

    @property
    def has_checkable(self) -> bool:
        """Whether checkable rows are more than an accident among the others."""
        return _matters(self.count("checkable"), len(self.kinds))

    @property
    def has_statements(self) -> bool:
        """Whether rows for SFT are more than an accident among the checkable ones."""
        certain = self.count("identity")
        return _matters(certain + self.count("fact", "text"), len(self.kinds)) or certain >= 3


def survey_rows(rows: Rows, *, prompt_column: str, reference_column: str) -> RowSurvey:
    """Sort rows by what they call for.

    An answer in words that identity questions have is a name, whatever else it answers.
    reference_column "": rewards judge without a reference, so a row that is no statement counts as
    checkable.
    """
    first = [
        kind_of_row(row, prompt_column=prompt_column, reference_column=reference_column)
        for row in rows
    ]
    names = Counter(canonical_answer(row.answer) for row in first if row.kind == "identity")
    kinds = tuple(
        replace(row, kind="identity")
        if row.kind == "checkable" and names[row.answer] >= 2 and _is_name(row.answer)
        else row
        for row in first
    )
    answers = Counter(row.answer for row in kinds if row.kind == "checkable" and row.answer)
    statements = {row.answer for row in kinds if row.kind != "checkable"}
    top, count = answers.most_common(1)[0] if answers else ("", 0)
    return RowSurvey(
        kinds=kinds,
        repeated=count / answers.total() if answers else 0.0,
        top=top,
        num_answers=len(answers),
        num_statements=len(statements),
    )


def kind_of_row(row: Row, *, prompt_column: str, reference_column: str) -> RowKind:
    """What one row calls for."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return RowKind(kind="pair", question="", answer="")
    questions, answer = read_row(row, prompt_column, reference_column)
    question = questions[-1] if questions else ""
    if any(_is_identity(text) for text in questions) or IDENTITY_ANSWER.search(answer[:400]):
        return RowKind(kind="identity", question=question, answer=_one_line(answer))
    if any(row.get(column) for column in _TEST_COLUMNS):
        return RowKind(kind="checkable", question=question, answer=_one_line(answer))
    if row.get("numbers") and row.get("target") is not None:
        return RowKind(kind="checkable", question=question, answer=str(row["target"]))
    final, is_marked = _final_answer(answer)
    is_checkable = final is not None and (is_marked or _is_short_answer(final))
    if is_checkable and not (is_marked or _is_knowledge(question, str(final))):
        return RowKind(kind="checkable", question=question, answer=canonical_answer(str(final)))
    if is_marked:
        return RowKind(kind="checkable", question=question, answer=canonical_answer(str(final)))
    if not answer and not reference_column and question:
        return RowKind(kind="checkable", question=question, answer="")
    kind: Kind = "fact" if FACT_QUESTION.search(question) else "text"
    return RowKind(kind=kind, question=question, answer=_one_line(answer))


def warn_if_not_checkable(rows: Rows, prompt_column: str, reference_column: str) -> list[str]:
    """Lines to warn with before GRPO on these rows: what in them it cannot learn."""
    found = survey_rows(rows, prompt_column=prompt_column, reference_column=reference_column)
    num_rows = len(found.kinds)
    lines = []
    if found.count("pair") * 2 >= num_rows:
        lines.append("the rows are pairs of answers, chosen and rejected: that is `sparring dpo`")
    statements = found.places("identity", "fact", "text")
    if found.has_statements:
        first = found.kinds[statements[0]]
        lines.append(
            f"{len(statements)} of {num_rows} rows are statements that no program can check"
            f" ({described(found)}; the first: {rows.where(statements[0])},"
            f" '{first.question[:60]}'). GRPO can only make likelier what the model says already:"
            " teach these by `sparring sft` or tell them in data.system_prompt; `sparring advise`"
            " sorts the rows"
        )
    if _is_repeated(found):
        lines.append(
            f"{found.repeated:.0%} of the checkable rows have the answer '{found.top[:40]}': a"
            " constant completion earns their reward"
        )
    return lines


def described(found: RowSurvey) -> str:
    """How many rows there are of which kind, in words."""
    names: Mapping[Kind, str] = {
        "checkable": "with an answer that a program can check",
        "identity": "on who the model is",
        "fact": "on facts",
        "text": "with free text",
        "pair": "pairs of answers",
    }
    counts = {kind: found.count(kind) for kind in names}
    return ", ".join(f"{count} {names[kind]}" for kind, count in counts.items() if count)


def _is_repeated(found: RowSurvey) -> bool:
    return found.count("checkable") >= 4 and found.repeated >= REPEATED_SHARE


def _matters(count: int, total: int) -> bool:
    is_enough = count >= MINOR_ROWS or 10 * count >= total
    return count > 0 and count >= MINOR_SHARE * total and is_enough


def _is_identity(question: str) -> bool:
    return len(question) <= LONGEST_IDENTITY_QUESTION and bool(IDENTITY_QUESTION.search(question))


def _is_knowledge(question: str, answer: str) -> bool:
    """Whether the answer has to be known and cannot be worked out."""
    if any(letter.isdigit() for letter in question):
        return False
    if parse_number(normalise(answer)) is not None:
        return bool(WHEN_QUESTION.search(question))
    return is_text(normalise(answer)) and bool(FACT_QUESTION.search(question))


def _is_name(text: str) -> bool:
    """Whether a canonical answer is a word that may be a name."""
    return len(text) > 1 and is_text(text.capitalize()) and text not in _YES_AND_NO


def _is_short_answer(text: str) -> bool:
    """Whether a program can compare it: a number, letter, formula, or a word or two."""
    plain = normalise(text)
    if not plain or len(plain) > 200:
        return False
    if parse_number(plain) is not None or choice_letter(plain) is not None:
        return True
    if not is_text(plain):
        return not _SENTENCE.search(text.strip())
    has_few_words = len(plain.split()) <= LONGEST_WORD_ANSWER and len(plain) <= 30
    return has_few_words and not _SENTENCE.search(text.strip())


def _final_answer(answer: str) -> tuple[str | None, bool]:
    """The final answer of a text, and whether a mark (box, ####, tag) says that it is that."""
    found = extract(answer, ("answer", "boxed", "hash"))
    if found.text is not None:
        return found.text, _is_short_answer(found.text)
    said = after_thinking(answer)
    whole, _ = gold(said if said is not None else answer)
    return whole, False


def read_row(row: Row, prompt_column: str, reference_column: str) -> tuple[list[str], str]:
    """The user's questions and the answer of a row in any of the known forms."""
    for name in ("messages", "conversations"):
        if isinstance(row.get(name), list | tuple):
            return _read_turns(row[name])
    question = next(
        (row[name] for name in (prompt_column, *_QUESTION_COLUMNS) if row.get(name)), ""
    )
    answer = next(
        (
            row[name]
            for name in (reference_column, *_ANSWER_COLUMNS)
            if name and row.get(name) not in (None, "")
        ),
        "",
    )
    if isinstance(question, list | tuple):
        questions, _ = _read_turns(question)
    else:
        extra = row.get("input") if question is row.get("instruction") else None
        questions = [f"{question}\n{extra}" if extra else str(question)]
    if isinstance(answer, list | tuple):
        _, answer = _read_turns(answer)
    return [text.strip() for text in questions if text.strip()], str(answer).strip()


def _read_turns(turns: Sequence[Any]) -> tuple[list[str], str]:
    questions, answer = [], ""
    for turn in turns:
        if not isinstance(turn, Mapping):
            continue
        role = turn.get("role") or turn.get("from")
        text = turn.get("content") if "content" in turn else turn.get("value")
        if role in ("user", "human"):
            questions.append(str(text or ""))
        elif role in ("assistant", "gpt"):
            answer = str(text or "")
    return questions, answer


def _one_line(text: str) -> str:
    return " ".join(text.split())
