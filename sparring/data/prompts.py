"""Prompts for rollouts: rows become tokenised `Prompt`s, with every other column kept for rewards.

A prompt over the limit is dropped and counted, never cut. No file is read here (rows.py) and no
answer is learned from (conversations.py).
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparring.data.chat import ChatTemplate, as_template, parse_messages
from sparring.data.rows import BadRows, Row, Rows
from sparring.errors import DataError
from sparring.types import Message, Prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptSet:
    """The prompts of one data set, and what became of its rows.

    source: what the user named. num_rows: rows that were there, unreadable ones included. num_bad:
    rows skipped because they were wrong; bad: the first of them in words. num_too_long: prompts
    dropped because they have more than max_prompt_tokens tokens; longest: tokens of the longest
    prompt found, longest_at: its row's place. notes: what a reader should know besides.
    fingerprints: per prompt a hash of its question, free of case, spacing and template.
    is_ordered: a run takes them in this order, epoch after epoch, instead of a new one each time.
    """

    prompts: tuple[Prompt, ...]
    source: str
    num_rows: int
    num_bad: int
    bad: tuple[str, ...]
    num_too_long: int
    longest: int
    max_prompt_tokens: int
    template: ChatTemplate
    notes: tuple[str, ...]
    fingerprints: tuple[bytes, ...]
    longest_at: str = ""
    is_ordered: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self.prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def report(self) -> list[str]:
        """Lines for people: how many prompts there are and why others are not."""
        lines = [f"{self.source}: {len(self.prompts):,} prompts of {self.num_rows:,} rows"]
        if self.num_too_long:
            lines.append(
                too_long_line(
                    self.num_too_long, self.max_prompt_tokens, self.longest, self.longest_at
                )
            )
        lines += bad_row_lines(self.num_bad, self.bad)
        return lines + [f"  {note}" for note in self.notes]


def too_long_line(num: int, limit: int, longest: int, longest_at: str) -> str:
    """A line of a report on samples that were dropped as too long, with the place of the worst."""
    place = f", {longest_at}," if longest_at else ""
    return f"  {num:,} dropped: longer than {limit:,} tokens (the longest{place} has {longest:,})"


def bad_row_lines(num_bad: int, bad: Sequence[str], shown: int = 3) -> list[str]:
    """Lines of a report on rows that were skipped, the first few in full."""
    if not num_bad:
        return []
    lines = [f"  {num_bad:,} bad {'row' if num_bad == 1 else 'rows'} skipped:"]
    lines += [f"    {message}" for message in bad[:shown]]
    if num_bad > shown:
        lines.append(f"    and {num_bad - min(shown, len(bad)):,} more")
    return lines


def load_prompts(
    rows: Rows,
    tokenizer: Any,
    *,
    prompt_column: str = "prompt",
    reference_column: str = "reference",
    template: str | ChatTemplate = "auto",
    system_prompt: str = "",
    max_prompt_tokens: int,
    bad_rows: str = "error",
) -> PromptSet:
    """Tokenise the prompts of `rows`.

    A row's prompt is text or a list of messages. Text is rendered as one user message where there
    is a chat template, else tokenised as it stands; `Prompt.messages` is set only for message rows.
    `Prompt.id` is the index of the row in `rows`. Columns: all but the prompt, the same names for
    every row (None where a row has none), and the reference column under "reference" too.
    reference_column "": the data has no references. template: a name or file, or a template already
    built (system_prompt is then its own).

    Raises DataError: a column that no row has, a bad row under bad_rows = "error" (with file and
    line), messages without a chat template, or no prompt left within max_prompt_tokens.
    """
    _check_columns(rows, prompt_column, reference_column)
    if max_prompt_tokens < 1:
        raise DataError(
            f"{max_prompt_tokens} tokens are left for prompts (model.max_tokens less "
            "rollout.max_completion_tokens); raise the one or lower the other"
        )
    template = as_template(tokenizer, template, system_prompt)
    _check_template(rows, prompt_column, template)
    bad = BadRows(bad_rows)
    prompts: list[Prompt] = []
    fingerprints: list[bytes] = []
    num_too_long, longest_at = 0, ""
    lengths: list[int] = []
    names = [name for name in rows.columns if name != prompt_column]
    for index, row in enumerate(rows):
        try:
            prompt = _read_prompt(index, row, names, prompt_column, reference_column, template)
        except DataError as error:
            bad.add(rows.where(index), str(error))
            continue
        if len(prompt.token_ids) > max(lengths, default=0):
            longest_at = rows.where(index)
        lengths.append(len(prompt.token_ids))
        if len(prompt.token_ids) > max_prompt_tokens:
            num_too_long += 1
            continue
        prompts.append(prompt)
        fingerprints.append(_fingerprint(row[prompt_column]))
    if not prompts:
        raise DataError(_nothing_left(rows, bad, lengths, max_prompt_tokens, longest_at))
    return PromptSet(
        prompts=tuple(prompts),
        source=rows.source,
        num_rows=len(rows) + rows.num_bad,
        num_bad=rows.num_bad + bad.num,
        bad=(*rows.bad, *bad.messages),
        num_too_long=num_too_long,
        longest=max(lengths),
        max_prompt_tokens=max_prompt_tokens,
        template=template,
        notes=_notes(rows, prompts, reference_column, template),
        fingerprints=tuple(fingerprints),
        longest_at=longest_at,
    )


def shared_prompts(train: PromptSet, evaluation: PromptSet) -> tuple[int, ...]:
    """Ids of evaluation prompts that are also training prompts, case and spacing aside."""
    seen = set(train.fingerprints)
    return tuple(
        prompt.id
        for prompt, fingerprint in zip(evaluation.prompts, evaluation.fingerprints, strict=True)
        if fingerprint in seen
    )


def _check_columns(rows: Rows, prompt_column: str, reference_column: str) -> None:
    known = ", ".join(rows.columns) or "none"
    for knob, name in (("data.prompt", prompt_column), ("data.reference", reference_column)):
        if name not in rows.columns and (name or knob == "data.prompt"):
            raise DataError(
                f"{rows.source} has no column '{name}'; its columns are: {known}; "
                f"set {knob} to one of them"
            )


def _check_template(rows: Rows, prompt_column: str, template: ChatTemplate) -> None:
    """Messages without a template are a mistake in the recipe, not in a row."""
    if template.source is not None:
        return
    for index, row in enumerate(rows):
        value = row.get(prompt_column)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            try:
                template.render(parse_messages(value), add_generation_prompt=True)
            except DataError as error:
                raise DataError(f"{rows.where(index)}: {error}") from error


def _read_prompt(
    index: int,
    row: Row,
    names: Sequence[str],
    prompt_column: str,
    reference_column: str,
    template: ChatTemplate,
) -> Prompt:
    if row.get(prompt_column) is None:
        raise DataError(f"the row has no '{prompt_column}' (its columns: {', '.join(row)})")
    if reference_column and row.get(reference_column) is None:
        raise DataError(f"the row has no '{reference_column}' (its columns: {', '.join(row)})")
    value = row[prompt_column]
    messages: tuple[Message, ...] | None = None
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"'{prompt_column}' is empty")
        rendered = template.render_text(value)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        messages = parse_messages(value)
        if messages[-1]["role"] == "assistant":
            raise DataError(
                f"'{prompt_column}' ends with the assistant's turn, which is what the model writes"
            )
        rendered = template.render(messages, add_generation_prompt=True)
        messages = template.with_system_prompt(messages)
    else:
        raise DataError(
            f"'{prompt_column}' is a {type(value).__name__}; it is text or a list of messages"
        )
    columns = {name: row.get(name) for name in names}
    if reference_column:
        columns["reference"] = row[reference_column]
    token_ids = template.encode(rendered.text)
    if not token_ids:
        raise DataError(f"'{prompt_column}' has no tokens")
    return Prompt(
        id=index,
        token_ids=tuple(token_ids),
        text=rendered.text,
        messages=messages,
        columns=columns,
        prefill=rendered.prefill,
    )


def _nothing_left(
    rows: Rows, bad: BadRows, lengths: list[int], max_prompt_tokens: int, longest_at: str
) -> str:
    if not lengths:
        return f"{rows.source}: all {bad.num} rows are bad; the first is {bad.messages[0]}"
    return (
        f"{rows.source}: all {len(lengths)} prompts are longer than {max_prompt_tokens} tokens "
        f"(the shortest has {min(lengths)}, the longest, {longest_at}, {max(lengths)}); raise "
        "model.max_tokens or lower rollout.max_completion_tokens"
    )


def _notes(
    rows: Rows, prompts: Sequence[Prompt], reference_column: str, template: ChatTemplate
) -> tuple[str, ...]:
    notes = []
    if reference_column not in ("", "reference") and "reference" in rows.columns:
        notes.append(
            f"the column 'reference' is hidden from rewards: data.reference is '{reference_column}'"
        )
    own = sum(_has_own_system(prompt, template) for prompt in prompts)
    if own:
        notes.append(f"{own:,} prompts keep a system message of their own")
    prefills = {prompt.prefill for prompt in prompts}
    if prefills != {""}:
        shown = " or ".join(repr(prefill) for prefill in sorted(prefills))
        notes.append(f"the template begins the completion with {shown}")
    return tuple(notes)


def _has_own_system(prompt: Prompt, template: ChatTemplate) -> bool:
    if not template.system_prompt or prompt.messages is None:
        return False
    return bool(prompt.messages[0]["content"] != template.system_prompt)


def _fingerprint(value: str | Sequence[Mapping[str, Any]]) -> bytes:
    if not isinstance(value, str):
        messages = parse_messages(value)
        value = " ".join(turn["content"] for turn in messages if turn["role"] != "system")
    words = unicodedata.normalize("NFKC", value).casefold().split()
    return hashlib.blake2b(" ".join(words).encode("utf-8"), digest_size=16).digest()
