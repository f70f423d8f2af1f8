"""Who computes next: admission by memory, prefill in chunks, decode, preemption by recomputation.

Pure bookkeeping on integers: no tensors, no tokens, no clock. Groups are admitted in the order in
which they were added, whole wherever that is possible; the sequence that was added first is never
preempted for a later one, so every sequence finishes with memory for a single one.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sparring.errors import MemoryBudgetError
from sparring.rollout.block_pool import BlockPool, blocks_for

_RESERVE_SHARE = 0.25
_PRIOR_WEIGHT = 8


@dataclass(slots=True, eq=False, kw_only=True)
class GroupState:
    """The sequences of one prompt.

    shared_blocks: the blocks wholly inside the prompt, held by every sequence that is in memory
    (num_holders of them). is_prompt_cached: their keys and values are computed. is_started: the
    prompt was computed once and every sequence drew its first token from it.
    """

    prompt_length: int
    sequences: tuple[SequenceState, ...] = ()
    shared_blocks: list[int] = field(default_factory=list)
    num_holders: int = 0
    is_prompt_cached: bool = False
    is_started: bool = False


@dataclass(slots=True, eq=False, kw_only=True)
class SequenceState:
    """One completion in the making.

    index: its place over all sequences in the order of adding. num_cached: tokens (prompt included)
    whose keys and values are in memory. block_table: its blocks in order, none while not in memory.
    """

    index: int
    group: GroupState
    max_completion_tokens: int
    num_completion_tokens: int = 0
    num_cached: int = 0
    block_table: list[int] = field(default_factory=list)
    is_finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Prompt and completion tokens known so far."""
        return self.group.prompt_length + self.num_completion_tokens

    @property
    def max_length(self) -> int:
        """Prompt tokens and the most completion tokens."""
        return self.group.prompt_length + self.max_completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillChunk:
    """Tokens start .. start + length - 1 of a sequence, to be computed in this step.

    drawing: the sequences that draw their next token from the chunk's last position: none before
    the last chunk, the whole group where its prompt is computed for the first time.
    """

    sequence: SequenceState
    start: int
    length: int
    drawing: tuple[SequenceState, ...]


class Scheduler:
    """Decides what each step computes, within the blocks of a pool.

    max_running: most sequences in memory at once. max_prefill_tokens: most tokens of one prefill
    step; a longer prompt is computed in chunks. expected_completion_tokens: a guess of the mean
    completion length, corrected as sequences finish. Who is admitted beside others leaves a quarter
    of that mean free for each of them: with a quarter of the memory wanted and log-normal lengths
    that brings recomputed tokens from 70-85 % of all tokens to 7-10 %, for 5 to 12 % more steps
    (benchmarks/schedule.py).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        max_prefill_tokens: int,
        expected_completion_tokens: float = 128.0,
    ) -> None:
        assert min(max_running, max_prefill_tokens) >= 1, "limits are at least 1"
        self.pool = pool
        self.max_running = max_running
        self.max_prefill_tokens = max_prefill_tokens
        self.running: dict[int, SequenceState] = {}
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0
        self._completion_tokens = expected_completion_tokens * _PRIOR_WEIGHT
        self._num_completions = _PRIOR_WEIGHT
        self._groups: list[GroupState] = []
        self._waiting: deque[GroupState] = deque()
        self._preempted: list[SequenceState] = []
        self._prefilling: list[SequenceState] = []
        self._num_sequences = 0
        self._num_in_memory = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self._prefilling or self._preempted or self._waiting)

    @property
    def has_waiting(self) -> bool:
        """Whether any sequence waits for a place in memory."""
        return bool(self._preempted or self._waiting)

    def add(self, *, prompt_length: int, max_completion_tokens: Sequence[int]) -> GroupState:
        """Queues a prompt with one sequence for each given completion limit.

        Raises MemoryBudgetError where a sequence would not fit even if it were alone.
        """
        assert min(prompt_length, *max_completion_tokens) >= 1, "there is something to compute"
        longest = max(max_completion_tokens)
        needed = blocks_for(prompt_length + longest, self.pool.block_size)
        if needed > self.pool.num_usable:
            self._refuse(prompt_length, longest, needed)
        group = GroupState(prompt_length=prompt_length)
        group.sequences = tuple(
            SequenceState(index=self._num_sequences + i, group=group, max_completion_tokens=limit)
            for i, limit in enumerate(max_completion_tokens)
        )
        self._num_sequences += len(group.sequences)
        self._groups.append(group)
        self._waiting.append(group)
        return group

    def _refuse(self, prompt_length: int, completion_length: int, needed: int) -> None:
        pool = self.pool
        raise MemoryBudgetError(
            f"a prompt of {prompt_length} tokens with up to {completion_length} completion tokens "
            f"needs {needed} blocks of {pool.block_size} tokens for its keys and values "
            f"({needed * pool.block_bytes:,} bytes), but the budget holds {pool.num_usable} "
            f"({pool.num_usable * pool.block_bytes:,} bytes): it could never finish. Give keys and "
            "values more memory, or lower max_completion_tokens."
        )

    def next_prefill(self) -> list[PrefillChunk]:
        """The chunks of the next prefill step, admitting what fits; empty if there is none.

        A prompt is cut only where it leads the step: then its chunk is all the step computes.
        """
        chunks: list[PrefillChunk] = []
        room = self.max_prefill_tokens
        while room > 0:
            if len(chunks) == len(self._prefilling) and not self._admit():
                break
            sequence = self._prefilling[len(chunks)]
            remaining = sequence.num_tokens - sequence.num_cached
            if remaining > room and chunks:
                break
            length = min(remaining, room)
            drawing: tuple[SequenceState, ...] = ()
            if length == remaining:
                group = sequence.group
                drawing = (sequence,) if group.is_started else group.sequences
            start = sequence.num_cached
            chunks.append(
                PrefillChunk(sequence=sequence, start=start, length=length, drawing=drawing)
            )
            room -= length
        return chunks

    def complete_prefill(self, chunks: Iterable[PrefillChunk]) -> list[tuple[int, int]]:
        """Takes note that the chunks are computed; returns block copies (source, target) to make.

        The copies give each sequence of a new group its own block where the prompt ends inside one.
        """
        copies: list[tuple[int, int]] = []
        for chunk in chunks:
            sequence, group = chunk.sequence, chunk.sequence.group
            sequence.num_cached += chunk.length
            shared_length = group.prompt_length // self.pool.block_size * self.pool.block_size
            group.is_prompt_cached = sequence.num_cached >= shared_length
            if not chunk.drawing:
                continue
            self._prefilling.remove(sequence)
            if group.is_started:
                self.running[sequence.index] = sequence
            else:
                copies += self._fork(group)
        return copies

    def _fork(self, group: GroupState) -> list[tuple[int, int]]:
        group.is_started = True
        source = group.sequences[0].block_table[-1]
        copies: list[tuple[int, int]] = []
        for sequence in group.sequences:
            if not sequence.block_table:  # no room at admission: it goes on once there is some
                bisect.insort(self._preempted, sequence, key=_index)
                continue
            sequence.num_cached = group.prompt_length
            self.running[sequence.index] = sequence
            if group.prompt_length % self.pool.block_size and sequence.block_table[-1] != source:
                copies.append((source, sequence.block_table[-1]))
        return copies

    def next_decode(self, num_steps: int = 1) -> list[SequenceState]:
        """Reserves memory for `num_steps` more tokens of every running sequence; returns them.

        Where memory runs out the youngest sequences are preempted: they give their blocks back and
        are computed again later. The order is that of adding.
        """
        rows = sorted(self.running.values(), key=_index)
        size = self.pool.block_size
        for sequence in rows:
            if not sequence.block_table:
                break  # preempted just now, as is every younger one
            length = min(sequence.num_cached + num_steps, sequence.max_length)
            missing = blocks_for(length, size) - len(sequence.block_table)
            while missing > self.pool.num_free and sequence.block_table:
                self._preempt(self.running[max(self.running)])
            if missing > 0 and sequence.block_table:
                sequence.block_table += self.pool.allocate(missing)
        return rows[: len(self.running)]

    def reserve_ahead(self, rows: Iterable[SequenceState], num_tokens: int) -> bool:
        """Reserves memory for `num_tokens` more tokens of each row, if there is enough for all.

        For rows that run on before their newest tokens are known; none is preempted for it, and
        rows that have finished in the meantime get nothing.
        """
        size = self.pool.block_size
        wanted: list[tuple[SequenceState, int]] = []
        for sequence in rows:
            if not sequence.is_finished:
                length = min(sequence.num_cached + num_tokens, sequence.max_length)
                missing = blocks_for(length, size) - len(sequence.block_table)
                if missing > 0:
                    wanted.append((sequence, missing))
        if sum(missing for _, missing in wanted) > self.pool.num_free:
            return False
        for sequence, missing in wanted:
            sequence.block_table += self.pool.allocate(missing)
        return True

    def finish(self, sequence: SequenceState) -> None:
        """The sequence is complete: its blocks are free for others."""
        assert not sequence.is_finished, "a sequence finishes once"
        sequence.is_finished = True
        self._completion_tokens += sequence.num_completion_tokens
        self._num_completions += 1
        if sequence.block_table:
            del self.running[sequence.index]
            self._leave_memory(sequence)
        else:
            self._preempted.remove(sequence)

    def abandon(self) -> None:
        """Forgets every unfinished sequence; the blocks are free for others."""
        for group in self._groups:
            for sequence in group.sequences:
                if sequence.block_table:
                    self._leave_memory(sequence)
        self.running.clear()
        self._prefilling.clear()
        self._preempted.clear()
        self._waiting.clear()

    def _admit(self) -> bool:
        """Moves the next sequence, or group, into memory if it fits; the order is never broken."""
        if self._preempted:
            return self._admit_preempted(self._preempted[0])
        if self._waiting:
            return self._admit_group(self._waiting[0])
        return False

    def _admit_preempted(self, sequence: SequenceState) -> bool:
        group = sequence.group
        if group.num_holders and not group.is_prompt_cached:
            return False  # a sibling is computing the prompt: share it in the next step
        needed = blocks_for(sequence.num_tokens, self.pool.block_size) - len(group.shared_blocks)
        if not self._fits(needed, 1):
            return False
        del self._preempted[0]
        num_shared = len(group.shared_blocks)
        self._enter_memory(sequence, needed)
        sequence.num_cached = num_shared * self.pool.block_size
        self.num_recomputed_tokens += sequence.num_tokens - sequence.num_cached - 1
        self._prefilling.append(sequence)
        return True

    def _admit_group(self, group: GroupState) -> bool:
        num_shared = group.prompt_length // self.pool.block_size
        num_rows = len(group.sequences)
        if not self._fits(num_shared + num_rows, num_rows):
            if self._num_in_memory:
                return False
            num_rows = min(num_rows, self.max_running, self.pool.num_free - num_shared)
        self._waiting.popleft()
        for i, sequence in enumerate(group.sequences[:num_rows]):
            self._enter_memory(sequence, num_shared + 1 if i == 0 else 1)
        self._prefilling.append(group.sequences[0])
        return True

    def _fits(self, num_blocks: int, num_rows: int) -> bool:
        if self._num_in_memory == 0:
            return num_blocks <= self.pool.num_free and num_rows <= self.max_running
        mean_tokens = self._completion_tokens / self._num_completions
        growth = _RESERVE_SHARE * mean_tokens / self.pool.block_size * self._num_in_memory
        has_blocks = num_blocks + growth <= self.pool.num_free
        return has_blocks and self._num_in_memory + num_rows <= self.max_running

    def _enter_memory(self, sequence: SequenceState, num_new_blocks: int) -> None:
        group = sequence.group
        num_shared = group.prompt_length // self.pool.block_size
        self.pool.share(group.shared_blocks)
        sequence.block_table = group.shared_blocks + self.pool.allocate(num_new_blocks)
        group.shared_blocks = sequence.block_table[:num_shared]
        group.num_holders += 1
        self._num_in_memory += 1

    def _leave_memory(self, sequence: SequenceState) -> None:
        group = sequence.group
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_cached = 0
        self._num_in_memory -= 1
        group.num_holders -= 1
        if group.num_holders == 0:
            group.shared_blocks = []
            group.is_prompt_cached = False

    def _preempt(self, sequence: SequenceState) -> None:
        del self.running[sequence.index]
        self._leave_memory(sequence)
        bisect.insort(self._preempted, sequence, key=_index)
        self.num_preemptions += 1


def _index(sequence: SequenceState) -> int:
    return sequence.index
