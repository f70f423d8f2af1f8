"""Which tiles shared-prompt attention goes through and how large they are: planned once a batch.

Tile sizes come from a static table by architecture and head size, never from the batch, so a row's
sums have one order on one kind of card.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparring.kernels import Capability

_MIDDLE, _LARGE = "163 KiB", "227 KiB"

TILES: dict[tuple[str, int, str], dict[str, int]] = {
    (_LARGE, 64, "forward"): {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    (_LARGE, 64, "dq"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    (_LARGE, 64, "dkv"): {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    (_LARGE, 128, "forward"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    (_LARGE, 128, "dq"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3},
    (_LARGE, 128, "dkv"): {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 1},
    (_LARGE, 256, "forward"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    (_LARGE, 256, "dq"): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    (_LARGE, 256, "dkv"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    (_MIDDLE, 64, "forward"): {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    (_MIDDLE, 64, "dq"): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    (_MIDDLE, 64, "dkv"): {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    (_MIDDLE, 128, "forward"): {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    (_MIDDLE, 128, "dq"): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    (_MIDDLE, 128, "dkv"): {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    (_MIDDLE, 256, "forward"): {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2},
    (_MIDDLE, 256, "dq"): {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1},
    (_MIDDLE, 256, "dkv"): {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
"""(shared memory of a block, head size rounded up, pass) -> launch.

The rows of 227 KiB and 128 were chosen by time on an H200 (benchmarks/attention.py), the others by
compiling them. Cards of 99 KiB take the rows of 163 KiB, which fit them.
"""

_INTERPRETED = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4}


def tile_of(capability: Capability, head_size: int, which: str) -> dict[str, int]:
    """Launch of a pass ("forward", "dq" or "dkv"); raises ValueError for heads above 256."""
    if capability.arch == 0:
        return _INTERPRETED
    size = next((size for size in (64, 128, 256) if head_size <= size), 0)
    if not size:
        raise ValueError(f"head size is {head_size}; shared-prompt attention takes at most 256")
    is_large = 90 <= capability.arch < 120
    if capability.arch >= 100 and which == "dkv" and size != 128:
        is_large = False  # the large tiles spill there
    return TILES[_LARGE if is_large else _MIDDLE, size, which]


class SharedPlan:
    """Tiles of one batch; made once, used by every layer and both passes.

    cu_seqlens, parents: as in layout.PackedLayout. Heavier tiles come first, which evens out the
    end of a launch and changes no number. bitwise: the forward pass gives the bits of decoding.
    """

    def __init__(
        self,
        cu_seqlens: Sequence[int],
        parents: Sequence[int],
        *,
        device: torch.device,
        capability: Capability,
        bitwise: bool = False,
    ) -> None:
        self.bitwise = bitwise
        self.cu_seqlens, self.parents = tuple(cu_seqlens), tuple(parents)
        self.device, self.capability = device, capability
        self._query_tiles: dict[int, Tensor] = {}
        self._key_units: dict[int, tuple[Tensor, Tensor, int]] = {}

    def _bounds(self) -> list[tuple[int, int]]:
        return [(a, b - a) for a, b in zip(self.cu_seqlens, self.cu_seqlens[1:], strict=False)]

    @property
    def context_lengths(self) -> list[int]:
        """Of each segment its tokens and its parent's."""
        lengths = [length for _, length in self._bounds()]
        return [
            length + (lengths[parent] if parent >= 0 else 0)
            for length, parent in zip(lengths, self.parents, strict=True)
        ]

    def query_tiles(self, block_m: int) -> Tensor:
        """[n, 5] int32: segment's start and length, first query, parent's start and length."""
        if block_m not in self._query_tiles:
            bounds, tiles = self._bounds(), []
            for (start, length), parent in zip(bounds, self.parents, strict=True):
                theirs = bounds[parent] if parent >= 0 else (start, 0)
                tiles += [(start, length, first, *theirs) for first in range(0, length, block_m)]
            tiles.sort(key=lambda tile: -(tile[2] + tile[4]))
            self._query_tiles[block_m] = self._tensor(tiles, 5)
        return self._query_tiles[block_m]

    def key_units(self, block_n: int) -> tuple[Tensor, Tensor, int]:
        """Units [n, 6] int32: first key, keys, first query row, queries, base, slot (-1: none);
        sums [m, 4]: first key, keys, first slot, slots; and the number of slots.
        """
        if block_n in self._key_units:
            return self._key_units[block_n]
        bounds = self._bounds()
        children: dict[int, list[int]] = {}
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                children.setdefault(parent, []).append(segment)
        units, sums, num_slots = [], [], 0
        for segment, (start, length) in enumerate(bounds):
            mine = children.get(segment, [])
            for first in range(0, length, block_n):
                keys = (start + first, min(block_n, length - first))
                if not mine:
                    units.append((*keys, start, length, -first, -1))
                    continue
                sums.append((*keys, num_slots, 1 + len(mine)))
                units.append((*keys, start, length, -first, num_slots))
                for i, child in enumerate(mine, start=1):
                    units.append((*keys, *bounds[child], length - first, num_slots + i))
                num_slots += 1 + len(mine)
        units.sort(key=lambda unit: -(unit[3] + min(0, unit[4])))
        found = (self._tensor(units, 6), self._tensor(sums, 4), num_slots)
        self._key_units[block_n] = found
        return found

    def _tensor(self, rows: list[tuple[int, ...]], width: int) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32).reshape(-1, width).to(self.device)
