"""Products of a decode step with norm, residual and gate folded in: on a GPU or interpreted.

The interpreter's process is started by tests/kernels/test_processes.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparring.kernels import Capability, capability_for, capability_of, chain, few_rows
from sparring.kernels.few_rows import (
    Form,
    Norm,
    few_rows_reference,
    few_rows_triton,
    general_form,
    squares_of,
)
from sparring.kernels.norm import add_rms_norm_triton, rms_norm_triton
from sparring.kernels.step_start import start_step, start_step_reference, start_step_triton
from sparring.kernels.swiglu import swiglu_triton
from sparring.layout import DecodeLayout
from sparring.models.attention_paged_kernel import PagedKernelPlan
from sparring.models.few_rows import run_layers
from sparring.models.rope import RopeConfig, inverse_frequencies
from sparring.models.transformer import Decoder, TransformerConfig, new_kv_pool
from tests.kernels.chained import layers_and_rows, replays_that_differ
from tests.kernels.test_triton import DEVICE, INTERPRETED, _poisoned, pytestmark, random
from tests.kernels.test_triton_matmul import error

__all__ = ["_poisoned", "pytestmark"]

LIMIT = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5}
CAN_RUN = DEVICE.type == "cpu" or torch.cuda.is_available()
CAPABILITY = capability_of(DEVICE) if CAN_RUN else capability_for(90)


CASES = [
    (1, 64, 64, torch.bfloat16, 1),
    (3, 72, 192, torch.float16, 1),
    (8, 136, 704, torch.bfloat16, 3),
    (30, 72, 320, torch.float16, 2),
]


@pytest.mark.parametrize(("rows", "outputs", "columns", "dtype", "segments"), CASES)
def test_every_form(rows, outputs, columns, dtype, segments):
    x = random(rows, columns, dtype=dtype, seed=1)
    weight = random(outputs, columns, dtype=dtype, seed=2, scale=0.1)
    bias = random(outputs, dtype=dtype, seed=3)
    form = Form(general_form(CAPABILITY, rows, outputs, columns).tile, segments)
    residual = random(rows, outputs, dtype=dtype, seed=4)
    norm = Norm(weight=random(columns, dtype=dtype, seed=5) + 1, eps=1e-6, squares=squares_of(x))
    for given in (
        {"bias": bias},
        {"norm": norm, "bias": bias},
        {"norm": norm, "out_dtype": torch.float32},
        {"residual": residual},
        {"bias": bias, "norm": norm, "residual": residual},
        {"norm": norm, "bias": bias, "gated": True},
    ):
        want, want_squares = few_rows_reference(x, weight, **given)
        got, squares = few_rows_triton(x, weight, **given, capability=CAPABILITY, form=form)
        assert got.shape == want.shape
        # a norm's rounded elements differ where the sums of squares do: not below the inputs' unit
        assert error(got, want) < LIMIT[dtype]
        assert (squares is None) == (want_squares is None)
        if squares is not None:
            kept = got.float().square().sum(1)
            assert error(squares.parts.sum(0), kept) < 1e-6, "of what was stored"


def test_a_chain_of_layers_finds_its_own_squares():
    """Two products with residuals, each normed by what the one before left."""
    dtype = torch.bfloat16
    x = random(5, 128, dtype=dtype, seed=1)
    weights = [random(128, 128, dtype=dtype, seed=i, scale=0.1) for i in (2, 3)]
    gain = random(128, dtype=dtype, seed=4) + 1
    form = Form(general_form(CAPABILITY, 5, 128, 128).tile, 2)
    y, squares, want = x, squares_of(x), x
    for weight in weights:
        norm = Norm(weight=gain, eps=1e-6, squares=squares)
        y, squares = few_rows_triton(
            y, weight, norm=norm, residual=y, capability=CAPABILITY, form=form
        )
        want, _ = few_rows_reference(want, weight, norm=norm, residual=want)
    assert error(y, want) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("rows", [1, 5])
def test_norm_and_swiglu_of_a_chain_have_the_bits_of_the_plain_ones(rows):
    dtype, width = torch.bfloat16, 96
    x, before = (random(rows, width, dtype=dtype, seed=i) for i in (1, 2))
    gain = random(width, dtype=dtype, seed=3) + 1
    given = {"overlaps": few_rows.overlaps(CAPABILITY)}
    for residual in (None, before):
        got = chain.add_norm_early(x, residual, gain, 1e-6, **given)
        if residual is None:
            want = (rms_norm_triton(x, gain, 1e-6), x)
        else:
            want = add_rms_norm_triton(x, residual, gain, 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    gate_up = random(rows, 2 * 1100, dtype=dtype, seed=5)
    assert torch.equal(chain.swiglu_early(gate_up, **given), swiglu_triton(gate_up))


def test_a_norm_adds_pieces_in_order():
    width = 192
    pieces = random(3, 5, width, dtype=torch.float32, seed=1)
    residual = random(5, width, dtype=torch.bfloat16, seed=2)
    gain = random(width, dtype=torch.bfloat16, seed=3)
    y, summed = chain.pieces_norm_early(pieces, residual, gain, 1e-6, overlaps=False)
    product = ((pieces[0] + pieces[1]) + pieces[2]).bfloat16()
    want_y, want = add_rms_norm_triton(product, residual, gain, 1e-6)
    assert torch.equal(summed, want)
    assert error(y, want_y) < 4e-3


def test_forms_serve_the_rows_they_were_measured_for():
    hopper = Capability(arch=90, tensor_dots=True)
    weight = torch.empty(2048, 1536, device="meta")
    assert few_rows.form_of(hopper, 8, weight) is not None
    assert few_rows.form_of(hopper, 17, weight) is None
    gate_up = torch.empty(37888, 3584, device="meta")
    found = [few_rows.form_of(hopper, n, gate_up) is not None for n in (16, 17, 32, 64, 65)]
    assert found == [False, True, True, True, False]
    assert [few_rows.form_of(hopper, n, weight) for n in (64, 65, 257)] == [
        None, few_rows.RINGS[(2048, 1536)][128], None
    ]  # fmt: skip
    assert few_rows.form_of(Capability(arch=80, tensor_dots=True), 8, weight) is None


def test_the_start_of_a_step():
    table = random(50, 72, dtype=torch.bfloat16, seed=1)
    ids = torch.tensor([0, 49, 7, 7, 3], device=DEVICE)
    positions = torch.tensor([0, 1, 500, 4095, 131071], device=DEVICE)
    frequencies = inverse_frequencies(RopeConfig(theta=1e6), 24).to(DEVICE)
    want = start_step_reference(table, ids, positions, frequencies)
    got = start_step_triton(table, ids, positions, frequencies)
    assert torch.equal(got[0], want[0])
    assert error(got[1].parts, want[1].parts) < 1e-6
    for table_got, table_want in zip(got[2:], want[2:], strict=True):
        assert (table_got - table_want).abs().max() < 3e-7


@pytest.mark.parametrize(("folds", "early"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_decoder_step_as_a_chain(qk_norm, folds, early, monkeypatch):
    """The layers' own forward and the chain, with the library's products and with folded ones, over
    the same keys and values.
    """
    config = TransformerConfig(
        family="qwen2", vocab_size=50, width=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_size=16, ffn_width=128, norm_eps=1e-6, rope=RopeConfig(), windows=(0, 5),
        max_tokens=64, tied_head=True, qkv_bias=True, qk_norm=qk_norm, initializer_range=0.1,
    )  # fmt: skip
    model = Decoder(config, device=DEVICE, dtype=torch.bfloat16, capability=CAPABILITY)
    model.init_weights(0)
    rows, context = 3, 13
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2} if folds else set()
    forms = {}
    for shape in shapes:
        form = general_form(CAPABILITY, rows, *shape)
        forms[shape] = replace(form, tile=replace(form.tile, block_t=16))
    monkeypatch.setitem(few_rows.FORMS, CAPABILITY.arch, forms)
    if not early:
        monkeypatch.setattr(few_rows, "PDL_ARCH", 1000)
    found = []
    for fuses in (False, True):
        pool = new_kv_pool(config, 4, 16, torch.bfloat16, DEVICE)
        pool.data.copy_(random(*pool.data.shape, dtype=torch.bfloat16, seed=1))
        layout = DecodeLayout(
            kv_lengths_R=torch.full((rows,), context, dtype=torch.int32, device=DEVICE),
            block_tables_RN=torch.arange(1, 4, dtype=torch.int32, device=DEVICE)[:, None],
            slots_R=torch.arange(1, 4, device=DEVICE) * 16 + context - 1,
            block_size=16,
            max_kv_length=16,
        )
        positions = torch.full((rows,), context - 1, device=DEVICE)
        tokens = torch.arange(rows, device=DEVICE)
        with torch.no_grad():
            plan = PagedKernelPlan.of_layout(layout, pool, CAPABILITY)
            cos, sin = model.angles(positions)
            if fuses:
                start = start_step(model.embed.weight, tokens, positions, model.frequencies_E2)
                stream = run_layers(list(model.layers), *start, plan)
                if folds:
                    kept = stream.x_TD.float().square().sum(1)
                    assert error(stream.squares.parts.sum(0), kept) < 1e-6
                out = stream.normed(model.norm)
            else:
                out = model.infer(model.embed.rows(tokens), cos, sin, plan, None)
        found.append((out, pool.data))
    (want, kept), (got, written) = found
    assert error(got, want) < 1e-2
    assert error(written, kept) < 1e-2, "keys and values of the new tokens"


def test_what_the_kernel_does_not_take():
    x = random(2, 64, dtype=torch.bfloat16)
    given = {"capability": CAPABILITY}
    with pytest.raises(ValueError, match="columns must be equal"):
        few_rows_triton(x, random(4, 128, dtype=torch.bfloat16), **given)
    many = random(few_rows.MAX_ROWS + 1, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows at most"):
        few_rows_triton(many, random(4, 64, dtype=torch.bfloat16), **given)
    with pytest.raises(ValueError, match="one dtype"):
        few_rows_triton(x, random(4, 64, dtype=torch.float16), **given)


@pytest.mark.skipif(INTERPRETED, reason="launches that overlap")
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_overlapping_launches_change_no_bit(rows):
    """A chain of the 1.5B's products in a graph, 1,000 replays, each with other inputs."""
    if not few_rows.overlaps(CAPABILITY):
        pytest.skip("needs compute capability 9.0")

    layers, first = layers_and_rows(rows)

    def chain(x, *, overlaps):
        given = {"capability": CAPABILITY, "overlap": overlaps}
        squares = squares_of(x)
        for up, back, gate_up, down, gain in layers:
            norm = Norm(weight=gain, eps=1e-6, squares=squares)
            y, _ = few_rows_triton(x, up, norm=norm, **given)
            x, squares = few_rows_triton(y, back, residual=x, ahead=gate_up, **given)
            norm = Norm(weight=gain, eps=1e-6, squares=squares)
            y, _ = few_rows_triton(x, gate_up, norm=norm, gated=True, **given)
            x, squares = few_rows_triton(y, down, residual=x, **given)
        return x

    assert replays_that_differ(chain, first) == 0
