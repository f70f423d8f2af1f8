"""Trusted test code on one side, an untrusted program on the other, a pipe of plain values between.

The tests run in a sandbox of their own and never share a process with the program: a call of the
program is a line out and a line in, and only plain values cross. An object that cannot travel (a
tree node that the program's own class made) is a `Remote` here: it can be called, read, set and
handed back, but it is equal to nothing and neither true nor false, so it can satisfy no assertion.
What the program does to its copy of an argument is not seen here: else it could clear the list that
the expected value is computed from.
"""

from __future__ import annotations

import builtins
import json
import os
from types import ModuleType
from typing import Any, Protocol

from sparring.rewards.sandbox.loading import run_module
from sparring.rewards.sandbox.values import Equality, Handle, NotPlainError, decode, encode, matches


class _Reply(Protocol):
    def send(self, document: Any) -> None:
        """Write one line."""


class RemoteError(Exception):
    """The program's call failed: it raised, ended, or sent what is not a value."""


class _Stop(BaseException):
    """The verdict is settled; the rest of the tests need not run."""


class Link:
    """Sends commands to the program and takes its answers, in turn."""

    def __init__(self, reply: _Reply, commands_descriptor: int) -> None:
        self._reply = reply
        self._answers = os.fdopen(commands_descriptor, "rb", closefd=False)
        self.num_calls = 0

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """One command, one answer; raises what the program raised, if it is a built-in error."""
        self._reply.send({"command": command})
        line = self._answers.readline()
        answer = json.loads(line) if line else {"error": "the program ended", "kind": ""}
        if type(answer) is not dict:
            raise RemoteError("the program answered with something else")
        if "value" not in answer:
            kind = getattr(builtins, str(answer.get("kind")), None)
            text = str(answer.get("error"))
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    failure = kind(text)
                except TypeError:  # some take more arguments, as UnicodeDecodeError does
                    failure = RemoteError(text)
                raise failure
            raise RemoteError(text)
        return answer

    def wrap(self, document: Any) -> Any:
        """The value of an answer, handles turned into Remote objects."""
        value = decode(document)
        return self._wrapped(value)

    def _wrapped(self, value: Any) -> Any:
        if type(value) is Handle:
            return Remote(self, value.key)
        if type(value) in (list, tuple):
            return type(value)(self._wrapped(item) for item in value)
        if type(value) is dict:
            return {key: self._wrapped(item) for key, item in value.items()}
        return value


class Remote:
    """Something that lives in the program's process: its function, class or object."""

    __slots__ = ("_key", "_link")

    def __init__(self, link: Link, key: int | str) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_key", key)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it in the program's process, with copies of plain values."""
        link: Link = object.__getattribute__(self, "_link")
        link.num_calls += 1
        answer = link.ask(
            {
                "do": "call",
                "target": encode(self, keep=_key_of),
                "args": [encode(item, keep=_key_of) for item in args],
                "kwargs": {name: encode(item, keep=_key_of) for name, item in kwargs.items()},
            }
        )
        return link.wrap(answer["value"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        link: Link = object.__getattribute__(self, "_link")
        answer = link.ask({"do": "get", "target": encode(self, keep=_key_of), "name": name})
        return link.wrap(answer["value"])

    def __setattr__(self, name: str, value: Any) -> None:
        link: Link = object.__getattribute__(self, "_link")
        link.ask(
            {
                "do": "set",
                "target": encode(self, keep=_key_of),
                "name": name,
                "value": encode(value, keep=_key_of),
            }
        )

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        raise RemoteError("an object of the program is neither true nor false")


def _key_of(value: object) -> int | str:
    if type(value) is Remote:
        key: int | str = object.__getattribute__(value, "_key")
        return key
    raise NotPlainError(f"a test hands over a {type(value).__name__}, which does not travel")


class Score:
    """Counts assertions. `stop_early`: the first that fails settles everything."""

    def __init__(self, equality: Equality, *, stop_early: bool) -> None:
        self.passed = 0
        self.failed = 0
        self.first_failure = ""
        self._equality = equality
        self._stop_early = stop_early

    def equal(self, left: Any, right: Any) -> bool:
        """The assertion's `==`: by type and value for plain values, else Python's own."""
        if type(left) is Remote or type(right) is Remote:
            return left is right
        try:
            encode(right)
            return matches(right, encode(left), self._equality)
        except NotPlainError:
            return bool(left == right)

    def record(self, is_passed: object, source: str) -> None:
        """Count one assertion; `is_passed` is whatever its expression gave."""
        try:
            is_passed = bool(is_passed)
        except Exception:
            is_passed = False
        if is_passed:
            self.passed += 1
            return
        self.failed += 1
        self.first_failure = self.first_failure or source
        if self._stop_early:
            raise _Stop


def run_tests(
    module: ModuleType, request: dict[str, Any], reply: _Reply, commands_descriptor: int
) -> int:
    """Run a test program whose assertions were rewritten to `__record__`; send one verdict."""
    link = Link(reply, commands_descriptor)
    equality = Equality(*request["equality"])
    score = Score(equality, stop_early=request["stop_early"])
    vars(module).update(
        __remote__=lambda name: Remote(link, name),
        __equal__=score.equal,
        __record__=score.record,
    )
    error = ""
    try:
        run_module(module)
    except _Stop:
        pass
    except BaseException as failure:
        error = f"{type(failure).__name__}: {failure}"[:300]
    verdict = {
        "passed": score.passed,
        "failed": score.failed,
        "first_failure": score.first_failure[:300],
        "num_calls": link.num_calls,
        "error": error,
    }
    reply.send({"verdict": verdict})
    return 0
