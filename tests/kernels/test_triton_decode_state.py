"""The kernels around a decode step against their references, on a GPU or in the interpreter."""

from __future__ import annotations

import math
import os
from dataclasses import fields

import pytest
import torch

from sparring.kernels import decode_state
from sparring.kernels.decode_state import DecodeState, advance_reference, advance_triton

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = (
    []
    if INTERPRETED
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU or the interpreter"),
    ]
)


def state_of(num_rows, num_steps, seed, stops=(3, -1, 7)):
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high):
        return torch.randint(low, high, (num_rows,), generator=generator).to(DEVICE)

    draws = integers(0, 9)
    return DecodeState(
        tokens_R=integers(0, 50),
        positions_R=draws + integers(1, 99),
        draws_R=draws,
        limits_R=draws + integers(1, 6),
        is_done_R=integers(0, 4) == 0,
        step_1=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        stop_ids_E=torch.tensor(stops, dtype=torch.int64, device=DEVICE),
        # views of wider buffers, as a bucket's are
        out_tokens_KR=torch.full((num_steps, num_rows + 3), -9, device=DEVICE)[:, :num_rows],
        out_logprobs_KR=torch.full((num_steps, num_rows + 1), -9.0, device=DEVICE)[:, :num_rows],
    )


def copied(state):
    return DecodeState(**{f.name: getattr(state, f.name).clone() for f in fields(state)})


@pytest.mark.parametrize("stops", [(), (3, -1, 7)])
@pytest.mark.parametrize("num_rows", [1, 33, 300])
def test_advance(num_rows, stops):
    state = state_of(num_rows, 4, seed=num_rows, stops=stops)
    expected = copied(state)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randint(0, 12, (num_rows,), generator=generator).to(DEVICE)
        logprobs = -torch.rand(num_rows, generator=generator).to(DEVICE)
        logprobs[0] = math.nan
        advance_triton(state, drawn, logprobs)
        advance_reference(expected, drawn, logprobs)
        for field in fields(state):
            got, want = getattr(state, field.name), getattr(expected, field.name)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True, msg=field.name)
    assert int(state.step_1) == 4
    assert num_rows == 1 or bool(state.is_done_R.any())


def test_advance_by_hand():
    """A row that goes on, one that stops, one at its limit, one done before, one not a number."""

    def row(*values):
        return torch.tensor(values, device=DEVICE)

    state = DecodeState(
        tokens_R=row(1, 1, 1, 1, 1),
        positions_R=row(10, 20, 30, 40, 50),
        draws_R=row(2, 2, 2, 2, 2),
        limits_R=row(9, 9, 3, 9, 9),
        is_done_R=row(False, False, False, True, False),
        step_1=row(1),
        stop_ids_E=row(7, -1),
        out_tokens_KR=torch.zeros(2, 5, dtype=torch.int64, device=DEVICE),
        out_logprobs_KR=torch.zeros(2, 5, device=DEVICE),
    )
    advance_triton(state, row(4, 7, 4, 7, 4), row(-1.0, -2.0, -3.0, -4.0, math.nan))
    assert state.tokens_R.tolist() == [4, 7, 4, 1, 4]
    assert state.positions_R.tolist() == [11, 21, 31, 40, 51]
    assert state.draws_R.tolist() == [3, 3, 3, 2, 3]
    assert state.is_done_R.tolist() == [False, True, True, True, False]
    assert state.out_tokens_KR.tolist() == [[0] * 5, [4, 7, 4, -1, 4]]
    assert state.out_logprobs_KR[1, :4].tolist() == [-1.0, -2.0, -3.0, 0.0]
    assert math.isnan(state.out_logprobs_KR[1, 4])
    assert state.step_1.tolist() == [2]


@pytest.mark.parametrize("num_rows", [1, 5, 300])
@pytest.mark.parametrize("block_size", [16, 64])
def test_place(num_rows, block_size):
    generator = torch.Generator().manual_seed(num_rows)
    positions = torch.randint(0, 12 * block_size, (num_rows,), generator=generator)
    positions[0] = block_size
    is_done = torch.rand(num_rows, generator=generator) < 0.3
    is_done[0] = False
    tables = torch.randint(1, 1 << 30, (num_rows, 20), generator=generator, dtype=torch.int32)
    pairs = []
    for place in (decode_state.place_triton, decode_state.place_reference):
        slots = torch.full((num_rows,), -5, device=DEVICE)
        lengths = torch.full((num_rows,), -5, dtype=torch.int32, device=DEVICE)
        inputs = [x.to(DEVICE) for x in (positions, is_done)]
        # a view of a wider table, as a bucket's is
        place(*inputs, tables.to(DEVICE)[:, :12], slots, lengths, block_size=block_size)
        pairs.append((slots, lengths))
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert torch.equal(pairs[0][1], pairs[1][1])
    slots, lengths = (x.cpu() for x in pairs[0])
    assert int(slots[0]) == int(tables[0, 1]) * block_size
    assert bool((slots[is_done] < block_size).all())
    assert bool((lengths[is_done] == 0).all())
