"""One run seen from the trainer's side: its pipes, its bounds, and what came of it.

`drive` is one poll loop over one or several runs at once. It never waits on a program: input lies
in files in memory, output is read as it comes and only up to its cap, and whatever the program
does, the fork server ends it at the wall limit; if the server itself does not answer, the loop
gives up on it shortly after.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparring.rewards.sandbox.limits import Limits

Status = Literal[
    "ok",
    "error",
    "signal",
    "time_limit",
    "cpu_limit",
    "output_limit",
    "disk_limit",
    "stopped",
    "not_started",
    "lost",
]
"""ok: exit code 0; error: another exit code; stopped: ended by the caller; not_started: a step of
containment failed; lost: the fork server did not answer. These two say nothing of the program."""

_GRACE_SECONDS = 5.0
_CHUNK = 64 << 10
_MAX_MESSAGE = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """How one program ended. Text is decoded with replacement; `seconds` is wall time."""

    status: Status
    exit_code: int | None
    signal: int | None
    seconds: float
    cpu_seconds: float
    stdout: str
    stderr: str
    replies: tuple[Any, ...]
    is_truncated: bool
    level: str
    notes: tuple[str, ...] = ()

    @property
    def is_judged(self) -> bool:
        """Whether this result speaks of the program rather than of a broken sandbox."""
        return self.status not in ("not_started", "lost")


class Run:
    """A program in flight on one fork server. Made by `start`; ends in `result`."""

    def __init__(self, control: socket.socket, level: str, limits: Limits, tag: str) -> None:
        self.control = control
        self.level = level
        self.limits = limits
        self.number = secrets.randbits(48)
        self.is_over_limit = False
        self.is_stopped = False
        self.ending: dict[str, Any] | None = None
        self.is_lost = False
        self._tag = tag.encode()
        self._names: dict[int, str] = {}
        self._unread: list[int] = []
        self._bytes = {"stdout": bytearray(), "stderr": bytearray(), "reply": bytearray()}
        self._num_scanned = 0
        self._commands = -1
        self._unsent = bytearray()
        self._deadline = time.monotonic() + limits.wall_seconds + _GRACE_SECONDS

    def start(self, request: Mapping[str, Any], stdin: bytes, *, with_commands: bool) -> None:
        """Hand the request over and let the program begin. Raises OSError if the server is gone."""
        theirs: list[int] = []
        try:
            for content in (json.dumps(request).encode(), stdin):
                theirs.append(_memory_file(content))
            for name in ("stdout", "stderr", "reply"):
                ours, other = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                os.set_blocking(other, True)
                self._names[ours] = name
                theirs.append(other)
            if with_commands:
                other, self._commands = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
                os.set_blocking(other, True)
                theirs.append(other)
            order = {"run": self.number, "limits": self.limits.to_json()}
            socket.send_fds(self.control, [json.dumps(order).encode()], theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)

    def send(self, document: Any) -> None:
        """Queue one command line for the program."""
        self._unsent += json.dumps(document).encode() + b"\n"

    def stop(self) -> None:
        """Ask the server to end this run now."""
        if not self.is_stopped:
            self.is_stopped = True
            try:
                self.control.send(json.dumps({"kill": self.number}).encode())
            except OSError:
                self.is_lost = True

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self.ending is not None or self.is_lost

    def register(self, poller: select.poll) -> None:
        """Watch what may bring news."""
        for descriptor in self._names:
            poller.register(descriptor, select.POLLIN)
        poller.register(self.control.fileno(), select.POLLIN)
        if self._unsent and self._commands >= 0:
            poller.register(self._commands, select.POLLOUT)

    def attend(self, ready: set[int]) -> None:
        """Read, write and take note, after a poll."""
        for descriptor in [one for one in self._names if one in ready]:
            self._read(descriptor)
        if self._commands in ready:
            self._write()
        if self.control.fileno() in ready:
            self._hear()
        if not self.is_done and time.monotonic() > self._deadline:
            self.is_lost = True
        if self.is_done:
            for descriptor in list(self._names):
                while descriptor in self._names and self._read(descriptor):
                    pass

    def lines(self) -> list[Any]:
        """Reply lines that are complete and not yet taken: JSON that bears this run's tag."""
        found: list[Any] = []
        buffer = self._bytes["reply"]
        while (end := buffer.find(b"\n", self._num_scanned)) >= 0:
            line = bytes(buffer[self._num_scanned : end])
            self._num_scanned = end + 1
            if line.startswith(self._tag):
                try:
                    found.append(json.loads(line[len(self._tag) :]))
                except (ValueError, RecursionError):
                    continue
        return found

    def result(self, replies: Sequence[Any]) -> RunResult:
        """What came of it, once done; the descriptors are closed by `close`."""
        ending = self.ending or {"reason": "lost", "status": None, "cpu": 0.0, "seconds": 0.0}
        status, code, signal_number = self._judge(ending)
        notes = [*ending.get("notes", ())]
        if ending.get("failed"):
            notes.append(f"containment failed: {ending['failed']}")
        return RunResult(
            status=status,
            exit_code=code,
            signal=signal_number,
            seconds=ending["seconds"],
            cpu_seconds=ending["cpu"],
            stdout=self._bytes["stdout"].decode("utf-8", "replace"),
            stderr=self._bytes["stderr"].decode("utf-8", "replace"),
            replies=tuple(replies),
            is_truncated=self.is_over_limit,
            level=self.level,
            notes=tuple(notes),
        )

    def close(self) -> None:
        """Close the pipes."""
        for descriptor in [*self._names, *self._unread]:
            os.close(descriptor)
        self._names.clear()
        self._unread.clear()
        if self._commands >= 0:
            os.close(self._commands)
            self._commands = -1

    def _judge(self, ending: dict[str, Any]) -> tuple[Status, int | None, int | None]:
        if self.is_over_limit:
            return "output_limit", None, None
        reason = ending["reason"]
        if reason in ("lost", "time_limit", "disk_limit"):
            return reason, None, None
        if reason == "failed":
            return "not_started", None, None
        raw = ending["status"]
        if reason == "killed" or raw is None:
            return ("stopped" if self.is_stopped else "lost"), None, None
        if os.WIFEXITED(raw):
            code = os.WEXITSTATUS(raw)
            return ("error" if code else "ok"), code, None
        number = os.WTERMSIG(raw)
        # The kernel counts ticks against the limit; on a busy machine they overstate the time.
        if number == signal.SIGKILL and ending["cpu"] >= 0.5 * self.limits.cpu_seconds:
            return "cpu_limit", None, number
        return "signal", None, number

    def _read(self, descriptor: int) -> bool:
        """Take one chunk; over its cap the stream is dropped and the program ended."""
        name = self._names[descriptor]
        cap = self.limits.reply_bytes if name == "reply" else self.limits.output_bytes
        buffer = self._bytes[name]
        try:
            chunk = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        if not chunk or len(buffer) + len(chunk) > cap:
            buffer += chunk[: cap - len(buffer)]
            self._unread.append(descriptor)  # open, so that the program meets no broken pipe
            del self._names[descriptor]
            if chunk:
                self.is_over_limit = True
                self.stop()
            return False
        buffer += chunk
        return True

    def _write(self) -> None:
        try:
            sent = os.write(self._commands, self._unsent[:_CHUNK])
            del self._unsent[:sent]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it closed its end or is gone; its end will be told
            self._unsent.clear()

    def _hear(self) -> None:
        try:
            message = self.control.recv(_MAX_MESSAGE)
        except OSError:
            message = b""
        if not message:
            self.is_lost = True
            return
        document = json.loads(message)
        if document.get("run") == self.number:
            self.ending = document


def drive(
    runs: Sequence[Run],
    on_line: Callable[[Run, Any], None],
    on_turn: Callable[[], None] | None = None,
) -> None:
    """Attend to all runs until every one is done.

    on_line: takes each reply line. on_turn: is called after each round of reading and writing.
    """
    while not all(run.is_done for run in runs):
        poller = select.poll()
        for run in runs:
            if not run.is_done:
                run.register(poller)
        ready = {descriptor for descriptor, _ in poller.poll(250)}
        for run in runs:
            if not run.is_done:
                run.attend(ready)
                for line in run.lines():
                    on_line(run, line)
        if on_turn is not None:
            on_turn()


def _memory_file(content: bytes) -> int:
    """A descriptor to read `content` from, without a file system."""
    descriptor = os.memfd_create("input", os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
