"""One GRPO step on the CPU, in its two halves, against the usual way of doing each.

On the policy that ships with Sparring: 16 prompts of 40 tokens x 8 completions, lengths log-uniform
from 8 to 128, the same in all arms.

    rollouts   the engine against transformers' generate, every completion stopped at its length
    training   train_step on packed tokens, with each completion's own prompt and with the group's
               prompt shared, against a padded PyTorch loop on transformers' model at its best
               micro-batch of 16, 32 and 128 completions; the same loss, clipping and AdamW

The arms take turns; what is compared are medians. The padded loop asks for logits behind the prompt
alone. Prints one JSON object; exit code 1 where a target is missed.

    python benchmarks/cpu_step.py --repeats 7 --threads 2
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparring
from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.environment import describe_environment
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.optimizer import build_optimizer
from sparring.train.step import train_step
from sparring.types import Group, Prompt, Rollout

POLICY = Path(sparring.__file__).parent / "assets" / "quickstart" / "policy"
NUM_PROMPTS, NUM_SAMPLES, PROMPT_TOKENS = 16, 8, 40
SHORTEST, LONGEST = 8, 128
MICRO_BATCHES = (16, 32, 128)
MICRO_BATCH_TOKENS = 8192
LEARNING_RATE = 1e-6
TARGETS = {"rollout": 2.0, "training": 1.2, "training_shared_prompt": 1.6}


def build_work(vocab_size: int) -> tuple[list[Prompt], list[list[int]], list[Group], list[Tensor]]:
    """Prompts, every completion's length, and groups of random completions of those lengths."""
    draw = random.Random(0)
    low, high = math.log(SHORTEST), math.log(LONGEST)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    prompts = [
        Prompt(id=index, token_ids=tuple(tokens(PROMPT_TOKENS)), text="")
        for index in range(NUM_PROMPTS)
    ]
    lengths = [
        [round(math.exp(draw.uniform(low, high))) for _ in range(NUM_SAMPLES)] for _ in prompts
    ]
    groups = []
    for prompt, group_lengths in zip(prompts, lengths, strict=True):
        rollouts = tuple(
            Rollout(
                prompt=prompt,
                sample_index=index,
                token_ids=torch.tensor(tokens(length)),
                logprobs=torch.full((length,), -math.log(vocab_size)),
                loss_mask=torch.ones(length, dtype=torch.bool),
                text="",
                finish_reason="length",
                policy_version=0,
            )
            for index, length in enumerate(group_lengths)
        )
        rewards_G = torch.tensor([float(draw.random() < 0.5) for _ in rollouts])
        groups.append(Group(prompt=prompt, rollouts=rollouts, rewards_G=rewards_G, reward_parts={}))
    advantages = [torch.randn(NUM_SAMPLES, generator=torch.manual_seed(0)) for _ in groups]
    return prompts, lengths, groups, advantages


def transformers_model() -> Any:
    """The same policy as transformers loads it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(str(POLICY), dtype=torch.float32)


def generate_arm(model: Any, prompts: list[Prompt], lengths: list[list[int]]) -> Callable[[], None]:
    """Transformers' generate over all samples; every row stops at its own length."""
    import transformers

    wanted = torch.tensor([length for group in lengths for length in group])
    input_ids = torch.tensor([prompt.token_ids for prompt in prompts])
    input_ids = input_ids.repeat_interleave(NUM_SAMPLES, dim=0)

    class AtLength(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, *_: object, **__: object) -> Tensor:
            return input_ids.shape[1] - PROMPT_TOKENS >= wanted

    settings = transformers.GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=LONGEST,
        eos_token_id=None,
        pad_token_id=0,
    )
    model.generation_config.eos_token_id = None  # random tokens would otherwise end a row early

    def arm() -> None:
        with torch.no_grad():
            model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=settings,
                stopping_criteria=transformers.StoppingCriteriaList([AtLength()]),
            )

    return arm


def padded_arm(
    model: Any, groups: list[Group], advantages: list[Tensor], micro_batch: int
) -> Callable[[], None]:
    """The usual loop: rows padded to the longest of their micro-batch, one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    all_advantages = torch.cat(advantages)
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)

    def loss_of(start: int) -> Tensor:
        rows = rollouts[start : start + micro_batch]
        longest = max(len(row.token_ids) for row in rows)
        input_ids = torch.zeros(len(rows), PROMPT_TOKENS + longest, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest)
        for index, row in enumerate(rows):
            length = len(row.token_ids)
            input_ids[index, :PROMPT_TOKENS] = torch.tensor(row.prompt.token_ids)
            input_ids[index, PROMPT_TOKENS : PROMPT_TOKENS + length] = row.token_ids
            mask[index, :length] = 1.0
        attended = torch.cat([torch.ones(len(rows), PROMPT_TOKENS), mask], dim=1)
        logits = model(
            input_ids, attention_mask=attended.long(), logits_to_keep=longest + 1
        ).logits[:, :-1]
        labels = input_ids[:, PROMPT_TOKENS:]
        logprobs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        ratio = (logprobs - logprobs.detach()).exp()
        advantage = all_advantages[start : start + micro_batch, None]
        clipped = ratio.clamp(0.8, 1.28)
        surrogate = torch.minimum(ratio * advantage, clipped * advantage)
        return -(surrogate * mask).sum() / num_tokens

    def arm() -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(rollouts), micro_batch):
            loss_of(start).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return arm


def packed_arm(
    model: Any, groups: list[Group], advantages: list[Tensor], *, share_prompts: bool
) -> Callable[[], None]:
    """Sparring's own step: packing included."""
    model.requires_grad_(True)
    optimizer = build_optimizer(
        model.trainable_parameters(),
        name="adamw",
        learning_rate=LEARNING_RATE,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        schedule="constant",
        warmup_steps=0,
        num_steps=1000,
        compute_dtype=model.dtype,
    )

    def arm() -> None:
        batches = pack_groups(
            groups,
            advantages,
            max_tokens=MICRO_BATCH_TOKENS,
            temperature=1.0,
            share_prompts=share_prompts,
        )
        train_step(model, batches, dapo, optimizer, max_grad_norm=1.0)

    return arm


def build_arms() -> dict[str, Callable[[], None]]:
    """Every arm by name, each with a model of its own."""
    model, _ = sparring.load(str(POLICY), device="cpu")
    prompts, lengths, groups, advantages = build_work(model.config.vocab_size)
    engine = Engine(
        model,
        kv_bytes=1 << 28,
        stop_ids=(),
        decode=lambda _: "",
        max_tokens=PROMPT_TOKENS + LONGEST,
    )
    sampling = Sampling(max_completion_tokens=LONGEST)

    def rollouts() -> None:
        engine.generate(prompts, sampling, num_samples=NUM_SAMPLES, limits=lengths)

    arms: dict[str, Callable[[], None]] = {
        "engine": rollouts,
        "generate": generate_arm(transformers_model().eval(), prompts, lengths),
    }
    for name, share_prompts in (("packed", False), ("packed_shared_prompt", True)):
        trained, _ = sparring.load(str(POLICY), device="cpu")
        arms[name] = packed_arm(trained, groups, advantages, share_prompts=share_prompts)
    for size in MICRO_BATCHES:
        peer = transformers_model().train()
        arms[f"padded_{size}"] = padded_arm(peer, groups, advantages, size)
    return arms


def main() -> None:
    """Time all arms in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arms = build_arms()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(arguments.repeats + 1):  # the first is a warm-up
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    best = min(MICRO_BATCHES, key=lambda size: median[f"padded_{size}"])
    padded = median[f"padded_{best}"]
    ratios = {
        "rollout": median["generate"] / median["engine"],
        "training": padded / median["packed"],
        "training_shared_prompt": padded / median["packed_shared_prompt"],
    }
    report = {
        "threads": arguments.threads,
        "date": date.today().isoformat(),
        "environment": describe_environment(),
        "repeats": arguments.repeats,
        "seconds": {name: round(value, 4) for name, value in median.items()},
        "best_padded_micro_batch": best,
        "ratios": {name: round(value, 2) for name, value in ratios.items()},
        "targets": TARGETS,
    }
    print(json.dumps(report, indent=2))
    sys.exit(0 if all(ratios[name] >= target for name, target in TARGETS.items()) else 1)


if __name__ == "__main__":
    main()
