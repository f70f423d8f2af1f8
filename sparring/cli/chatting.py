"""Talking to a model on the terminal: what `generate --chat` does once the model is open.

Answers go to standard output as they are written, all else to standard error. Lines come from the
terminal or, one message a line, from whatever standard input is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from sparring.cli.terminal import say
from sparring.errors import UserError

if TYPE_CHECKING:
    from sparring.train.conversation import Conversation

_FENCE = '"""'
_HELP = (
    "/new forgets the conversation, /exit ends it (so does Ctrl-D); Ctrl-C stops an answer."
    f" {_FENCE} opens a message of several lines, {_FENCE} closes it."
)


def talk(conversation: Conversation) -> None:
    """Messages in, answers out, until the messages end."""
    read = _reader()
    say(_HELP)
    while (message := _message(read)) is not None:
        if message in ("/exit", "/quit"):
            return
        if message == "/help":
            say(_HELP)
        elif message == "/new":
            conversation.clear()
            say("(a new conversation)")
        elif message:
            _answer(conversation, message)


def _answer(conversation: Conversation, message: str) -> None:
    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        rollout = conversation.answer(message, write)
    except UserError as error:
        say(f"{error} /new forgets the conversation.")
        return
    except KeyboardInterrupt:
        write("\n")
        say("(stopped)")
        return
    write("\n")
    if rollout.finish_reason == "length":
        say(f"(cut after {len(rollout.token_ids)} tokens; see --max-completion-tokens)")


def _reader() -> Callable[[str], str | None]:
    """A line without its end for a prompt, or None at the end of the messages."""
    if not sys.stdin.isatty():
        return lambda _: line.rstrip("\n") if (line := sys.stdin.readline()) else None
    with suppress(ImportError):  # a Python built without it reads lines all the same
        import readline  # noqa: F401 (arrow keys and history at input())

    def ask(prompt: str) -> str | None:
        try:
            return input(prompt)
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return None

    return ask


def _message(read: Callable[[str], str | None]) -> str | None:
    """One message: a line, or the lines between two fences."""
    line = read("> ")
    if line is None or not line.lstrip().startswith(_FENCE):
        return line if line is None else line.strip()
    lines = [line.lstrip().removeprefix(_FENCE)]
    while not lines[-1].rstrip().endswith(_FENCE):
        more = read(". ")
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines).rstrip().removesuffix(_FENCE).strip()
