"""The scheduler's promises, checked by a memory that knows what every slot holds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.errors import MemoryBudgetError
from sparring.rollout.block_pool import BlockPool, blocks_for
from sparring.rollout.scheduler import Scheduler, SequenceState

Work = list[tuple[int, list[int]]]
"""For each prompt its length and the length of each completion."""


class Simulation:
    """Runs a scheduler as the engine would, writing names of tokens in place of keys and values."""

    def __init__(
        self,
        work: Work,
        pool: BlockPool,
        *,
        max_running: int,
        max_prefill_tokens: int,
        steps: int = 1,
        expected_completion_tokens: float = 12.0,
        is_checked: bool = True,
        is_ahead: bool = False,
    ) -> None:
        self.is_ahead = is_ahead
        self.pool = pool
        self.is_checked = is_checked
        self.scheduler = Scheduler(
            pool,
            max_running=max_running,
            max_prefill_tokens=max_prefill_tokens,
            expected_completion_tokens=expected_completion_tokens,
        )
        self.steps = steps
        self.max_running = max_running
        self.memory: dict[int, tuple[object, ...]] = {}
        self.lengths: list[int] = []
        self.order_of_finish: list[int] = []
        self.num_prefill_tokens = 0
        self.num_ahead = 0
        for prompt_length, lengths in work:
            self.scheduler.add(prompt_length=prompt_length, max_completion_tokens=lengths)
            self.lengths += lengths

    def slot(self, sequence: SequenceState, position: int) -> int:
        size = self.pool.block_size
        return sequence.block_table[position // size] * size + position % size

    @staticmethod
    def name(sequence: SequenceState, position: int) -> tuple[object, ...]:
        """What must lie at a position: prompts are shared by the group, completions are not."""
        if position < sequence.group.prompt_length:
            return (id(sequence.group), position)
        return ("completion", sequence.index, position)

    def write(self, sequence: SequenceState, position: int) -> None:
        block = sequence.block_table[position // self.pool.block_size]
        is_prompt = position < sequence.group.prompt_length
        assert is_prompt or self.pool.references(block) == 1, "a shared block is written"
        self.memory[self.slot(sequence, position)] = self.name(sequence, position)

    def check(self, sequence: SequenceState, length: int) -> None:
        if not self.is_checked:
            return
        for position in range(length):
            held = self.memory.get(self.slot(sequence, position))
            assert held == self.name(sequence, position), f"position {position} holds {held}"

    def draw(self, sequences: Sequence[SequenceState]) -> None:
        for sequence in sequences:
            sequence.num_completion_tokens += 1
            if sequence.num_completion_tokens == self.lengths[sequence.index]:
                self.order_of_finish.append(sequence.index)
                self.scheduler.finish(sequence)

    def prefill(self) -> bool:
        chunks = self.scheduler.next_prefill()
        if not chunks:
            return False
        assert 0 < sum(c.length for c in chunks) <= self.scheduler.max_prefill_tokens
        for chunk in chunks:
            self.check(chunk.sequence, chunk.start)  # before this step writes anything
        for chunk in chunks:
            for position in range(chunk.start, chunk.start + chunk.length):
                self.write(chunk.sequence, position)
        self.num_prefill_tokens += sum(c.length for c in chunks)
        size = self.pool.block_size
        for source, target in self.scheduler.complete_prefill(chunks):
            for offset in range(size):
                if source * size + offset in self.memory:
                    self.memory[target * size + offset] = self.memory[source * size + offset]
        for chunk in chunks:
            self.draw(chunk.drawing)
        return True

    def decode(self) -> None:
        running = self.scheduler.next_decode(self.steps)
        assert len(running) <= self.max_running
        goes_on = bool(running)
        while goes_on:
            goes_on = self.goes_on(running)
            for sequence in running:
                for _ in range(self.steps):
                    if sequence.is_finished:
                        break
                    self.write(sequence, sequence.num_cached)
                    sequence.num_cached += 1
                    self.check(sequence, sequence.num_cached)
                    self.draw([sequence])

    def goes_on(self, running: Sequence[SequenceState]) -> bool:
        """Whether a burst of the same rows is queued before the one in flight is read."""
        scheduler = self.scheduler
        if not self.is_ahead or scheduler.has_waiting or all(s.is_finished for s in running):
            return False
        before = scheduler.num_preemptions
        got = scheduler.reserve_ahead(running, 2 * self.steps)
        assert scheduler.num_preemptions == before
        self.num_ahead += got
        return got

    def run(self) -> Simulation:
        rounds = 0
        while self.scheduler.has_work:
            while self.prefill():
                pass
            self.decode()
            rounds += 1
            assert rounds <= 4 * sum(self.lengths) + 100, "no end in sight"
        assert sorted(self.order_of_finish) == list(range(len(self.lengths)))
        assert self.pool.num_free == self.pool.num_usable
        assert all(self.pool.references(b) == 0 for b in range(self.pool.num_usable + 1))
        return self


def needed_blocks(work: Work, size: int) -> int:
    return max(blocks_for(length + max(lengths), size) for length, lengths in work)


@settings(max_examples=300, deadline=None)
@given(
    work=st.lists(
        st.tuples(st.integers(1, 30), st.lists(st.integers(1, 24), min_size=1, max_size=5)),
        min_size=1,
        max_size=10,
    ),
    block_size=st.integers(1, 8),
    spare_blocks=st.one_of(st.integers(0, 3), st.integers(0, 80)),
    max_running=st.integers(1, 12),
    max_prefill_tokens=st.integers(1, 60),
    steps=st.sampled_from([1, 1, 2, 5]),
    is_ahead=st.booleans(),
    expected_completion_tokens=st.sampled_from([0.0, 12.0]),
)
def test_everything_finishes_and_nothing_leaks(
    work: Work,
    block_size: int,
    spare_blocks: int,
    max_running: int,
    max_prefill_tokens: int,
    steps: int,
    is_ahead: bool,
    expected_completion_tokens: float,
) -> None:
    pool = BlockPool(1 + needed_blocks(work, block_size) + spare_blocks, block_size)
    Simulation(
        work,
        pool,
        max_running=max_running,
        max_prefill_tokens=max_prefill_tokens,
        steps=steps,
        is_ahead=is_ahead,
        expected_completion_tokens=expected_completion_tokens,
    ).run()


def test_room_for_a_single_sequence_is_enough() -> None:
    draw = random.Random(0)
    work = [(draw.randint(1, 40), [draw.randint(1, 40) for _ in range(4)]) for _ in range(20)]
    pool = BlockPool(1 + needed_blocks(work, 4), 4)
    simulation = Simulation(work, pool, max_running=64, max_prefill_tokens=16).run()
    assert simulation.scheduler.num_preemptions > 0
    assert pool.peak_used <= pool.num_usable


def test_with_room_each_prompt_is_computed_once_and_stored_once() -> None:
    work = [(37, [9] * 8), (16, [9] * 8), (1, [9] * 8)]
    pool = BlockPool(1000, 16)
    simulation = Simulation(work, pool, max_running=64, max_prefill_tokens=100)
    assert simulation.prefill()
    groups = {s.group.prompt_length: s.group for s in simulation.scheduler.running.values()}
    assert [pool.references(b) for b in groups[37].shared_blocks] == [8, 8]
    assert [pool.references(b) for b in groups[16].shared_blocks] == [8]
    assert groups[1].shared_blocks == []
    assert pool.num_used == 2 + 8 + 1 + 8 + 8
    simulation.run()
    assert simulation.num_prefill_tokens == 37 + 16 + 1
    assert simulation.scheduler.num_preemptions == 0


def test_a_group_enters_whole_and_others_wait_for_it() -> None:
    pool = BlockPool(1 + 20, 4)
    work = [(4, [8] * 6), (4, [8] * 6)]
    simulation = Simulation(work, pool, max_running=11, max_prefill_tokens=64)
    simulation.prefill()
    assert sorted(simulation.scheduler.running) == list(range(6))
    assert not simulation.prefill()
    simulation.run()


def test_a_group_larger_than_the_memory_still_computes_its_prompt_once_for_first_tokens() -> None:
    pool = BlockPool(1 + 5, 4)
    simulation = Simulation([(8, [5] * 10)], pool, max_running=64, max_prefill_tokens=64)
    chunks = simulation.scheduler.next_prefill()
    assert [len(chunk.drawing) for chunk in chunks] == [10]
    assert pool.num_used == 5
    Simulation([(8, [5] * 10)], BlockPool(6, 4), max_running=64, max_prefill_tokens=64).run()


def test_bursts_ahead_take_memory_only_where_there_is_enough() -> None:
    pool = BlockPool(1 + 12, 4)
    scheduler = Scheduler(pool, max_running=8, max_prefill_tokens=64)
    scheduler.add(prompt_length=4, max_completion_tokens=[40, 9])
    while chunks := scheduler.next_prefill():
        scheduler.complete_prefill(chunks)
    long, short = scheduler.next_decode(4)
    assert [len(s.block_table) for s in (long, short)] == [2, 2]
    assert scheduler.reserve_ahead([long, short], 8)
    assert [len(s.block_table) for s in (long, short)] == [3, 3]
    assert scheduler.reserve_ahead([long, short], 16)
    assert [len(s.block_table) for s in (long, short)] == [5, 4], "none past its own limit"
    free = pool.num_free
    assert not scheduler.reserve_ahead([long, short], 36)
    assert pool.num_free == free
    scheduler.finish(short)
    assert scheduler.reserve_ahead([long, short], 36)
    assert [len(s.block_table) for s in (long, short)] == [10, 0]
    assert scheduler.num_preemptions == 0


def test_completions_of_one_token_never_decode() -> None:
    pool = BlockPool(3, 16)
    simulation = Simulation([(16, [1, 1, 1])], pool, max_running=8, max_prefill_tokens=64)
    assert simulation.prefill()
    assert not simulation.scheduler.has_work
    assert pool.num_free == pool.num_usable


def test_a_long_prompt_goes_in_chunks_and_alone() -> None:
    pool = BlockPool(100, 4)
    scheduler = Scheduler(pool, max_running=8, max_prefill_tokens=10)
    for length in (4, 25, 3):
        scheduler.add(prompt_length=length, max_completion_tokens=[5])
    lengths = []
    while chunks := scheduler.next_prefill():
        lengths.append([chunk.length for chunk in chunks])
        scheduler.complete_prefill(chunks)
    assert lengths == [[4], [10], [10], [5, 3]]


def test_the_youngest_is_preempted_and_comes_back_with_its_prompt_shared() -> None:
    pool = BlockPool(1 + 8, 4)
    simulation = Simulation([(9, [12, 12, 12])], pool, max_running=8, max_prefill_tokens=64)
    scheduler = simulation.scheduler
    simulation.prefill()
    while not scheduler.num_preemptions:
        simulation.decode()
    assert sorted(scheduler.running) == [0, 1]
    simulation.run()
    assert simulation.order_of_finish[-1] == 2
    assert scheduler.num_recomputed_tokens < scheduler.num_preemptions * (9 + 12)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_first_added_is_never_preempted_for_a_later_one(block_size: int) -> None:
    draw = random.Random(block_size)
    work = [(draw.randint(1, 20), [draw.randint(1, 60)]) for _ in range(40)]
    pool = BlockPool(1 + needed_blocks(work, block_size) + 8, block_size)
    simulation = Simulation(work, pool, max_running=64, max_prefill_tokens=32)
    while simulation.scheduler.has_work:
        while simulation.prefill():
            pass
        before = set(simulation.scheduler.running)
        simulation.decode()
        lost = before - set(simulation.scheduler.running) - set(simulation.order_of_finish)
        kept = before - lost
        assert not lost or max(kept) < min(lost), "an older sequence made room for a younger one"


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(BlockPool(11, 16, block_bytes=1000), max_running=8, max_prefill_tokens=64)
    scheduler.add(prompt_length=100, max_completion_tokens=[60])
    with pytest.raises(
        MemoryBudgetError,
        match=r"100 tokens with up to 61 .* 11 blocks .*11,000 bytes.* 10 .10,000",
    ):
        scheduler.add(prompt_length=100, max_completion_tokens=[1, 61])


def test_scarce_memory_costs_few_recomputed_tokens() -> None:
    draw = random.Random(3)
    work = [
        (draw.randint(64, 256), [int(draw.lognormvariate(4.5, 0.8)) + 1 for _ in range(8)])
        for _ in range(16)
    ]
    ample = BlockPool(10_000, 16)
    Simulation(work, ample, max_running=64, max_prefill_tokens=2048, is_checked=False).run()
    scarce = BlockPool(max(ample.peak_used // 4, 1 + needed_blocks(work, 16)), 16)
    simulation = Simulation(
        work,
        scarce,
        max_running=64,
        max_prefill_tokens=2048,
        expected_completion_tokens=120,
        is_checked=False,
    )
    scheduler = simulation.run().scheduler
    num_tokens = sum(length + sum(lengths) for length, lengths in work)
    assert scheduler.num_preemptions > 0
    assert scheduler.num_recomputed_tokens <= 0.25 * num_tokens  # 0.69 without a reserve
