"""The engine on a GPU under load: ten thousand prompts in memory for twenty, a hundred cycles."""

from __future__ import annotations

import time

import pytest
import torch

from sparring.data.packing import pack_groups
from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.optimizer import build_optimizer
from sparring.train.plan_job import CONTEXT_BYTES
from sparring.train.plan_recipe import hold_budget
from sparring.train.step import train_step
from sparring.types import Group, LossOutput, Prompt

pytestmark = pytest.mark.gpu
CAP = 3 << 29
"""1.5 GiB with the context: some 0.3 GiB are used."""

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512,
    "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": True, "vocab_size": 1024,
    "num_hidden_layers": 4, "max_position_embeddings": 1024,
}  # fmt: skip


def small_model(*, bitwise: bool) -> Decoder:
    model = build_model(SHAPE, device="cuda", dtype=torch.bfloat16)
    model.init_weights(0)
    model.set_bitwise(bitwise)
    return model


def asked(count: int) -> tuple[list[Prompt], list[list[int]]]:
    """Prompts and completion limits whose sums lie between 2 and 512."""
    generator = torch.Generator().manual_seed(0)
    prompts, limits = [], []
    for number in range(count):
        total = int(torch.randint(2, 513, (), generator=generator))
        length = int(torch.randint(1, total, (), generator=generator))
        ids = torch.randint(0, 1024, (length,), generator=generator).tolist()
        prompts.append(Prompt(id=number, token_ids=tuple(ids), text=""))
        limits.append([total - length])
    return prompts, limits


def engine(model: Decoder, num_tokens: int, **changes: object) -> Engine:
    arguments: dict[str, object] = {
        "kv_bytes": num_tokens * 4 * 2 * 2 * 64 * 2, "stop_ids": (), "decode": lambda _: "",
        "max_tokens": 512, "max_running": 64,
    }  # fmt: skip
    return Engine(model, **{**arguments, **changes})  # type: ignore[arg-type]


def test_ten_thousand_prompts_in_memory_for_twenty() -> None:
    model = small_model(bitwise=True)
    prompts, limits = asked(10_000)
    sampling = Sampling(max_completion_tokens=512, temperature=0.0)
    scarce = engine(model, 20 * 272)
    # capturing a graph gives cached memory back, so every bucket is captured before the count
    scarce.generate(prompts[:500], sampling, limits=limits[:500])
    reserved: list[int] = []

    def watch(finished: int, total: int, _tokens: int) -> None:
        if (not reserved and finished * 10 >= total) or finished == total:
            reserved.append(torch.cuda.memory_reserved())

    started = time.perf_counter()
    got = scarce.generate(prompts, sampling, limits=limits, on_progress=watch)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    stats = scarce.stats
    print(f"{seconds:.1f} s, {stats}")
    assert seconds <= 120
    assert stats.num_free_blocks == stats.num_blocks == 84
    assert stats.num_preemptions >= 50
    assert [len(r[0].token_ids) for r in got] == [limit for (limit,) in limits]
    assert reserved[0] == reserved[-1]
    roomy = engine(model, 256 * 576, max_running=256)
    free = roomy.generate(prompts, sampling, limits=limits)
    assert roomy.stats.num_preemptions == 0
    for (one,), (other,) in zip(got, free, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)


def policy_loss(scores: object, batch: object) -> LossOutput:
    mask = batch.loss_mask_T  # type: ignore[attr-defined]
    chosen = scores.logprobs_T * batch.advantages_T  # type: ignore[attr-defined]
    return LossOutput(loss=-chosen[mask].sum() / batch.num_loss_tokens, metrics={})  # type: ignore[attr-defined]


def cycles(count: int, *, sleeps: bool) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Generate and train in turn: the last cycle's tokens, and memory and graphs after each."""
    model = small_model(bitwise=False)
    model.add_adapter(LoraConfig(rank=8))
    optimizer = build_optimizer(
        model.trainable_parameters(), learning_rate=1e-3, num_steps=count,
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    prompts, _ = asked(4)
    writer = engine(model, 64 * 512)
    sampling = Sampling(max_completion_tokens=40)
    seen, rollouts = [], []
    for number in range(count):
        writer.weights_changed(policy_version=number)
        rollouts = writer.generate(prompts, sampling, num_samples=4)
        if sleeps:
            writer.sleep()
        groups = [
            Group(prompt=p, rollouts=tuple(r), rewards_G=torch.ones(4), reward_parts={})
            for p, r in zip(prompts, rollouts, strict=True)
        ]
        batches = pack_groups(
            groups, [torch.tensor([1.0, -1.0, 0.5, -0.5])] * 4, max_tokens=1024, temperature=1.0
        )
        train_step(model, batches, policy_loss, optimizer)
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        seen.append((torch.cuda.memory_reserved(), total - free, writer.graph_stats.num_graphs))
    return [r.token_ids.tolist() for group in rollouts for r in group], seen


def test_a_hundred_cycles_of_writing_and_training_under_a_cap() -> None:
    torch.cuda.empty_cache()
    hold_budget(CAP, torch.device("cuda"), print)
    try:
        tokens, seen = cycles(100, sleeps=True)
        print(seen[2], seen[-1])
        assert seen[-1] == seen[2], "reserved and device-used memory, and the number of graphs"
        assert max(reserved for reserved, _, _ in seen) <= CAP - CONTEXT_BYTES
        awake, _ = cycles(100, sleeps=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert tokens == awake
