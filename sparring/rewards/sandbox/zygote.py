"""The fork server: a bare interpreter that forks one contained process per run.

It is started with a clean environment and one socket, before it has seen anything, and never sees
a program: a run's request arrives as a descriptor that only the run's own process reads. It keeps
the wall clock, kills everything that a run started, and tells how the run ended. When the socket
closes it kills what is running and ends.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from sparring.rewards.sandbox import harness, namespaces, run_directory
from sparring.rewards.sandbox.contain import (
    FULL,
    RLIMITS,
    contain,
    die_with_parent,
    interpreter_paths,
    prepare_server,
)
from sparring.rewards.sandbox.limits import Limits
from sparring.rewards.sandbox.syscalls import PR_SET_CHILD_SUBREAPER, Kernel

_MAX_MESSAGE = 64 << 10
_MAX_DESCRIPTORS = 6
_FIRST_FREE = 64
_WATCH_SECONDS = 0.25
_REAP_SECONDS = 2.0
_PRELOADED = """
    bisect collections copy functools heapq itertools json math operator random re string typing
"""


class Server:
    """State of one fork server: its level, where runs live, and the socket to the trainer."""

    def __init__(self, control: socket.socket, config: dict[str, Any]) -> None:
        self.control = control
        self.level: str = config["level"]
        self.base: str = config["base"]
        self.uid: int = config["uid"]
        try:
            self.kernel: Kernel | None = Kernel()
        except OSError:
            if self.level != RLIMITS:
                raise
            self.kernel = None
        self.owns_user = False
        self.packages: list[str] = config["packages"]
        self.readable = [*interpreter_paths(), *self.packages]

    def prepare(self) -> None:
        """Take the steps that all runs share. Raises OSError."""
        self.owns_user = prepare_server(self.kernel, self.level, self.readable, uid=self.uid)

    def serve(self) -> None:
        """Answer one request after the other until the socket closes."""
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(
                    self.control, _MAX_MESSAGE, _MAX_DESCRIPTORS
                )
            except ConnectionResetError:
                return
            if not message:
                return
            request = json.loads(message)
            if "run" not in request:
                continue  # a late order to end a run that has ended by itself
            result = self._run(request, descriptors)
            try:
                self.control.send(json.dumps(result).encode())
            except (BrokenPipeError, ConnectionResetError):
                return

    def _run(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        limits = Limits(**request["limits"])
        notes: list[str] = []
        directory = namespaces.BOX
        if self.level != FULL:
            directory = os.path.join(self.base, os.urandom(12).hex())
            os.mkdir(directory, 0o700)
        status_in, status_out = os.pipe2(os.O_CLOEXEC)
        started = time.monotonic()
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(status_in)
            self.control.close()
            self._become_program(server, limits, directory, descriptors, status_out)
        os.close(status_out)
        for descriptor in descriptors:
            os.close(descriptor)
        reason = self._wait(pid, request["run"], started + limits.wall_seconds, limits, directory)
        seconds = time.monotonic() - started
        raw_status: int | None
        raw_status, cpu_seconds = self._reap(pid, notes)
        with os.fdopen(status_in, "rb") as status:
            lines = [json.loads(line) for line in status.read(_MAX_MESSAGE).splitlines()]
        reported: dict[str, Any] = {}
        for line in lines:
            reported.update(line)
        if self.level != FULL:
            try:
                run_directory.remove(directory)
            except OSError as error:
                notes.append(f"the run's directory could not be removed: {error}")
        if "failed" in reported:
            reason = "failed"
        elif self.level == FULL:
            raw_status = reported.get("status")
            cpu_seconds = reported.get("cpu", cpu_seconds)
        return {
            "run": request["run"],
            "reason": reason,
            "failed": reported.get("failed", ""),
            "status": raw_status,
            "cpu": cpu_seconds,
            "seconds": seconds,
            "notes": notes,
        }

    def _wait(self, pid: int, run: int, deadline: float, limits: Limits, directory: str) -> str:
        """Wait for the end of the run, whatever brings it; say what did."""
        ended = os.pidfd_open(pid)
        try:
            poller = select.poll()
            poller.register(ended, select.POLLIN)
            poller.register(self.control.fileno(), select.POLLIN)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return "time_limit"
                watch = left if self.level == FULL else min(left, _WATCH_SECONDS)
                events = [descriptor for descriptor, _ in poller.poll(watch * 1000 + 1)]
                if ended in events:
                    return "exit"
                if events:
                    message = self.control.recv(_MAX_MESSAGE)
                    if not message or json.loads(message).get("kill") == run:
                        return "killed"
                elif self.level != FULL and run_directory.is_over(
                    directory, max_bytes=limits.disk_bytes, max_files=limits.max_files
                ):
                    return "disk_limit"
        finally:
            os.close(ended)

    def _reap(self, pid: int, notes: list[str]) -> tuple[int, float]:
        """Kill what is left of the run and collect it: (wait status of `pid`, its CPU seconds)."""
        for kill in (os.kill, os.killpg):
            try:
                kill(pid, signal.SIGKILL)  # at the full level PID 1 of the run dies with it
            except ProcessLookupError:
                continue  # no group was made yet
        _, status, usage = os.wait4(pid, 0)
        deadline = time.monotonic() + _REAP_SECONDS
        while True:
            try:
                if self.level == FULL:
                    os.wait4(-1, 0)
                    continue
                for child in _children():
                    os.kill(child, signal.SIGKILL)
                child, _, _ = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return status, usage.ru_utime + usage.ru_stime
            if child == 0:
                if time.monotonic() > deadline:
                    notes.append("processes of the run could not be ended")
                    return status, usage.ru_utime + usage.ru_stime
                time.sleep(0.001)

    def _become_program(
        self,
        server: int,
        limits: Limits,
        directory: str,
        descriptors: list[int],
        status_out: int,
    ) -> None:
        """In the child: contain this process, run the program, and never return."""
        try:
            status_out = fcntl.fcntl(status_out, fcntl.F_DUPFD, _FIRST_FREE)
            die_with_parent(self.kernel)
            if os.getppid() != server:
                os._exit(70)
            if self.level == FULL:
                assert self.kernel is not None, "the full level exists only with a kernel table"
                namespaces.enter_for_run(
                    self.kernel, disk_bytes=limits.disk_bytes, max_files=limits.max_files
                )
                self._split_off_init(status_out)
            else:
                os.setsid()
                os.chdir(directory)
            if self.level != FULL:
                os.environ["HOME"] = os.environ["TMPDIR"] = directory
            request_file, has_commands = _arrange(descriptors)
            with os.fdopen(request_file, "rb") as file:
                request = json.loads(file.read())
            contain(
                self.kernel,
                self.level,
                limits,
                readable=self.readable,
                directory=directory,
                has_own_process_count=self.owns_user,
            )
        except BaseException as error:
            os.write(status_out, json.dumps({"failed": f"{error}"[:1000]}).encode() + b"\n")
            os._exit(70)
        os.close(status_out)
        os.closerange(5 if has_commands else 4, 4096)
        code = harness.run(request, reply_descriptor=3, commands_descriptor=4)
        harness.finish(code)
        raise SystemExit(code)  # as a script ends: exit handlers, threads, flushed output

    def _split_off_init(self, status_out: int) -> None:
        """Fork the namespace's PID 1, which forks the program and reaps; returns in the program."""
        init = os.fork()
        if init != 0:
            os.closerange(0, status_out)
            os.closerange(status_out, 4096)
            os.waitpid(init, 0)
            os._exit(0)
        die_with_parent(self.kernel)
        program = os.fork()
        if program == 0:
            die_with_parent(self.kernel)
            os.setsid()
            return
        os.closerange(0, status_out)
        os.closerange(status_out + 1, 4096)
        while True:
            child, status, usage = os.wait4(-1, 0)
            if child == program:
                break
        report = {"status": status, "cpu": usage.ru_utime + usage.ru_stime}
        os.write(status_out, json.dumps(report).encode() + b"\n")
        os._exit(0)


def _arrange(descriptors: list[int]) -> tuple[int, bool]:
    """Put the standard streams at 0, 1, 2, the reply at 3, commands at 4; return the request's."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, _FIRST_FREE) for descriptor in descriptors]
    request, *streams = high
    for target, source in enumerate(streams):
        os.dup2(source, target, inheritable=False)
    return request, len(streams) > 4


def _children() -> list[int]:
    """This process's children, orphans of the run included, where the kernel lists them."""
    path = f"/proc/self/task/{os.getpid()}/children"
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [int(word) for word in file.read().split()]


def _volunteer_for_oom() -> None:
    """If memory runs out, programs go first and the trainer last. Inherited by every run."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError as error:  # a /proc that is absent or read-only: the kernel then decides
        print(f"oom_score_adj: {error}", file=sys.stderr)


def main() -> int:
    """Set up, say so, serve. The only argument is a JSON object."""
    config = json.loads(sys.argv[1])
    control = socket.socket(fileno=config["control"])
    control.set_inheritable(False)
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _volunteer_for_oom()
    sys.path[:] = [path for path in sys.path if path != config["root"]]
    try:
        for name in _PRELOADED.split():  # what programs usually import, once for all runs
            importlib.import_module(name)
        server = Server(control, config)
        server.prepare()
        sys.path.extend(server.packages)
        if server.level == FULL:
            child = os.fork()
            if child != 0:
                control.close()
                os.waitpid(child, 0)
                return 0
            die_with_parent(server.kernel)
        elif server.kernel is not None:
            server.kernel.prctl(PR_SET_CHILD_SUBREAPER, 1)
    except OSError as error:
        control.send(json.dumps({"failed": f"{error}"}).encode())
        return 1
    gc.freeze()
    control.send(json.dumps({"ready": os.getpid()}).encode())
    server.serve()
    if server.base:
        run_directory.remove(server.base)
    return 0
