"""The steps by which one process of a run gives up its powers, per level, in an order that works.

Every step that a level names is taken or the program does not start: an OSError from here becomes
"not started", never a weaker run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sparring.rewards.sandbox import landlock, namespaces, seccomp
from sparring.rewards.sandbox.limits import Limits, apply_rlimits
from sparring.rewards.sandbox.syscalls import (
    CAP_DAC_READ_SEARCH,
    PR_SET_KEEPCAPS,
    PR_SET_PDEATHSIG,
    Kernel,
)

FULL = "full"
LANDLOCK = "landlock+seccomp"
RLIMITS = "rlimits"
NONE = "none"

_SIGKILL = 9


def interpreter_paths() -> list[str]:
    """What the interpreter reads while it runs: its own library, shared libraries, time zones."""
    paths = {sys.base_prefix + "/lib", sys.base_exec_prefix + "/lib"}
    paths |= {path for path in sys.path if os.path.isabs(path) and os.path.isdir(path)}
    system = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo")
    return sorted(paths) + [path for path in system if os.path.exists(path)]


def prepare_server(kernel: Kernel | None, level: str, readable: Sequence[str], *, uid: int) -> bool:
    """What the fork server does once, before its first run. Raises OSError.

    Returns whether the kernel now counts its processes apart from all others of this machine.
    """
    if kernel is None:
        return False
    if level == FULL:
        namespaces.enter(kernel, readable, uid=uid)
        return True
    if namespaces.may_become(uid):
        if level == LANDLOCK:
            kernel.prctl(PR_SET_KEEPCAPS, 1)
        namespaces.become(kernel, uid)
        if level == LANDLOCK:
            # The interpreter may lie where only root can read, as in /root. Landlock, which holds
            # for root too, then says what may be read.
            hidden = [path for path in readable if not os.access(path, os.R_OK | os.X_OK)]
            kernel.drop_capabilities(keep=(CAP_DAC_READ_SEARCH,) if hidden else ())
        return True
    return False


def die_with_parent(kernel: Kernel | None) -> None:
    """Be killed when the process that forked this one ends."""
    if kernel is not None:
        kernel.prctl(PR_SET_PDEATHSIG, _SIGKILL)


def contain(
    kernel: Kernel | None,
    level: str,
    limits: Limits,
    *,
    readable: Sequence[str],
    directory: str,
    has_own_process_count: bool,
) -> None:
    """What the program's process does before the program is read. Raises OSError."""
    apply_rlimits(limits, has_own_process_count=has_own_process_count)
    if kernel is None:
        return
    if level == FULL:
        kernel.drop_capabilities()
    kernel.no_new_privileges()
    if level in (FULL, LANDLOCK):
        landlock.restrict(
            kernel,
            readable=[*readable, "/dev/urandom"],
            read_write=["/dev/null", "/dev/zero"],
            writable=[directory],
        )
        seccomp.install(kernel, namespaces=level == FULL)
