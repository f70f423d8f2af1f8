"""Products of 65 to 256 rows in tiles whose weights come before their turn, on an sm_90 card."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_for, few_rows
from sparring.kernels.chain import pieces_norm_early
from sparring.kernels.few_rows import few_rows_reference
from sparring.kernels.few_rows_tiles import MAX_ROWS, Tiles, launch
from sparring.kernels.norm import add_rms_norm
from tests.kernels.chained import layers_and_rows, replays_that_differ
from tests.kernels.test_few_rows_hopper import on_card
from tests.kernels.test_triton import _poisoned, error, random

__all__ = ["_poisoned"]

CASES = [
    # rows, outputs, columns, tiles
    (65, 64, 128, Tiles(32, 2)),
    (128, 2048, 1536, Tiles(32, 9)),
    (100, 200, 320, Tiles(32, 4)),
    (256, 1152, 896, Tiles(64, 7)),
    (129, 896, 896, Tiles(64, 7)),
    (128, 520, 3584, Tiles(64, 6)),
    (256, 1000, 2048, Tiles(64, 3)),
]


@on_card
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_tile(case):
    rows, outputs, columns, tiles = CASES[case]
    dtype = torch.float16 if case == 1 else torch.bfloat16
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(outputs, columns, dtype=dtype, seed=2, scale=0.1)
    bias, residual = random(outputs, dtype=dtype, seed=3), random(rows, outputs, dtype=dtype)
    for given in ({}, {"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}):
        want, _ = few_rows_reference(x, weight, **given)
        got = launch(x, weight, **given, tiles=tiles)
        assert got.shape == want.shape
        assert error(got, want) < (4e-3 if dtype == torch.bfloat16 else 6e-4)
        assert torch.equal(launch(x, weight, **given, tiles=tiles), got), "again"
        assert torch.equal(launch(x, weight, **given, tiles=tiles, overlaps=False), got), "in turn"


PIECES = [
    (128, 1536, 8960, Tiles(128, 4, 5)),
    (200, 896, 4864, Tiles(64, 7, 2)),
    (70, 200, 704, Tiles(64, 3, 3)),
]


@on_card
@pytest.mark.parametrize("case", range(len(PIECES)))
def test_pieces_and_the_norm_behind_them(case):
    rows, outputs, columns, tiles = PIECES[case]
    dtype = torch.bfloat16
    x, weight = random(rows, columns, dtype=dtype, seed=1), random(outputs, columns, dtype=dtype)
    residual = random(rows, outputs, dtype=dtype, seed=3)
    pieces = launch(x, weight, tiles=tiles)
    assert pieces.shape == (tiles.pieces, rows, outputs)
    assert pieces.dtype == torch.float32
    for piece, of in enumerate(pieces):
        steps = -(-columns // 128)
        first, last = (128 * ((piece + i) * steps // tiles.pieces) for i in (0, 1))
        want = x[:, first:last].double() @ weight[:, first:last].double().T
        assert error(of, want) < 1e-4
    assert torch.equal(launch(x, weight, tiles=tiles, overlaps=False), pieces), "in turn"
    gain = random(outputs, dtype=dtype, seed=5) + 1
    got, summed = pieces_norm_early(pieces, residual, gain, 1e-6)
    added = torch.zeros_like(pieces[0])
    for piece in pieces:
        added += piece
    want = add_rms_norm(added.to(dtype), residual, gain, 1e-6)
    assert torch.equal(summed, want[1])
    assert error(got, want[0]) < 4e-3


@on_card
@pytest.mark.parametrize(("rows", "tiles"), [(128, Tiles(32, 9)), (256, Tiles(64, 6))])
def test_overlapping_launches_change_no_bit(rows, tiles):
    """A chain of the 1.5B's products in a graph, each replay with other inputs."""
    layers, first = layers_and_rows(rows)

    def chain(x, *, overlaps):
        given = {"overlaps": overlaps, "tiles": tiles}
        for up, back, gate_up, down, _ in layers:
            y = launch(x, up, **given)
            x = launch(y, back, residual=x, **given)
            y = launch(x, gate_up, **given)[:, : down.shape[1]].contiguous()
            x = launch(y, down, residual=x, **given)
        return x

    assert replays_that_differ(chain, first, 300) == 0


def test_forms_refuse_what_they_do_not_compute():
    tiles, weight = Tiles(32, 4), torch.zeros(128, 128)
    given = {"capability": capability_for(90), "form": tiles}
    x = torch.zeros(70, 128)
    with pytest.raises(AssertionError, match="a gate"):
        few_rows.few_rows(x, weight, gated=True, **given)
    with pytest.raises(ValueError, match="rows at most 256"):
        few_rows.few_rows(torch.zeros(257, 128), weight, **given)


def test_tiles_of_the_table_fit():
    """In shared memory with their barriers, and no piece is empty."""
    for (outputs, columns), forms in few_rows.RINGS.items():
        for rows, tiles in forms.items():
            if isinstance(tiles, Tiles):
                assert 64 < rows <= MAX_ROWS
                assert tiles.stages * (64 + tiles.block_t) * 256 + 1024 <= 232448
                assert tiles.pieces * 128 <= columns
                assert outputs % 64 == 0
