"""A few fixed optimizer steps on a tiny decoder: golden.json records them, test_golden.py repeats.

    python tests/train/golden_run.py            prints the numbers of this working tree
    python tests/train/golden_run.py --write    rewrites golden.json

Regenerate only after a change that is meant to change the numbers, and say in the commit why they
moved. Weights and data come from formulas, not from a random generator, so nothing but our own
arithmetic is recorded. The file imports nothing from its neighbours: benchmarks/golden.py runs it
against other commits too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.algorithms.registry import build_advantage, build_loss
from sparring.data.packing import pack_groups
from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder
from sparring.train.optimizer import build_optimizer
from sparring.train.step import train_step, with_old_logprobs
from sparring.types import Batch, Group, Prompt, Rollout

GOLDEN = Path(__file__).with_name("golden.json")
STEPS = 3
PASSES = 2
VOCABULARY = 64
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
CASES = {"dapo": {"kl_coef": 0.05}, "grpo": {}, "gspo": {}, "lora_cispo": {}}


def build_decoder(dtype: torch.dtype = torch.float32, *, lora: bool = False) -> Decoder:
    """A two-layer decoder whose weights are sines of their place."""
    model = build_model(CONFIG, dtype=dtype)
    if lora:
        model.add_adapter(LoraConfig(rank=4, alpha=8, target_modules="all-linear", seed=0))
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            place = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
            wave = torch.sin(place * (1.0 + 0.618 * index) + index)
            parameter.copy_(1.0 + 0.1 * wave if parameter.ndim == 1 else 0.15 * wave)
    return model


def build_groups(step: int) -> list[Group]:
    """Three groups of four completions of unequal lengths; one sample of the step is not judged."""
    groups = []
    for row in range(3):
        prompt_ids = tuple((7 * step + 5 * row + 3 * t) % VOCABULARY for t in range(3 + 2 * row))
        prompt = Prompt(id=row, token_ids=prompt_ids, text="")
        rollouts, rewards = [], []
        for sample in range(4):
            length = 2 + (5 * sample + 3 * row + step) % 9
            ids = (torch.arange(length) * 11 + 13 * sample + row + step) % VOCABULARY
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    sample_index=sample,
                    token_ids=ids,
                    logprobs=-3.0 - 0.1 * torch.sin(ids.float()),
                    loss_mask=torch.ones(length, dtype=torch.bool),
                    text="",
                    finish_reason="stop",
                    policy_version=step,
                    temperature=0.9,
                )
            )
            rewards.append(float((sample + row + step) % 3))
        if row == 1:
            rewards[step % 4] = float("nan")
        groups.append(
            Group(
                prompt=prompt,
                rollouts=tuple(rollouts),
                rewards_G=torch.tensor(rewards),
                reward_parts={},
            )
        )
    return groups


def build_batches(step: int, *, max_tokens: int = 48) -> list[Batch]:
    """The packed groups of one step, in several micro-batches."""
    groups = build_groups(step)
    advantages = build_advantage("group", {})(groups)
    return pack_groups(groups, advantages, max_tokens=max_tokens, temperature=0.9)


def run_case(case: str) -> dict[str, Any]:
    """STEPS rollouts with PASSES updates each: metrics, final weights, a digest of their bits."""
    name = case.removeprefix("lora_")
    model = build_decoder(lora=case.startswith("lora_"))
    frozen = copy.deepcopy(model)

    def reference(batch: Batch) -> Tensor:
        return frozen.score(batch).logprobs_T

    knobs: dict[str, float] = dict(CASES[case])
    loss = build_loss(name, knobs, max_completion_tokens=16)
    optimizer = build_optimizer(
        model.trainable_parameters(),
        learning_rate=1e-3,
        epsilon=1e-2,  # with a small one the rounding of tiny gradients would count
        num_steps=STEPS * PASSES,
        schedule="cosine",
        warmup_steps=1,
        weight_decay=0.01,
    )
    steps = []
    for step in range(STEPS):
        batches = with_old_logprobs(model, build_batches(step))
        for _ in range(PASSES):
            metrics = train_step(
                model,
                batches,
                loss,
                optimizer,
                max_grad_norm=1.0,
                reference=reference if knobs.get("kl_coef") else None,
            )
            steps.append(
                {"loss": metrics.loss, "gradient_norm": metrics.gradient_norm, **metrics.values}
            )
    weights = {key: p.detach() for key, p in model.trainable_parameters().items()}
    digest = hashlib.sha256()
    for weight in weights.values():
        digest.update(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "steps": steps,
        "weights": {key: weight.double().abs().mean().item() for key, weight in weights.items()},
        "bits": digest.hexdigest(),
    }


def run() -> dict[str, Any]:
    """All cases, on one thread."""
    torch.set_num_threads(1)
    return {case: run_case(case) for case in CASES}


def main() -> None:
    """Print the numbers, or write them with --write."""
    text = json.dumps(run(), indent=1) + "\n"
    if "--write" in sys.argv[1:]:
        GOLDEN.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
