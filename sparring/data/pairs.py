"""Pairs for preference training: two completions of one prompt, one chosen and one rejected.

Rows hold `chosen` and `rejected`, both text or both lists of messages, and a prompt:

    prompt column, text or messages    it stands before both completions
    no prompt column                   what both begin with: their first messages that are the
                                       same, or their first characters that are the same

A list of messages may be the whole conversation, its prompt repeated. A text prompt is a user's
message where there is a chat template, as everywhere; a prompt that two texts only have in common
is taken as it stands. Completions are tokenised as conversations.py does it, so that a pair is
learned behind the tokens that generation would find. A row that is too long is dropped and counted,
never cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparring.data.chat import ChatTemplate, as_template, no_template, parse_messages
from sparring.data.conversations import NO_END, Dialogue, tokenise
from sparring.data.prompts import bad_row_lines, too_long_line
from sparring.data.rows import BadRows, Row, Rows
from sparring.errors import DataError
from sparring.types import Message


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """Two completions behind one context.

    context_ids [P] int64, P >= 1: what both go on from. chosen_ids, rejected_ids [R] int64, each
    with its end token; chosen_mask, rejected_mask [R] bool: True where a token bears loss. row:
    index of the row it came from.
    """

    context_ids: Tensor
    chosen_ids: Tensor
    chosen_mask: Tensor
    rejected_ids: Tensor
    rejected_mask: Tensor
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairSet:
    """The pairs of one data set, and what became of its rows.

    num_rows: rows that were there, unreadable ones included. num_bad, bad: rows skipped, and the
    first of them in words. num_too_long: pairs dropped because one side has more than max_tokens
    tokens, context included; longest: tokens of the longest side found, longest_at: its row's
    place. notes: what a reader should know besides. is_ordered: as of PromptSet.
    """

    pairs: tuple[Pair, ...]
    source: str
    num_rows: int
    num_bad: int
    bad: tuple[str, ...]
    num_too_long: int
    longest: int
    max_tokens: int
    template: ChatTemplate
    notes: tuple[str, ...] = ()
    longest_at: str = ""
    is_ordered: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    def report(self) -> list[str]:
        """Lines for people: how many pairs there are and what was left out."""
        chosen = sum(int(pair.chosen_mask.sum()) for pair in self.pairs) / len(self.pairs)
        rejected = sum(int(pair.rejected_mask.sum()) for pair in self.pairs) / len(self.pairs)
        lines = [
            f"{self.source}: {len(self.pairs):,} pairs of {self.num_rows:,} rows, on average"
            f" {chosen:.0f} tokens chosen and {rejected:.0f} rejected"
        ]
        if self.num_too_long:
            lines.append(
                too_long_line(self.num_too_long, self.max_tokens, self.longest, self.longest_at)
            )
        lines += bad_row_lines(self.num_bad, self.bad)
        return lines + [f"  {note}" for note in self.notes]


def load_pairs(
    rows: Rows,
    tokenizer: Any,
    *,
    max_tokens: int,
    template: str | ChatTemplate = "auto",
    system_prompt: str = "",
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    bad_rows: str = "error",
) -> PairSet:
    """Tokenise the pairs of `rows`.

    max_tokens: of a context and one completion together. template, system_prompt: as in
    `load_prompts`. A prompt column of another name than "prompt" must be there.

    Raises DataError: columns that are missing, a bad row under bad_rows = "error" (with file and
    line: chosen equal to rejected, an empty completion, text beside messages, ...), messages
    without a chat template, no end token, or no pair left within max_tokens.
    """
    columns = (prompt_column, chosen_column, rejected_column)
    _check_columns(rows, *columns)
    template = as_template(tokenizer, template, system_prompt)
    if not template.end_ids:
        raise DataError(NO_END)
    bad = BadRows(bad_rows)
    pairs: list[Pair] = []
    lengths: list[int] = []
    num_implicit_texts, longest_at = 0, ""
    for index, row in enumerate(rows):
        try:
            chosen, rejected = _read(row, *columns)
        except DataError as error:
            bad.add(rows.where(index), str(error))
            continue
        used = template
        if not chosen.messages:
            num_implicit_texts += 1
            used = replace(template, source=None)
        elif template.source is None and chosen.text is None:
            raise DataError(f"{rows.where(index)}: {no_template(template.name)}")
        try:
            pair = _tokenise(chosen, rejected, used, index)
        except DataError as error:
            bad.add(rows.where(index), str(error))
            continue
        length = len(pair.context_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
        if length > max(lengths, default=0):
            longest_at = rows.where(index)
        lengths.append(length)
        if lengths[-1] <= max_tokens:
            pairs.append(pair)
    if not pairs:
        raise DataError(_nothing_left(rows, bad, lengths, max_tokens, longest_at))
    return PairSet(
        pairs=tuple(pairs),
        source=rows.source,
        num_rows=len(rows) + rows.num_bad,
        num_bad=rows.num_bad + bad.num,
        bad=(*rows.bad, *bad.messages),
        num_too_long=len(lengths) - len(pairs),
        longest=max(lengths),
        max_tokens=max_tokens,
        template=template,
        notes=_notes(num_implicit_texts, template),
        longest_at=longest_at,
    )


def _check_columns(rows: Rows, prompt: str, chosen: str, rejected: str) -> None:
    missing = [name for name in (chosen, rejected) if name not in rows.columns]
    if prompt != "prompt" and prompt not in rows.columns:
        missing.append(prompt)
    if missing:
        raise DataError(
            f"{rows.source} holds no pairs: it has no column {' and no column '.join(missing)};"
            f" its columns are {', '.join(rows.columns)}; expected chosen and rejected (text or"
            " messages) and prompt, which may be left out where both begin with it"
        )


def _read(row: Row, prompt: str, chosen: str, rejected: str) -> tuple[Dialogue, Dialogue]:
    """The two sides of a row; one without messages is text whose prompt was found in it."""
    sides = []
    for name in (chosen, rejected):
        value = row.get(name)
        if value is None:
            raise DataError(f"the row has no '{name}' (its columns: {', '.join(row)})")
        is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not (is_list or isinstance(value, str)):
            raise DataError(
                f"'{name}' is a {type(value).__name__}; it is text or a list of messages"
            )
        if not value or (isinstance(value, str) and not value.strip()):
            raise DataError(f"'{name}' is empty")
        sides.append(value)
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise DataError(f"of '{chosen}' and '{rejected}' one is text and one a list of messages")
    if sides[0] == sides[1]:
        raise DataError(f"'{chosen}' and '{rejected}' are the same")
    before = row.get(prompt)
    if before is not None and (not before or (isinstance(before, str) and not before.strip())):
        raise DataError(f"'{prompt}' is empty")
    if isinstance(sides[0], str):
        return _read_texts(before, sides[0], sides[1], prompt)
    return _read_messages(before, parse_messages(sides[0]), parse_messages(sides[1]), prompt)


def _read_texts(
    before: object, chosen: str, rejected: str, prompt: str
) -> tuple[Dialogue, Dialogue]:
    if before is None:
        common = _common_text(chosen, rejected)
        if not common.strip():
            raise DataError(
                f"the row has no '{prompt}', and chosen and rejected do not begin alike"
            )
        size = len(common)
        if not (chosen[size:].strip() and rejected[size:].strip()):
            raise DataError(
                f"the row has no '{prompt}', and one of chosen and rejected is how the other"
                " begins: nothing is left of it behind what they share"
            )
        return (
            Dialogue(messages=(), text=(common, chosen[size:])),
            Dialogue(messages=(), text=(common, rejected[size:])),
        )
    if isinstance(before, str):
        head: tuple[Message, ...] = ({"role": "user", "content": before},)
    else:
        head = parse_messages(before)

    def side(text: str) -> Dialogue:
        return Dialogue(
            messages=(*head, {"role": "assistant", "content": text}),
            learn_from=len(head),
            text=(before, text) if isinstance(before, str) else None,
        )

    return side(chosen), side(rejected)


def _read_messages(
    before: object, chosen: tuple[Message, ...], rejected: tuple[Message, ...], prompt: str
) -> tuple[Dialogue, Dialogue]:
    starts = {chosen[0]["role"], rejected[0]["role"]}
    if before is None or starts != {"assistant"}:
        size = _common_length(chosen, rejected)
        if not size:
            raise DataError("chosen and rejected do not begin with the same message")
        _check_repeated(before, chosen[:size], prompt)
    else:
        is_text = isinstance(before, str)
        head = ({"role": "user", "content": before},) if is_text else parse_messages(before)
        size, chosen, rejected = len(head), (*head, *chosen), (*head, *rejected)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if len(side) == size:
            raise DataError(f"'{name}' has no message behind what both begin with")
        if side[size]["role"] != "assistant":
            raise DataError(
                f"chosen and rejected part at message {size + 1} of '{name}', which is the"
                f" {side[size]['role']}'s; what is compared begins with the assistant's turn"
            )
    return (
        Dialogue(messages=chosen, learn_from=size),
        Dialogue(messages=rejected, learn_from=size),
    )


def _check_repeated(before: object, head: tuple[Message, ...], prompt: str) -> None:
    """A prompt beside whole conversations must be the one that they repeat."""
    if before is None:
        return
    said = [message["content"].strip() for message in head]
    asked = [{"content": before}] if isinstance(before, str) else parse_messages(before)
    if not all(message["content"].strip() in said for message in asked):
        raise DataError(
            f"'{prompt}' is not among the messages that chosen and rejected begin with; leave the"
            " column out, or give in chosen and rejected the assistant's turn alone"
        )


def _tokenise(chosen: Dialogue, rejected: Dialogue, template: ChatTemplate, row: int) -> Pair:
    sides = []
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        samples = tokenise(dialogue, template)
        if len(samples) > 1:
            raise DataError(
                f"'{name}' has {len(samples)} assistant turns and the chat template"
                f" ({template.name}) rewrites earlier ones, so they are no single completion; put"
                " all but the last into the prompt"
            )
        sides.append(samples[0])
    if sides[0] == sides[1]:
        raise DataError("chosen and rejected are the same after templating")
    (chosen_ids, chosen_mask), (rejected_ids, rejected_mask) = sides
    heads = [ids[: mask.index(True)] for ids, mask in sides]
    size = _common_length(*heads)
    if not size:
        raise DataError("nothing stands before the completions: there is no prompt token")
    return Pair(
        context_ids=torch.tensor(chosen_ids[:size], dtype=torch.int64),
        chosen_ids=torch.tensor(chosen_ids[size:], dtype=torch.int64),
        chosen_mask=torch.tensor(chosen_mask[size:], dtype=torch.bool),
        rejected_ids=torch.tensor(rejected_ids[size:], dtype=torch.int64),
        rejected_mask=torch.tensor(rejected_mask[size:], dtype=torch.bool),
        row=row,
    )


def _common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common_text(one: str, other: str) -> str:
    """What both begin with, without a blank at its end: that belongs to the completions."""
    return one[: _common_length(one, other)].rstrip(" ")


def _notes(num_implicit_texts: int, template: ChatTemplate) -> tuple[str, ...]:
    if not num_implicit_texts or template.source is None:
        return ()
    return (
        f"{num_implicit_texts:,} rows have no prompt of their own: what their texts begin with is"
        " taken as it stands, without the chat template",
    )


def _nothing_left(
    rows: Rows, bad: BadRows, lengths: list[int], max_tokens: int, longest_at: str
) -> str:
    if not lengths:
        return f"{rows.source}: all {bad.num} rows are bad; the first is {bad.messages[0]}"
    return (
        f"{rows.source}: all {len(lengths)} pairs are longer than {max_tokens} tokens (the "
        f"shortest has {min(lengths)}, the longest, {longest_at}, {max(lengths)}); raise "
        "model.max_tokens"
    )
