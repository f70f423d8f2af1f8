"""Bitwise mode on a GPU: the trainer's log-probabilities are the sampler's, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparring.data.packing import pack_groups
from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.quantised import Quantised
from sparring.models.transformer import Decoder
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Batch, Group, Prompt, Rollout

pytestmark = pytest.mark.gpu

COMMON = {
    "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    "vocab_size": 5000, "num_hidden_layers": 3, "max_position_embeddings": 4096,
    "use_sliding_window": False,
}  # fmt: skip
QWEN2 = {
    **COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {
    **COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3",
    "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "qwen2": {
        **QWEN2, "hidden_size": 896, "intermediate_size": 2368, "num_attention_heads": 7,
        "num_key_value_heads": 1,
    },
    "qwen3": {
        **QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "vocab_size": 4999,
    },
    "7b": {
        **QWEN2, "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
        "num_key_value_heads": 4, "num_hidden_layers": 2,
    },
    "policy": {
        **QWEN3, "hidden_size": 192, "intermediate_size": 640, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    },
}  # fmt: skip
"""A head group and layer widths of the 7B's kind (a quarter as wide), Qwen3-0.6B's layers, two of
the 7B's own, and the shipped policy's.
"""
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def bitwise_model(name: str, quantization: str, lora: bool) -> Decoder:
    torch.manual_seed(0)
    is_quantised = quantization == "nf4"
    model = build_model(
        SHAPES[name], device="cuda", dtype=torch.bfloat16, is_quantised=is_quantised
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.fill_(1.0) if path.endswith("norm") else parameter.normal_(0.0, 0.05)
        for linear in model.linears().values():
            base = linear.base
            if isinstance(base, Quantised):
                for index, rows in enumerate(base.part_rows):
                    weight = torch.randn(rows, base.num_inputs, device="cuda") * 0.05
                    base.quantise(index, weight.bfloat16())
        if lora:
            targets = ALL if name == "7b" else ("q_proj", "v_proj", "o_proj")
            model.add_adapter(LoraConfig(rank=16, target_modules=targets))
            for adapter in model.adapter_modules("policy").values():
                adapter.b.normal_(0.0, 0.05)
            model.refresh_shadows()
        else:
            model.requires_grad_(not is_quantised)
    model.set_bitwise(True)
    return model


def prompts(*lengths: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(3)
    return [
        Prompt(
            id=i,
            text="",
            token_ids=tuple(torch.randint(8, 4990, (n,), generator=generator).tolist()),
        )
        for i, n in enumerate(lengths)
    ]


def engine(model: Decoder, **changes: object) -> Engine:
    arguments: dict[str, object] = {
        "kv_bytes": 1 << 29, "stop_ids": (7,), "decode": lambda _: "", "max_tokens": 1024,
        "max_running": 64,
    }  # fmt: skip
    return Engine(model, **{**arguments, **changes})  # type: ignore[arg-type]


def on_gpu(batch: Batch) -> Batch:
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    moved = {k: v.cuda() for k, v in fields.items() if isinstance(v, torch.Tensor)}
    return replace(batch, **moved)


def assert_trained_on_what_was_sampled(
    model: Decoder, asked: list[Prompt], rollouts: list[list[Rollout]], *, share: bool
) -> None:
    groups = [
        Group(prompt=p, rollouts=tuple(r), rewards_G=torch.ones(len(r)), reward_parts={})
        for p, r in zip(asked, rollouts, strict=True)
    ]
    batches = pack_groups(
        groups,
        [torch.ones(len(r)) for r in rollouts],
        max_tokens=2048,
        temperature=rollouts[0][0].temperature,
        share_prompts=share,
    )
    compared = 0
    for batch in map(on_gpu, batches):
        logprobs = model.score(batch).logprobs_T.detach()
        mask = batch.loss_mask_T
        assert torch.equal(logprobs[mask], batch.sampler_logprobs_T[mask])
        compared += int(mask.sum())
    assert compared == sum(len(r.token_ids) for group in rollouts for r in group)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("samples", [1, 8, 64])
@pytest.mark.parametrize(
    ("name", "quantization", "lora"),
    [
        ("qwen2", "nf4", True),
        ("qwen2", "none", True),
        ("qwen3", "none", True),
        ("qwen3", "nf4", True),
        ("qwen3", "none", False),
    ],
)
def test_trainer_and_sampler_agree_to_the_bit(
    name: str, quantization: str, lora: bool, samples: int, share: bool
) -> None:
    model = bitwise_model(name, quantization, lora)
    asked = prompts(1, 63, 64, 65, 255, 256, 300)
    if samples == 64:
        asked = asked[3:5]
    sampling = Sampling(max_completion_tokens=80, temperature=0.9)
    sampler = engine(model)
    calls = [asked] if samples > 1 else [[prompt] for prompt in asked]  # steps of one row
    rollouts = sum((sampler.generate(c, sampling, num_samples=samples) for c in calls), [])  # noqa: RUF017
    assert_trained_on_what_was_sampled(model, asked, rollouts, share=share)


@pytest.mark.parametrize(
    ("name", "quantization", "lora"),
    [("7b", "nf4", True), ("7b", "none", True), ("policy", "none", False), ("qwen3", "nf4", True)],
)
@pytest.mark.parametrize(("num_prompts", "samples"), [(16, 8), (180, 1)])
def test_many_rows_in_flight(
    name: str, quantization: str, lora: bool, num_prompts: int, samples: int
) -> None:
    """More rows than a small tile holds; both counts pass through many buckets as rows end."""
    model = bitwise_model(name, quantization, lora)
    lengths = (20, 31, 63, 64, 65, 90, 255, 256, 257)
    asked = prompts(*(lengths[i % len(lengths)] for i in range(num_prompts)))
    limits = [[1 + (7 * i + 5 * j) % 40 for j in range(samples)] for i in range(num_prompts)]
    sampling = Sampling(max_completion_tokens=40, temperature=0.9)
    wide = engine(model, max_running=512)
    for _ in range(2):  # graphs are captured, then used after the pool was taken anew
        got = wide.generate(asked, sampling, num_samples=samples, limits=limits)
        assert_trained_on_what_was_sampled(model, asked, got, share=True)
        wide.sleep()
    assert_trained_on_what_was_sampled(model, asked, got, share=False)


@pytest.mark.parametrize(
    ("name", "quantization"), [("qwen2", "none"), ("qwen2", "nf4"), ("policy", "none")]
)
def test_company_bursts_and_preemption_change_no_bit(name: str, quantization: str) -> None:
    model = bitwise_model(name, quantization, name != "policy")
    asked = prompts(40, 130, 256)
    sampling = Sampling(max_completion_tokens=150)
    wide = engine(model).generate(asked, sampling, num_samples=8)
    block_bytes = engine(model).block_bytes
    others = [
        engine(model, steps_per_sync=1),
        engine(model, max_running=3),
        engine(model, cuda_graphs=False, max_prefill_tokens=64),
        engine(model, kv_bytes=block_bytes * 15),
    ]
    for other in others:
        got = other.generate(asked, sampling, num_samples=8)
        for one, two in zip(sum(got, []), sum(wide, []), strict=True):  # noqa: RUF017
            assert torch.equal(one.token_ids, two.token_ids)
            assert torch.equal(one.logprobs, two.logprobs)
    assert others[-1].stats.num_preemptions > 0
    for share in (True, False):
        assert_trained_on_what_was_sampled(model, asked, got, share=share)


def test_cached_weights_change_no_bit() -> None:
    model = bitwise_model("qwen2", "nf4", True)
    asked = prompts(70)
    sampling = Sampling(max_completion_tokens=60)
    packed = engine(model).generate(asked, sampling, num_samples=8)
    cached = engine(model, caches_weights=True).generate(asked, sampling, num_samples=8)
    for one, two in zip(sum(cached, []), sum(packed, []), strict=True):  # noqa: RUF017
        assert torch.equal(one.token_ids, two.token_ids)
        assert torch.equal(one.logprobs, two.logprobs)
