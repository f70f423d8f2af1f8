"""The rows of a captured decode step: tensors that keep their place, filled anew for each burst.

Everything a step reads or writes about its rows lies here, on the device, at addresses that never
change, so that a captured step may be replayed on it. The host writes all of it before the first
burst of some rows, only their new blocks before a further one, and reads the drawn tokens after
each. What two bursts draw lies apart, so that one may run while the other is read. No kernel is
called here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels.decode_state import DecodeState
from sparring.rollout.block_pool import SPARE_BLOCK
from sparring.rollout.scheduler import SequenceState

_TOKEN, _POSITION, _DRAW, _LIMIT, _ID, _STEP = 0, 1, 2, 3, 4, 6


class DeviceRows:
    """State of up to `max_rows` rows of up to `max_blocks` blocks, and room for two bursts' draws.

    sample_ids_R2 int64: what keys the rows' noise. tables_RN int32: their blocks. slots_R int64 and
    kv_lengths_R int32: where a step writes and how far it looks. `of_rows`: all else, by row. A
    burst has up to `num_steps` steps and draws into half 0 or half 1.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_blocks: int,
        num_steps: int,
        stop_ids: Tensor,
        device: torch.device,
    ) -> None:
        pinned = device.type == "cuda"
        shape = (_STEP + 1, max_rows)
        self._host = torch.zeros(shape, dtype=torch.int64, pin_memory=pinned)
        self._host_done = torch.ones(max_rows, dtype=torch.bool, pin_memory=pinned)
        self._host_tables = torch.full(
            (max_rows, max_blocks), SPARE_BLOCK, dtype=torch.int32, pin_memory=pinned
        )
        size = 2 * num_steps * max_rows
        self._host_tokens = torch.zeros(size, dtype=torch.int64, pin_memory=pinned)
        self._host_logprobs = torch.zeros(size, pin_memory=pinned)
        self._in_row: list[tuple[list[int] | None, int]] = [(None, 0)] * max_rows
        state = torch.zeros(shape, dtype=torch.int64, device=device)
        self._state, self._stop_ids = state, stop_ids
        self.sample_ids_R2 = state[_ID : _ID + 2].view(max_rows, 2)
        self._is_done_R = torch.ones(max_rows, dtype=torch.bool, device=device)
        self.tables_RN = torch.full_like(self._host_tables, SPARE_BLOCK, device=device)
        self.slots_R = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.kv_lengths_R = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._out_tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._out_logprobs = torch.zeros(size, device=device)
        self._num_steps = num_steps

    def of_rows(self, num_rows: int) -> DecodeState:
        """The first rows' state, as views that every burst of so many rows uses."""
        r, state = slice(0, num_rows), self._state
        size = 2 * self._num_steps * num_rows
        return DecodeState(
            tokens_R=state[_TOKEN, r],
            positions_R=state[_POSITION, r],
            draws_R=state[_DRAW, r],
            limits_R=state[_LIMIT, r],
            is_done_R=self._is_done_R[r],
            step_1=state[_STEP, :1],
            stop_ids_E=self._stop_ids,
            out_tokens_KR=self._out_tokens[:size].view(-1, num_rows),
            out_logprobs_KR=self._out_logprobs[:size].view(-1, num_rows),
        )

    def idle(self) -> None:
        """Every row is done: a step changes nothing then."""
        self._is_done_R.fill_(True)
        self._state[_STEP, 0] = 0

    def upload(
        self,
        running: Sequence[SequenceState],
        token_ids: Sequence[Sequence[int]],
        sample_ids: Sequence[tuple[int, int]],
    ) -> None:
        """Makes row i that of running[i]; the rows behind are done."""
        num_rows = len(running)
        host = self._host.numpy()
        host[_TOKEN, :num_rows] = [token_ids[s.index][-1] for s in running]
        host[_POSITION, :num_rows] = [s.num_cached for s in running]
        host[_DRAW, :num_rows] = [s.num_completion_tokens for s in running]
        host[_LIMIT, :num_rows] = [s.max_completion_tokens for s in running]
        host[_ID : _ID + 2].reshape(-1, 2)[:num_rows] = [sample_ids[s.index] for s in running]
        host[_POSITION, num_rows:] = 0
        done = self._host_done.numpy()
        done[:num_rows], done[num_rows:] = False, True
        self._write_tables(running)
        self._state.copy_(self._host, non_blocking=True)
        self._is_done_R.copy_(self._host_done, non_blocking=True)
        self.tables_RN[:num_rows].copy_(self._host_tables[:num_rows], non_blocking=True)

    def go_on(self, running: Sequence[SequenceState], half: int) -> None:
        """The same rows go on where they are, with the blocks they have now, and draw into `half`.

        To be called while at most the burst before is unread: rows only ever get more blocks, so a
        copy that is still to come may take the new ones along.
        """
        if self._write_tables(running):
            num_rows = len(running)
            self.tables_RN[:num_rows].copy_(self._host_tables[:num_rows], non_blocking=True)
        self._state[_STEP, :1].fill_(half * self._num_steps)

    def _write_tables(self, running: Sequence[SequenceState]) -> bool:
        tables, has_new = self._host_tables.numpy(), False
        for row, sequence in enumerate(running):
            blocks = sequence.block_table
            # a table that grows stays the same list; one made anew after a preemption does not
            known, written = self._in_row[row]
            if known is not blocks:
                written = 0
            if written < len(blocks):
                tables[row, written : len(blocks)] = blocks[written:]
                self._in_row[row] = (blocks, len(blocks))
                has_new = True
        return has_new

    def fetch(self, state: DecodeState, num_steps: int, half: int) -> Fetched:
        """Queues the copy of what a burst drew into `half`, behind the burst."""
        num_rows = len(state.tokens_R)
        start = half * self._num_steps
        place = slice(start * num_rows, (start + num_steps) * num_rows)
        tokens_NR = self._host_tokens[place].view(num_steps, num_rows)
        logprobs_NR = self._host_logprobs[place].view(num_steps, num_rows)
        tokens_NR.copy_(state.out_tokens_KR[start : start + num_steps], non_blocking=True)
        logprobs_NR.copy_(state.out_logprobs_KR[start : start + num_steps], non_blocking=True)
        event = None
        if self._state.is_cuda:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._state.device))
        return Fetched(tokens_NR=tokens_NR, logprobs_NR=logprobs_NR, event=event)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fetched:
    """Tokens [N, R] and log-probabilities of a burst on their way to the CPU."""

    tokens_NR: Tensor
    logprobs_NR: Tensor
    event: torch.cuda.Event | None

    def wait(self) -> None:
        """Waits until they are there."""
        if self.event is not None:
            self.event.synchronize()


def fetch(tokens_NR: Tensor, logprobs_NR: Tensor) -> Fetched:
    """Queues the copy of tokens and log-probabilities behind what computes them."""
    event = None
    tokens, logprobs = (t.to("cpu", non_blocking=True) for t in (tokens_NR, logprobs_NR))
    if tokens_NR.is_cuda:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tokens_NR.device))
    return Fetched(tokens_NR=tokens, logprobs_NR=logprobs, event=event)
