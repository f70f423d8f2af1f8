"""The levels of isolation, and the self-test that alone decides which of them this machine offers.

full               namespaces, Landlock, seccomp, rlimits
landlock+seccomp   the same without namespaces: what containers usually allow
rlimits            limits, a clean environment, a session of its own: NO isolation. A program can
                   read files, use the network and signal the trainer.
none               nothing runs
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparring.rewards.sandbox.contain import FULL, LANDLOCK, NONE, RLIMITS

LEVELS = (FULL, LANDLOCK, RLIMITS)
"""From the strongest to the weakest."""

__all__ = ["FULL", "LANDLOCK", "LEVELS", "NONE", "PROBE", "RLIMITS", "SandboxLevel", "find_fault"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLevel:
    """The level in force, for a run's records.

    name: one of LEVELS. landlock_abi: the kernel's version of Landlock, 0 without. failures: why
    each stronger level was not to be had.
    """

    name: str
    landlock_abi: int
    failures: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a plain mapping."""
        return asdict(self)


PROBE = """
import ctypes, os

def attempt(action):
    try:
        action()
    except OSError as error:
        return error.errno
    return 0

def make_socket():
    import socket
    socket.socket().close()

def raise_limit():
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))
    except ValueError:
        raise OSError(1, "refused")

def write_here():
    with open("probe.txt", "w") as file:
        file.write("x")
    os.remove("probe.txt")

def start_thread():
    import threading
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()

def probe(file, folder, process):
    try:
        import decimal, heapq, statistics
        library = ""
    except ImportError as error:
        library = str(error)
    return {
        "library": library,
        "write here": attempt(write_here),
        "start a thread": attempt(start_thread),
        "read a file": attempt(lambda: open(file).close()),
        "write a file": attempt(lambda: open(file, "a").close()),
        "make a file": attempt(lambda: os.close(os.open(folder + "/made", os.O_CREAT | os.O_EXCL))),
        "list a folder": attempt(lambda: os.listdir(folder)),
        "read an environment": attempt(lambda: open(f"/proc/{process}/environ").close()),
        "signal a process": attempt(lambda: os.kill(process, 0)),
        "open a socket": attempt(make_socket),
        "start a program": attempt(lambda: os.execv("/nonexistent", ["x"])),
        "enter a namespace": ctypes.CDLL(None, use_errno=True).unshare(0x10000000),
        "raise a limit": attempt(raise_limit),
        "user": os.geteuid(),
        "names": sorted(os.environ),
    }
"""
"""A harmless program that tries what must be refused: opening, signal 0, a socket, never more."""

_MUST_FAIL = (
    "read a file",
    "write a file",
    "make a file",
    "list a folder",
    "read an environment",
    "signal a process",
    "open a socket",
    "enter a namespace",
    "raise a limit",
)
_MUST_WORK = ("write here", "start a thread")
_EPERM = 1


def find_fault(level: str, found: Any) -> str:
    """What the probe's answer shows to be wrong with this level; empty if it is as it should be."""
    if not isinstance(found, dict):
        return "the self-test gave no answer"
    if found["library"]:
        return f"the standard library cannot be read inside: {found['library']}"
    for name in _MUST_WORK:
        if found[name] != 0:
            return f"a program cannot {name} (errno {found[name]})"
    if level == RLIMITS:
        return ""
    for name in _MUST_FAIL:
        if found[name] == 0:
            return f"a program can {name}"
    if found["start a program"] != _EPERM:
        return "a program can start another"
    if found["user"] == 0:
        return "a program runs as root"
    return ""
