"""Sizes of paged attention: splits, tiles of new tokens and the workspace where splits meet.

Sizes come from the architecture and the shape of the heads, never from the batch, so a row's sums
have one order on one kind of card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparring.kernels import Capability
from sparring.kernels.upload import upload

SPLIT = 256
"""Keys of a split."""
TILE_KEYS = 64
"""Keys of a tile."""

_INTERPRETED = {"SPLIT": 64, "BLOCK_N": 16, "num_stages": 1}


def split_of(capability: Capability, head_size: int) -> dict[str, int]:
    """Split, key tile and pipeline depth; raises ValueError for heads above 256."""
    if head_size > 256:
        raise ValueError(f"head size is {head_size}; attention over blocks takes at most 256")
    if capability.arch == 0:
        return _INTERPRETED
    is_large = 90 <= capability.arch < 120  # shared memory of 227 KiB
    most = 128 if capability.arch >= 100 else 256  # with larger heads a third stage spills there
    is_deep = head_size <= (most if is_large else 64)
    return {"SPLIT": SPLIT, "BLOCK_N": TILE_KEYS, "num_stages": 3 if is_deep else 2}


LARGEST_SPANNED = 128
"""Larger heads take one split a program: nothing else was measured, and registers are short."""

SPANS = {90: ((4, 128, 16384), (8, 512, 0))}
"""By architecture, ascending: splits of a program, and from how many rows times key heads, and
values of their keys, it takes so many. Where there is work for all multiprocessors, fewer programs
that load without a break are faster than more of them; in long ones rows of unequal length wait.
"""


def span_of(capability: Capability, num_pairs: int, head_size: int) -> int:
    """Splits that one decode program takes, a power of two, for `num_pairs` rows times key heads;
    it changes no bit.
    """
    span = 1
    if head_size > LARGEST_SPANNED:
        return span
    for splits, pairs, values in SPANS.get(capability.arch, ()):
        if num_pairs >= pairs and num_pairs * head_size >= values:
            span = splits
    return span


LEAST_SWAPPED = 64
"""Smaller heads read their splits in order: none were measured."""


def swaps_splits(span: int, head_size: int) -> bool:
    """Whether, of rows that share their first split alone, half read the second one first: memory
    is not idle then while a prompt is read out of the L2 cache. It changes no bit.
    """
    return span > 1 and head_size >= LEAST_SWAPPED


SHARING = {90: (1024, 2)}
"""By architecture: from how many rows times key heads on, and up to how many query heads a key
head, a prompt's splits are computed once for neighbouring rows of its group. With more query heads
the rows' own programs, which find the prompt in the L2 cache, are as fast or faster.
"""


def sharing_pays(capability: Capability, num_pairs: int, group: int) -> bool:
    """Whether decoding computes prompts once for neighbours (shared_decode.py); changes no bit."""
    pairs, most = SHARING.get(capability.arch, (0, 0))
    return num_pairs >= pairs and group <= most


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeWorkspace:
    """Where the splits of rows meet; one serves every layer, and every step of a captured graph.

    partial [R, K, S, G, E] and states [R, K, S, 2, G] float32: acc, then peak and total of a split;
    tickets [R, K] int32, 0 between launches: how many programs of a row are done.
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
        new = partial(torch.empty, dtype=torch.float32, device=device)
        return cls(
            partial=new((*shape, group, size)),
            states=new((*shape, 2, group)),
            tickets=torch.zeros(shape[:2], dtype=torch.int32, device=device),
        )


class PrefillTiles:
    """Tiles of the new tokens of a step: made once, used by every layer.

    cu_seqlens, kv_lengths: as in layout.PagedLayout. Heavier tiles come first, which changes no
    number.
    """

    def __init__(
        self, cu_seqlens: Sequence[int], kv_lengths: Sequence[int], device: torch.device
    ) -> None:
        self.cu_seqlens, self.kv_lengths = tuple(cu_seqlens), tuple(kv_lengths)
        self.device = device
        self._tiles: dict[int, Tensor] = {}

    def of(self, block_m: int) -> Tensor:
        """[n, 4] int32: row, first token, tokens, position of the first one."""
        if block_m not in self._tiles:
            tiles = []
            for row, kv_length in enumerate(self.kv_lengths):
                start, stop = self.cu_seqlens[row], self.cu_seqlens[row + 1]
                for token in range(start, stop, block_m):
                    count = min(block_m, stop - token)
                    tiles.append((row, token, count, kv_length - (stop - token)))
            tiles.sort(key=lambda tile: -tile[3])
            rows = torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4)
            self._tiles[block_m] = upload(rows, self.device, torch.int32)
        return self._tiles[block_m]
