"""How much memory a run takes: the CUDA allocator's where there is a GPU, else the process's."""

from __future__ import annotations

import resource

import torch


def give_back_free_pages() -> None:
    """Between phases: what the allocator keeps of one must not stand beside what the next takes."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_workspaces(device: torch.device, dtype: torch.dtype) -> None:
    """Have the library's workspaces, of the thread that goes forward and of backward's, in place.

    They stay for good, so they come before memory that is given back and taken again.
    """
    if device.type != "cuda":
        return
    with torch.enable_grad():
        ones = torch.ones(16, 16, dtype=dtype, device=device, requires_grad=True)
        torch.mm(ones, ones).sum().backward()


class MemoryWatch:
    """Peak bytes of a step, and the highest peak so far."""

    def __init__(self) -> None:
        self.highest_bytes = 0

    def peak_bytes(self) -> int:
        """Most bytes reserved on the GPU since the last call; without one the process's peak."""
        if torch.cuda.is_available():
            peak = int(torch.cuda.max_memory_reserved())
            torch.cuda.reset_peak_memory_stats()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.highest_bytes = max(self.highest_bytes, peak)
        return peak
