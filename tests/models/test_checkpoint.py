"""Model folders in and out, and every way in which one can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparring.errors import CheckpointError, MemoryBudgetError
from sparring.models import checkpoint
from sparring.models.checkpoint import (
    FAMILIES,
    base_folder,
    build_model,
    load_model,
    save_model,
)
from sparring.models.files import INDEX
from sparring.models.memory import check_fits, free_bytes
from tests.models.tiny import CONFIGS, logits_of, random_ids


def saved(name: str, folder: Path, **options: Any) -> Any:
    """A model of ours with random weights, saved in a folder."""
    model = build_model(CONFIGS[name], dtype=torch.float32)
    model.init_weights(3)
    save_model(model, folder, **options)
    return model


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
@pytest.mark.parametrize("name", ["llama_biases", "qwen2", "qwen3", "mistral_window"])
def test_transformers_loads_what_is_saved(name: str, max_shard_bytes: int, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    ours = saved(name, tmp_path, max_shard_bytes=max_shard_bytes, end_ids=(2, 5))
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_bytes < 10**9) == (tmp_path / INDEX).exists()
    assert all(shard.stat().st_size < max_shard_bytes + 20_000 for shard in shards)
    names = set().union(*(load_file(shard) for shard in shards))
    assert ("lm_head.weight" in names) != CONFIGS[name]["tie_word_embeddings"]
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.generation_config.eos_token_id == [2, 5]
    sequences = random_ids((50, 3), 97)
    with torch.no_grad():
        for ids, logits in zip(sequences, logits_of(ours, sequences), strict=True):
            torch.testing.assert_close(logits, theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5)
        again = load_model(tmp_path, dtype="float32")
        for logits, reread in zip(
            logits_of(ours, sequences), logits_of(again, sequences), strict=True
        ):
            assert torch.equal(logits, reread)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_can_be_chosen_for_files_and_for_loading(dtype: str, tmp_path: Path):
    model = saved("qwen2", tmp_path, dtype=dtype)
    wanted = checkpoint.DTYPES[dtype]
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {wanted}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert load_model(tmp_path).dtype == wanted
    assert load_model(tmp_path, dtype="float32").dtype == torch.float32
    embedding = load_model(tmp_path).embed.weight
    assert torch.equal(embedding, model.embed.weight.to(wanted))


def test_the_checkpoints_own_dtype_key_is_kept(tmp_path: Path):
    config = {**CONFIGS["llama2"], "torch_dtype": "bfloat16"}
    save_model(build_model(config, dtype=torch.float16), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["torch_dtype"] == "float16"
    assert "dtype" not in written


@pytest.mark.parametrize("which", ["both", "head only"])
def test_tied_embeddings_load_from_either_name(which: str, tmp_path: Path):
    model = saved("qwen2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if which == "head only":
        tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert again.head is again.embed
    assert torch.equal(again.embed.weight, model.embed.weight)


def test_shards_without_an_index_load(tmp_path: Path):
    model = saved("llama2", tmp_path, max_shard_bytes=40_000)
    (tmp_path / INDEX).unlink()
    assert torch.equal(load_model(tmp_path).norm, model.norm)


def test_old_rotary_tables_in_a_checkpoint_are_ignored(tmp_path: Path):
    saved("llama2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    load_model(tmp_path)


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def replace_weights(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"not read")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])


Q = "model.layers.1.self_attn.q_proj"

DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "family": (
        lambda f: edit_config(f, architectures=["GptOssForCausalLM"]),
        r"GptOssForCausalLM.*known families: llama.*mistral.*qwen2.*qwen3",
    ),
    "no family": (
        lambda f: edit_config(f, architectures="DELETE", model_type="mixtral"),
        r"mixtral.*llama",
    ),
    "rope": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "yarn", "factor": 2.0}),
        r"'yarn' is not supported; known: default, linear, llama3",
    ),
    "rope keys": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "llama3", "factor": 2.0}),
        r"llama3.*low_freq_factor, high_freq_factor",
    ),
    "partial rope": (lambda f: edit_config(f, partial_rotary_factor=0.5), "partial_rotary_factor"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), r"hidden_act is 'gelu'"),
    "heads": (lambda f: edit_config(f, num_key_value_heads=4), "6 attention heads"),
    "missing key": (lambda f: edit_config(f, hidden_size="DELETE"), "hidden_size is None"),
    "awq": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), "AWQ"),
    "gptq": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "GPTQ"),
    "fp8": (lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}), "FP8"),
    "bnb": (
        lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes"}),
        "bitsandbytes",
    ),
    "gptq tensors": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.qweight": torch.zeros(2)})),
        r"qweight shows a GPTQ or AWQ",
    ),
    "fp8 tensors": (
        lambda f: edit_tensors(
            f, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)})
        ),
        r"stored as F8_E4M3",
    ),
    "integer tensors": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.weight": torch.zeros(2).char()})),
        r"stored as I8",
    ),
    "missing": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}.weight")),
        rf"1 tensors missing: {Q}.weight",
    ),
    "unexpected": (
        lambda f: edit_tensors(f, lambda t: t.update({f"{Q}.bias": torch.zeros(48)})),
        rf"1 tensors unexpected: {Q}.bias",
    ),
    "shape": (
        lambda f: edit_config(f, intermediate_size=64),
        r"6 tensors of another shape.*gate_proj.weight is \[80, 48\].*\[64, 48\]",
    ),
    "pickle": (lambda f: replace_weights(f, "pytorch_model.bin"), r"pickled.*save_pretrained"),
    "gguf": (lambda f: replace_weights(f, "model.gguf"), "GGUF"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "cut off": (cut, "cut off"),
    "config": (lambda f: (f / "config.json").write_text("{"), r"config.json cannot be read"),
    "config list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_cannot_be_read_as_it_stands_is_refused(damage: str, tmp_path: Path):
    saved("llama2", tmp_path)
    load_model(tmp_path)
    change, message = DAMAGES[damage]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize("has_index", [True, False])
def test_missing_shards_are_named(has_index: bool, tmp_path: Path):
    saved("llama2", tmp_path, max_shard_bytes=40_000)
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    if not has_index:
        (tmp_path / INDEX).unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ shards are missing: {victim.name}"):
        load_model(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path):
    saved("llama2", tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(tmp_path)


def test_values_beyond_float16_are_refused(tmp_path: Path):
    saved("llama2", tmp_path)
    edit_tensors(tmp_path, lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds values beyond float16"):
        load_model(tmp_path, dtype="float16")
    load_model(tmp_path, dtype="bfloat16")


def test_unknown_dtypes_and_quantisations_are_refused(tmp_path: Path):
    saved("llama2", tmp_path)
    with pytest.raises(CheckpointError, match="'int8'; known: auto, float32"):
        load_model(tmp_path, dtype="int8")
    with pytest.raises(CheckpointError, match="'int4'; known: none"):
        load_model(tmp_path, quantization="int4")


def test_bfloat16_on_a_card_without_it_proposes_float16(tmp_path: Path, monkeypatch):
    saved("llama2", tmp_path, dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for dtype in ("auto", "bfloat16"):
        with pytest.raises(CheckpointError, match=r"capability 7.5 has no bfloat16.*float16"):
            load_model(tmp_path, dtype=dtype, device="cuda")


def test_a_model_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch):
    model = saved("llama2", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    count = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("sparring.models.memory.free_bytes", lambda device: 4 * count + 1000)
    with pytest.raises(CheckpointError, match="cut off"):
        load_model(tmp_path)
    with pytest.raises(MemoryBudgetError, match=rf"{count:,} parameters in float32.*keys and val"):
        load_model(tmp_path, kv_bytes=1001)
    for dtype, kv_bytes in (("float32", 1000), ("bfloat16", 2 * count + 1000)):
        with pytest.raises(CheckpointError, match="cut off"):
            load_model(tmp_path, dtype=dtype, kv_bytes=kv_bytes)
        with pytest.raises(MemoryBudgetError, match="KV budget"):
            load_model(tmp_path, dtype=dtype, kv_bytes=kv_bytes + 1)


def test_free_memory_is_measured_and_compared():
    device = torch.device("cpu")
    free = free_bytes(device)
    assert 2**24 < free < 2**50
    check_fits(1000, torch.float32, device)
    with pytest.raises(MemoryBudgetError, match="GiB are free on cpu"):
        check_fits(free, torch.float32, device)


def test_run_directories_and_adapters_lead_to_their_base(tmp_path: Path):
    saved("llama2", tmp_path / "run" / "final")
    assert base_folder(tmp_path / "run") == tmp_path / "run" / "final"
    load_model(str(tmp_path / "run"))
    adapter = tmp_path / "tuned" / "final"
    adapter.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "run")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert base_folder(tmp_path / "tuned") == tmp_path / "run" / "final"
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        base_folder(tmp_path / "tuned")


def test_every_family_is_found_by_its_own_files(tmp_path: Path):
    assert {family.name for family in FAMILIES.values()} == {"llama", "mistral", "qwen2", "qwen3"}
    for name in ("llama2", "mistral", "qwen2", "qwen3"):
        config = {k: v for k, v in CONFIGS[name].items() if k != "architectures"}
        assert checkpoint.family_of(config).name == name.removesuffix(
            "2" if "llama" in name else ""
        )


@pytest.mark.shared
def test_parameters_are_counted_as_published(shared_dir: Path):
    expected = {
        "Qwen2.5-7B-Instruct": 7_615_616_512,
        "Qwen3-0.6B": 596_049_920,
        "Llama-3.2-1B-Instruct": 1_235_814_400,
        "Mistral-7B-Instruct-v0.3": 7_248_023_552,
        "SmolLM2-135M": 134_515_008,
    }
    for name, count in expected.items():
        config = json.loads((shared_dir / "configs" / f"{name}.json").read_text())
        model = build_model(config, device="meta", dtype=torch.bfloat16)
        assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    ["gemma-2-2b", "Mixtral-8x7B-v0.1", "Phi-3-mini-4k-instruct", "SmolLM3-3B", "DeepSeek-V3"],
)
def test_families_that_are_not_supported_are_named(name: str, shared_dir: Path, tmp_path: Path):
    shutil.copy(shared_dir / "configs" / f"{name}.json", tmp_path / "config.json")
    architecture = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    if name != "DeepSeek-V3":
        assert architecture in str(caught.value)
        assert "qwen3" in str(caught.value)
    else:
        assert "FP8" in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["TinyStories-656K", "stories260K"])
def test_real_checkpoints_continue_as_in_transformers(name: str, shared_dir: Path):
    from transformers import AutoModelForCausalLM

    from tests.models.tiny import PagedRows

    folder = shared_dir / "models" / name
    model = load_model(folder, dtype="float32")
    tokenizer = checkpoint.load_tokenizer(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    expected = theirs.generate(
        prompt, max_new_tokens=128, min_new_tokens=128, do_sample=False, pad_token_id=0
    )[0]
    ids = torch.zeros(prompt.shape[1] + 128, dtype=torch.long)
    start = prompt.shape[1]
    ids[:start] = prompt[0]
    rows = PagedRows(model, [ids], block_size=16)
    ends = list(checkpoint.end_token_ids(folder, tokenizer))
    logits = rows.step([(0, 0, start)])[0][-1]
    for position in range(start, len(ids)):
        logits[ends] = -torch.inf  # as min_new_tokens does
        ids[position] = logits.argmax()
        if position + 1 < len(ids):
            logits = rows.step([(0, position, position + 1)])[0][-1]
    assert ids.tolist() == expected.tolist()
