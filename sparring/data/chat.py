"""Conversations into the text and the tokens that a model reads.

A `ChatTemplate` is a tokenizer with one choice made: its own chat template, one of ours for base
models, a .jinja file, or none. Rendering always goes through the tokenizer's sandboxed
`apply_chat_template`. What a template writes on the assistant's behalf after the header of its turn
(an opened or an empty think block) is found and handed on as the prefill. No rows are read here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparring.errors import DataError
from sparring.types import Message

# For base models: a plain-text frame in the manner of DeepSeek-R1 (arXiv 2501.12948), which asks
# for structure and gives no hint on how to think. Policies are trained on these very words.
_FRAME = (
    "A User puts a question to an Assistant. The Assistant first works it out between <think> and "
    "</think>, then gives the User its answer between <answer> and </answer>."
)
_THINK = (
    r"{{ '" + _FRAME + r"\n' }}"
    r"{% for message in messages %}"
    r"{% if message.role == 'system' %}{{ message.content + '\n' }}"
    r"{% elif message.role == 'user' %}{{ '\nUser: ' + message.content + '\n' }}"
    r"{% elif message.role == 'assistant' %}"
    r"{{ 'Assistant: ' + message.content + (eos_token or '') + '\n' }}"
    r"{% else %}{{ raise_exception('it knows the roles system, user and assistant, not '"
    r" + message.role) }}{% endif %}"
    r"{% endfor %}"
)
_CHATML = (
    r"{% for message in messages %}"
    r"{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    r"{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES: Mapping[str, str] = {
    "think": _THINK + r"{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    "think-open": _THINK + r"{% if add_generation_prompt %}{{ 'Assistant: <think>\n' }}{% endif %}",
    "chatml": _CHATML,
}
NAMES = ("auto", "none", *TEMPLATES)

_THINK_TAG = re.compile(r"<\|?(?:\w+:)?(?:think|thinking|reasoning|thought)\|?>|\[THINK\]")
_THINK_END = re.compile(r"<think>\s*(?:</think>\s*)?\Z")
_PLAIN = "Xq7 plain"
_THOUGHT = "<think>\nZk9\n</think>\n\nWv3"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rendered:
    """Text of a conversation; prefill: the end of it that speaks for the assistant, or ""."""

    text: str
    prefill: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChatTemplate:
    """A tokenizer and how conversations are written for it; made by `build_template`.

    name: what the user asked for. source: the Jinja text, None where conversations cannot be
    rendered. system_prompt: put before every conversation that has no system message of its own.
    options: further arguments of the template, such as enable_thinking. is_own: one of ours, which
    leaves the begin token to the tokenizer; any other template writes its own. header: what opens
    an assistant turn, None where that could not be found. begin_ids: what the tokenizer puts before
    plain text. end_ids: the tokens that may end an assistant turn; generation must stop at them.
    """

    tokenizer: Any
    name: str
    source: str | None
    system_prompt: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    is_own: bool = False
    header: str | None = None
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    special_ids: frozenset[int] = frozenset()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
        """Text of `messages`, with the system prompt, and the prefill of an open assistant turn.

        Raises DataError where there is no template or the template refuses these messages.
        """
        if self.source is None:
            raise DataError(no_template(self.name))
        messages = self.with_system_prompt(messages)
        text = _apply(self, messages, add_generation_prompt)
        if not add_generation_prompt:
            return Rendered(text=text)
        closed = _apply(self, messages, False)
        return Rendered(text=text, prefill=_find_prefill(text, closed, self.header))

    def with_system_prompt(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """`messages` behind the system prompt; a system message of their own stays in its place."""
        if not self.system_prompt or (messages and messages[0]["role"] == "system"):
            return tuple(messages)
        return ({"role": "system", "content": self.system_prompt}, *messages)

    def render_text(self, text: str) -> Rendered:
        """A plain-text prompt: one user message where there is a template, else as it stands."""
        if self.source is None:
            return Rendered(text=text)
        return self.render([{"role": "user", "content": text}], add_generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text; nothing is cut."""
        if self.source is None or self.is_own:
            return self.encode_plain(text)
        return self._ids(text)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of text that no template has seen, behind the tokenizer's begin token."""
        ids, begin = self._ids(text), list(self.begin_ids)
        return ids if ids[: len(begin)] == begin else begin + ids

    def encode_more(self, text: str, ids: Sequence[int], more: str) -> list[int]:
        """Token ids of `more` where it follows `text`, whose ids are `ids`.

        Taken from the tokens of the whole where those begin with `ids`; where the tokenizer joins
        letters over the seam, `more` is tokenised by itself, which is what a model that was given
        `ids` can go on with.
        """
        whole = self.encode(text + more)
        if whole[: len(ids)] == list(ids):
            return whole[len(ids) :]
        # Behind a line break a tokenizer adds no space of its own, as some do at a beginning.
        anchor, anchored = self._ids("\n"), self._ids("\n" + more)
        if anchored[: len(anchor)] == anchor:
            return anchored[len(anchor) :]
        return self._ids(more)

    def _ids(self, text: str) -> list[int]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return list(encoded["input_ids"])


def build_template(
    tokenizer: Any,
    template: str = "auto",
    system_prompt: str = "",
    *,
    options: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """The conversation format that the recipe asks for.

    template: "auto" (the tokenizer's own; where it has none, plain text stays as it stands),
    "none", "think" (ours for base models), "think-open" (the same with <think> already opened),
    "chatml", or the path of a .jinja file. Raises DataError: an unknown name, a file that is
    missing or no template, ChatML without its tokens, a system prompt that has no place.
    """
    name, source, is_own = template, None, False
    if template == "auto":
        source = _own_template(tokenizer)
    elif template in TEMPLATES:
        source, is_own = TEMPLATES[template], True
    elif template != "none":
        source = _read_template(template)
    if source is None and system_prompt:
        raise DataError(
            f'data.system_prompt is set, but template = "{name}" has no place for it'
            f"{'' if name == 'none' else ' (the tokenizer has no chat template)'}; "
            'set data.template to "think", "chatml" or a .jinja file, or write it into the prompts'
        )
    plain = ChatTemplate(
        tokenizer=tokenizer,
        name=name,
        source=source,
        system_prompt=system_prompt,
        options=dict(options or {}),
        is_own=is_own,
        begin_ids=_begin_ids(tokenizer),
        special_ids=_special_ids(tokenizer),
    )
    if template == "chatml":
        _check_chatml(plain)
    probed = _probe(plain, template)
    if system_prompt:
        _check_system_prompt(probed)
    return probed


def as_template(
    tokenizer: Any, template: str | ChatTemplate, system_prompt: str = ""
) -> ChatTemplate:
    """A template given by name or file, or one already built, which has its own system prompt."""
    if isinstance(template, str):
        return build_template(tokenizer, template, system_prompt)
    if system_prompt not in ("", template.system_prompt):
        raise ValueError("a built template carries its own system prompt; build it with this one")
    return template


def parse_messages(value: object) -> tuple[Message, ...]:
    """A conversation as role/content messages; raises DataError saying what is wrong with it.

    Content that comes as a list of text parts is joined; keys without a value are dropped.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise DataError(f"the conversation is a {type(value).__name__}; it is a list of messages")
    if not value:
        raise DataError("the conversation is empty")
    return tuple(_parse_message(message, index) for index, message in enumerate(value, start=1))


def _parse_message(value: object, number: int) -> Message:
    if not isinstance(value, Mapping):
        raise DataError(f"message {number} is a {type(value).__name__}, not an object")
    message = {str(key): item for key, item in value.items() if item is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise DataError(
            f"message {number} has no 'role' (its keys: {', '.join(map(str, value)) or 'none'})"
        )
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, Sequence) and not isinstance(content, str | bytes):
        content = _join_parts(content, number)
    if not isinstance(content, str):
        raise DataError(
            f"message {number} ({role}) has 'content' of type {type(content).__name__}; it is text"
        )
    return {**message, "role": role, "content": content}


def _join_parts(parts: Sequence[object], number: int) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise DataError(f"message {number} has a part that is not text; only text is read")
        texts.append(text)
    return "".join(texts)


def _own_template(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(f"the tokenizer's chat templates cannot be used: {error}") from error


def _read_template(template: str) -> str:
    path = Path(template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.template {template!r} is neither a known name ({', '.join(NAMES)}) nor a "
            f"template file that can be read: {path.absolute()} ({error})"
        ) from error


def no_template(name: str) -> str:
    """What to say where messages meet no template."""
    why = 'template = "none" is set' if name == "none" else "the tokenizer has no chat template"
    return (
        f"the data holds messages, but {why}; set data.template to "
        '"think" (base models), "chatml" or a .jinja file, or give plain-text prompts'
    )


def _check_chatml(template: ChatTemplate) -> None:
    marks = ("<|im_start|>", "<|im_end|>")
    missing = [mark for mark in marks if len(template._ids(mark)) != 1]
    if missing:
        raise DataError(
            f'template = "chatml" needs the tokens {" and ".join(marks)}, and this tokenizer lacks '
            f'{" and ".join(missing)}; set data.template to "think" or to a .jinja file'
        )


def _check_system_prompt(template: ChatTemplate) -> None:
    question: Message = {"role": "user", "content": "Hi"}
    remedy = "write it into the prompts instead, or use another data.template"
    try:
        text = _apply(template, template.with_system_prompt([question]), True)
    except DataError as error:
        raise DataError(f"data.system_prompt cannot be used: {error}; {remedy}") from error
    if template.system_prompt.strip() not in text:
        raise DataError(
            f"data.system_prompt has no effect: the chat template ({template.name}) leaves system "
            f"messages out or changes them; {remedy}"
        )


def _apply(template: ChatTemplate, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    import jinja2

    try:
        text = template.tokenizer.apply_chat_template(
            list(messages),
            chat_template=template.source,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **template.options,
        )
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template ({template.name}) refuses these messages (roles: {roles}): {error}"
        ) from error
    return str(text)


def _find_prefill(text: str, closed: str, header: str | None) -> str:
    """The end of `text` behind the assistant's header; `closed` is `text` without an open turn."""
    if header is None or not text.startswith(closed):
        match = _THINK_END.search(text)
        return match.group() if match else ""
    opening = text[len(closed) :]
    if opening.startswith(header):
        prefill = opening[len(header) :]
    else:
        match = None if header.startswith(opening) else _THINK_TAG.search(opening)
        prefill = opening[match.start() :] if match else ""
    return prefill if prefill.strip() else ""


def _probe(template: ChatTemplate, name: str) -> ChatTemplate:
    """Learn from small conversations how an assistant turn begins and ends."""
    import jinja2

    eos = template.tokenizer.eos_token_id
    end_ids = () if eos is None else (int(eos),)
    if template.source is None:
        return replace(template, header=None, end_ids=end_ids)
    question: Message = {"role": "user", "content": "Hi"}
    answers: list[Message] = [{"role": "assistant", "content": text} for text in (_PLAIN, _THOUGHT)]
    try:
        asked = _apply(template, [question], False)
        plain, thought = (_apply(template, [question, answer], False) for answer in answers)
    except DataError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            raise DataError(
                f"data.template {name}:{error.__cause__.lineno}: {error.__cause__.message}"
            ) from error
        return replace(template, header=None, end_ids=end_ids)
    both = _common_prefix(plain, thought)
    header = both[len(_common_prefix(both, asked)) :]
    match = _THINK_TAG.search(header)
    header = header[: match.start()] if match else header
    _, found, tail = plain.partition(_PLAIN)
    ending = [token for token in template._ids(tail) if token in template.special_ids]
    if ending and ending[0] not in end_ids:
        end_ids = (ending[0], *end_ids)
    return replace(template, header=header if found else None, end_ids=end_ids)


def _common_prefix(one: str, other: str) -> str:
    pairs = enumerate(zip(one, other, strict=False))
    at = next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
    return one[:at]


def _begin_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer writes before plain text, found by tokenising a letter both ways."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start])
    return ()


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = (index for index, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset(added) | frozenset(tokenizer.all_special_ids)
