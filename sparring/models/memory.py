"""Does a model fit: bytes of its weights and of its keys and values against what is free now."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sparring.errors import MemoryBudgetError

_CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be taken now: free card memory, or host memory within its limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _meminfo_available()
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is None or used is None:
        return available
    return min(available, max(0, limit - used + _reclaimable()))


def check_fits(
    num_parameters: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    kv_bytes: int = 0,
    weight_bytes: int | None = None,
    free: int | None = None,
) -> None:
    """Raise MemoryBudgetError if the weights in `dtype` and the KV budget exceed free memory.

    weight_bytes: what the weights take, where it is not the number of parameters in `dtype`.
    free: bytes to compare with; by default what `free_bytes(device)` finds.
    """
    weights = num_parameters * dtype.itemsize if weight_bytes is None else weight_bytes
    available = free_bytes(device) if free is None else free
    if weights + kv_bytes <= available:
        return
    name = str(dtype).removeprefix("torch.")
    budget = f" and {_gib(kv_bytes)} for keys and values" if kv_bytes else ""
    smaller = " in a 16-bit dtype," if dtype.itemsize > 2 else ""
    raise MemoryBudgetError(
        f"the model needs {_gib(weights)} ({num_parameters:,} parameters in {name}){budget}, but "
        f"only {_gib(available)} are free on {device}; load it{smaller} on a larger device, take a "
        f"smaller model{', or lower the KV budget' if kv_bytes else ''}"
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _meminfo_available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _number(file: Path) -> int | None:
    """A control group's number; None where there is no such file or no limit."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _reclaimable() -> int:
    """Bytes of file cache that count as used in a control group but are given up on demand."""
    try:
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split() for line in lines)
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
