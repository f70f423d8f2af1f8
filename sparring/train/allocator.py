"""PyTorch's caching allocator as a calculation: what it would reserve for a series of requests.

Numbers only, no GPU and no torch. The rules are those of the CUDA allocator's defaults: a request
is rounded up to 512 bytes; up to 1 MiB it is served from segments of 2 MiB, below 10 MiB from
segments of 20 MiB, above from a segment of its own in whole 2 MiB. The smallest free block that
fits is taken and split where more than 1 MiB (small ones: 512 bytes) would be left; free neighbours
join. At a limit, segments that are free as a whole are given back first.

With expandable segments there is one segment for small and one for large requests, which grows by
pages of 2 and 20 MiB; its end is used only where no free block fits, every rest is split off, and
at a limit free pages are given back wherever they lie.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

MIB = 2**20
ROUND = 512
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
MIDDLE_REQUEST = 10 * MIB
MIDDLE_SEGMENT = 20 * MIB
LARGE_ROUND = 2 * MIB


class LimitReached(Exception):
    """A request does not fit under the limit; `needed` is the request in bytes."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"a request of {needed:,} bytes does not fit under the limit")
        self.needed = needed


@dataclass(slots=True, eq=False)
class _Block:
    """A piece of a segment: its place in it, and its neighbours there."""

    segment: int
    offset: int
    size: int
    is_small: bool
    is_free: bool = False
    before: _Block | None = None
    after: _Block | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


@dataclass(slots=True)
class _Pool:
    """Free blocks, smallest first, the earlier segment first among equals."""

    keys: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int, int], _Block] = field(default_factory=dict)

    def put(self, block: _Block) -> None:
        bisect.insort(self.keys, block.key)
        self.blocks[block.key] = block
        block.is_free = True

    last: _Block | None = None
    """The block at the end of an expandable segment."""

    def remove(self, block: _Block) -> None:
        del self.keys[bisect.bisect_left(self.keys, block.key)]
        del self.blocks[block.key]
        block.is_free = False

    def best(self, size: int) -> _Block | None:
        at = bisect.bisect_left(self.keys, (size, -1, -1))
        if at < len(self.keys) and self.blocks[self.keys[at]] is self.last:
            at += at + 1 < len(self.keys)  # the end is the largest block: it may still grow
        return self.blocks[self.keys[at]] if at < len(self.keys) else None


class CachingAllocator:
    """Serves requests in order. limit: most bytes it may reserve, None for no limit.

    expandable: with expandable segments. allocated counts whole blocks, as PyTorch's counter does;
    peaks hold since `reset_peaks`.
    """

    def __init__(self, limit: int | None = None, *, expandable: bool = False) -> None:
        self.limit, self.expandable = limit, expandable
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self._pools = (_Pool(), _Pool())
        self._num_segments = 0

    def take(self, size: int) -> _Block:
        """A block for `size` bytes; raises LimitReached where the limit leaves none."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        is_small = size <= SMALL_REQUEST
        pool = self._pools[is_small]
        block = pool.best(size)
        if block is None:
            grow = self._grown if self.expandable else self._segment
            block = grow(size, is_small)
        else:
            pool.remove(block)
        left = block.size - size
        if left >= ROUND if is_small or self.expandable else left > SMALL_REQUEST:
            rest = _Block(
                block.segment, block.offset + size, left, is_small, before=block, after=block.after
            )
            if rest.after is not None:
                rest.after.before = rest
            block.after, block.size = rest, size
            if pool.last is block:
                pool.last = rest
            pool.put(rest)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def give(self, block: _Block) -> None:
        """Take a block back; it joins its free neighbours."""
        self.allocated -= block.size
        pool = self._pools[block.is_small]
        before, after = block.before, block.after
        if after is not None and after.is_free:
            pool.remove(after)
            if pool.last is after:
                pool.last = block
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        if before is not None and before.is_free:
            pool.remove(before)
            before.size += block.size
            before.after = block.after
            if before.after is not None:
                before.after.before = before
            if pool.last is block:
                pool.last = before
            block = before
        pool.put(block)

    def release(self) -> None:
        """Give every segment back that is free as a whole, as `torch.cuda.empty_cache` does."""
        for pool in self._pools:
            whole = [b for b in pool.blocks.values() if b.before is None and b.after is None]
            for block in whole:
                pool.remove(block)
                self.reserved -= block.size

    def reset_peaks(self) -> None:
        """Peaks count from now on."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _grown(self, size: int, is_small: bool) -> _Block:
        """The end of the one segment, grown until the request fits."""
        pool = self._pools[is_small]
        page = SMALL_SEGMENT if is_small else MIDDLE_SEGMENT
        last = pool.last
        if last is None or not last.is_free:
            offset = 0 if last is None else last.offset + last.size
            block = _Block(int(is_small), offset, 0, is_small, before=last)
            if last is not None:
                last.after = block
        else:
            block = last
            pool.remove(block)
        wanted = -(-(size - block.size) // page) * page
        if self.limit is not None and self.reserved + wanted > self.limit:
            self.reserved = self._touched()
            if self.reserved + wanted > self.limit:
                raise LimitReached(size)
        block.size += wanted
        pool.last = block
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _touched(self) -> int:
        """Bytes of the pages that something is allocated in."""
        total = 0
        for pool, page in zip(self._pools, (MIDDLE_SEGMENT, SMALL_SEGMENT), strict=True):
            block, end = pool.last, 0
            while block is not None:
                if not block.is_free:
                    first, stop = block.offset // page, -(-(block.offset + block.size) // page)
                    total += (stop - first) * page
                    if end and stop > end:
                        total -= page  # the page is shared with the block behind
                    end = first
                block = block.before
        return total

    def _segment(self, size: int, is_small: bool) -> _Block:
        if is_small:
            wanted = SMALL_SEGMENT
        elif size < MIDDLE_REQUEST:
            wanted = MIDDLE_SEGMENT
        else:
            wanted = -(-size // LARGE_ROUND) * LARGE_ROUND
        if self.limit is not None and self.reserved + wanted > self.limit:
            self.release()
            if self.reserved + wanted > self.limit:
                raise LimitReached(size)
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        self._num_segments += 1
        return _Block(self._num_segments, 0, wanted, is_small)
