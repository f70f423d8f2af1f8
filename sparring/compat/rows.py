"""Data sets of the ecosystem as the sets that the loops learn from, by TRL's rules.

Text is tokenised as it stands, behind the tokenizer's begin token; messages go through the chat
template. Which of the two a data set holds, its first row says. Rows are cut at their end where TRL
cuts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from sparring.data.chat import ChatTemplate, build_template
from sparring.data.conversations import (
    Conversation,
    ConversationSet,
    dialogue_reader,
    load_conversations,
)
from sparring.data.pairs import Pair, PairSet, load_pairs
from sparring.data.prompts import PromptSet, load_prompts
from sparring.data.rows import Row, Rows, build_rows
from sparring.errors import DataError, UserError

UNCUT = 2**31
"""A limit that no row meets: rows are cut afterwards."""

PER_ROW = frozenset({"tools", "chat_template_kwargs"})
"""Columns by which TRL renders each row in its own way."""

OFFERED = (
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),
    *("prefills", "finish_reasons", "group_ids", "judged"),
)
"""Keywords that rewards are called with, so that no column may have one of these names."""


def read_rows(dataset: Any, name: str) -> Rows:
    """The rows of a datasets.Dataset or of a list of dictionaries. Raises UserError or DataError.

    Images, rows that come as they are made, and several splits at once are refused.
    """
    if dataset is None:
        raise UserError(f"{name} is None; give a datasets.Dataset or a list of dictionaries")
    if isinstance(dataset, str):
        from sparring.data.named import read_rows as read_named

        return read_named(dataset, split="train", bad_rows="error")
    if isinstance(dataset, Mapping):
        raise UserError(
            f"{name} holds several splits ({', '.join(map(str, dataset))}); give one of them"
        )
    if not hasattr(dataset, "__len__"):
        raise UserError(
            f"{name} is a {type(dataset).__name__} without a length, and epochs are counted from"
            " it; give a datasets.Dataset or list(...) of it"
        )
    rows = build_rows(dataset, name=name)
    images = [column for column in ("image", "images") if column in rows.columns]
    if images:
        raise DataError(f"{name} has a column '{images[0]}': models read text alone; remove it")
    for index, row in enumerate(rows if PER_ROW & set(rows.columns) else ()):
        for column in PER_ROW:
            if row.get(column):
                raise DataError(
                    f"{rows.where(index)} has '{column}', which is refused: the chat template is"
                    " the same for all rows; write what it would add into the messages"
                )
    return rows


def is_conversational(rows: Rows) -> bool:
    """TRL's rule: the first known column of the first row holds a list of messages with roles."""
    for column in ("prompt", "chosen", "rejected", "completion", "messages"):
        value = rows[0].get(column)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes) and value:
            return isinstance(value[0], Mapping) and "role" in value[0]
        if value is not None:
            return False
    return False


def template_for(
    tokenizer: Any, options: Mapping[str, Any] | None, *, name: str, has_messages: bool
) -> ChatTemplate:
    """The conversation format for rows of messages, or the one of plain text.

    name: what the model's own run recorded, "none" where that run learned from plain text.
    """
    if not has_messages:
        return build_template(tokenizer, "none")
    return build_template(tokenizer, "auto" if name == "none" else name, options=options)


def read_prompts(
    rows: Rows, template: ChatTemplate, *, max_prompt_tokens: int, longest: int | None
) -> PromptSet:
    """Prompts for GRPO; `longest`: drop those over it though the model has room for more."""
    taken = [name for name in rows.columns if name in OFFERED]
    if taken:
        raise DataError(
            f"{rows.source} has a column '{taken[0]}', a name that every reward is given; rename it"
        )
    limit = max_prompt_tokens if longest is None else min(longest, max_prompt_tokens)
    return load_prompts(
        rows,
        template.tokenizer,
        reference_column="",
        template=template,
        max_prompt_tokens=limit,
    )


def read_pairs(
    rows: Rows,
    template: ChatTemplate,
    max_tokens: int,
    *,
    longest_prompt: int | None = None,
    longest_answer: int | None = None,
) -> PairSet:
    """Preference pairs, cut behind max_tokens tokens of prompt and answer together.

    longest_prompt: a pair with a longer one is dropped and counted. longest_answer: answers are cut
    behind so many tokens.
    """
    found = load_pairs(rows, template.tokenizer, template=template, max_tokens=UNCUT)
    prompt, answer = longest_prompt or max_tokens, longest_answer or max_tokens
    kept = [
        _cut_pair(pair, min(max_tokens, len(pair.context_ids) + answer))
        for pair in found.pairs
        if len(pair.context_ids) <= prompt
    ]
    left = tuple(pair for pair in kept if pair is not None)
    if not left:
        raise DataError(
            f"{rows.source}: every prompt alone fills max_length = {max_tokens}; raise it"
        )
    dropped = len(found.pairs) - len(left)
    return replace(found, pairs=left, num_too_long=dropped, max_tokens=max_tokens)


def _cut_pair(pair: Pair, max_tokens: int) -> Pair | None:
    room = max_tokens - len(pair.context_ids)
    if room < 1 or not (pair.chosen_mask[:room].any() and pair.rejected_mask[:room].any()):
        return None
    return replace(
        pair,
        chosen_ids=pair.chosen_ids[:room],
        chosen_mask=pair.chosen_mask[:room],
        rejected_ids=pair.rejected_ids[:room],
        rejected_mask=pair.rejected_mask[:room],
    )


def read_dialogues(
    rows: Rows,
    template_by_kind: Callable[[bool], ChatTemplate],
    *,
    text_field: str,
    completion_only: bool | None,
    assistant_only: bool,
    max_tokens: int,
) -> ConversationSet:
    """Rows for SFT with TRL's masks, cut behind max_tokens tokens.

    A text and whole conversations are learned token by token, unless assistant_only; of a prompt
    and its completion the completion alone, unless completion_only is False.
    """
    has_messages = is_conversational(rows)
    has_prompt = {"prompt", "completion"} <= set(rows.columns)
    is_text = not has_messages and not has_prompt and text_field in rows.columns
    if not is_text and "conversations" in rows.columns:
        has_messages = True
    template = template_by_kind(has_messages)
    if completion_only and not has_prompt:
        raise UserError(
            "SFTConfig: completion_only_loss = True needs rows with prompt and completion; for"
            " conversations set assistant_only_loss = True, for texts train_on_responses_only"
        )
    if assistant_only and (is_text or not has_messages):
        raise UserError(
            "SFTConfig: assistant_only_loss = True needs rows of messages, and these hold text;"
            " give the messages, or use train_on_responses_only"
        )
    learns_all = not assistant_only and (completion_only is False or not has_prompt)
    if is_text:
        found = _read_whole(rows, template, lambda row: _text(row, text_field))
    elif learns_all and (has_messages or has_prompt):
        found = _read_whole(rows, template, _whole_text(rows, template))
    else:
        found = load_conversations(rows, template.tokenizer, template=template, max_tokens=UNCUT)
    return _cut(found, max_tokens)


def _text(row: Row, name: str) -> tuple[str, bool]:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"'{name}' is {'empty' if isinstance(value, str) else 'no text'}")
    return value, True


def _whole_text(rows: Rows, template: ChatTemplate) -> Callable[[Row], tuple[str, bool]]:
    read = dialogue_reader(rows)

    def whole(row: Row) -> tuple[str, bool]:
        dialogue = read(row)
        if template.source is None and dialogue.text is not None:
            return "".join(dialogue.text), True
        return template.render(dialogue.messages, add_generation_prompt=False).text, False

    return whole


def _read_whole(
    rows: Rows, template: ChatTemplate, whole: Callable[[Row], tuple[str, bool]]
) -> ConversationSet:
    """Every token of a row is learned but the first; plain text gets its end token."""
    samples = []
    for index, row in enumerate(rows):
        try:
            text, is_plain = whole(row)
        except DataError as error:
            raise DataError(f"{rows.where(index)}: {error}") from error
        ids = template.encode_plain(text) if is_plain else template.encode(text)
        if is_plain and template.end_ids and ids[-1:] != [template.end_ids[0]]:
            ids.append(template.end_ids[0])
        mask = torch.ones(len(ids), dtype=torch.bool)
        mask[0] = False
        samples.append(
            Conversation(token_ids=torch.tensor(ids, dtype=torch.int64), loss_mask=mask, row=index)
        )
    return ConversationSet(
        conversations=tuple(samples),
        source=rows.source,
        num_rows=len(rows),
        num_bad=0,
        bad=(),
        num_split=0,
        num_too_long=0,
        longest=max(len(sample.token_ids) for sample in samples),
        max_tokens=UNCUT,
        template=template,
    )


def _cut(found: ConversationSet, max_tokens: int) -> ConversationSet:
    """Samples cut behind max_tokens tokens; one with nothing left to learn is dropped."""
    kept = [
        replace(
            sample,
            token_ids=sample.token_ids[:max_tokens],
            loss_mask=sample.loss_mask[:max_tokens],
        )
        for sample in found.conversations
    ]
    return with_samples(found, kept, max_tokens=max_tokens)


def with_samples(
    found: ConversationSet, samples: Sequence[Conversation], *, max_tokens: int
) -> ConversationSet:
    """The set with other samples, less those without a token to learn; DataError if all."""
    left = tuple(sample for sample in samples if bool(sample.loss_mask[1:].any()))
    if not left:
        raise DataError(f"{found.source}: no row has a token to learn within {max_tokens} tokens")
    dropped = len(samples) - len(left)
    return replace(found, conversations=left, num_too_long=dropped, max_tokens=max_tokens)


def responses_only(
    found: ConversationSet, instruction_part: str, response_part: str
) -> ConversationSet:
    """The set with loss on what stands between a response part and the next instruction part.

    Raises DataError where no row has the response part.
    """
    template = found.template
    starts = _spellings(template, response_part)
    stops = _spellings(template, instruction_part)
    samples = []
    for sample in found.conversations:
        ids = sample.token_ids.tolist()
        mask = torch.zeros(len(ids), dtype=torch.bool)
        learning = False
        place = 0
        while place < len(ids):
            if size := _match(ids, place, starts):
                learning, place = True, place + size
                continue
            if _match(ids, place, stops):
                learning = False
            mask[place] = learning
            place += 1
        samples.append(replace(sample, loss_mask=mask))
    if not any(bool(sample.loss_mask.any()) for sample in samples):
        raise DataError(
            f"{found.source}: no row has the response part {response_part!r}; give the text that"
            " the chat template writes before an answer"
        )
    return with_samples(found, samples, max_tokens=found.max_tokens)


def _spellings(template: ChatTemplate, part: str) -> list[list[int]]:
    """Token ids of a part: as it stands, and without the white space that may join what follows."""
    tokenizer = template.tokenizer
    texts = dict.fromkeys([part, part.rstrip(), part.strip()])
    found = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts if text]
    return sorted((ids for ids in found if ids), key=len, reverse=True)


def _match(ids: list[int], place: int, spellings: list[list[int]]) -> int:
    return next((len(one) for one in spellings if ids[place : place + len(one)] == one), 0)
