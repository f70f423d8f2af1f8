"""Products of few rows whose weights come through a ring in shared memory, on an sm_90 card."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_for, few_rows, few_rows_hopper, few_rows_strips
from sparring.kernels.few_rows import Norm, few_rows_reference
from sparring.kernels.few_rows_hopper import Ring, launch, most_pieces
from sparring.kernels.few_rows_strips import Strips
from sparring.kernels.few_rows_tiles import Tiles
from tests.kernels.chained import layers_and_rows, replays_that_differ
from tests.kernels.test_triton import _poisoned, error, random

__all__ = ["_poisoned"]

ON_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs an sm_90 card",
    ),
]


def on_card(test):
    for mark in ON_CARD:
        test = mark(test)
    return test


CASES = [
    # rows, outputs, columns, ring
    (1, 64, 128, Ring(1, 128, 2)),
    (8, 200, 256, Ring(3, 64, 3)),
    (8, 2048, 1536, Ring(128, 128, 3)),
    (5, 1536, 8960, Ring(132, 128, 5)),
    (13, 320, 1024, Ring(7, 128, 4, 2)),
    (32, 1000, 3584, Ring(132, 64, 4, 2)),
    (64, 520, 640, Ring(20, 128, 3)),
    (8, 17920, 1536, Ring(132, 64, 6, 2)),
]


@on_card
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_form(case):
    rows, outputs, columns, ring = CASES[case]
    dtype = torch.float16 if case == 1 else torch.bfloat16
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(outputs, columns, dtype=dtype, seed=2, scale=0.1)
    bias, residual = random(outputs, dtype=dtype, seed=3), random(rows, outputs, dtype=dtype)
    gain = random(columns, dtype=dtype, seed=5) + 1
    limit = 4e-3 if dtype == torch.bfloat16 else 6e-4
    cases = [{"bias": bias}, {"residual": residual}, {"bias": bias, "residual": residual}]
    cases += [{"out_dtype": torch.float32}]
    if few_rows_hopper.folds_norm(ring, rows, columns):
        cases += [{"norm": gain, "bias": bias}, {"norm": gain, "out_dtype": torch.float32}]
    if ring.boxes == 2:
        cases += [case | {"gated": True} for case in cases if "residual" not in case]
    for case in cases:
        norm = case.pop("norm", None)
        wanted = None if norm is None else Norm(weight=norm, eps=1e-6, squares=None)
        want, _ = few_rows_reference(x, weight, **case, norm=wanted)
        given = case | {"norm": None if norm is None else (norm, 1e-6), "ring": ring}
        got = launch(x, weight, **given)
        assert got.shape == want.shape
        assert error(got, want) < limit
        assert torch.equal(launch(x, weight, **given), got), "again"
    assert torch.equal(launch(x, weight, **given, overlaps=False), got), "the last one in turn"


@on_card
@pytest.mark.parametrize(("rows", "strips"), [(1, True), (8, False), (8, True), (32, False)])
def test_overlapping_launches_change_no_bit(rows, strips):
    """A chain of the 1.5B's products in a graph, 1,000 replays, each with other inputs."""
    layers, first = layers_and_rows(rows)

    def chain(x, *, overlaps):
        for up, back, gate_up, down, gain in layers:
            norm = (gain, 1e-6) if rows <= 8 else None
            given = {"overlaps": overlaps}
            if strips:
                launch_strips = few_rows_strips.launch
                y = launch_strips(x, up, norm=norm, strips=Strips(128, 6), **given)
                x = launch_strips(y, back, residual=x, strips=Strips(96, 8), **given)
                y = launch_strips(x, gate_up, norm=norm, gated=True, strips=Strips(132, 8), **given)
                x = launch(y, down, residual=x, ring=Ring(132, 128, 5), **given)
                continue
            y = launch(x, up, norm=norm, ring=Ring(128, 128, 3), **given)
            x = launch(y, back, residual=x, ring=Ring(132, 128, 3), **given)
            y = launch(x, gate_up, norm=norm, gated=True, ring=Ring(132, 64, 5, 2), **given)
            x = launch(y, down, residual=x, ring=Ring(132, 128, 5), **given)
        return x

    assert replays_that_differ(chain, first) == 0


@pytest.mark.parametrize(
    ("programs", "tiles", "steps"), [(4, 4, 3), (3, 4, 3), (128, 32, 12), (132, 24, 70), (7, 7, 1)]
)
def test_pieces_of_a_tile(programs, tiles, steps):
    units, owners = tiles * steps, {}
    for program in range(programs):
        for unit in range(program * units // programs, (program + 1) * units // programs):
            owners[unit] = program
            assert ((unit + 1) * programs - 1) // units == program, "as the kernel finds it"
    pieces = [
        len({owners[unit] for unit in range(tile * steps, (tile + 1) * steps)})
        for tile in range(tiles)
    ]
    assert most_pieces(Ring(programs), tiles, steps) == max(pieces)


def test_forms_of_the_table_have_work_for_all():
    hopper = capability_for(90)
    for (outputs, columns), rings in few_rows.RINGS.items():
        for block_t, ring in rings.items():
            weight = torch.empty(outputs, columns, device="meta")
            assert few_rows.form_of(hopper, block_t, weight) is ring
            if isinstance(ring, Tiles):
                continue
            tiles = -(-outputs // (64 * ring.boxes if isinstance(ring, Ring) else 16))
            steps = -(-columns // ring.block_k) if isinstance(ring, Ring) else 1
            assert ring.programs <= tiles * steps


STRIPS = [(1, 64, 256, 3, 2), (8, 200, 512, 5, 3), (8, 2048, 1536, 128, 6), (5, 1536, 8960, 96, 8)]


@on_card
@pytest.mark.parametrize("case", range(len(STRIPS)))
def test_every_strip(case):
    rows, outputs, columns, programs, stages = STRIPS[case]
    dtype = torch.float16 if case == 1 else torch.bfloat16
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(outputs, columns, dtype=dtype, seed=2, scale=0.1)
    bias, residual = random(outputs, dtype=dtype, seed=3), random(rows, outputs, dtype=dtype)
    gain = random(columns, dtype=dtype, seed=5) + 1
    limit = 4e-3 if dtype == torch.bfloat16 else 6e-4
    cases = [{"bias": bias}, {"residual": residual, "bias": bias}, {"gated": True}]
    if few_rows_strips.folds_norm(columns):
        cases += [{"norm": gain, "bias": bias, "gated": True}]
        cases += [{"norm": gain, "out_dtype": torch.float32}]
    strips = Strips(programs, stages, 1)
    for case in cases:
        norm = case.pop("norm", None)
        wanted = None if norm is None else Norm(weight=norm, eps=1e-6, squares=None)
        want, _ = few_rows_reference(x, weight, **case, norm=wanted)
        given = case | {"norm": None if norm is None else (norm, 1e-6), "strips": strips}
        got = few_rows_strips.launch(x, weight, **given)
        assert got.shape == want.shape
        assert error(got, want) < limit
        assert torch.equal(few_rows_strips.launch(x, weight, **given), got), "again"
    again = few_rows_strips.launch(x, weight, **given, overlaps=False)
    assert torch.equal(again, got), "the last one in turn"
