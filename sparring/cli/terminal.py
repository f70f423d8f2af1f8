"""What every command does with its terminal: messages, JSON lines, files, errors, exit codes.

What a machine reads goes to standard output alone, what a person reads to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer

from sparring.errors import Interrupted, SparringError, UserError

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130


@contextmanager
def reporting(traceback: bool) -> Iterator[None]:
    """Every error as one message on standard error and an exit code: the last resort."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(FAILED) from None
    except typer.Exit:
        raise
    except Interrupted as error:
        fail(error, f"{error}; go on with --resume", traceback, error.exit_code)
    except KeyboardInterrupt as error:
        fail(error, "interrupted", traceback, INTERRUPTED)
    except UserError as error:
        fail(error, f"{type(error).__name__}: {error}", traceback, WRONG_INPUT)
    except SparringError as error:
        fail(error, f"{type(error).__name__}: {error}", traceback, FAILED)
    except Exception as error:  # noqa: BLE001 (the last resort: shown in full, never swallowed)
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            remedy = "lower train.micro_batch_tokens, rollout.kv_memory or run.memory"
            fail(error, f"out of memory: {error}; {remedy}", traceback, FAILED)
        fail(error, f"a fault in Sparring: {type(error).__name__}: {error}", True, FAILED)


def fail(error: BaseException, message: str, traceback: bool, code: int) -> None:
    """Say the message, with the traceback where it is wanted, and end with the code."""
    if traceback:
        tracebacks.print_exception(error, file=sys.stderr)
    say(message)
    raise typer.Exit(code) from None


@contextmanager
def opened(name: str) -> Iterator[TextIO | None]:
    """A file that takes its name only when all is written; None where no name is given."""
    if not name:
        yield None
        return
    path = Path(name)
    partial = path.with_name(f".{path.name}.partial")
    try:
        file = partial.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(f"{path.absolute()} cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int, int], None] | None]:
    """A line on the terminal that follows sampling; nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:

        def follow(num_finished: int, num_all: int, num_tokens: int) -> None:
            status.update(f"{what}: {num_finished} of {num_all} completions, {num_tokens} tokens")

        yield follow


def show_before_and_after(summary: Mapping[str, Any]) -> None:
    """The evaluations of a finished run as a table, where it had any."""
    rows = {name: summary[name] for name in ("before", "after") if summary.get(name)}
    if rows:
        say(table(rows))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Evaluations by name as aligned text."""
    lines = [f"{'':10}{'accuracy':>9}  {'95% interval':^17}{'n':>6}{'greedy':>9}{'tokens':>8}"]
    for name, found in rows.items():
        greedy = "" if found.get("greedy") is None else f"{found['greedy']:.1%}"
        lines.append(
            f"{name:10}{found['accuracy']:>9.1%}  {interval(found):^17}{found['n']:>6}{greedy:>9}"
            f"{found['mean_tokens']:>8.1f}"
        )
    return "\n".join(lines)


def interval(found: Mapping[str, Any]) -> str:
    """A 95% interval in percent."""
    return f"{found['low']:.1%} to {found['high']:.1%}"


def emit(row: Mapping[str, Any], target: TextIO) -> None:
    """One JSON line."""
    is_unicode = (getattr(target, "encoding", "") or "").lower().replace("-", "") == "utf8"
    print(json.dumps(row, ensure_ascii=not is_unicode, default=str), file=target)


def say(text: str) -> None:
    """A line for people."""
    print(text, file=sys.stderr, flush=True)
