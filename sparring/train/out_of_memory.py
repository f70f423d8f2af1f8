"""A device that has no memory left, told as one error of the run, with the memory given back.

The loops write their checkpoint when a RunError passes, so it must leave nothing allocated behind:
the failing call's frames hold its tensors and are cleared. Nothing is retried here.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparring.errors import RunError

REMEDIES = {
    "rollout": "lower rollout.kv_memory, or set run.memory to what the card has free",
    "reward": "give the reward model a smaller batch, or keep it on the CPU",
    "train": 'lower train.micro_batch_tokens, or set train.checkpointing = "layers"',
    "eval": "lower rollout.kv_memory, or set run.memory to what the card has free",
}
"""What to change, by phase of a step."""


@contextmanager
def out_of_memory(phase: str) -> Iterator[None]:
    """Turns an allocator's failure inside into RunError; its tensors are free when that is seen."""
    failed = ""
    try:
        yield
    except torch.OutOfMemoryError as error:
        failed = str(error).split(". ")[0]
        traceback.clear_frames(error.__traceback__)
    if not failed:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise RunError(
        f"the device ran out of memory while this step was in phase '{phase}': {failed}. To go on, "
        f"{REMEDIES.get(phase, 'free memory on the device')}, then call again with --resume; "
        "`sparring plan` shows what a recipe needs."
    )
