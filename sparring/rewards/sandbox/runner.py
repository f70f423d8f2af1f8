"""The sandbox as the rest of the house sees it: a pool of fork servers that run untrusted programs.

    with Sandbox() as sandbox:
        result = sandbox.run("print(int(input()) + 1)", stdin="41")

It is no virtual machine: programs share the kernel with the trainer. On a machine with secrets,
run training in a container or account that has none.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparring.errors import RewardError, RunError
from sparring.rewards.sandbox import landlock, server
from sparring.rewards.sandbox.ladder import (
    LANDLOCK,
    LEVELS,
    PROBE,
    RLIMITS,
    SandboxLevel,
    find_fault,
)
from sparring.rewards.sandbox.limits import Limits
from sparring.rewards.sandbox.runs import Run, RunResult, drive
from sparring.rewards.sandbox.syscalls import Kernel
from sparring.rewards.sandbox.values import decode, encode

_PROBE_LIMITS = Limits(wall_seconds=10.0)


class Sandbox:
    """Runs programs, several at a time, each in a world of its own. Threads may share it.

    require: the weakest level that is good enough; "rlimits" isolates nothing and warns.
    num_workers: programs at a time, at least 2. limits: the default of every run. packages: folders
    that programs may import from (none: the standard library alone). strongest: where to enter the
    ladder. Raises RewardError where the machine offers no level that is good enough.
    """

    def __init__(
        self,
        *,
        require: str = LANDLOCK,
        num_workers: int = 2,
        limits: Limits | None = None,
        packages: Sequence[str] = (),
        strongest: str = LEVELS[0],
    ) -> None:
        if require not in LEVELS or strongest not in LEVELS:
            raise RewardError(
                f"no sandbox level {require if require not in LEVELS else strongest!r}; "
                f"there are {', '.join(LEVELS)}"
            )
        if num_workers < 2:
            raise RewardError(f"sandbox num_workers is {num_workers}; it must be 2 or more")
        self.limits = limits if limits is not None else Limits()
        self._packages = tuple(str(Path(folder).resolve()) for folder in packages)
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()
        self._idle: list[server.Server] = []
        self._finalizer = weakref.finalize(self, _shut_down, self._idle)
        try:
            self.level = self._climb(require, strongest)
            while len(self._idle) < num_workers:
                self._idle.append(self._start(self.level.name))
        except BaseException:
            self.close()
            raise
        if self.level.name == RLIMITS:
            warnings.warn(
                "the sandbox is at level 'rlimits': programs written by the model can read your "
                "files, use the network and end this process. Reasons: "
                + "; ".join(self.level.failures),
                RuntimeWarning,
                stacklevel=2,
            )

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return not self._finalizer.alive

    @property
    def server_pids(self) -> list[int]:
        """Process numbers of the fork servers that are idle now."""
        with self._condition:
            return [one.pid for one in self._idle]

    @property
    def server_folders(self) -> list[str]:
        """Where idle fork servers keep their runs' directories; none at the full level."""
        with self._condition:
            return [one.base for one in self._idle if one.base]

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every fork server and remove what they used. Runs in flight are ended."""
        with self._condition:
            self._finalizer()
            self._condition.notify_all()

    def run(
        self,
        program: str,
        *,
        mode: str = "script",
        stdin: str = "",
        calls: Sequence[Mapping[str, Any]] = (),
        limits: Limits | None = None,
    ) -> RunResult:
        """Run one program and say how it ended; replies are the lines its harness sent.

        mode "script": as __main__ with `stdin`. "value": the same, and the last expression's value.
        "calls": load it, then for each call {"function", "args", "kwargs"} one reply with "index"
        and "value" as typed JSON, or "error". Never raises for what the program does.
        """
        request = {"mode": mode, "calls": list(calls), "program": _source_bytes(program).hex()}
        with self._lease(1) as servers:
            return self._drive(servers, [(request, stdin, False)], limits)[0]

    def run_tests(
        self, program: str, tests: Mapping[str, Any], *, limits: Limits | None = None
    ) -> tuple[RunResult, RunResult]:
        """Run trusted tests in one sandbox against a program in another: (tests, program).

        tests: {"program": source, "equality": fields of Equality, "stop_early"}; see `remote.py`.
        """
        trusted = {**tests, "mode": "tests", "program": _source_bytes(tests["program"]).hex()}
        served = {"mode": "serve", "program": _source_bytes(program).hex()}
        with self._lease(2) as servers:
            jobs = [(trusted, "", True), (served, "", True)]
            results = self._drive(servers, jobs, limits)
        return results[0], results[1]

    def _drive(
        self,
        servers: list[server.Server],
        jobs: Sequence[tuple[dict[str, Any], str, bool]],
        limits: Limits | None,
    ) -> list[RunResult]:
        """Run one job on each server; two jobs are tests and their program, joined line by line."""
        limits = limits if limits is not None else self.limits
        runs: list[Run] = []
        replies: dict[int, list[Any]] = {}
        try:
            for one, (request, stdin, with_commands) in zip(servers, jobs, strict=True):
                tag = secrets.token_hex(16)
                run = Run(one.control, one.level, limits, tag)
                runs.append(run)
                replies[run.number] = []
                stream = stdin.encode("utf-8", "surrogatepass")
                try:
                    run.start({**request, "tag": tag}, stream, with_commands=with_commands)
                except OSError:
                    run.is_lost = True
            if len(runs) == 1:
                drive(runs, lambda run, line: replies[run.number].append(line))
            else:
                _Relay(runs[0], runs[1], replies).drive()
            return [run.result(replies[run.number]) for run in runs]
        finally:
            for index, run in enumerate(runs):
                run.close()
                if not run.is_done or run.is_lost:
                    servers[index] = self._replace(servers[index])

    @contextmanager
    def _lease(self, count: int) -> Iterator[list[server.Server]]:
        """Take `count` idle servers at once, in the order of asking."""
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            self._condition.wait_for(
                lambda: self.is_closed or (self._waiting[0] is ticket and len(self._idle) >= count)
            )
            self._waiting.remove(ticket)
            if self.is_closed:
                raise RunError("the sandbox is closed")
            taken = [self._idle.pop() for _ in range(count)]
            self._condition.notify_all()
        try:
            yield taken
        finally:
            self._give_back(taken)

    def _give_back(self, taken: list[server.Server]) -> None:
        with self._condition:
            self._idle.extend(taken)
            if self.is_closed:  # meanwhile
                _shut_down(self._idle)
            self._condition.notify_all()

    def _replace(self, broken: server.Server) -> server.Server:
        broken.process.kill()
        broken.close()
        try:
            return self._start(self.level.name)
        except server.ServerError as error:
            raise RunError(
                f"a fork server of the sandbox ended and cannot start again: {error}"
            ) from error

    def _start(self, level: str) -> server.Server:
        return server.start(level, packages=self._packages)

    def _climb(self, require: str, strongest: str) -> SandboxLevel:
        """Down from the strongest level to the first that passes its self-test."""
        failures: list[str] = []
        for level in LEVELS[LEVELS.index(strongest) : LEVELS.index(require) + 1]:
            try:
                one = self._start(level)
            except OSError as error:
                failures.append(f"{level}: {error}")
                continue
            self._idle.append(one)
            fault = self._self_test(level)
            if not fault:
                abi = 0 if level == RLIMITS else landlock.abi(Kernel())
                return SandboxLevel(name=level, landlock_abi=abi, failures=tuple(failures))
            failures.append(f"{level}: {fault}")
            self._idle.pop().close()
        raise RewardError(
            f"no sandbox as strong as {require!r} here; programs written by a model are not run. "
            + "; ".join(failures)
            + ". Allow unprivileged user namespaces or Landlock and seccomp; only on a machine "
            "with nothing to lose, ask for sandbox = 'rlimits'"
        )

    def _self_test(self, level: str) -> str:
        with tempfile.TemporaryDirectory(prefix="sparring-probe-") as folder:
            canary = Path(folder) / "canary"
            canary.write_text("canary")
            os.chmod(folder, 0o777)  # so that only the sandbox can be what refuses
            canary.chmod(0o666)
            arguments = [encode(value) for value in (str(canary), folder, os.getpid())]
            call = {"function": "probe", "args": arguments, "kwargs": {}}
            result = self.run(PROBE, mode="calls", calls=[call], limits=_PROBE_LIMITS)
        for reply in result.replies:
            if "value" in reply:
                return find_fault(level, decode(reply["value"]))
            return f"the self-test failed: {reply}"
        return f"the self-test ended with {result.status}: {' '.join(result.notes)}{result.stderr}"


class _Relay:
    """Carries lines between trusted tests and the program they call, in two sandboxes."""

    def __init__(self, tests: Run, program: Run, replies: dict[int, list[Any]]) -> None:
        self.tests = tests
        self.program = program
        self.replies = replies
        self.is_ready = False
        self.is_asking = False
        self.held: list[Any] = []

    def drive(self) -> None:
        """Attend to both until both have ended."""
        drive([self.tests, self.program], self._on_line, self._on_turn)

    def _on_line(self, run: Run, line: Any) -> None:
        if not isinstance(line, dict):
            return
        if run is self.tests:
            if "command" in line:
                self.is_asking = True
                self.held.append(line["command"])
            else:
                self.replies[run.number].append(line)
        elif not self.is_ready:
            self.is_ready = line.get("ready") is True
            self.replies[run.number].append(line)
        elif self.is_asking:
            self.is_asking = False
            self.tests.send(line)

    def _on_turn(self) -> None:
        if self.tests.is_done:
            self.program.stop()
        elif self.program.is_done:
            if self.is_asking:
                self.is_asking = False
                self.held.clear()
                self.tests.send({"error": "the program ended", "kind": ""})
        elif self.is_ready:
            for command in self.held:
                self.program.send(command)
            self.held.clear()


def _shut_down(idle: list[server.Server]) -> None:
    """End fork servers."""
    while idle:
        idle.pop().close()


def _source_bytes(text: str) -> bytes:
    """UTF-8; a lone surrogate stays one, and the program's interpreter then refuses the text."""
    return text.encode("utf-8", "surrogatepass")


def run_level(
    require: str = LANDLOCK, *, strongest: str = LEVELS[0], packages: Sequence[str] = ()
) -> SandboxLevel:
    """The level that this machine offers, by self-test, for a run's records. Raises RewardError."""
    with Sandbox(require=require, strongest=strongest, packages=packages) as sandbox:
        return sandbox.level
