"""NF4 models: quantised on load, read and written as bitsandbytes stores them, trained through."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparring.errors import CheckpointError
from sparring.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparring.models import nf4_files
from sparring.models.checkpoint import build_model, load_model, save_model, weight_views
from sparring.models.files import INDEX
from sparring.models.lora import LoraConfig
from sparring.models.quantised import Quantised
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Prompt
from tests.models.tiny import CONFIGS, logits_of, random_ids

CONFIG: dict[str, Any] = {
    **CONFIGS["qwen2"],
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}
SEQUENCES = random_ids((30, 3), 97)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    model = build_model(CONFIG, dtype=torch.float32)
    model.init_weights(3)
    save_model(model, tmp_path / "plain", dtype="bfloat16")
    return tmp_path / "plain"


def decoded_copy(folder: Path, dtype: str) -> Any:
    """An ordinary model with the numbers that NF4 of each original matrix decodes to."""
    model = load_model(folder, dtype=dtype)
    for name, view in weight_views(model):
        if "_proj.weight" in name:
            view.copy_(dequantize_nf4(quantize_nf4(view.clone())))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_quantised_on_load_is_the_decoded_model(plain: Path, dtype: str):
    ours = load_model(plain, dtype=dtype, quantization="nf4")
    want = decoded_copy(plain, dtype)
    for path, linear in ours.linears().items():
        assert isinstance(linear.base, Quantised)
        assert torch.equal(linear.base.dense(), want.linears()[path].base.dense()), path
        assert torch.equal(linear.base.dense(slice(3, 9)), linear.base.dense()[3:9])
    with torch.no_grad():
        pairs = zip(logits_of(ours, SEQUENCES), logits_of(want, SEQUENCES), strict=True)
        for ours_logits, wanted in pairs:
            assert torch.equal(ours_logits, wanted)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_what_is_written_reads_back_to_the_same_bits(
    plain: Path, tmp_path: Path, max_shard_bytes: int
):
    ours = load_model(plain, dtype="bfloat16", quantization="nf4")
    save_model(ours, tmp_path / "nf4", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "nf4" / INDEX).exists() == (max_shard_bytes < 10**9)
    again = load_model(tmp_path / "nf4")
    assert again.is_quantised
    assert again.dtype == torch.bfloat16
    for path, linear in again.linears().items():
        assert torch.equal(linear.base.dense(), ours.linears()[path].base.dense())


def test_transformers_with_bitsandbytes_reads_what_is_written(plain: Path, tmp_path: Path):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM

    ours = load_model(plain, dtype="float32", quantization="nf4")
    save_model(ours, tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    for layer in range(2):
        for path, name in (("output", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            stored = theirs.get_submodule(f"model.layers.{layer}.{name}").weight
            decoded = functional.dequantize_4bit(stored.data, stored.quant_state)
            ours_decoded = ours.get_submodule(f"layers.{layer}.{path}").base.dense()
            assert torch.equal(decoded.float(), ours_decoded)
    with torch.no_grad():
        for ids, logits in zip(SEQUENCES, logits_of(ours, SEQUENCES), strict=True):
            # its CPU products round to bfloat16
            error = (logits - theirs(ids[None]).logits[0]).norm() / logits.norm()
            assert error < 2.5e-2, error


def test_a_prequantised_checkpoint_with_a_matrix_left_in_16_bits(plain: Path, tmp_path: Path):
    save_model(load_model(plain, quantization="nf4"), tmp_path / "nf4")
    file, name = tmp_path / "nf4" / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(file)
    for stored in [key for key in tensors if key.startswith(name)]:
        del tensors[stored]
    tensors[name] = load_file(plain / "model.safetensors")[name]
    save_file(tensors, file)
    mixed = load_model(tmp_path / "nf4")
    rows = mixed.get_submodule("layers.1.qkv").parts["q_proj"]
    assert torch.equal(mixed.get_submodule("layers.1.qkv").base.dense(rows), tensors[name])
    save_model(mixed, tmp_path / "again")
    skipped = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert name.removesuffix(".weight") in skipped["llm_int8_skip_modules"]
    assert torch.equal(
        load_model(tmp_path / "again").get_submodule("layers.1.qkv").base.dense(),
        mixed.get_submodule("layers.1.qkv").base.dense(),
    )


@pytest.mark.parametrize("mode", ["none", "layers", "selective"])
def test_adapters_train_through_it_as_through_the_decoded_weights(plain: Path, mode: Any):
    grads = []
    for model in (
        load_model(plain, dtype="float32", quantization="nf4"),
        decoded_copy(plain, "float32"),
    ):
        model.add_adapter(LoraConfig(rank=4))
        with torch.no_grad():
            for adapter in model.adapter_modules("policy").values():
                adapter.b.fill_(0.01)
        model.set_checkpointing(mode)
        sum(logits.pow(2).sum() for logits in logits_of(model, SEQUENCES)).backward()
        grads.append({name: p.grad for name, p in model.trainable_parameters().items()})
    assert len(grads[0]) == 16
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, x: t.pop(x + ".absmax"), "1 tensors missing"),
        (lambda t, x: t.update({x + ".quant_map": torch.zeros(16)}), "quant_map"),
        (lambda t, x: t.update({x + ".absmax": torch.zeros(3, dtype=torch.uint8)}), "3 scales"),
    ],
)
def test_damaged_files(plain: Path, tmp_path: Path, damage: Any, message: str):
    save_model(load_model(plain, quantization="nf4"), tmp_path / "nf4")
    file = tmp_path / "nf4" / "model.safetensors"
    tensors = load_file(file)
    damage(tensors, "model.layers.0.mlp.up_proj.weight")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "nf4")


def test_bytes_of_a_quantised_weight(plain: Path):
    base = load_model(plain, quantization="nf4").get_submodule("layers.0.gate_up").base
    assert base.num_bytes / (2 * 192 * 128) == pytest.approx(0.5625, abs=0.06)


@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_give_the_products_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_mixed: bool
):
    weight = Quantised((192, 64, 96), 320, device=torch.device("cpu"), dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for index, rows in enumerate(weight.part_rows):
        matrix = torch.randn(rows, 320, generator=generator).to(dtype)
        put = weight.fill if is_mixed and index == 1 else weight.quantise
        put(index, matrix)
    x, dy = (torch.randn(5, n, generator=generator).to(dtype) for n in (320, 352))
    dense = weight.dense()
    monkeypatch.setattr("sparring.models.quantised.STEP", 64)
    monkeypatch.setattr("sparring.models.quantised.SLICE_BYTES", 320 * 70 * dtype.itemsize)
    monkeypatch.setattr("sparring.models.quantised.COLUMN_SLICE_BYTES", 352 * 130 * dtype.itemsize)
    assert [rows.stop for rows, _ in weight._row_slices()] == [64, 128, 192, 256, 320, 352]
    assert [columns.stop for columns, _ in weight._column_slices()] == [128, 256, 320]
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    bias = torch.randn(352, generator=generator).to(dtype)
    for got, want in (
        (weight._part_by_part(x, bias), x.double() @ dense.double().T + bias.double()),
        (weight.matmul_transposed(dy), dy.double() @ dense.double()),
        (weight.add_matmul_transposed(x.clone(), dy), x.double() + dy.double() @ dense.double()),
    ):
        assert (got.double() - want).norm() / want.norm() < limit


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fused_sliced_and_saved_forms_have_the_bits_of_bitsandbytes(
    tmp_path: Path, dtype: torch.dtype, double: bool
):
    functional = pytest.importorskip("bitsandbytes.functional")
    rows, width = (128, 64, 64), 256  # the smaller parts fill whole groups of scales, and then not
    for width in (256, 192):
        weight = Quantised(rows, width, device=torch.device("cpu"), dtype=dtype)
        wanted = []
        for index, size in enumerate(rows):
            generator = torch.Generator().manual_seed(index)
            matrix = (torch.randn(size, width, generator=generator) * 0.02).to(dtype)
            packed, state = functional.quantize_4bit(
                matrix, quant_type="nf4", compress_statistics=double, blocksize=64
            )
            wanted.append(functional.dequantize_4bit(packed, state).reshape(size, width))
            name = f"x{index}.weight"
            stored = {
                name: packed,
                **{f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()},
            }
            save_file({key: value.contiguous() for key, value in stored.items()}, tmp_path / name)
            collector, whole = nf4_files.Collector(torch.device("cpu")), None
            for key, tensor in load_file(tmp_path / name).items():
                whole = collector.add(key, tensor) or whole
            assert whole is not None
            weight.fill(index, whole[1])
            again = nf4_files.stored_tensors(name, whole[1])
            assert again.keys() == stored.keys()
            for key, tensor in again.items():
                if key.endswith(nf4_files.STATE):
                    assert json.loads(bytes(tensor.tolist())) == json.loads(
                        bytes(stored[key].tolist())
                    )
                else:
                    assert torch.equal(tensor.flatten(), stored[key].flatten()), key
        want = torch.cat(wanted)
        assert torch.equal(weight.dense(), want)
        assert torch.equal(weight.dense(slice(70, 200)), want[70:200])
        for part, one in zip(weight.parts(), wanted, strict=True):
            assert torch.equal(dequantize_nf4(part), one)
        assert all(torch.equal(part, want[some]) for some, part in weight._row_slices())
        assert all(torch.equal(part, want[:, some]) for some, part in weight._column_slices())


@pytest.mark.parametrize("double", [True, False])
def test_what_transformers_and_bitsandbytes_wrote(plain: Path, tmp_path: Path, double: bool):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"],  # a "dynamic" checkpoint
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype=torch.bfloat16
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert ours.is_quantised
    kept = ours.get_submodule("layers.1.down").base
    assert torch.equal(kept.dense(), load_model(plain).get_submodule("layers.1.down").base.weight)
    whole = ours.get_submodule("layers.0.output").base._whole
    assert (whole.absmax2 is not None) == double
    exact = logits_of(load_model(tmp_path / "theirs", dtype="float32"), SEQUENCES)
    with torch.no_grad():
        for ids, logits, want in zip(SEQUENCES, logits_of(ours, SEQUENCES), exact, strict=True):
            rounding = (logits - want).norm()
            assert 0 < rounding < 3e-2 * want.norm()
            assert (theirs(ids[None]).logits[0].float() - want).norm() < 2 * rounding


def test_a_copy_of_decoded_weights_lasts_for_a_rollout_and_changes_no_bit(plain: Path):
    model = load_model(plain, dtype="bfloat16", quantization="nf4")
    bases = [linear.base for linear in model.linears().values()]
    packed = [base.dense().clone() for base in bases]
    prompts = [
        Prompt(id=i, token_ids=tuple(ids.tolist()), text="") for i, ids in enumerate(SEQUENCES)
    ]
    written, seen = [], []
    for caches in (False, True):
        engine = Engine(
            model, kv_bytes=1 << 22, stop_ids=(), decode=lambda _: "", max_tokens=64,
            caches_weights=caches,
        )  # fmt: skip
        groups = engine.generate(
            prompts,
            Sampling(max_completion_tokens=12),
            num_samples=2,
            on_progress=lambda *_: seen.append([base.cached_address > 0 for base in bases]),
        )
        written.append([(r.token_ids.tolist(), r.logprobs.tolist()) for g in groups for r in g])
        if caches:
            assert seen
            assert all(all(each) for each in seen)
            for base, want in zip(bases, packed, strict=True):
                assert torch.equal(base.dense(), want)
        engine.sleep()
        assert not any(base.cached_address for base in bases), "training has this memory"
        assert not any(any(each) for each in seen) or caches
        seen.clear()
    assert written[0] == written[1]


@pytest.mark.gpu
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_a_card_gives_the_logits_of_transformers_from_the_same_files(
    plain: Path, tmp_path: Path, writer: str
):
    """Their kernels and ours differ from float32 of the decoded weights by as much."""
    functional = pytest.importorskip("bitsandbytes.functional")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "nf4"
    if writer == "ours":
        save_model(load_model(plain, dtype="bfloat16", quantization="nf4", device="cuda"), folder)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=settings, dtype=torch.bfloat16, device_map={"": 0}
        ).save_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map={"": 0})
    ours = load_model(folder, dtype="bfloat16", device="cuda")
    for layer in range(2):
        for path, name in (("output", "self_attn.o_proj"), ("down", "mlp.down_proj")):
            stored = theirs.get_submodule(f"model.layers.{layer}.{name}").weight
            decoded = functional.dequantize_4bit(stored.data, stored.quant_state)
            assert torch.equal(decoded, ours.get_submodule(f"layers.{layer}.{path}").base.dense())
    exact = logits_of(load_model(folder, dtype="float32"), SEQUENCES)
    with torch.no_grad():
        for ids, logits, want in zip(SEQUENCES, logits_of(ours, SEQUENCES), exact, strict=True):
            rounding = (logits.cpu() - want).norm()
            assert 0 < rounding < 3e-2 * want.norm()
            other = theirs(ids[None].cuda()).logits[0].float().cpu()
            assert (other - want).norm() < 2 * rounding
            assert (other - logits.cpu()).norm() < 2 * rounding
