"""Conversations for supervised training: rows become token ids and a mask of what is learned.

Loss falls on what the assistant writes and nowhere else: on each of its turns from behind the
header (and behind a prefill such as an opened think block, which generation too finds in its
prompt) up to and including the token that ends the turn. Generation markers of a template are not
needed and make no difference.

Each assistant turn is rendered with its own generation prompt. Where that prompt's tokens begin
with everything written so far, the turn goes on in the same sample. Where they do not, because the
template rewrites history (Qwen3 drops earlier thinking) or the tokenizer joins letters over the
seam, the sample ends and the turn opens a new one: so every turn is learned behind exactly the
tokens that the model is given when it has to write that turn. A row may become several samples. A
turn that does not begin with the template's prefill (one with thinking, where the template puts an
empty think block) is learned behind the generation prompt without the prefill. A turn without
thinking is learned behind the template's empty think block; where the template only opens one,
closing it is learned first.

Which columns hold the conversation, in the order in which they are looked for:

    messages                       role/content
    conversations                  ShareGPT: from/value (or role/content), `system` beside it
    prompt, completion             both text, or both lists of messages
    instruction, input, output     alpaca, with `system` and `history` ([question, answer] pairs)
    query, response                the same in the words of ms-swift
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.data.chat import ChatTemplate, as_template, no_template, parse_messages
from sparring.data.prompts import bad_row_lines, too_long_line
from sparring.data.rows import BadRows, Row, Rows
from sparring.errors import DataError
from sparring.types import Message

NO_END = (
    "the tokenizer has no end token and the template writes none, so a model could never learn to "
    "stop; set eos_token in tokenizer_config.json"
)
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_EMPTY_THINK = re.compile(r"<think>\s*(</think>\s*)?\Z")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversation:
    """One sample: token_ids [R] int64, loss_mask [R] bool (True: learn to write this token).

    weight: of each of its tokens in the loss. row: index of the row it came from.
    """

    token_ids: Tensor
    loss_mask: Tensor
    weight: float = 1.0
    row: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConversationSet:
    """The samples of one data set, and what became of its rows.

    num_rows: rows that were there, unreadable ones included. num_bad, bad: rows skipped, and the
    first of them in words. num_split: rows that became several samples because their template
    rewrites history. num_too_long: samples dropped because they have more than max_tokens tokens;
    longest: tokens of the longest sample found, longest_at: its row's place. is_ordered: as of
    PromptSet.
    """

    conversations: tuple[Conversation, ...]
    source: str
    num_rows: int
    num_bad: int
    bad: tuple[str, ...]
    num_split: int
    num_too_long: int
    longest: int
    max_tokens: int
    template: ChatTemplate
    longest_at: str = ""
    is_ordered: bool = False

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        return self.conversations[index]

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)

    def report(self) -> list[str]:
        """Lines for people: how many samples there are and what was left out."""
        learned = sum(int(sample.loss_mask.sum()) for sample in self.conversations)
        lines = [
            f"{self.source}: {len(self.conversations):,} samples of {self.num_rows:,} rows, "
            f"{learned:,} tokens to learn"
        ]
        if self.num_split:
            lines.append(
                f"  {self.num_split:,} rows are several samples each: the template rewrites history"
            )
        if self.num_too_long:
            lines.append(
                too_long_line(self.num_too_long, self.max_tokens, self.longest, self.longest_at)
            )
        return lines + bad_row_lines(self.num_bad, self.bad)


def load_conversations(
    rows: Rows,
    tokenizer: Any,
    *,
    max_tokens: int,
    template: str | ChatTemplate = "auto",
    system_prompt: str = "",
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    weight_column: str = "",
    bad_rows: str = "error",
) -> ConversationSet:
    """Tokenise the conversations of `rows` and mark what is learned.

    max_tokens: a longer sample is dropped and counted, never cut. template, system_prompt: as in
    `load_prompts`. Without a template (template = "none", or "auto" where the tokenizer has none)
    prompt and completion text are joined as they stand, and the end token is added where it is
    missing. weight_column: a column with a number per row, "" for 1.

    Raises DataError: unknown columns, a bad row under bad_rows = "error" (with file and line; an
    empty completion and a conversation without an assistant turn are bad rows), messages without a
    chat template, no end token, or no sample left within max_tokens.
    """
    read = dialogue_reader(rows, prompt_column, completion_column)
    if weight_column and weight_column not in rows.columns:
        raise DataError(
            f"{rows.source} has no column '{weight_column}'; its columns are: "
            f"{', '.join(rows.columns)}"
        )
    template = as_template(tokenizer, template, system_prompt)
    if not template.end_ids:
        raise DataError(NO_END)
    bad = BadRows(bad_rows)
    kept: list[Conversation] = []
    lengths: list[int] = []
    num_split, longest_at = 0, ""
    for index, row in enumerate(rows):
        try:
            dialogue = read(row)
            weight = _read_weight(row, weight_column)
        except DataError as error:
            bad.add(rows.where(index), str(error))
            continue
        if template.source is None and dialogue.text is None:
            raise DataError(f"{rows.where(index)}: {no_template(template.name)}")
        try:
            samples = tokenise(dialogue, template)
        except DataError as error:
            bad.add(rows.where(index), str(error))
            continue
        num_split += len(samples) > 1
        found = [len(ids) for ids, _ in samples]
        if max(found) > max(lengths, default=0):
            longest_at = rows.where(index)
        lengths += found
        kept += [
            Conversation(
                token_ids=torch.tensor(ids, dtype=torch.int64),
                loss_mask=torch.tensor(mask, dtype=torch.bool),
                weight=weight,
                row=index,
            )
            for ids, mask in samples
            if len(ids) <= max_tokens
        ]
    if not kept:
        raise DataError(_nothing_left(rows, bad, lengths, max_tokens, longest_at))
    return ConversationSet(
        conversations=tuple(kept),
        source=rows.source,
        num_rows=len(rows) + rows.num_bad,
        num_bad=rows.num_bad + bad.num,
        bad=(*rows.bad, *bad.messages),
        num_split=num_split,
        num_too_long=len(lengths) - len(kept),
        longest=max(lengths),
        max_tokens=max_tokens,
        template=template,
        longest_at=longest_at,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dialogue:
    """A row in one form: its messages, the first one that may bear loss, and its plain text."""

    messages: tuple[Message, ...]
    learn_from: int = 0
    text: tuple[str, str] | None = None


def dialogue_reader(
    rows: Rows, prompt_column: str = "prompt", completion_column: str = "completion"
) -> Callable[[Row], Dialogue]:
    """What reads a row of these columns; the DataError of an unknown set of columns lists them."""
    columns = set(rows.columns)
    if "messages" in columns:
        return lambda row: Dialogue(messages=parse_messages(_field(row, "messages")))
    if "conversations" in columns:
        return _read_sharegpt
    if {prompt_column, completion_column} <= columns:
        return lambda row: _read_completion(row, prompt_column, completion_column)
    if {"instruction", "output"} <= columns:
        return lambda row: _read_alpaca(row, "instruction", "output")
    if {"query", "response"} <= columns:
        return lambda row: _read_alpaca(row, "query", "response")
    raise DataError(
        f"{rows.source} holds no conversations: its columns are {', '.join(rows.columns)}; "
        f"expected messages, or conversations, or {prompt_column} and {completion_column}, or "
        "instruction and output, or query and response"
    )


def _field(row: Row, name: str) -> Any:
    if row.get(name) is None:
        raise DataError(f"the row has no '{name}' (its columns: {', '.join(row)})")
    return row[name]


def _text_field(row: Row, name: str, *, optional: bool = False) -> str:
    value = row.get(name) if optional else _field(row, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"'{name}' is a {type(value).__name__}; it is text")
    return value


def _system(row: Row) -> tuple[Message, ...]:
    text = _text_field(row, "system", optional=True)
    return ({"role": "system", "content": text},) if text.strip() else ()


def _read_completion(row: Row, prompt_column: str, completion_column: str) -> Dialogue:
    prompt, completion = _field(row, prompt_column), _field(row, completion_column)
    sides: list[tuple[Message, ...]] = []
    for name, value, role in (
        (prompt_column, prompt, "user"),
        (completion_column, completion, "assistant"),
    ):
        if isinstance(value, str):
            if not value.strip():
                raise DataError(f"'{name}' is empty")
            sides.append(({"role": role, "content": value},))
        elif isinstance(value, Sequence) and not isinstance(value, bytes):
            sides.append(parse_messages(value))
        else:
            raise DataError(
                f"'{name}' is a {type(value).__name__}; it is text or a list of messages"
            )
    is_text = isinstance(prompt, str) and isinstance(completion, str)
    return Dialogue(
        messages=sides[0] + sides[1],
        learn_from=len(sides[0]),
        text=(prompt, completion) if is_text else None,
    )


def _read_alpaca(row: Row, asked: str, answered: str) -> Dialogue:
    question, output = _text_field(row, asked), _text_field(row, answered)
    extra = _text_field(row, "input", optional=True)
    if extra.strip():
        question = f"{question}\n{extra}" if question.strip() else extra
    if not question.strip():
        raise DataError(f"'{asked}' is empty")
    if not output.strip():
        raise DataError(f"'{answered}' is empty")
    messages = list(_system(row))
    for pair in row.get("history") or ():
        if (
            not isinstance(pair, Sequence)
            or len(pair) != 2
            or not all(isinstance(side, str) for side in pair)
        ):
            raise DataError("'history' is a list of [question, answer] pairs of text")
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    text = None if messages else (question, output)
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": output})
    return Dialogue(messages=tuple(messages), text=text)


def _read_sharegpt(row: Row) -> Dialogue:
    turns = _field(row, "conversations")
    if isinstance(turns, Sequence) and not isinstance(turns, str | bytes):
        turns = [_sharegpt_turn(turn) for turn in turns]
    messages = parse_messages(turns)
    system = () if messages[0]["role"] == "system" else _system(row)
    return Dialogue(messages=system + messages)


def _sharegpt_turn(turn: object) -> object:
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    speaker = turn["from"]
    if speaker not in SHAREGPT_ROLES:
        raise DataError(
            f"a turn is 'from' {speaker!r}; known speakers are {', '.join(SHAREGPT_ROLES)}"
        )
    return {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}


def _read_weight(row: Row, weight_column: str) -> float:
    if not weight_column:
        return 1.0
    value = _field(row, weight_column)
    try:
        weight = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"'{weight_column}' is {value!r}; it is a number") from error
    if not (math.isfinite(weight) and weight > 0):
        raise DataError(f"'{weight_column}' is {value!r}; a weight is a positive number")
    return weight


def tokenise(dialogue: Dialogue, template: ChatTemplate) -> list[tuple[list[int], list[bool]]]:
    """Samples of one row as (token ids, mask); each ends with a token that bears loss.

    Raises DataError for an empty turn of the assistant's, or one that the template changes.
    """
    if template.source is None:
        assert dialogue.text is not None, "messages without a template are refused before"
        prompt, completion = dialogue.text
        ids = template.encode_plain(prompt)
        learned = _with_end(template.encode_more(prompt, ids, completion), template)
        return [(ids + learned, [False] * len(ids) + [True] * len(learned))]
    samples: list[tuple[list[int], list[bool]]] = []
    for number, message in enumerate(dialogue.messages):
        if message["role"] != "assistant" or number < dialogue.learn_from:
            continue
        prompt_ids, learned = _turn(dialogue.messages[: number + 1], template)
        ids, mask = samples[-1] if samples else ([], [])
        if ids and prompt_ids[: len(ids)] == ids:
            between = prompt_ids[len(ids) :]
            ids += between + learned
            mask += [False] * len(between) + [True] * len(learned)
        else:
            mask = [False] * len(prompt_ids) + [True] * len(learned)
            samples.append((prompt_ids + learned, mask))
    if not samples:
        raise DataError("the conversation has no assistant turn to learn from")
    return samples


def _turn(messages: tuple[Message, ...], template: ChatTemplate) -> tuple[list[int], list[int]]:
    """Ids that the last message is written behind, and ids of that message to its end token."""
    content = messages[-1]["content"]
    if not content.strip() and not messages[-1].get("tool_calls"):
        raise DataError(f"message {len(messages)}, the assistant's, is empty")
    if not template.with_system_prompt(messages[:-1]):
        raise DataError("the conversation begins with the assistant's turn")
    opened = template.render(messages[:-1], add_generation_prompt=True)
    whole = template.render(messages, add_generation_prompt=False).text
    prompt = opened.text
    if not whole.startswith(prompt):
        prompt = prompt.removesuffix(opened.prefill)
    if not whole.startswith(prompt):
        raise DataError(
            f"the chat template ({template.name}) writes the turn in message {len(messages)} "
            "differently from the generation prompt before it, so what is learned would not be "
            "what is generated; use another data.template"
        )
    target = whole[len(prompt) :]
    thought = _THOUGHT.search(content)
    has_thinking = "</think>" in content or bool(messages[-1].get("reasoning_content"))
    block = _EMPTY_THINK.search(opened.prefill)
    if block and prompt != opened.text and not has_thinking:
        if not block.group(1):
            target = ("" if opened.prefill.endswith("\n") else "\n") + "\n</think>\n\n" + target
        prompt = opened.text
    if thought and thought.group(1).strip() not in target:
        raise DataError(
            f"the chat template ({template.name}) drops the thinking of message {len(messages)}; "
            "use a data.template that keeps it"
        )
    prompt_ids = template.encode(prompt)
    learned = template.encode_more(prompt, prompt_ids, target)
    end = len(learned)
    while end and learned[end - 1] not in template.special_ids:
        end -= 1
    if end and not template.tokenizer.decode(learned[end:]).strip():
        learned = learned[:end]
    else:
        learned = _with_end(template.encode_more(prompt, prompt_ids, target.rstrip()), template)
    if len(learned) < 2:
        raise DataError(f"message {len(messages)}, the assistant's, is empty after templating")
    return prompt_ids, learned


def _with_end(ids: list[int], template: ChatTemplate) -> list[int]:
    return ids if ids and ids[-1] in template.end_ids else [*ids, template.end_ids[0]]


def _nothing_left(
    rows: Rows, bad: BadRows, lengths: list[int], max_tokens: int, longest_at: str
) -> str:
    if not lengths:
        return f"{rows.source}: all {bad.num} rows are bad; the first is {bad.messages[0]}"
    return (
        f"{rows.source}: all {len(lengths)} samples are longer than {max_tokens} tokens (the "
        f"shortest has {min(lengths)}, the longest, {longest_at}, {max(lengths)}); raise "
        "model.max_tokens"
    )
