"""A Python tool for models that compute while they think: code in; output and last value out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparring.rewards.sandbox.limits import Limits
from sparring.rewards.sandbox.runner import Sandbox
from sparring.rewards.sandbox.runs import Status
from sparring.rewards.sandbox.values import NotPlainError, decode

_MAX_HASHED = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonResult:
    """What a piece of code printed and what its last line was worth.

    status: as `RunResult.status`. value: the last expression's value where it is a plain one, else
    None. value_text: its repr, "" where the code ends in no expression. Everything here was written
    by the program: show it, never trust it.
    """

    status: Status
    stdout: str
    stderr: str
    value: Any
    value_text: str
    seconds: float
    is_truncated: bool


def run_python(
    code: str, *, sandbox: Sandbox, stdin: str = "", limits: Limits | None = None
) -> PythonResult:
    """Run `code` from an empty state in the sandbox; never raises for what the code does."""
    result = sandbox.run(code, mode="value", stdin=stdin, limits=limits)
    value, text = None, ""
    for reply in result.replies:
        if isinstance(reply, dict) and isinstance(reply.get("repr"), str):
            text = reply["repr"]
            try:
                value = decode(reply.get("value"), max_hashed=_MAX_HASHED)
            except NotPlainError:
                value = None
    return PythonResult(
        status=result.status,
        stdout=result.stdout,
        stderr=result.stderr,
        value=value,
        value_text=text,
        seconds=result.seconds,
        is_truncated=result.is_truncated,
    )
