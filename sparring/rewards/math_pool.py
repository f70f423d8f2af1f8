"""Worker processes that compare formulas, each under a wall clock that the parent keeps.

A formula can take any time and memory. So the parent waits at most `limit_seconds` for each pair,
then kills the worker and starts a fresh one: one bomb costs one respawn and its own verdict,
nothing else. Workers die with their parent.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparring.rewards.math_formula import Pair
from sparring.rewards.process import (
    START_SECONDS,
    LineProcess,
    bare_environment,
    module_command,
)

PATIENCE = 3
"""So many pairs of a batch may take the whole limit; what follows has a quarter of it."""

RECYCLE_AFTER = 500
"""Pairs that one worker compares before it is replaced: SymPy's caches only grow."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether an answer equals its reference; None where the reference is to blame.

    reason: why. is_late: the wall clock ended it.
    """

    verdict: bool | None
    reason: str
    is_late: bool = False


class MathPool:
    """Up to `num_workers` workers, started at their first use.

    limit_seconds: wall clock of one pair; a quarter of it once three pairs of a batch have run into
    it. budget_seconds: wall clock of a whole batch; pairs that it leaves over get None.
    """

    def __init__(
        self,
        *,
        num_workers: int = 2,
        limit_seconds: float = 3.0,
        budget_seconds: float = 25.0,
        recycle_after: int = RECYCLE_AFTER,
        module: str = "sparring.rewards.math_worker",
    ) -> None:
        self._limit, self._budget = limit_seconds, budget_seconds
        self._recycle_after = recycle_after
        self._module = module
        self._workers: list[Worker] = []
        self._num_workers = max(1, min(num_workers, os.cpu_count() or 1))
        self._lock = threading.Lock()
        self.num_spawned = 0

    def compare(self, pairs: Sequence[Pair]) -> list[Comparison]:
        """Compare each reference with its answer; equal pairs are compared once."""
        distinct = list(dict.fromkeys(pairs))
        if not distinct:
            return []
        with self._lock:
            results = self._run(distinct)
        return [results[pair] for pair in pairs]

    def close(self) -> None:
        """Kill the workers; a later compare() starts new ones."""
        with self._lock:
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def _run(self, pairs: Sequence[Pair]) -> dict[Pair, Comparison]:
        work: queue.SimpleQueue[Pair] = queue.SimpleQueue()
        for pair in pairs:
            work.put(pair)
        wanted = min(self._num_workers, len(pairs))
        while len(self._workers) < wanted:
            self._workers.append(Worker(self._module, self._limit, self._recycle_after))
        results: dict[Pair, Comparison] = {}
        deadline = time.monotonic() + self._budget
        arguments = (work, results, self._limit, deadline)
        threads = [
            threading.Thread(target=_drain, args=(worker, *arguments), daemon=True)
            for worker in self._workers[:wanted]
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.num_spawned = sum(worker.num_spawned for worker in self._workers)
        return results


class Worker:
    """One process at a time, replaced when it was killed, ended or has compared enough."""

    def __init__(self, module: str, limit_seconds: float, recycle_after: int) -> None:
        self._module, self._limit, self._recycle_after = module, limit_seconds, recycle_after
        self._process: LineProcess | None = None
        self._num_compared = 0
        self._known: set[str] = set()
        self._broken = ""
        self.num_spawned = 0

    def compare(self, pair: Pair, limit_seconds: float) -> Comparison:
        """Ask the process. Never raises: a worker that cannot start gives None with the reason."""
        if self._process is None and not self._broken:
            self._start()
        process = self._process
        if process is None:
            return Comparison(None, self._broken)
        reference = pair[0]
        deadline = time.monotonic() + limit_seconds
        try:
            process.send(pair, deadline)
            message = process.receive(deadline)
            if "verdict" not in message:  # the reference was read; now the answer
                self._known.add(reference)
                message = process.receive(deadline)
        except TimeoutError:
            self.stop()
            return self._blame(reference, f"took over {limit_seconds:g} s", is_late=True)
        except EOFError as error:
            self.stop()
            return self._blame(reference, f"ended the worker ({error})")
        self._num_compared += 1
        if self._num_compared >= self._recycle_after or message.get("recycle"):
            self.stop()
        return Comparison(message["verdict"], message["reason"])

    def stop(self) -> None:
        """Kill the process, if there is one."""
        if self._process is not None:
            self._process.kill()
        self._process, self._num_compared = None, 0

    def _blame(self, reference: str, what: str, *, is_late: bool = False) -> Comparison:
        if reference in self._known:
            return Comparison(False, f"the comparison {what}", is_late)
        return Comparison(None, f"reading the reference {what}", is_late)

    def _start(self) -> None:
        self.num_spawned += 1
        process = LineProcess(
            [*module_command(self._module), str(self._limit)],
            environment=bare_environment(),
            quiet=True,
        )
        try:
            hello: Any = process.receive(time.monotonic() + START_SECONDS)
        except (TimeoutError, EOFError) as error:
            hello = {"error": f"the math worker could not be started: {error}"}
        if "error" in hello:
            process.kill()
            self._broken = str(hello["error"])
        else:
            self._process = process


def _drain(
    worker: Worker,
    work: queue.SimpleQueue[Pair],
    results: dict[Pair, Comparison],
    limit_seconds: float,
    deadline: float,
) -> None:
    while True:
        try:
            pair = work.get_nowait()
        except queue.Empty:
            return
        if time.monotonic() > deadline:
            results[pair] = Comparison(None, "the time for this batch was used up before its turn")
            continue
        num_late = sum(result.is_late for result in list(results.values()))
        limit = limit_seconds if num_late < PATIENCE else limit_seconds / 4
        results[pair] = worker.compare(pair, limit)
