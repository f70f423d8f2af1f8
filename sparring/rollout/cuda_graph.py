"""Decode steps as captured CUDA graphs: from the newest token of each row to the next, no host.

A step embeds the rows' tokens, runs the layers, draws the next tokens with their log-probabilities,
tests for the end and moves the rows on, all on the device. One graph is captured for each bucket of
row counts and context lengths when it is first needed, after a run of the same step without
capture; all share one memory pool, reserved beforehand (graph_memory.py). Several steps, a burst,
are replayed between two looks at the result. Rows that have ended go on in place, writing to the
spare block, until the host takes them out. While nothing waits for a place the next burst is queued
before the last one is read, so the device does not wait for the host's books.

Graphs read weights, adapter shadows, rules and rows where they lie, and the pool of keys and values
through its address in device memory: they stay valid over optimizer steps, and when that pool is
freed and taken again in the same size. They are captured anew only where that size has changed or a
transient copy of decoded weights has moved. With cuda_graphs = false the same steps run without
capture, to the same tokens.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparring.kernels.decode_state import advance, place
from sparring.kernels.sampling import DrawRules, draw_tokens
from sparring.layout import DecodeLayout, KVPool
from sparring.models.few_rows import step_logits
from sparring.models.quantised import cached_addresses, scratch_bytes
from sparring.models.transformer import Decoder
from sparring.rollout.block_pool import blocks_for
from sparring.rollout.device_rows import DeviceRows, Fetched
from sparring.rollout.graph_memory import GraphMemory, step_bytes
from sparring.rollout.sampler import Sampling, draw_rules, end_id_tensor
from sparring.rollout.scheduler import SequenceState
from sparring.rollout.steps import Burst, MayGoOn

MIN_CONTEXT = 512
"""The smallest bucket of context lengths; each further one is twice as long."""


def row_bucket(num_rows: int, max_rows: int) -> int:
    """The number of rows that `num_rows` are computed as: powers of two, then steps of 8 and up."""
    if num_rows <= 16:
        bucket = 1 << (num_rows - 1).bit_length()
    else:
        step = max(8, 1 << ((num_rows - 1).bit_length() - 3))
        bucket = -(-num_rows // step) * step
    return min(bucket, max_rows)


def context_bucket(num_tokens: int, max_tokens: int) -> int:
    """The context length that attention's grid is made for."""
    bucket = MIN_CONTEXT
    while bucket < num_tokens:
        bucket *= 2
    return min(bucket, max(max_tokens, 1))


@dataclass(frozen=True, slots=True)
class GraphStats:
    """Captured graphs, the bytes of their memory pool, and seconds spent on capturing."""

    num_graphs: int
    num_bytes: int
    seconds: float


class GraphSteps:
    """Captured steps of one model and adapter, for every generate call of an engine.

    num_steps: steps between two looks at the result. captures False: the same steps without graphs.
    caches_weights: four-bit weights are there decoded whenever a step runs.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        adapter: str | None,
        stop_ids: Sequence[int],
        max_rows: int,
        max_tokens: int,
        block_size: int,
        num_steps: int,
        captures: bool,
        caches_weights: bool = False,
    ) -> None:
        self.num_steps, self._caches_weights = num_steps, caches_weights
        self._model, self._adapter = model, adapter
        self._max_rows, self._max_tokens = max_rows, max_tokens
        self._block_size, self._captures = block_size, captures
        device = model.device
        end_ids = end_id_tensor(stop_ids, model.config.vocab_size, device)
        self._end_ids = torch.empty(0, dtype=torch.int64, device=device)
        if end_ids is not None:
            self._end_ids = end_ids
        self.rows = DeviceRows(
            max_rows=max_rows,
            max_blocks=blocks_for(max_tokens, block_size),
            num_steps=num_steps,
            stop_ids=self._end_ids,
            device=device,
        )
        self._rules: dict[bool, DrawRules] = {}
        self._is_cut = False
        # the engine alone holds the pool: what it gives away when it sleeps must be free then
        self._kv_pool: weakref.ref[KVPool] | None = None
        self._graphs: dict[tuple[int, int, bool], torch.cuda.CUDAGraph] = {}
        self._memory = GraphMemory(device) if captures else None
        self._held: tuple[int, ...] = ()  # numbers that a captured step holds
        self._capture_seconds = 0.0

    @property
    def stats(self) -> GraphStats:
        """What was captured so far."""
        num_bytes = 0 if self._memory is None else self._memory.num_bytes
        return GraphStats(len(self._graphs), num_bytes, self._capture_seconds)

    def has_room(self, num_rows: int, num_tokens: int) -> bool:
        """Whether graphs of so many rows of up to so many tokens need no more memory."""
        return self._memory is None or self._memory.has_room(self._bytes(num_rows, num_tokens))

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """Take the memory of these graphs, before keys and values take what is left."""
        if self._memory is not None:
            self._memory.reserve(self._bytes(num_rows, num_tokens))

    def _bytes(self, num_rows: int, num_tokens: int) -> int:
        model, rows = self._model, row_bucket(num_rows, self._max_rows)
        return step_bytes(
            model.config,
            rows,
            context_bucket(num_tokens, self._max_tokens),
            item=model.dtype.itemsize,
            scratch=0 if self._caches_weights else scratch_bytes(model, rows),
        )

    def aim(self, kv_pool: KVPool, sampling: Sampling) -> None:
        """The next bursts run on this pool, which has the address tensor of every pool before it,
        and draw as `sampling` says.
        """
        self._kv_pool = weakref.ref(kv_pool)
        held = kv_pool.num_blocks, *cached_addresses(self._model)
        if held != self._held:
            self._graphs.clear()
            self._held = held
        rules = draw_rules(sampling, self._max_rows, self._end_ids, self._model.device)
        self._is_cut = rules.cut is not None
        if self._is_cut in self._rules:
            _rewrite(self._rules[self._is_cut], rules)
        else:
            self._rules[self._is_cut] = rules

    def run(
        self,
        running: Sequence[SequenceState],
        token_ids: Sequence[Sequence[int]],
        sample_ids: Sequence[tuple[int, int]],
        may_go_on: MayGoOn,
    ) -> Generator[Burst, None, None]:
        """Bursts of the running sequences, until fewer rows would do or `may_go_on` says no."""
        num_steps = self._steps_left(running, 0)
        num_rows = row_bucket(len(running), self._max_rows)
        step = self._step(num_rows, self._context(running, num_steps))
        self.rows.upload(running, token_ids, sample_ids)
        half = 0
        queued: Fetched | None = self._queue(step, num_rows, num_steps, half)
        try:
            while queued is not None:
                burst, queued = queued, None
                following = self._steps_left(running, num_steps)
                ready = self._ready(running, num_rows, num_steps + following)
                if following and ready is not None and may_go_on(num_steps + following):
                    half = 1 - half
                    self.rows.go_on(running, half)
                    queued = self._queue(ready, num_rows, following, half)
                burst.wait()
                live = slice(0, len(running))
                yield Burst(
                    tokens_NR=burst.tokens_NR[:, live], logprobs_NR=burst.logprobs_NR[:, live]
                )
                num_steps = following
        finally:
            if queued is not None:
                queued.wait()  # what it writes to is free for others afterwards

    def _queue(self, step: Callable[[], None], num_rows: int, num_steps: int, half: int) -> Fetched:
        for _ in range(num_steps):
            step()
        return self.rows.fetch(self.rows.of_rows(num_rows), num_steps, half)

    def _steps_left(self, running: Sequence[SequenceState], num_queued: int) -> int:
        """Steps of the next burst, where num_queued tokens a row are not known yet."""
        left = max(
            (
                s.max_completion_tokens - s.num_completion_tokens
                for s in running
                if not s.is_finished
            ),
            default=0,
        )
        return max(0, min(self.num_steps, left - num_queued))

    def _context(self, running: Sequence[SequenceState], num_new: int) -> int:
        return context_bucket(max(s.num_cached for s in running) + num_new, self._max_tokens)

    def _ready(
        self, running: Sequence[SequenceState], num_rows: int, num_new: int
    ) -> Callable[[], None] | None:
        """The step for further tokens of the same rows, if there is one and no smaller one does."""
        num_live = sum(not s.is_finished for s in running)
        if not num_live or row_bucket(num_live, self._max_rows) < num_rows:
            return None
        context = self._context(running, num_new)
        if self._captures and (num_rows, context, self._is_cut) not in self._graphs:
            return None  # a capture needs rows that rest
        return self._step(num_rows, context)

    def _step(self, num_rows: int, context: int) -> Callable[[], None]:
        if not self._captures:
            return lambda: self._compute(num_rows, context)
        key = (num_rows, context, self._is_cut)
        if key not in self._graphs:
            self._graphs[key] = self._capture(num_rows, context)
        return self._graphs[key].replay

    def _capture(self, num_rows: int, context: int) -> torch.cuda.CUDAGraph:
        """The graph of a step, captured while every row is done, so that nothing is disturbed."""
        started = time.perf_counter()
        memory = self._memory
        assert memory is not None, "captures"
        self.rows.idle()
        with memory.allocating():
            self._compute(num_rows, context)  # compiles and loads what is not yet
        self.rows.idle()
        graph = memory.capture(lambda: self._compute(num_rows, context))
        self._capture_seconds += time.perf_counter() - started
        return graph

    def _compute(self, num_rows: int, context: int) -> None:
        """One step of the first `num_rows` rows, each with at most `context` tokens."""
        rows, pool = self.rows, None if self._kv_pool is None else self._kv_pool()
        assert pool is not None, "aim comes first"
        r, state = slice(0, num_rows), rows.of_rows(num_rows)
        layout = DecodeLayout(
            kv_lengths_R=rows.kv_lengths_R[r],
            block_tables_RN=rows.tables_RN[r],
            slots_R=rows.slots_R[r],
            block_size=self._block_size,
            max_kv_length=context,
        )
        place(
            state.positions_R,
            state.is_done_R,
            layout.block_tables_RN,
            layout.slots_R,
            layout.kv_lengths_R,
            block_size=self._block_size,
        )
        logits_RV = step_logits(
            self._model, state.tokens_R, state.positions_R, layout, pool, adapter=self._adapter
        )
        tokens_R, logprobs_R = draw_tokens(
            logits_RV,
            rows.sample_ids_R2[r],
            state.draws_R,
            self._rules[self._is_cut].of_rows(r),
        )
        advance(state, tokens_R, logprobs_R)


def _rewrite(rules: DrawRules, new: DrawRules) -> None:
    """Puts new numbers where captured graphs read the old ones."""
    for field in fields(rules):
        kept, fresh = getattr(rules, field.name), getattr(new, field.name)
        if isinstance(kept, Tensor):
            kept.copy_(fresh)
        elif kept is not None:
            for inner in fields(kept):
                getattr(kept, inner.name).copy_(getattr(fresh, inner.name))
