"""The reference is the policy at step 0, of three kinds, while training and after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparring.errors import CheckpointError
from sparring.models.checkpoint import build_model, load_model, save_adapter, save_model
from sparring.models.lora import LoraConfig
from sparring.models.reference import build_reference, load_reference
from sparring.models.transformer import Decoder
from tests.models.tiny import CONFIGS, batch_of, random_ids

BATCH = batch_of(
    random_ids((5, 9), 97), [random_ids((4, 12), 97, seed=s) for s in (1, 2)], share=True
)


def policy(kind: str) -> Decoder:
    model = build_model(CONFIGS["qwen2"], dtype=torch.float32)
    model.init_weights(0)
    if kind != "weights":
        model.add_adapter(LoraConfig(rank=3))
    if kind == "adapter":
        disturb(model, 0.1)
    return model


@torch.no_grad()
def disturb(model: Decoder, size: float) -> None:
    generator = torch.Generator().manual_seed(4)
    for parameter in model.trainable_parameters().values():
        parameter.add_(torch.empty(parameter.shape).normal_(0, size, generator=generator))
    model.refresh_shadows()


@pytest.mark.parametrize("kind", ["base", "adapter", "weights"])
def test_the_reference_stays_where_the_policy_began(kind: str, tmp_path: Path):
    model = policy(kind)
    with torch.no_grad():
        start = model.score(BATCH).logprobs_T
    trained = set(model.trainable_parameters())
    reference = build_reference(model)
    assert reference.kind == kind
    assert set(model.trainable_parameters()) == trained
    assert torch.equal(reference.score(BATCH).logprobs_T, start)
    disturb(model, 0.3)
    with torch.no_grad():
        moved = model.score(BATCH).logprobs_T
    assert (moved - start).abs().max() > 0.01
    scored = reference.score(BATCH).logprobs_T
    assert torch.equal(scored, start)
    assert not scored.requires_grad

    reference.save(tmp_path / "reference")
    if kind == "weights":
        save_model(model, tmp_path / "model")
        resumed = load_model(tmp_path / "model")
    else:
        base = policy("weights")
        save_model(base, tmp_path / "model")
        save_adapter(model, tmp_path / "adapter", str(tmp_path / "model"))
        resumed = load_model(tmp_path / "adapter")
    again = load_reference(resumed, tmp_path / "reference")
    assert again.kind == kind
    with torch.no_grad():
        torch.testing.assert_close(resumed.score(BATCH).logprobs_T, moved, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.score(BATCH).logprobs_T, start, atol=1e-6, rtol=0)
    assert set(resumed.trainable_parameters()) == trained


def test_a_reference_of_an_unknown_kind_is_refused(tmp_path: Path):
    (tmp_path / "reference.json").write_text(json.dumps({"kind": "critic"}))
    with pytest.raises(CheckpointError, match="'critic'; known: base, adapter, weights"):
        load_reference(policy("base"), tmp_path)


def test_a_fresh_adapter_keeps_no_copy():
    model = policy("base")
    count = sum(parameter.numel() for parameter in model.parameters())
    reference = build_reference(model)
    assert reference.model is model
    assert sum(parameter.numel() for parameter in model.parameters()) == count
