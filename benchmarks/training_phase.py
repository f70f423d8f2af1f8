"""The training phase of a GRPO step on a GPU: seconds, peak memory and where the time goes.

    python benchmarks/training_phase.py OUTPUT.json

Random weights of real shapes, LoRA of rank 16 on q, k, v and o with B drawn non-zero, distinct
prompts, advantages drawn non-zero. A phase is groups on the host to adapters updated: packing,
forward, backward, clipping and the optimizer. Peak is the allocator's largest reserved memory
since the weights are in place. Three phases after one to warm up; all are reported.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import triton

from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.models.checkpoint import build_model
from sparring.models.lora import LoraConfig
from sparring.models.quantised import Quantised
from sparring.models.transformer import Decoder
from sparring.train.optimizer import build_optimizer
from sparring.train.step import train_step
from sparring.types import Group, Prompt, Rollout

CUDA = torch.device("cuda")
SHAPES = {
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Qwen2.5's own shapes."""


def build(name: str, quantization: str) -> Decoder:
    """A model with random weights made on the card, matrix by matrix."""
    config = {
        **SHAPES[name], "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "hidden_act": "silu", "use_sliding_window": False,
    }  # fmt: skip
    model = build_model(
        config, device=CUDA, dtype=torch.bfloat16, is_quantised=quantization == "nf4"
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("norm"):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02)
        for linear in model.linears().values():
            base = linear.base
            if isinstance(base, Quantised):
                for index, rows in enumerate(base.part_rows):
                    weight = torch.empty(rows, base.num_inputs, device=CUDA, dtype=torch.bfloat16)
                    base.quantise(index, weight.normal_(0.0, 0.02))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    model.add_adapter(LoraConfig(rank=16, target_modules=targets))
    with torch.no_grad():
        for adapter in model.adapter_modules("policy").values():
            adapter.b.normal_(0.0, 0.01)
    model.refresh_shadows()
    return model


def groups(prompts: int, size: int, prompt_tokens: int, completion_tokens: int) -> list[Group]:
    """Random prompts and completions of fixed lengths."""
    found = []
    for number in range(prompts):
        ids = tuple(torch.randint(100, 150000, (prompt_tokens,)).tolist())
        prompt = Prompt(id=number, token_ids=ids, text="")
        rollouts = tuple(
            Rollout(
                prompt=prompt, sample_index=i,
                token_ids=torch.randint(100, 150000, (completion_tokens,)),
                logprobs=torch.full((completion_tokens,), -12.0),
                loss_mask=torch.ones(completion_tokens, dtype=torch.bool),
                text="", finish_reason="length", policy_version=0,
            )
            for i in range(size)
        )  # fmt: skip
        found.append(
            Group(prompt=prompt, rollouts=rollouts, rewards_G=torch.randn(size), reward_parts={})
        )
    return found


def measure(
    model: Decoder,
    work: tuple[int, ...],
    mode: str,
    micro_batch_tokens: int,
    **knobs: bool,
) -> dict[str, object]:
    """Seconds of three phases and the peak of memory, for one setting."""
    model.set_checkpointing(mode)
    model.head_chunk_rows = 512
    made = groups(*work)
    advantages = [torch.randn(work[1]) + 0.1 for _ in made]
    optimizer = build_optimizer(
        model.trainable_parameters(), learning_rate=1e-5, num_steps=10, compute_dtype=torch.bfloat16
    )

    def phase() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        batches = pack_groups(
            made, advantages, max_tokens=micro_batch_tokens, temperature=1.0, **knobs
        )
        train_step(model, batches, dapo, optimizer, max_grad_norm=1.0)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    weights = torch.cuda.memory_allocated()
    first = phase()
    seconds = [phase() for _ in range(3)]
    free, total = torch.cuda.mem_get_info()
    return {
        "work": work, "checkpointing": mode, "micro_batch_tokens": micro_batch_tokens, **knobs,
        "first seconds": first, "seconds": seconds,
        "weights GiB": weights / 2**30,
        "peak reserved GiB": torch.cuda.max_memory_reserved() / 2**30,
        "peak allocated GiB": torch.cuda.max_memory_allocated() / 2**30,
        "device used GiB": (total - free) / 2**30,
    }  # fmt: skip


def profile(model: Decoder, work: tuple[int, ...], micro_batch_tokens: int) -> str:
    """A table of the kernels that one forward and backward pass takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    made = groups(1, *work[1:])
    batch = pack_groups(
        made, [torch.ones(work[1])], max_tokens=micro_batch_tokens, temperature=1.0
    )[0]
    optimizer = build_optimizer(model.trainable_parameters(), learning_rate=1e-5, num_steps=10)
    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        train_step(model, [batch], dapo, optimizer, max_grad_norm=1.0)
        torch.cuda.synchronize()
    table: str = recorded.key_averages().table(
        sort_by="cuda_time_total", row_limit=22, max_name_column_width=60
    )
    return table


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    rows = []
    plan = [
        ("7B", "nf4", (4, 8, 256, 768), "layer", 8192, {}),
        ("7B", "nf4", (4, 8, 256, 768), "layer", 16384, {}),
        ("7B", "nf4", (4, 8, 256, 768), "none", 8192, {}),
        ("7B", "nf4", (1, 8, 1024, 512), "layer", 8192, {}),
        ("7B", "nf4", (1, 8, 1024, 512), "layer", 16384, {"share_prompts": False}),
        ("7B", "none", (4, 8, 256, 768), "none", 8192, {}),
        ("1.5B", "nf4", (1, 8, 256, 1024), "layer", 2048, {}),
    ]
    model, have = None, None
    for name, quantization, work, mode, tokens, knobs in plan:
        if have != (name, quantization):
            model = None
            torch.cuda.empty_cache()
            start = time.perf_counter()
            model, have = build(name, quantization), (name, quantization)
            print(f"{name} {quantization} built in {time.perf_counter() - start:.1f} s", flush=True)
        row: dict[str, object] = {"model": name, "quantization": quantization}
        try:
            row |= measure(model, work, mode, tokens, **knobs)
        except Exception as problem:  # noqa: BLE001 - one row must not lose the others
            row |= {"work": work, "checkpointing": mode, "failed": repr(problem)[:400]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if len(rows) == 1 and "failed" not in row:
            result["profile"] = profile(model, work, tokens)
            print(result["profile"], flush=True)
    result["rows"] = rows
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
