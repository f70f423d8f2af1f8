"""Blocks of the key/value memory: which are free, and how many sequences read each.

Plain bookkeeping on integers; the memory itself is a `KVPool` of the model's room. Block 0 is never
handed out: unused entries of a block table point to it.
"""

from __future__ import annotations

from collections.abc import Sequence

SPARE_BLOCK = 0
"""The block that no sequence owns."""


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class BlockPool:
    """A fixed number of blocks with reference counts.

    num_blocks counts the spare block; block_size is in tokens; block_bytes is the memory one block
    takes, for messages. Blocks given back last are handed out first, so memory that was never
    touched stays untouched as long as possible.
    """

    def __init__(self, num_blocks: int, block_size: int, block_bytes: int = 0) -> None:
        assert num_blocks >= 2, "a pool holds the spare block and at least one other"
        assert block_size >= 1, "a block holds at least one token"
        self.block_size = block_size
        self.block_bytes = block_bytes
        self.num_usable = num_blocks - 1
        self.peak_used = 0
        self._free = list(range(num_blocks - 1, SPARE_BLOCK, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_usable - len(self._free)

    def references(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._references[block]

    def allocate(self, num_blocks: int) -> list[int]:
        """Takes `num_blocks` free blocks, each with one reference; no more than num_free."""
        assert 0 <= num_blocks <= len(self._free), "more blocks taken than are free"
        if num_blocks == 0:
            return []
        taken = self._free[-num_blocks:][::-1]
        del self._free[-num_blocks:]
        for block in taken:
            self._references[block] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return taken

    def share(self, blocks: Sequence[int]) -> None:
        """Adds a reference to each block, all of which are held already."""
        for block in blocks:
            assert self._references[block] > 0, f"block {block} is shared while nobody holds it"
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drops a reference of each block; a block without references is free again."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released once too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
