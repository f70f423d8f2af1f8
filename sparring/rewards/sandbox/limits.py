"""How much a program may use: a value that travels to the fork server, and its rlimits."""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_THREADS_OF_OTHERS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one run.

    wall_seconds and cpu_seconds: of the whole run, and of each of its processes. memory_bytes:
    address space of each process. max_processes: processes and threads at one time. file_bytes:
    the largest file. disk_bytes, max_files: everything in the run's directory. output_bytes: each
    of standard output and standard error. reply_bytes: all values that come back. max_open_files:
    descriptors of each process.
    """

    wall_seconds: float = 5.0
    cpu_seconds: int = 4
    memory_bytes: int = 1 << 30
    max_processes: int = 16
    file_bytes: int = 16 << 20
    disk_bytes: int = 64 << 20
    max_files: int = 1024
    output_bytes: int = 64 << 10
    reply_bytes: int = 8 << 20
    max_open_files: int = 64

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"sandbox limit {name} is {value}; it must be above 0")

    def to_json(self) -> dict[str, Any]:
        """As a plain mapping; `Limits(**mapping)` makes it again."""
        return asdict(self)


def apply_rlimits(limits: Limits, *, has_own_process_count: bool) -> None:
    """Set hard and soft limits of this process alike, so that it cannot raise them again.

    has_own_process_count: whether the kernel counts this run's processes apart from all others of
    the user; otherwise the count of the user's threads is allowed on top.
    """
    processes = limits.max_processes + 2
    if not has_own_process_count:
        processes += count_user_threads() + _THREADS_OF_OTHERS
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.max_open_files,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_MEMLOCK: 64 << 10,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_STACK: 8 << 20,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def count_user_threads() -> int:
    """Threads on this machine that belong to this process's user, as far as /proc shows them."""
    own = Path("/proc/self").stat().st_uid
    total = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == own:
                    total += sum(1 for _ in (entry / "task").iterdir())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended, or is hidden
    return total
