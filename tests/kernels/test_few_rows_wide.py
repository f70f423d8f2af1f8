"""Products of 65 to 128 rows in tall tiles on an sm_90 card; the norm that adds their pieces."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_for, few_rows, few_rows_wide
from sparring.kernels.chain import add_norm_early, pieces_norm_early
from sparring.kernels.few_rows import few_rows_reference
from sparring.kernels.few_rows_wide import Wide, launch
from tests.kernels.chained import layers_and_rows, replays_that_differ
from tests.kernels.test_few_rows_hopper import on_card
from tests.kernels.test_triton import _poisoned, error, random

__all__ = ["_poisoned"]

CASES = [
    # rows, outputs, columns, form
    (128, 37888, 3584, Wide(128, 16, 4)),
    (128, 37888, 3584, Wide(128, 16, 4, behind=0)),
    (128, 3584, 18944, Wide(128, 16, 6, 5)),
    (128, 3584, 3584, Wide(128, 16, 6, 5, 0)),
    (128, 17920, 1536, Wide(64, 8, 6)),
    (65, 208, 256, Wide(64, 8, 3)),
    (100, 528, 640, Wide(128, 16, 2)),
    (77, 1000, 1024, Wide(64, 32, 3, 3)),
    (1, 144, 64, Wide(128, 16, 4)),
]


@on_card
@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_form(case):
    rows, outputs, columns, wide = CASES[case]
    dtype = torch.float16 if case == 6 else torch.bfloat16
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(outputs, columns, dtype=dtype, seed=2, scale=0.1)
    bias = random(outputs, dtype=dtype, seed=3)
    limit = 4e-3 if dtype == torch.bfloat16 else 6e-4
    if wide.pieces > 1:
        residual, gain = random(rows, outputs, dtype=dtype, seed=4), random(outputs, dtype=dtype)
        for given in ({}, {"bias": bias}):
            want, _ = few_rows_reference(x, weight, **given)
            pieces = launch(x, weight, **given, wide=wide)
            assert pieces.shape == (wide.pieces, rows, outputs)
            assert pieces.dtype == torch.float32
            assert error(pieces.double().sum(0), want) < limit
            assert torch.equal(launch(x, weight, **given, wide=wide, overlaps=False), pieces)
            together = pieces[0].clone()
            for piece in pieces[1:]:
                together += piece
            want_y, want = add_norm_early(together.to(dtype), residual, gain, 1e-6)
            got_y, got = pieces_norm_early(pieces, residual, gain, 1e-6)
            assert torch.equal(got, want), "as the product rounded, then added"
            assert error(got_y, want_y) < limit
        return
    plain = [{}, {"bias": bias}, {"out_dtype": torch.float32}]
    for given in [*plain, {"gated": True}, {"bias": bias, "gated": True}]:
        want, _ = few_rows_reference(x, weight, **given)
        got = launch(x, weight, **given, wide=wide)
        assert got.shape == want.shape
        assert error(got, want) < limit
        assert torch.equal(launch(x, weight, **given, wide=wide), got), "again"
        assert torch.equal(launch(x, weight, **given, wide=wide, overlaps=False), got), "in turn"


@on_card
@pytest.mark.parametrize("rows", [80, 128])
def test_overlapping_launches_change_no_bit(rows):
    """A chain of the 1.5B's products in a graph, 1,000 replays, each with other inputs."""
    layers, first = layers_and_rows(rows)

    def chain(x, *, overlaps):
        given = {"overlaps": overlaps}
        y, x = add_norm_early(x, None, layers[0][-1], 1e-6, **given)
        for up, back, gate_up, down, gain in layers:
            y = launch(y, up, wide=Wide(64, 8, 6), **given)
            pieces = launch(y, back, wide=Wide(64, 8, 6, 5), **given)
            y, x = pieces_norm_early(pieces, x, gain, 1e-6, **given)
            y = launch(y, gate_up, gated=True, wide=Wide(64, 8, 6, behind=0), **given)
            pieces = launch(y, down, wide=Wide(128, 16, 6, 12), **given)
            y, x = pieces_norm_early(pieces, x, gain, 1e-6, **given)
        return y

    assert replays_that_differ(chain, first) == 0


def test_forms_of_the_table_have_work_for_all():
    hopper = capability_for(90)
    for (outputs, columns), forms in few_rows.RINGS.items():
        for form in forms.values():
            if not isinstance(form, Wide):
                continue
            weight = torch.empty(outputs, columns, device="meta")
            assert few_rows.form_of(hopper, 128, weight) is form
            assert form.pieces <= columns // few_rows_wide.BLOCK_K
