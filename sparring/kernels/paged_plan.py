"""Sizes of paged attention: splits, tiles and the workspace where splits meet.

Sizes come from the architecture and the shape of the heads, never from the batch, so a row's sums
have one order on one kind of card.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import Capability

SPLIT = 256
"""Keys of a split."""

_INTERPRETED = {"SPLIT": 64, "BLOCK_N": 16, "num_stages": 1}


def split_of(capability: Capability, head_size: int) -> dict[str, int]:
    """Split, key tile and pipeline depth; raises ValueError for heads above 256."""
    if head_size > 256:
        raise ValueError(f"head size is {head_size}; attention over blocks takes at most 256")
    if capability.arch == 0:
        return _INTERPRETED
    return {"SPLIT": SPLIT, "BLOCK_N": 64, "num_stages": 2}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeWorkspace:
    """Where the splits of rows meet; one serves every layer, and every step of a captured graph.

    partial [R, K, S, G, E] and states [R, K, S, 2, G] float32: acc, then peak and total of a split;
    tickets [R, K] int32, 0 between launches: how many splits of a row are done.
    """

    partial: Tensor
    states: Tensor
    tickets: Tensor

    @staticmethod
    def num_bytes(rows: int, num_heads: int, num_kv_heads: int, size: int, max_splits: int) -> int:
        """Bytes of a workspace."""
        return 4 * rows * (num_heads * max_splits * (size + 2) + num_kv_heads)

    @classmethod
    def new(
        cls,
        rows: int,
        num_heads: int,
        num_kv_heads: int,
        size: int,
        max_splits: int,
        device: torch.device,
    ) -> DecodeWorkspace:
        """A workspace for up to `rows` rows of up to `max_splits` splits."""
        group = num_heads // num_kv_heads
        shape = (rows, num_kv_heads, max_splits)
        return cls(
            partial=torch.empty((*shape, group, size), dtype=torch.float32, device=device),
            states=torch.empty((*shape, 2, group), dtype=torch.float32, device=device),
            tickets=torch.zeros(shape[:2], dtype=torch.int32, device=device),
        )
