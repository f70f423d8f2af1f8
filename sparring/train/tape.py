"""A tape of requests for memory by part, and what it comes to when an allocator plays it.

A part is what people call a piece of memory ("weights", "KV pool"): the plan's table has a row for
each. No model is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from sparring.train.allocator import CachingAllocator


class Event(NamedTuple):
    """A request for `size` bytes under a number of its own, or (size 0) its end."""

    number: int
    size: int
    part: str


class Tape:
    """Requests and their ends, in order."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._next = 0

    def take(self, part: str, size: float) -> int:
        """Ask for bytes; the number gives them back."""
        number = self._next
        self._next += 1
        self.events.append(Event(number, max(1, int(size)), part))
        return number

    def give(self, *numbers: int | None) -> None:
        """Give back what was taken under these numbers; None is nothing."""
        self.events += [Event(number, 0, "") for number in numbers if number is not None]

    @contextmanager
    def during(self, part: str, size: float) -> Iterator[None]:
        """Bytes that are there while the block runs; 0 bytes are no request."""
        number = self.take(part, size) if size else None
        yield
        self.give(number)

    def brief(self, part: str, size: float) -> None:
        """Bytes that come and go at once."""
        with self.during(part, size):
            pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The most that was there at once.

    parts: bytes asked for by part when most were allocated; reserved: the allocator's own peak.
    """

    parts: Mapping[str, int]
    allocated: int
    reserved: int


def play(events: Iterable[Event], allocator: CachingAllocator, counted_from: int = 0) -> Peak:
    """Play a tape; parts and peaks are those from event number `counted_from` on.

    Raises LimitReached where the allocator's limit is too small.
    """
    held: dict[int, tuple[Any, str, int]] = {}
    by_part: dict[str, int] = {}
    most, parts = -1, {}
    for place, (number, size, part) in enumerate(events):
        if place == counted_from:
            allocator.reset_peaks()
        if size:
            block = allocator.take(size)
            held[number] = (block, part, block.size)
            by_part[part] = by_part.get(part, 0) + block.size
        else:
            block, part, size = held.pop(number)
            allocator.give(block)
            by_part[part] -= size
        if place >= counted_from and allocator.allocated > most:
            most, parts = allocator.allocated, dict(by_part)
    found = {part: size for part, size in parts.items() if size}
    return Peak(parts=found, allocated=max(most, 0), reserved=allocator.peak_reserved)
