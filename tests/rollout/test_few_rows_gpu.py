"""Few rows of a 1.5B's shapes on a GPU: rings, strips and attention whose keys come early."""

from __future__ import annotations

import pytest
import torch

from sparring.kernels import few_rows, few_rows_attention
from sparring.kernels.few_rows_hopper import Ring
from sparring.kernels.few_rows_strips import Strips
from sparring.kernels.few_rows_tiles import Tiles
from sparring.models.checkpoint import build_model
from sparring.rollout.sampler import Sampling
from tests.models.tiny import CONFIGS
from tests.rollout.test_engine_gpu import assert_same, engine, flat, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs an sm_90 card",
    ),
]

SHAPES = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "head_dim": 128,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_captured_steps_of_few_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, steps without capture, and one step a burst: the same tokens and log-probabilities;
    and again after every weight has changed in place.
    """
    model = build_model({**CONFIGS["qwen2"], **SHAPES}, device="cuda", dtype=torch.bfloat16)
    model.init_weights(0)
    model.requires_grad_(False)
    layer = model.layers[0]
    forms = {
        few_rows.form_of(model.capability, rows, linear.base.weight)
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
    }
    assert {type(form) for form in forms} == {Ring, Strips}
    calls = []
    attend = few_rows_attention.attend
    monkeypatch.setattr(
        few_rows_attention, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k)
    )
    given = {"kv_bytes": 1 << 27, "stop_ids": (), "max_tokens": 700}
    captured = engine(model, **given)
    others = [engine(model, cuda_graphs=False, **given), engine(model, steps_per_sync=1, **given)]
    sampling = Sampling(max_completion_tokens=300, seed=3)
    for _ in range(2):
        got = captured.generate(prompts(250), sampling, num_samples=rows)
        assert len({tuple(r.token_ids.tolist()) for r in flat(got)}) == rows
        for other in others:
            assert_same(other.generate(prompts(250), sampling, num_samples=rows), got)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.03)
    assert captured.graph_stats.num_graphs > 0
    assert calls, "keys came before their turn"


@pytest.mark.parametrize("rows", [70, 128, 200])
def test_captured_steps_of_many_rows(rows: int) -> None:
    """The same of products in tiles: graphs and steps without capture, weights changed in
    place between two runs.
    """
    model = build_model({**CONFIGS["qwen2"], **SHAPES}, device="cuda", dtype=torch.bfloat16)
    model.init_weights(0)
    model.requires_grad_(False)
    layer = model.layers[0]
    found = [
        few_rows.form_of(model.capability, rows, linear.base.weight)
        for linear in (layer.qkv, layer.output)
    ]
    assert all(isinstance(form, Tiles) for form in found)
    given = {"kv_bytes": 1 << 28, "stop_ids": (), "max_tokens": 400, "max_running": 256}
    captured, plain = engine(model, **given), engine(model, cuda_graphs=False, **given)
    sampling = Sampling(max_completion_tokens=40, seed=3)
    for _ in range(2):
        got = captured.generate(prompts(250), sampling, num_samples=rows)
        assert len({tuple(r.token_ids.tolist()) for r in flat(got)}) == rows
        assert_same(plain.generate(prompts(250), sampling, num_samples=rows), got)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.03)
    assert captured.graph_stats.num_graphs > 0
