"""Blocks: reference counts, the spare block, and no block in two hands."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.rollout.block_pool import SPARE_BLOCK, BlockPool, blocks_for


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, 16) == blocks


def test_a_shared_block_is_free_after_its_last_release() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 1
    assert [pool.references(block) for block in blocks] == [1, 1]
    pool.release(blocks)
    assert pool.num_free == pool.num_usable == 3
    assert pool.peak_used == 2


def test_the_spare_block_is_never_handed_out() -> None:
    pool = BlockPool(5, 16)
    assert SPARE_BLOCK not in pool.allocate(4)
    assert pool.num_free == 0


def test_misuse_is_caught() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="more blocks"):
        pool.allocate(2)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="once too often"):
        pool.release(blocks)
    with pytest.raises(AssertionError, match="nobody holds"):
        pool.share(blocks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_counts_hold_over_any_order(data: st.DataObject) -> None:
    pool = BlockPool(data.draw(st.integers(2, 20)), 4)
    held: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["allocate", "share", "release"]))
        if action == "allocate":
            held.append(pool.allocate(data.draw(st.integers(0, pool.num_free))))
        elif held and action == "share":
            held.append(list(data.draw(st.sampled_from(held))))
            pool.share(held[-1])
        elif held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        in_hand = [block for blocks in held for block in blocks]
        assert pool.num_used == len(set(in_hand))
        assert all(pool.references(block) == in_hand.count(block) for block in in_hand)
    for blocks in held:
        pool.release(blocks)
    assert pool.num_free == pool.num_usable
