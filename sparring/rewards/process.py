"""A child process that takes lines of JSON and answers with lines of JSON, under a wall clock.

The parent keeps the clock: whoever holds a LineProcess asks with a deadline and kills the whole
session of the child when it passes. The child sees its standard input end when the parent dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

START_SECONDS = 120.0
"""How long a child may take to start: imports on a busy machine, no work yet."""


class LineProcess:
    """`python -m module`, spoken to in lines of JSON. Not safe for use from two threads at once."""

    def __init__(
        self, command: Sequence[str], *, environment: Mapping[str, str] | None, quiet: bool
    ) -> None:
        """Start `command`. environment None: the parent's own. quiet: its standard error is
        dropped.
        """
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            env=None if environment is None else dict(environment),
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None, "a pipe was asked for"
        assert self._process.stdout is not None, "a pipe was asked for"
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
        self._received = bytearray()
        self._finalizer = weakref.finalize(self, _end, self._process)

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def send(self, message: Any, deadline: float) -> None:
        """Write one message. Raises TimeoutError past `deadline` (time.monotonic), EOFError if the
        child ended.
        """
        data = memoryview(json.dumps(message).encode() + b"\n")
        poller = select.poll()
        poller.register(self._stdin.fileno(), select.POLLOUT)
        poller.register(self._stdout.fileno(), select.POLLIN)
        while data:
            for descriptor, _ in _ready(poller, deadline):
                if descriptor == self._stdout.fileno():
                    self._read()
                    continue
                try:
                    data = data[os.write(descriptor, data[:65536]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError as error:
                    raise EOFError(self._ending()) from error

    def receive(self, deadline: float) -> Any:
        """Read one message. Raises TimeoutError past `deadline`, EOFError if the child ended."""
        poller = select.poll()
        poller.register(self._stdout.fileno(), select.POLLIN)
        scanned = 0
        while (end := self._received.find(b"\n", scanned)) < 0:
            scanned = len(self._received)
            _ready(poller, deadline)
            self._read()
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return json.loads(line)

    def kill(self) -> None:
        """End the child and everything in its session, and wait for it."""
        self._finalizer()

    def _read(self) -> None:
        try:
            chunk = os.read(self._stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return
        if not chunk:
            raise EOFError(self._ending())
        self._received += chunk

    def _ending(self) -> str:
        """How the child ended. It stays uncollected, so that its session can be killed by id."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        for _ in range(200):
            state = os.waitid(os.P_PID, self._process.pid, flags)
            if state is not None:
                killed = state.si_code != os.CLD_EXITED
                return f"{'killed by signal' if killed else 'ended with code'} {state.si_status}"
            time.sleep(0.01)
        return "closed its output"


def _ready(poller: select.poll, deadline: float) -> list[tuple[int, int]]:
    left = deadline - time.monotonic()
    ready = poller.poll(max(0.0, left) * 1000)
    if not ready and left <= 0:
        raise TimeoutError("the deadline passed")
    return ready


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # already gone; wait() still collects it
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def module_command(module: str) -> list[str]:
    """The command that runs `module` in a fresh interpreter of the same installation."""
    return [sys.executable, "-P", "-m", module]


def bare_environment() -> dict[str, str]:
    """An environment with this interpreter's import path and nothing of the user's."""
    return {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path if entry),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
    }
