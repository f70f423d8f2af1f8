"""The allocator's rules, against figures worked out by hand."""

from __future__ import annotations

import random

import pytest

from sparring.train.allocator import MIB, CachingAllocator, LimitReached


def test_small_requests_share_a_segment_of_two_mib() -> None:
    allocator = CachingAllocator()
    blocks = [allocator.take(1), allocator.take(513), allocator.take(MIB)]
    assert allocator.allocated == 512 + 1024 + MIB
    assert allocator.reserved == 2 * MIB
    for block in blocks:
        allocator.give(block)
    assert allocator.allocated == 0
    assert allocator.reserved == 2 * MIB
    assert allocator.take(MIB).size == MIB
    assert allocator.reserved == 2 * MIB


def test_middle_requests_share_segments_of_twenty_mib_and_large_ones_are_alone() -> None:
    allocator = CachingAllocator()
    allocator.take(5 * MIB)
    allocator.take(9 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.take(7 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.take(15 * MIB + 1)
    assert allocator.reserved == 56 * MIB
    assert allocator.allocated == (5 + 9 + 7 + 16) * MIB  # a rest below 1 MiB is not split off


def test_the_smallest_free_block_is_taken_and_neighbours_join() -> None:
    allocator = CachingAllocator()
    big, small = allocator.take(100 * MIB), allocator.take(30 * MIB)
    allocator.give(big)
    allocator.give(small)
    first = allocator.take(20 * MIB)
    assert first.segment == small.segment
    halves = [allocator.take(50 * MIB), allocator.take(50 * MIB)]
    assert allocator.reserved == 130 * MIB
    for block in halves:
        allocator.give(block)
    assert allocator.take(100 * MIB).size == 100 * MIB
    assert allocator.reserved == 130 * MIB


def test_a_limit_gives_free_segments_back_before_it_refuses() -> None:
    allocator = CachingAllocator(limit=100 * MIB)
    allocator.give(allocator.take(60 * MIB))
    kept = allocator.take(80 * MIB)
    assert (allocator.reserved, allocator.peak_reserved) == (80 * MIB, 80 * MIB)
    with pytest.raises(LimitReached):
        allocator.take(30 * MIB)
    allocator.give(kept)
    allocator.take(100 * MIB)


def test_books_balance_over_random_requests() -> None:
    draw = random.Random(0)
    allocator, held = CachingAllocator(), []
    for _ in range(3000):
        if held and draw.random() < 0.5:
            allocator.give(held.pop(draw.randrange(len(held))))
        else:
            held.append(allocator.take(draw.choice((700, 40_000, 3 * MIB, 14 * MIB, 90 * MIB))))
        assert allocator.allocated == sum(block.size for block in held) <= allocator.reserved
    for block in held:
        allocator.give(block)
    allocator.release()
    assert allocator.allocated == allocator.reserved == 0


def test_an_expandable_segment_grows_by_pages_and_keeps_its_end_for_last() -> None:
    allocator = CachingAllocator(expandable=True)
    first, second = allocator.take(30 * MIB), allocator.take(5 * MIB)
    assert allocator.reserved == 40 * MIB
    assert allocator.take(500).size == 512
    assert allocator.reserved == 42 * MIB
    allocator.give(first)
    third = allocator.take(4 * MIB)  # the hole of 30 MiB, although the end would be tighter
    assert third.offset == 0
    assert allocator.take(26 * MIB + 1).offset == 35 * MIB  # the hole's rest is a byte too small
    assert allocator.reserved == 82 * MIB
    allocator.give(second)
    assert allocator.take(31 * MIB).offset == 4 * MIB
    assert allocator.reserved == 82 * MIB


def test_at_a_limit_free_pages_inside_an_expandable_segment_are_given_back() -> None:
    allocator = CachingAllocator(limit=120 * MIB, expandable=True)
    held = [allocator.take(20 * MIB) for _ in range(5)]
    for block in held[:4:2]:
        allocator.give(block)
    allocator.take(40 * MIB)  # two holes of 20 MiB, nowhere 40
    assert allocator.reserved <= 120 * MIB
    with pytest.raises(LimitReached):
        allocator.take(40 * MIB)
