"""Weights kept in other ways: matrices that stay in 16 bits, a head of 8 bits, rows on the host."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparring
from sparring.data.packing import pack_sequences
from sparring.errors import CheckpointError, RecipeError
from sparring.kernels.int8 import dequantize_int8, quantize_int8
from sparring.models.checkpoint import (
    build_model,
    load_adapter_onto,
    load_model,
    save_adapter,
    save_model,
    weight_views,
)
from sparring.models.lora import LoraConfig
from sparring.models.storage import EightBitTable, Storage
from sparring.recipe import build_recipe
from tests.models.test_quantised import CONFIG, SEQUENCES
from tests.models.tiny import logits_of
from tests.train.tiny_run import write_checkpoint


def written(folder: Path, *, tied: bool) -> Path:
    config = {**CONFIG, "tie_word_embeddings": tied}
    model = build_model(config, dtype=torch.float32)
    model.init_weights(3)
    save_model(model, folder, dtype="bfloat16")
    return folder


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("down_proj",), {"layers.0.down", "layers.1.down"}),
        (
            ("model.layers.1",),
            {"layers.1.qkv", "layers.1.output", "layers.1.gate_up", "layers.1.down"},
        ),
        (("model.layers.0.mlp.gate_proj", "up_proj"), {"layers.0.gate_up"}),
    ],
)
def test_matrices_that_stay_in_16_bits(tmp_path: Path, names: tuple[str, ...], kept: set[str]):
    folder, storage = written(tmp_path / "plain", tied=True), Storage(keep_16bit=names)
    plain = load_model(folder).linears()
    ours = load_model(folder, quantization="nf4", storage=storage)
    same = {
        path
        for path, linear in ours.linears().items()
        if torch.equal(linear.base.dense(), plain[path].base.dense())
    }
    assert same == kept
    assert ours.get_submodule("layers.0.output").base.num_bytes < 128 * 128 * 0.7
    for path in kept:
        base = ours.get_submodule(path).base
        assert base.dense().data_ptr() == base.dense(slice(0, 3)).data_ptr(), "a view, not a copy"
    save_model(ours, tmp_path / "nf4")
    again = load_model(tmp_path / "nf4")
    for path, linear in again.linears().items():
        assert torch.equal(linear.base.dense(), ours.get_submodule(path).base.dense())
    skipped = json.loads((tmp_path / "nf4/config.json").read_text())["quantization_config"]
    assert ("model.layers.1.mlp.down_proj" in skipped["llm_int8_skip_modules"]) == (
        "layers.1.down" in kept
    )
    stored = "k_proj" if "layers.0.qkv" not in kept else "o_proj"
    with pytest.raises(CheckpointError, match="in four bits only"):
        load_model(tmp_path / "nf4", storage=Storage(keep_16bit=(stored,)))


def test_names_of_no_matrix(tmp_path: Path):
    folder = written(tmp_path / "plain", tied=True)
    with pytest.raises(CheckpointError, match=r"'w1'.*known: down_proj, .*v_proj"):
        load_model(folder, quantization="nf4", storage=Storage(keep_16bit=("w1",)))
    with pytest.raises(CheckpointError, match="'4bit'; known: 16bit, 8bit"):
        Storage(head="4bit")
    tables: dict[str, Any] = {
        "model": {"path": str(folder), "keep_16bit": ["down_proj"]},
        "data": {"train": "x"}, "optimizer": {"learning_rate": 1.0}, "run": {"dir": "x"},
        "train": {"steps": 1},
    }  # fmt: skip
    with pytest.raises(RecipeError, match="nothing is quantised"):
        build_recipe(tables, command="sft")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_of_8_bits_is_one_for_trainer_and_sampler(tmp_path: Path, tied: bool, dtype: str):
    folder = written(tmp_path / "plain", tied=tied)
    ours = load_model(folder, dtype=dtype, storage=Storage(head="8bit"))
    assert isinstance(ours.head, EightBitTable)
    assert (ours.embed is ours.head) == tied
    want = load_model(folder, dtype=dtype)
    table = want.head.weight
    with torch.no_grad():
        table.copy_(dequantize_int8(quantize_int8(table.detach())))
    assert torch.equal(ours.head.dense(), table)
    assert ours.num_weights == sum(p.numel() for p in want.parameters()) == want.num_weights
    packed = load_model(folder, dtype=dtype, quantization="nf4", storage=Storage(head="8bit"))
    assert packed.num_weights == want.num_weights
    grads = []
    for model in (ours, want):
        model.add_adapter(LoraConfig(rank=2))
        for adapter in model.adapter_modules("policy").values():
            torch.nn.init.constant_(adapter.b, 0.02)
        model.refresh_shadows()
        ((batch, _),) = pack_sequences([s.tolist() for s in SEQUENCES], max_tokens=100)
        scores = model.score(batch).logprobs_T
        scores.sum().backward()
        grads.append({name: p.grad for name, p in model.trainable_parameters().items()})
        with torch.no_grad():
            hidden = model(batch.input_ids_T, batch.positions_T, batch.layout)
            sampled = model.logits(hidden).log_softmax(-1)
        rows = batch.loss_mask_T.nonzero().squeeze(1)
        expected = sampled[rows].gather(1, batch.labels_T[rows, None]).squeeze(1)
        torch.testing.assert_close(scores[rows].detach(), expected, atol=2e-5, rtol=1e-5)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-5, msg=name)
    save_model(ours, tmp_path / "saved")
    saved = dict(weight_views(load_model(tmp_path / "saved", dtype=dtype)))
    assert torch.equal(saved["model.embed_tokens.weight" if tied else "lm_head.weight"], table)


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_sampled_from_a_head_of_8_bits_is_scored_alike(tmp_path: Path, tied: bool):
    write_checkpoint(tmp_path / "model", width=64, tied=tied)
    model, tokenizer = sparring.load(
        str(tmp_path / "model"), device="cpu", quantization="nf4", head="8bit",
        keep_16bit=["down_proj"],
    )  # fmt: skip
    assert isinstance(model.head, EightBitTable)
    groups = sparring.generate(
        model, tokenizer, ["ab", "c"], num_samples=3, max_completion_tokens=9
    )
    for rollout in (rollout for group in groups for rollout in group):
        prompt = list(rollout.prompt.token_ids)
        (scores,) = sparring.score(model, [prompt + rollout.token_ids.tolist()])
        torch.testing.assert_close(
            scores[len(prompt) - 1 :], rollout.logprobs, atol=2e-5, rtol=1e-5
        )


def test_an_adapter_goes_from_one_form_of_a_base_to_another(tmp_path: Path):
    folder = written(tmp_path / "plain", tied=True)
    model = load_model(folder)
    model.add_adapter(LoraConfig(rank=2))
    save_adapter(model, tmp_path / "adapter", str(folder))
    for storage in (Storage(head="8bit"), Storage()):
        load_adapter_onto(load_model(folder, storage=storage), tmp_path / "adapter")


def test_bytes_that_are_counted_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written(tmp_path / "plain", tied=False)
    seen: list[int] = []
    monkeypatch.setattr(
        "sparring.models.checkpoint.check_fits",
        lambda *_, **known: seen.append(known["weight_bytes"]),
    )
    for storage in (Storage(), Storage(head="8bit"), Storage(keep_16bit=("down_proj",))):
        load_model(folder, quantization="nf4", storage=storage)
    rows, width, ffn = CONFIG["vocab_size"], 128, 192
    assert seen[0] - seen[1] == rows * (2 * width - width - 4)
    assert seen[2] - seen[0] == pytest.approx(2 * width * ffn * (2 - 4.127 / 8), rel=1e-3)


@pytest.mark.gpu
def test_an_embedding_on_the_host(tmp_path: Path):
    folder = written(tmp_path / "plain", tied=False)
    with pytest.raises(CheckpointError, match="head of its own"):
        load_model(
            written(tmp_path / "tied", tied=True), device="cuda", storage=Storage(embedding="host")
        )
    want = load_model(folder, device="cuda")
    ours = load_model(folder, device="cuda", storage=Storage(embedding="host"))
    assert ours.embed.weight.device.type == "cpu"
    assert ours.device.type == "cuda"
    for one, other in zip(logits_of(ours, SEQUENCES), logits_of(want, SEQUENCES), strict=True):
        assert torch.equal(one, other)
    ids = torch.tensor([1, 5, 3], device="cuda")
    ours.embed.rows(ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = ours.embed.rows(ids)
    ids.copy_(torch.tensor([7, 7, 0], device="cuda"))
    graph.replay()
    assert torch.equal(rows, want.embed.weight[ids])
