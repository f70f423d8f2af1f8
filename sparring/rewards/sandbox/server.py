"""Starting and ending a fork server: a bare interpreter with a clean environment and one socket."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sparring.rewards.sandbox import run_directory
from sparring.rewards.sandbox.contain import FULL
from sparring.rewards.sandbox.namespaces import BOX

_START_SECONDS = 20.0
_STOP_SECONDS = 3.0
_FIRST_DYNAMIC_UID, _LAST_DYNAMIC_UID = 61184, 65519
"""Users that no account has (systemd keeps this range for services with a made-up user)."""

_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": BOX,
    "TMPDIR": BOX,
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONUTF8": "1",
}

# The package's other modules stay out: their names stand for folders alone.
_BOOT = """
import sys, types, json
root = json.loads(sys.argv[1])["root"]
for name, folder in (("sparring", root), ("sparring.rewards", root + "/rewards")):
    module = sys.modules[name] = types.ModuleType(name)
    module.__path__ = [folder]
from sparring.rewards.sandbox.zygote import main
sys.exit(main())
"""


class ServerError(OSError):
    """A fork server could not start, or not take a step of its level."""


class Server:
    """One fork server, used for one run at a time."""

    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, level: str, base: str
    ) -> None:
        self.process = process
        self.control = control
        self.level = level
        self.base = base

    @property
    def pid(self) -> int:
        """The process number on this machine."""
        return self.process.pid

    def close(self) -> None:
        """Let it end, with whatever still runs, collect it, and remove its folder."""
        self.control.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.base:
            run_directory.remove(self.base)  # the server did, unless it was killed


def start(level: str, *, packages: Sequence[str]) -> Server:
    """Start a fork server at exactly this level; raises ServerError where a step of it fails.

    packages: absolute folders that programs may import from.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uid = _FIRST_DYNAMIC_UID + secrets.randbelow(_LAST_DYNAMIC_UID - _FIRST_DYNAMIC_UID + 1)
    base = "" if level == FULL else tempfile.mkdtemp(prefix="sparring-sandbox-")
    if base and os.geteuid() == 0:
        os.chown(base, uid, uid)  # the server's own, to remove should this process be killed
    config = {
        "level": level,
        "base": base,
        "uid": uid,
        "packages": list(packages),
        "control": theirs.fileno(),
        "root": str(Path(__file__).resolve().parents[2]),
    }
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-P", "-S", "-B", "-c", _BOOT, json.dumps(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd="/",
            env=_ENVIRONMENT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        if base:
            os.rmdir(base)
        raise
    finally:
        theirs.close()
    server = Server(process, ours, level, base)
    try:
        reason = _failure(ours)
        if reason is not None:
            server.close()
            assert process.stderr is not None, "asked for above"
            complaint = process.stderr.read(4000).decode("utf-8", "replace").strip()
            raise ServerError(reason or complaint or "the fork server ended at its start")
    finally:
        if process.stderr is not None:
            process.stderr.close()
    return server


def _failure(control: socket.socket) -> str | None:
    """None if the server is ready; else its reason, empty where it ended without one."""
    control.settimeout(_START_SECONDS)
    try:
        message = control.recv(64 << 10)
    except TimeoutError:
        return f"the fork server was not ready after {_START_SECONDS:.0f} s"
    except ConnectionResetError:
        return ""
    finally:
        control.settimeout(None)
    if not message:
        return ""
    document = json.loads(message)
    return None if "ready" in document else str(document.get("failed"))
