"""The reference is the policy at step 0, of three kinds; tests/train/test_loops.py resumes."""

from __future__ import annotations

import pytest
import torch

from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.reference import build_reference
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
def test_the_reference_stays_where_the_policy_began(kind: str):
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


def test_a_fresh_adapter_keeps_no_copy():
    model = policy("base")
    count = sum(parameter.numel() for parameter in model.parameters())
    reference = build_reference(model)
    assert reference.model is model
    assert sum(parameter.numel() for parameter in model.parameters()) == count
