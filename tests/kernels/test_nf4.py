"""The NF4 format against bitsandbytes' own CPU code."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import nf4

oracle = pytest.importorskip("bitsandbytes.functional")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    weight[3] = 0
    weight[4, 5] = 7
    weight[6] = -weight[6].abs()
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 512), (70, 128), (128, 64), (64, 192)])
def test_quantise_and_decode_as_bitsandbytes_does(shape, dtype):
    weight = sample(shape, dtype)
    packed, state = oracle.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    ours = nf4.quantize_nf4(weight)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(ours.absmax2, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset.expand(len(ours.offset)))
    theirs = nf4.NF4Matrix(
        packed=packed.reshape(-1),
        absmax=state.absmax,
        absmax2=state.state2.absmax,
        offset=ours.offset,
        shape=shape,
        dtype=dtype,
    )
    assert torch.equal(nf4.dequantize_nf4(theirs), oracle.dequantize_4bit(packed, state))


def test_scales_are_within_one_step_of_bitsandbytes():
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(2)) * 0.02
    _, state = oracle.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=True, blocksize=64
    )
    steps = (nf4.quantize_nf4(weight).absmax.int() - state.absmax.int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_double_quantisation(dtype):
    weight = sample((70, 128), dtype)
    packed, state = oracle.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    ours = nf4.quantize_nf4(weight, double=False)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(nf4.dequantize_nf4(ours), oracle.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shapes", [((128, 128), (256, 128)), ((7, 64), (5, 64), (300, 64))])
def test_fused_parts_and_row_slices_decode_to_the_same_bits(shapes):
    parts = [nf4.quantize_nf4(sample((max(s[0], 7), s[1]), torch.bfloat16)[: s[0]]) for s in shapes]
    fused = nf4.fuse_nf4(parts)
    want = torch.cat([nf4.dequantize_nf4(part) for part in parts])
    assert torch.equal(nf4.dequantize_nf4(fused), want)
    out = torch.full((3, shapes[0][1]), float("nan"), dtype=torch.bfloat16)
    assert torch.equal(nf4.dequantize_nf4(fused, rows=slice(4, 7), out=out), want[4:7])


def test_bytes_and_error_of_a_round_trip():
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    matrix = nf4.quantize_nf4(weight)
    assert matrix.num_bytes / weight.numel() == pytest.approx(0.5161, abs=2e-4)
    relative = (nf4.dequantize_nf4(matrix) - weight).norm() / weight.norm()
    assert 0.085 < relative < 0.1


def test_a_number_of_weights_that_makes_no_whole_blocks():
    with pytest.raises(ValueError, match="multiple of 64"):
        nf4.quantize_nf4(torch.zeros(3, 10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_slices_change_nothing(monkeypatch, dtype):
    weight = sample((70, 128), torch.float32)
    whole = nf4.quantize_nf4(weight.to(dtype))
    monkeypatch.setattr(nf4, "QUANTIZE_WEIGHTS", 64 * 11)
    sliced = nf4.quantize_nf4(weight, device=torch.device("cpu"), dtype=dtype)
    for name in ("packed", "absmax", "absmax2", "offset", "dtype", "shape"):
        one, other = getattr(whole, name), getattr(sliced, name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


def test_one_scratch_serves_matrices_of_any_size(monkeypatch):
    monkeypatch.setattr(nf4, "QUANTIZE_WEIGHTS", 64 * 11)
    scratch = nf4.QuantizeScratch.build(torch.device("cpu"), torch.bfloat16)
    assert scratch.suits(torch.device("cpu"), torch.bfloat16)
    assert not scratch.suits(torch.device("cpu"), torch.float16)
    assert not scratch.suits(torch.device("meta"), torch.bfloat16)
    for rows in (70, 7, 300):
        weight = sample((rows, 128), torch.bfloat16)
        for buffer in (scratch.moved, scratch.wide):
            buffer.fill_(float("nan"))
        one, other = nf4.quantize_nf4(weight), nf4.quantize_nf4(weight, scratch=scratch)
        assert torch.equal(one.packed, other.packed)
        assert torch.equal(one.absmax, other.absmax)


@pytest.mark.gpu
def test_quantised_from_the_host_onto_a_gpu():
    weight = sample((4096, 1024), torch.bfloat16)
    here, there = nf4.quantize_nf4(weight), nf4.quantize_nf4(weight, device=torch.device("cuda"))
    assert torch.equal(there.packed.cpu(), here.packed)
    assert (there.absmax.cpu().int() - here.absmax.int()).abs().max() <= 1
    torch.testing.assert_close(there.offset.cpu(), here.offset, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1024, 3584), (70, 192)])
def test_a_card_decodes_as_bitsandbytes_does_there(shape, dtype, double):
    """Their kernel against ours on the same stored tensors: whole, fused and in slices of rows."""
    weight = sample(shape, dtype).cuda()
    packed, state = oracle.quantize_4bit(
        weight, quant_type="nf4", compress_statistics=double, blocksize=64
    )
    want = oracle.dequantize_4bit(packed, state)
    ours = nf4.NF4Matrix(
        packed=packed.reshape(-1),
        absmax=state.absmax,
        absmax2=state.state2.absmax if double else None,
        offset=torch.full_like(state.state2.absmax, float(state.offset)) if double else None,
        shape=shape,
        dtype=dtype,
    )
    assert torch.equal(nf4.dequantize_nf4_triton(ours), want)
    out = torch.full((9, shape[1]), float("nan"), dtype=dtype, device="cuda")
    assert torch.equal(nf4.dequantize_nf4_triton(ours, rows=slice(5, 14), out=out), want[5:14])
    fused = nf4.fuse_nf4([ours, ours])
    assert torch.equal(nf4.dequantize_nf4_triton(fused), torch.cat([want, want]))
