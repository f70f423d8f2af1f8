"""The small work around a decode step: where its keys go, and what its tokens change.

`place` runs before a step and finds for each row the slot of its newest token and how many tokens
it attends to. `advance` runs after the draw: it writes tokens and log-probabilities down, marks the
rows that end, and moves the others on. Between them nothing needs the host, so a graph of one step
can be replayed many times. A row that is done stays where it is, writes into the spare block and
attends to nothing. Stop strings are the host's: it cuts what was drawn past one.
Shapes: [R] each, block tables [R, N], what is written down [R, steps]. One launch each, of some 100
bytes a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparring.kernels import jit, tl, triton, uses_triton

__all__ = [
    "DecodeState",
    "advance",
    "advance_reference",
    "advance_triton",
    "place",
    "place_reference",
    "place_triton",
]

NO_TOKEN = -1
PLACE_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeState:
    """What decode steps change in place, one entry for each row R.

    tokens_R int64: the newest token. positions_R int64: its place in prompt + completion. draws_R
    int64: the place in the completion of the token to draw next. limits_R int64: tokens that the
    completion may have. is_done_R bool. step_1 int64: steps since the host last looked. stop_ids_E
    int64: tokens that end a completion; negative entries are unused. out_tokens_KR int64 and
    out_logprobs_KR float32: what each of up to K steps drew; NO_TOKEN and 0 where the row was done
    before.
    """

    tokens_R: Tensor
    positions_R: Tensor
    draws_R: Tensor
    limits_R: Tensor
    is_done_R: Tensor
    step_1: Tensor
    stop_ids_E: Tensor
    out_tokens_KR: Tensor
    out_logprobs_KR: Tensor


def advance_reference(state: DecodeState, drawn_R: Tensor, logprobs_R: Tensor) -> None:
    """Every row that is not done drew drawn_R [R] int64 with logprobs_R [R] float32.

    Changes the state in place. A log-probability that is not a number is written as it is, for the
    host to report.
    """
    step, is_done_R = int(state.step_1), state.is_done_R.clone()
    state.out_tokens_KR[step] = torch.where(is_done_R, NO_TOKEN, drawn_R)
    state.out_logprobs_KR[step] = torch.where(is_done_R, 0.0, logprobs_R)
    is_stop_R = (drawn_R[:, None] == state.stop_ids_E).any(1) & (drawn_R >= 0)
    ends_R = is_stop_R | (state.draws_R + 1 >= state.limits_R)
    goes_on_R = (~is_done_R).long()
    state.tokens_R.copy_(torch.where(is_done_R, state.tokens_R, drawn_R))
    state.positions_R.add_(goes_on_R)
    state.draws_R.add_(goes_on_R)
    state.is_done_R.logical_or_(ends_R)
    state.step_1.add_(1)


@jit
def _advance_kernel(
    drawn_ptr, logprobs_ptr, tokens_ptr, positions_ptr, draws_ptr, limits_ptr, is_done_ptr,
    step_ptr, stop_ptr, out_tokens_ptr, out_logprobs_ptr, num_rows, stride_tokens, stride_logprobs,
    STOPS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All rows in one program, which alone counts the step."""
    step = tl.load(step_ptr)
    rows = tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    was_done = tl.load(is_done_ptr + rows, mask=inside, other=1) != 0
    drawn = tl.load(drawn_ptr + rows, mask=inside, other=0)
    logprobs = tl.load(logprobs_ptr + rows, mask=inside, other=0.0)
    out_tokens_ptr += step * stride_tokens
    out_logprobs_ptr += step * stride_logprobs
    tl.store(out_tokens_ptr + rows, tl.where(was_done, -1, drawn), mask=inside)
    tl.store(out_logprobs_ptr + rows, tl.where(was_done, 0.0, logprobs), mask=inside)
    draws = tl.load(draws_ptr + rows, mask=inside, other=0) + 1
    is_done = draws >= tl.load(limits_ptr + rows, mask=inside, other=0)
    for i in tl.static_range(STOPS):
        is_done = is_done | (drawn == tl.load(stop_ptr + i))
    live = inside & (was_done == 0)
    positions = tl.load(positions_ptr + rows, mask=live, other=0) + 1
    tl.store(tokens_ptr + rows, drawn, mask=live)
    tl.store(positions_ptr + rows, positions, mask=live)
    tl.store(draws_ptr + rows, draws, mask=live)
    tl.store(is_done_ptr + rows, is_done.to(tl.int8), mask=live)
    tl.store(step_ptr, step + 1)


def advance_triton(state: DecodeState, drawn_R: Tensor, logprobs_R: Tensor) -> None:
    """`advance_reference` in one launch without host synchronisation."""
    num_rows = len(drawn_R)
    block = max(32, triton.next_power_of_2(num_rows))
    _advance_kernel[(1,)](
        drawn_R, logprobs_R, state.tokens_R, state.positions_R, state.draws_R, state.limits_R,
        state.is_done_R.view(torch.int8), state.step_1, state.stop_ids_E, state.out_tokens_KR,
        state.out_logprobs_KR, num_rows, state.out_tokens_KR.stride(0),
        state.out_logprobs_KR.stride(0), STOPS=len(state.stop_ids_E), BLOCK_R=block,
        num_warps=min(8, block // 32),
    )  # fmt: skip


def advance(state: DecodeState, drawn_R: Tensor, logprobs_R: Tensor) -> None:
    """Every row that is not done drew drawn_R [R] int64 with logprobs_R [R] float32; changes the
    state in place.
    """
    chosen = advance_triton if uses_triton(logprobs_R) else advance_reference
    chosen(state, drawn_R, logprobs_R)


def place_reference(
    positions_R: Tensor,
    is_done_R: Tensor,
    block_tables_RN: Tensor,
    slots_R: Tensor,
    kv_lengths_R: Tensor,
    *,
    block_size: int,
) -> None:
    """Writes slots_R [R] int64 and kv_lengths_R [R] int32 of the coming step.

    A row writes at its position: slot = its block * block_size + offset, and attends to position +
    1 tokens. A row that is done writes into block 0 and attends to none. block_tables [R, N] int32.
    """
    num_rows, num_columns = block_tables_RN.shape
    columns_R = torch.div(positions_R, block_size, rounding_mode="floor")
    columns_R = columns_R.clamp(0, num_columns - 1)
    blocks_R = block_tables_RN.gather(1, columns_R[:, None])[:, 0].long()
    slots = blocks_R * block_size + positions_R % block_size
    spare = torch.arange(num_rows, device=slots.device) % block_size
    slots_R.copy_(torch.where(is_done_R, spare, slots))
    kv_lengths_R.copy_(torch.where(is_done_R, 0, positions_R + 1))


@jit
def _place_kernel(
    positions_ptr, is_done_ptr, tables_ptr, slots_ptr, lengths_ptr, num_rows, stride_r,
    COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < num_rows
    live = inside & (tl.load(is_done_ptr + rows, mask=inside, other=1) == 0)
    positions = tl.load(positions_ptr + rows, mask=inside, other=0)
    columns = tl.minimum(positions // BLOCK_SIZE, COLUMNS - 1)
    blocks = tl.load(tables_ptr + rows.to(tl.int64) * stride_r + columns, mask=live, other=0)
    slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    spare = (rows % BLOCK_SIZE).to(tl.int64)
    tl.store(slots_ptr + rows, tl.where(live, slots, spare), mask=inside)
    tl.store(lengths_ptr + rows, tl.where(live, positions + 1, 0).to(tl.int32), mask=inside)


def place_triton(
    positions_R: Tensor,
    is_done_R: Tensor,
    block_tables_RN: Tensor,
    slots_R: Tensor,
    kv_lengths_R: Tensor,
    *,
    block_size: int,
) -> None:
    """`place_reference` in one launch."""
    num_rows, num_columns = block_tables_RN.shape
    _place_kernel[(triton.cdiv(num_rows, PLACE_BLOCK),)](
        positions_R, is_done_R.view(torch.int8), block_tables_RN, slots_R, kv_lengths_R, num_rows,
        block_tables_RN.stride(0), COLUMNS=num_columns, BLOCK_SIZE=block_size, BLOCK_R=PLACE_BLOCK,
        num_warps=4,
    )  # fmt: skip


def place(
    positions_R: Tensor,
    is_done_R: Tensor,
    block_tables_RN: Tensor,
    slots_R: Tensor,
    kv_lengths_R: Tensor,
    *,
    block_size: int,
) -> None:
    """Writes slots_R [R] int64 and kv_lengths_R [R] int32 of the coming step from positions_R [R]
    int64, is_done_R [R] bool and block_tables [R, N] int32.
    """
    chosen = place_triton if positions_R.is_cuda and triton is not None else place_reference
    chosen(positions_R, is_done_R, block_tables_RN, slots_R, kv_lengths_R, block_size=block_size)
