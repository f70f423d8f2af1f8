"""Which prompts a step takes: a pure function of seed and step, so that resuming needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Row = TypeVar("Row")


def rows_of_step(
    rows: Sequence[Row], *, step: int, per_step: int, seed: int, in_order: bool = False
) -> list[Row]:
    """The rows of optimizer step `step` (0-based): every epoch is a new permutation, and steps
    run on over its end, so each row comes up equally often. More per step than there
    are rows is allowed; a row may then appear more than once in a step. in_order: every epoch takes
    the rows as they stand.
    """
    picked: list[Row] = []
    position = step * per_step
    while len(picked) < per_step:
        epoch, offset = divmod(position, len(rows))
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(rows), generator=generator)
        if in_order:
            order = torch.arange(len(rows))
        take = order[offset : offset + per_step - len(picked)].tolist()
        picked += [rows[index] for index in take]
        position += len(take)
    return picked
