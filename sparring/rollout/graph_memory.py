"""The memory of captured decode steps: one pool for all graphs, taken before keys and values are.

What a step of the largest bucket needs is known from the model's shape, so it is reserved as a
whole before the pool of keys and values takes the rest of the budget: a graph that is captured
later finds its room, and so does the run before it. A graph's bytes are free for the next one once
it is captured, and are written again at each of its replays: what outlives a step must lie outside
(kernels/kept.py). Nothing is computed here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch.nn import functional as F

from sparring.kernels.cut import CAPACITY
from sparring.kernels.kept import lending, make_kept
from sparring.kernels.paged_plan import SPLIT, DecodeWorkspace
from sparring.kernels.sampling import BLOCK_V
from sparring.models.transformer import TransformerConfig

SMALL_BYTES, SMALL_PIECES = 2**20, 8
"""Requests of up to 1 MiB come from pages of their own; a step has a few at a time."""


def step_bytes(
    config: TransformerConfig, rows: int, context: int, *, item: int, scratch: int = 0
) -> int:
    """What a decode step of so many rows of up to `context` tokens holds at once, in bytes.

    item: bytes of a number. scratch: what one product decodes of its weight. Attention's splits are
    gone when logits come; the rows' states are there with both.
    """
    splits = -(-context // SPLIT)
    heads, keys = config.num_heads, config.num_kv_heads
    attention = DecodeWorkspace.num_bytes(rows, heads, keys, config.head_size, splits)
    tiles = -(-config.vocab_size // BLOCK_V)
    draw = rows * 4 * (config.vocab_size + 4 * tiles + CAPACITY)
    states = rows * (3 * config.ffn_width + 8 * config.width) * item
    return max(attention + scratch, draw) + states


class GraphMemory:
    """The pool that graphs of one engine share, and the stream they are captured on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        make_kept(device)
        self.stream = torch.cuda.Stream(device)
        self._handle = torch.cuda.graph_pool_handle()
        self._keeper: torch.cuda.CUDAGraph | None = None
        self._reserved = 0

    @property
    def num_bytes(self) -> int:
        """What the pool has taken of the device."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if s["segment_pool_id"] == self._handle)

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much is reserved."""
        return num_bytes <= self._reserved

    def reserve(self, num_bytes: int) -> None:
        """Take memory for a step of `num_bytes`, and the library's workspaces of the stream.

        A graph that only asks for the memory holds it for all graphs that follow. Raises
        torch.OutOfMemoryError where there is none.
        """
        if self.has_room(num_bytes):
            return
        if self._keeper is None:
            self._ask([1])  # what is captured inside must not load a kernel
            self._keeper = self.capture(lambda: self._ask([1]))
            with self.allocating():  # a pool must belong to a graph before it is lent
                small = torch.ones(16, 16, dtype=torch.float16, device=self.device)
                torch.mm(small, small)
                F.linear(small, small, small[0])  # with a bias: another library's workspace
                del small
        self._keeper = self.capture(lambda: self._ask([num_bytes, *[SMALL_BYTES] * SMALL_PIECES]))
        self._reserved = num_bytes

    def _ask(self, sizes: Sequence[int]) -> None:
        """Have so many bytes at once, for a moment."""
        held = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        held[-1].zero_()

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Inside, the stream is current and memory comes from the pool, as in a capture."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # inside nothing that is cached could be given back
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        torch._C._cuda_beginAllocateCurrentThreadToPool(index, self._handle)
        try:
            with torch.cuda.stream(self.stream), lending():
                yield
        finally:
            torch._C._cuda_endAllocateToPool(index, self._handle)
            torch._C._cuda_releasePool(index, self._handle)
        torch.cuda.synchronize(self.device)

    def capture(self, compute: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """The graph of what `compute` launches, which is not run."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream), lending():
            graph.capture_begin(pool=self._handle)
            try:
                compute()
            except BaseException:
                # what was captured so far is dropped, whatever the driver says of it
                with warnings.catch_warnings(), suppress(RuntimeError):
                    warnings.simplefilter("ignore")
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize(self.device)
        return graph
