"""What the contained process does with a program: the five ways to run one.

- script: as __main__, with standard input and output.
- value: as __main__, and the value of a final expression comes back (the Python tool).
- calls: load it, then call functions with inputs that came along; each output comes back.
- serve: load it, then answer calls that come one by one over a pipe.
- tests: trusted test code, which calls a program that is served in another sandbox.

Only inputs come in. What goes out is typed JSON, a line each, that starts with the run's tag; the
tag guards against stray output, not against lies: a lie, too, would have to be the right value.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from sparring.rewards.sandbox.loading import VALUE_NAME, prepare_module, run_module
from sparring.rewards.sandbox.remote import run_tests
from sparring.rewards.sandbox.values import Handle, NotPlainError, decode, encode

_MAX_ERROR = 500


class Reply:
    """The way out: one JSON line after another on a descriptor of its own."""

    def __init__(self, descriptor: int, tag: str) -> None:
        self.descriptor = descriptor
        self.tag = tag.encode()
        self._dumps = json.dumps
        self._write = os.write

    def send(self, document: Any) -> None:
        """Write one line; blocks while the other side does not read."""
        line = self.tag + self._dumps(document).encode() + b"\n"
        while line:
            line = line[self._write(self.descriptor, line) :]


def run(request: dict[str, Any], *, reply_descriptor: int, commands_descriptor: int) -> int:
    """Do what the request asks and return the exit code of the process."""
    reply = Reply(reply_descriptor, request["tag"])
    text = bytes.fromhex(request["program"])
    mode = request["mode"]
    is_main = mode in ("script", "value")
    module = prepare_module(
        text, "__main__" if is_main else "program", keep_last_value=mode == "value"
    )
    if mode == "tests":
        return run_tests(module, request, reply, commands_descriptor)
    try:
        run_module(module)
    except SystemExit as error:
        if is_main:
            return _exit_code(error)
        reply.send({"load": f"SystemExit: {error}"[:_MAX_ERROR]})
        return 1
    except BaseException as error:
        _print_traceback(error)
        reply.send({"load": describe(error)})
        return 1
    if mode == "value":
        _send_value(module, reply)
    elif mode == "calls":
        for index, call in enumerate(request["calls"]):
            reply.send({"index": index, **_call(module, call)})
    elif mode == "serve":
        _serve(module, reply, commands_descriptor)
    return 0


def finish(code: int) -> None:
    """End the process at once where no thread and no exit handler is left to wait for.

    Taking an interpreter down in order costs more than all the rest of a short run; so where
    nothing could tell the difference, only output is flushed. Otherwise this returns.
    """
    threading = sys.modules.get("threading")
    if atexit._ncallbacks() or (threading is not None and threading.active_count() > 1):
        return
    vars(sys.modules["__main__"]).clear()  # its objects' finalisers run, as at any exit
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        try:
            if stream is not None:
                stream.flush()
        except Exception:
            code = code or 1
    os._exit(code)


def describe(error: BaseException) -> str:
    """The error's class and text, shortened; never raises, whatever the error's own text does."""
    try:
        text = str(error)
    except BaseException:
        text = "(no text)"
    return f"{type(error).__name__}: {text}"[:_MAX_ERROR]


def _exit_code(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """As Python prints it, without the frames of this harness and of the import system."""
    frame = error.__traceback__
    while frame is not None and not frame.tb_frame.f_code.co_filename.endswith("program.py"):
        frame = frame.tb_next
    traceback.print_exception(type(error), error, frame, limit=-20)


def _send_value(module: ModuleType, reply: Reply) -> None:
    if VALUE_NAME not in vars(module):
        return
    value = vars(module)[VALUE_NAME]
    try:
        text = repr(value)[:10_000]
    except BaseException as error:
        text = f"(repr failed: {describe(error)})"
    try:
        reply.send({"repr": text, "value": encode(value)})
    except (NotPlainError, RecursionError):
        reply.send({"repr": text})


def _find(module: ModuleType, name: str) -> Callable[..., Any]:
    """A function of the program, or a method of its class Solution."""
    if hasattr(module, name):
        found = getattr(module, name)
    elif hasattr(module, "Solution"):
        found = getattr(module.Solution(), name)
    else:
        raise NameError(f"the program defines no {name!r}")
    if not callable(found):
        raise TypeError(f"{name!r} is not a function")
    function: Callable[..., Any] = found
    return function


def _call(module: ModuleType, call: dict[str, Any]) -> dict[str, Any]:
    try:
        function = _find(module, call["function"])
        arguments = [decode(item) for item in call["args"]]
        keywords = {name: decode(item) for name, item in call["kwargs"].items()}
        return {"value": encode(function(*arguments, **keywords))}
    except BaseException as error:
        return {"error": describe(error)}


def _serve(module: ModuleType, reply: Reply, commands_descriptor: int) -> None:
    """Answer calls until the pipe ends. Objects that do not travel stay here under a number."""
    kept: list[Any] = []

    def keep(value: object) -> int:
        kept.append(value)
        return len(kept) - 1

    def resolve(value: Any) -> Any:
        if type(value) is Handle:
            key = value.key
            return kept[key] if isinstance(key, int) else _find(module, key)
        if type(value) in (list, tuple, set, frozenset):
            return type(value)(resolve(item) for item in value)
        if type(value) is dict:
            return {resolve(key): resolve(item) for key, item in value.items()}
        return value

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        target = resolve(decode(command["target"]))
        if command["do"] == "get":
            return {"value": encode(getattr(target, command["name"]), keep=keep)}
        if command["do"] == "set":
            setattr(target, command["name"], resolve(decode(command["value"])))
            return {"value": None}
        arguments = [resolve(decode(item)) for item in command["args"]]
        keywords = {name: resolve(decode(item)) for name, item in command["kwargs"].items()}
        return {"value": encode(target(*arguments, **keywords), keep=keep)}

    reply.send({"ready": True})
    with os.fdopen(commands_descriptor, "rb", closefd=False) as commands:
        for line in commands:
            try:
                result = answer(json.loads(line))
            except BaseException as error:
                result = {"error": describe(error), "kind": type(error).__name__}
            reply.send(result)
