"""What `sparring plan` predicts against what a card takes: bytes by part and seconds, six recipes.

    python benchmarks/plan_accuracy.py OUTPUT.json [ROW ...]

Random weights of real shapes, distinct prompts, advantages drawn non-zero, fixed lengths. Peak is
the allocator's largest reserved memory since the weights are in place. A cap of N GiB limits the
allocator to N - 1.0 GiB. Two phases after one to warm up; all are reported. The allocator's own
events of one more phase go into OUTPUT.NAME.json.gz, so that its rounding can be replayed.
"""

from __future__ import annotations

import gc
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import shapes
import torch
import triton

from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.models.lora import LoraConfig
from sparring.models.transformer import Decoder
from sparring.train.optimizer import Optimizer, build_optimizer
from sparring.train.step import train_step
from sparring.types import Group, Prompt, Rollout

GIB = 2**30
CONTEXT_BYTES = 1.0 * GIB
ROWS: dict[str, dict[str, Any]] = {
    "0.5b-full": {
        "shape": "qwen2.5-0.5b", "quantization": "none", "targets": None, "cap_gib": None,
        "work": (4, 8, 256, 512), "checkpointing": "none", "micro_batch_tokens": 8192,
    },
    "0.5b-lora": {
        "shape": "qwen2.5-0.5b", "quantization": "none", "targets": "all-linear", "cap_gib": 8,
        "work": (4, 8, 256, 512), "checkpointing": "layers", "micro_batch_tokens": 8192,
    },
    "1.5b-nf4": {
        "shape": "qwen2.5-1.5b", "quantization": "nf4", "targets": "all-linear", "cap_gib": 6,
        "work": (2, 8, 256, 1024), "checkpointing": "layers", "micro_batch_tokens": 4096,
    },
    "1.5b-full": {
        "shape": "qwen2.5-1.5b", "quantization": "none", "targets": None, "cap_gib": 40,
        "work": (2, 8, 256, 1024), "checkpointing": "layers", "micro_batch_tokens": 8192,
    },
    "7b-nf4": {
        "shape": "qwen2.5-7b", "quantization": "nf4", "targets": shapes.ATTENTION, "cap_gib": 24,
        "work": (2, 8, 256, 768), "checkpointing": "layers", "micro_batch_tokens": 8192,
    },
    "7b-lora": {
        "shape": "qwen2.5-7b", "quantization": "none", "targets": "all-linear", "cap_gib": None,
        "work": (2, 8, 256, 768), "checkpointing": "none", "micro_batch_tokens": 8192,
    },
}  # fmt: skip
"""work: prompts, samples of each, prompt tokens, completion tokens."""
RECORDED = ("0.5b-full", "1.5b-nf4", "7b-nf4", "7b-lora")


def groups(prompts: int, size: int, prompt_tokens: int, completion_tokens: int) -> list[Group]:
    """Random prompts and completions of fixed lengths."""
    found = []
    for number in range(prompts):
        ids = tuple(torch.randint(100, 120000, (prompt_tokens,)).tolist())
        prompt = Prompt(id=number, token_ids=ids, text="")
        rollouts = tuple(
            Rollout(
                prompt=prompt, sample_index=i,
                token_ids=torch.randint(100, 120000, (completion_tokens,)),
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


def built(row: dict[str, Any]) -> Decoder:
    """The row's model, ready to train."""
    model = shapes.build(row["shape"], quantization=row["quantization"], lora_rank=0)
    if row["targets"]:
        model.add_adapter(LoraConfig(rank=16, target_modules=row["targets"]))
        with torch.no_grad():
            for adapter in model.adapter_modules("policy").values():
                adapter.b.normal_(0.0, 0.01)
        model.refresh_shadows()
    model.set_checkpointing(row["checkpointing"])
    return model


def counters(**names: float) -> dict[str, float]:
    """Allocated, reserved and used memory now, in bytes."""
    free, total = torch.cuda.mem_get_info()
    return {
        **names, "allocated": torch.cuda.memory_allocated(),
        "reserved": torch.cuda.memory_reserved(), "device used": total - free,
    }  # fmt: skip


def peaks() -> dict[str, int]:
    """The allocator's peaks since the last reset."""
    return {
        "peak allocated": torch.cuda.max_memory_allocated(),
        "peak reserved": torch.cuda.max_memory_reserved(),
    }


def training(model: Decoder, optimizer: Optimizer, row: dict[str, Any], made: list[Group]) -> float:
    """Seconds of one training phase: groups on the host to weights updated."""
    advantages = [torch.randn(row["work"][1]) + 0.1 for _ in made]
    torch.cuda.synchronize()
    start = time.perf_counter()
    batches = pack_groups(made, advantages, max_tokens=row["micro_batch_tokens"], temperature=1.0)
    train_step(model, batches, dapo, optimizer, max_grad_norm=1.0)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(name: str, row: dict[str, Any], output: Path) -> dict[str, Any]:
    """Everything measured of one recipe."""
    gc.collect()
    torch.cuda.empty_cache()
    cap = row["cap_gib"]
    total = torch.cuda.get_device_properties(0).total_memory
    limit = total if cap is None else cap * GIB - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(limit / total)
    stages = [counters(stage="before")]
    start = time.perf_counter()
    model = built(row)
    stages.append(counters(stage="weights", seconds=time.perf_counter() - start))
    optimizer = build_optimizer(
        model.trainable_parameters(), learning_rate=1e-5, num_steps=10, compute_dtype=model.dtype
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stages.append(counters(stage="optimizer"))
    made = groups(*row["work"])
    first = training(model, optimizer, row, made)
    stages.append(counters(stage="first step", **peaks()))
    seconds = [training(model, optimizer, row, made) for _ in range(2)]
    stages.append(counters(stage="end", **peaks()))
    found = {**row, "stages": stages, "first seconds": first, "seconds": seconds, **peaks()}
    if name in RECORDED:
        torch.cuda.memory._record_memory_history(context=None, max_entries=400000)
        training(model, optimizer, row, made)
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        torch.cuda.memory._record_memory_history(enabled=None)
        brief = [[event["action"], event["addr"], event["size"]] for event in events]
        with gzip.open(output.with_suffix(f".{name}.json.gz"), "wt") as file:
            json.dump(brief, file)
    return found


def main() -> None:
    torch.manual_seed(0)
    output, wanted = Path(sys.argv[1]), sys.argv[2:] or list(ROWS)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "rows": {},
    }  # fmt: skip
    for name in wanted:
        try:
            result["rows"][name] = measured(name, ROWS[name], output)
        except Exception as problem:  # noqa: BLE001 - one row must not lose the others
            result["rows"][name] = {**ROWS[name], "failed": repr(problem)[:400]}
        found = result["rows"][name]
        shown = {
            key: round(value / GIB, 3) for key, value in found.items() if key.startswith("peak")
        }
        print(name, found.get("failed", ""), shown, found.get("seconds"), flush=True)
        output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
