"""How a run ends when it is asked to: SIGINT and SIGTERM become `Interrupted` at a safe point.

Long phases that change no weights (rollouts, rewards, evaluation) run inside `interruptible()` and
are left at once. Everything else runs to its end, and `check()` between phases raises. A second
signal ends the process on the spot; checkpoints are written atomically, so the last stays whole.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sparring.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interruptions:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; use as a context manager around a run.

    Outside the main thread Python cannot install handlers; signals then keep their own effect.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._inside = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            sys.stderr.write("\nInterrupted again: ending now; the last checkpoint is intact.\n")
            sys.stderr.flush()
            os._exit(EXIT_CODES[signal.Signals(number)])
        self._signal = number
        if self._inside:
            self._inside = False
            raise self._error()
        sys.stderr.write("\nInterrupted: finishing this step, then writing a checkpoint.\n")
        sys.stderr.flush()

    def _error(self) -> Interrupted:
        number = signal.Signals(self._signal or signal.SIGINT)
        return Interrupted(f"the run was ended by {number.name}", exit_code=EXIT_CODES[number])

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self._signal is not None:
            raise self._error()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A phase that changes no weights and may be left at any point."""
        self.check()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
