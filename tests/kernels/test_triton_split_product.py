"""Products joined with the norm or the gate behind them: on a GPU or interpreted.

The interpreter's process is started by tests/kernels/test_processes.py.
"""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import capability_for, split_product
from sparring.kernels.norm import add_rms_norm_triton
from sparring.kernels.split_product import (
    SplitForm,
    add_norm_of_parts_reference,
    add_norm_of_parts_triton,
    gated_product_reference,
    gated_product_triton,
    split_form,
    split_product_reference,
    split_product_triton,
)
from tests.kernels.test_triton import DEVICE, HALVES, INTERPRETED, _poisoned, pytestmark, random
from tests.kernels.test_triton_matmul import error

__all__ = ["_poisoned", "pytestmark"]

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def _with_bulk_copies():
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs compute capability 9.0")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "outputs", "columns", "form"),
    [
        (5, 64, 128, SplitForm(32, 64, 1, 4, 2)),
        (70, 96, 320, SplitForm(32, 64, 3, 4, 2)),
        (130, 72, 448, SplitForm(64, 128, 4, 8, 3)),
    ],
)
def test_pieces_and_their_norm(rows, outputs, columns, form, dtype):
    """Also rows and outputs that do not fill a tile, and pieces of unequal size."""
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(outputs, columns, dtype=dtype, seed=2, scale=0.1)
    parts = split_product_triton(x, weight, form)
    assert parts.shape == (form.segments, rows, outputs)
    assert error(parts, split_product_reference(x, weight, form.segments)) < 1e-5
    bias, gain = (random(outputs, dtype=dtype, seed=i) for i in (3, 4))
    residual = random(rows, outputs, dtype=dtype, seed=5)
    for given in (None, bias):
        got = add_norm_of_parts_triton(parts, given, residual, gain, 1e-6)
        want = add_norm_of_parts_reference(parts, given, residual, gain, 1e-6)
        for one, other in zip(got, want, strict=True):
            assert error(one, other) < LIMIT[dtype]


def test_one_piece_has_the_norm_s_bits():
    rows, width = 9, 192
    parts = random(1, rows, width, dtype=torch.float32, seed=1)
    residual, gain = (random(n, width, dtype=torch.bfloat16, seed=2) for n in (rows, 1))
    got = add_norm_of_parts_triton(parts, None, residual, gain[0], 1e-6)
    want = add_rms_norm_triton(parts[0].to(torch.bfloat16), residual, gain[0], 1e-6)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "half", "columns", "form"),
    [(5, 64, 128, SplitForm(32, 64, 1, 4, 2)), (130, 192, 320, SplitForm(64, 128, 1, 8, 3))],
)
def test_a_gated_product(rows, half, columns, form, dtype):
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(2 * half, columns, dtype=dtype, seed=2, scale=0.1)
    bias = random(2 * half, dtype=dtype, seed=3)
    for given in (None, bias):
        got = gated_product_triton(x, weight, given, form)
        assert got.shape == (rows, half)
        # a rounded gate is steep: its last unit counts a little more than the product's
        assert error(got, gated_product_reference(x, weight, given)) < 1.5 * LIMIT[dtype]


@pytest.mark.parametrize("first", [1, 33])
def test_a_row_s_bits_do_not_depend_on_the_others(first):
    form = SplitForm(32, 64, 2, 4, 2)
    x = random(100, 256, dtype=torch.bfloat16, seed=1)
    weight = random(64, 256, dtype=torch.bfloat16, seed=2)
    whole, some = (split_product_triton(part, weight, form) for part in (x, x[first:]))
    assert torch.equal(whole[:, first:], some)
    whole, some = (gated_product_triton(part, weight, None, form) for part in (x, x[first:]))
    assert torch.equal(whole[first:], some)


def test_what_the_kernels_do_not_take():
    form = SplitForm(32, 64, 1, 4, 2)
    x = random(2, 64, dtype=torch.bfloat16)
    for product in (
        lambda weight: split_product_triton(x, weight, form),
        lambda weight: gated_product_triton(x, weight, None, form),
    ):
        with pytest.raises(ValueError, match="columns must be equal"):
            product(random(64, 128, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="dtypes the same"):
            product(random(64, 64, dtype=torch.float16))
    with pytest.raises(ValueError, match="no multiple of 32"):
        gated_product_triton(x, random(80, 64, dtype=torch.bfloat16), None, form)


def test_which_form_a_product_takes(monkeypatch):
    small, large = SplitForm(64, 128, 2), SplitForm(128, 128, 4)
    table = {(96, 64): ((65, 128, small), (129, 256, large))}
    monkeypatch.setattr(split_product, "FORMS", {90: table})
    weight = torch.empty(96, 64, device=DEVICE)
    for rows, form in ((64, None), (65, small), (128, small), (129, large), (257, None)):
        assert split_form(capability_for(90), rows, weight) is form
    assert split_form(capability_for(100), 100, weight) is None
    assert split_form(capability_for(90), 100, weight.T) is None
