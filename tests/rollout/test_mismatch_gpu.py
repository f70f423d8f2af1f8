"""Default mode on real checkpoints in bfloat16: how far the trainer and the sampler are apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sparring
from sparring.data.packing import pack_groups
from sparring.models.checkpoint import end_token_ids
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.step import to_device
from sparring.types import Group, Prompt

pytestmark = [pytest.mark.gpu, pytest.mark.shared]

BEGINNINGS = ("Once upon a time", "Lily and Tom went to", "The little dog was", "One day, a girl")


@pytest.mark.parametrize(
    ("name", "is_bitwise"),
    [("TinyStories-656K", False), ("TinyStories-656K", True), ("stories260K", False)],
)
def test_log_probabilities_of_real_checkpoints(
    shared_dir: Path, name: str, is_bitwise: bool
) -> None:
    folder = str(shared_dir / "models" / name)
    model, tokenizer = sparring.load(folder, dtype="bfloat16", device="cuda")
    model.set_bitwise(is_bitwise)
    prompts = [
        Prompt(id=i, token_ids=tuple(tokenizer(text)["input_ids"]), text=text)
        for i, text in enumerate(BEGINNINGS)
    ]
    engine = Engine(
        model,
        kv_bytes=1 << 28,
        stop_ids=end_token_ids(folder, tokenizer),
        decode=lambda _: "",
        max_tokens=min(256, model.config.max_tokens),
    )
    rollouts = engine.generate(prompts, Sampling(max_completion_tokens=128), num_samples=16)
    groups = [
        Group(prompt=p, rollouts=tuple(r), rewards_G=torch.ones(16), reward_parts={})
        for p, r in zip(prompts, rollouts, strict=True)
    ]
    scores: dict[bool, list[Tensor]] = {False: [], True: []}
    sampled = []
    with torch.no_grad():
        for batch in pack_groups(
            groups, [torch.ones(16)] * len(groups), max_tokens=4096, temperature=1.0
        ):
            batch = to_device(batch, model.device)
            assert batch.sampler_logprobs_T is not None
            sampled.append(batch.sampler_logprobs_T[batch.loss_mask_T])
            for order in scores:
                model.set_bitwise(order)
                scores[order].append(model.score(batch).logprobs_T[batch.loss_mask_T])
    gap = (torch.cat(scores[is_bitwise]) - torch.cat(sampled)).double()
    mean, divergence = gap.abs().mean().item(), (gap.exp() - 1 - gap).mean().item()
    orders = (torch.cat(scores[False]) - torch.cat(scores[True])).double()
    figures = (
        f"{name} bitwise {is_bitwise}: {len(gap)} tokens, mean {mean:.5f} (must 0.005), KL"
        f" {divergence:.2e} (must 1e-4), largest {gap.abs().max():.4f}; two orders of the trainer"
        f": mean {orders.abs().mean():.5f}, KL {(orders.exp() - 1 - orders).mean():.2e}"
    )
    print(figures)
    assert len(gap) > 1000, figures
    assert mean <= 0.005, figures
    assert divergence <= 1e-4, figures
    if is_bitwise:
        assert gap.abs().max().item() == 0.0, figures
