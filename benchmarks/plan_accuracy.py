"""What `sparring plan` predicts against what a card takes: bytes and seconds of seven recipes.

    python benchmarks/plan_accuracy.py OUTPUT.json [ROW ...] [--again]

Random weights of real shapes, distinct prompts, advantages drawn non-zero, fixed lengths. A step is
a rollout by the engine, whose KV pool is what the plan says, and a training phase: groups on the
host to weights updated. Peak is the allocator's largest reserved memory in a phase since the
weights are in place; between phases free pages are given back, as a run does. A cap of N GiB limits
the allocator to N - 1.0 GiB. One step to warm up, then a rollout and five training phases; all are
reported, and seconds are compared by the median of those after the warm-up. Allocated and device
memory stand beside it, each part of the prediction, and what every pool of the allocator held at a
phase's end. Rows share a process; what one leaves (library workspaces) is freed before the next.
--again measures nothing and needs no card: what stands in OUTPUT.json is predicted anew.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import shapes
import torch
import triton

from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.models.checkpoint import family_of
from sparring.models.lora import PROJECTIONS, LoraConfig
from sparring.models.transformer import Decoder
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.cards import find_card
from sparring.train.memory import take_workspaces
from sparring.train.optimizer import Optimizer, build_optimizer
from sparring.train.plan import Phase, Plan, predict
from sparring.train.plan_job import CONTEXT_BYTES, Job, Settings, Trained, Work
from sparring.train.step import train_step
from sparring.types import Group, Prompt, Rollout

GIB = 2**30
TRAININGS = 5
"""Phases after the warm-up: one takes up to half as long again as the next where the host is waited
for."""
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
    "7b-nf4-tight": {
        "shape": "qwen2.5-7b", "quantization": "nf4", "targets": shapes.ATTENTION, "cap_gib": 19.5,
        "work": (8, 8, 256, 256), "checkpointing": "selective", "micro_batch_tokens": 4096,
        "caches_weights": True,
    },
}  # fmt: skip
"""The last is one whose keys and values take all that its cap leaves beside decoded weights: too
little for all rows at once. work: prompts, samples of each, prompt tokens, completion tokens."""


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
    """The allocator's peaks since the last reset, and what the device holds while pages stay."""
    free, total = torch.cuda.mem_get_info()
    return {
        "peak allocated": torch.cuda.max_memory_allocated(),
        "peak reserved": torch.cuda.max_memory_reserved(),
        "device used": total - free,
    }


def pools() -> dict[str, list[int]]:
    """[reserved, allocated] now of ordinary memory and of graphs, small and large requests."""
    found: dict[str, list[int]] = {}
    for segment in torch.cuda.memory_snapshot():
        owner = "ordinary" if tuple(segment["segment_pool_id"]) == (0, 0) else "graphs"
        sizes = found.setdefault(f"{owner} {segment['segment_type']}", [0, 0])
        sizes[0] += segment["total_size"]
        sizes[1] += segment["allocated_size"]
    return found


def job_of(row: dict[str, Any]) -> tuple[Job, Settings]:
    """The row as the plan takes it."""
    shape = shapes.SHAPES[row["shape"]]
    targets = row["targets"] or ()
    prompts, size, prompt_tokens, completion_tokens = row["work"]
    model = Trained(
        config=family_of(shape).config(shape),
        is_quantised=row["quantization"] == "nf4",
        rank=16 if targets else 0,
        targets=frozenset(PROJECTIONS if targets == "all-linear" else targets),
    )
    work = Work(
        prompts=prompts, group_size=size, prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )  # fmt: skip
    settings = Settings(
        checkpointing=row["checkpointing"], micro_batch_tokens=row["micro_batch_tokens"],
        caches_weights=row.get("caches_weights", False), max_running=prompts * size,
    )  # fmt: skip
    return Job(policy=model, work=work), settings


def training(model: Decoder, optimizer: Optimizer, row: dict[str, Any], made: list[Group]) -> float:
    """Seconds of one training phase: groups on the host to weights updated."""
    advantages = [torch.randn(row["work"][1]) + 0.1 for _ in made]
    torch.cuda.synchronize()
    start = time.perf_counter()
    batches = pack_groups(made, advantages, max_tokens=row["micro_batch_tokens"], temperature=1.0)
    train_step(model, batches, dapo, optimizer, max_grad_norm=1.0)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def rollout(engine: Engine, row: dict[str, Any], made: list[Group], step: int) -> float:
    """Seconds of one rollout of the row's work."""
    engine.weights_changed(policy_version=step)
    sampling = Sampling(temperature=1.0, max_completion_tokens=row["work"][3])
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.generate([group.prompt for group in made], sampling, num_samples=row["work"][1])
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(row: dict[str, Any]) -> dict[str, Any]:
    """Everything measured of one recipe, beside what is predicted."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    plan = planned(row)
    total = torch.cuda.get_device_properties(0).total_memory
    limit = total if plan.budget is None else plan.budget - CONTEXT_BYTES
    torch.cuda.set_per_process_memory_fraction(limit / total)
    stages = [counters(stage="before")]
    model = built(row)
    optimizer = build_optimizer(
        model.trainable_parameters(), learning_rate=1e-5, num_steps=10, compute_dtype=model.dtype
    )
    torch.cuda.empty_cache()
    stages.append(counters(stage="resident"))
    made = groups(*row["work"])
    engine = Engine(
        model, kv_bytes=plan.settings.kv_bytes, stop_ids=(), decode=lambda _: "",
        max_tokens=row["work"][2] + row["work"][3], max_running=plan.settings.max_running,
        caches_weights=bool(plan.settings.caches_weights),
    )  # fmt: skip
    seconds: dict[str, list[float]] = {"rollout": [], "training": [], "handing over": []}
    found: dict[str, dict[str, int]] = {}
    held: dict[str, dict[str, list[int]]] = {}
    take_workspaces(model.device, model.dtype)
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        seconds["rollout"].append(rollout(engine, row, made, step))
        _keep_peaks(found, "rollout")
        held["rollout"] = pools()
        start = time.perf_counter()
        engine.make_room()
        torch.cuda.empty_cache()
        seconds["handing over"].append(time.perf_counter() - start)
        stages.append(counters(stage=f"after rollout {step}"))
        torch.cuda.reset_peak_memory_stats()
        for _ in range(TRAININGS if step else 1):
            torch.cuda.empty_cache()
            seconds["training"].append(training(model, optimizer, row, made))
        _keep_peaks(found, "training")
        held["training"] = pools()
        torch.cuda.empty_cache()
        stages.append(counters(stage=f"after training {step}"))
    return {
        **row, "stages": stages, "peaks": found, "pools": held, "seconds": seconds,
        "graphs": asdict(engine.graph_stats), "predicted": predicted(plan),
    }  # fmt: skip


def planned(row: dict[str, Any]) -> Plan:
    """The row's plan under its cap, with the lengths that it has."""
    job, settings = job_of(row)
    budget = None if row["cap_gib"] is None else int(row["cap_gib"] * GIB)
    return predict(job, settings, budget=budget, card=find_card("H200"), exact=True)


def predicted(plan: Plan) -> dict[str, Any]:
    """Bytes of both phases, by part, and their seconds."""
    assert plan.rollout is not None, "the rows sample"
    assert plan.seconds is not None, "a card is named"
    seconds = plan.seconds
    return {
        "rollout": told(plan.rollout),
        "training": told(plan.training),
        "seconds": {"rollout": seconds.prefill + seconds.decode, "training": seconds.training},
    }


def told(phase: Phase) -> dict[str, Any]:
    """A phase's prediction: with and without what is allowed for beyond the played requests."""
    return {"reserved": phase.reserved, "played": phase.played, "parts": dict(phase.parts)}


def _keep_peaks(found: dict[str, dict[str, int]], phase: str) -> None:
    before = found.get(phase, {})
    found[phase] = {name: max(size, before.get(name, 0)) for name, size in peaks().items()}


def table_line(name: str, row: dict[str, Any]) -> str:
    """A row for people: measured, predicted and their ratio, bytes and seconds, both phases."""
    cells = []
    for phase in ("rollout", "training"):
        took, said = row["peaks"][phase]["peak reserved"], row["predicted"][phase]["reserved"]
        runs, plan = sorted(row["seconds"][phase][1:]), row["predicted"]["seconds"][phase]
        usual = median(runs)
        cells.append(
            f"{phase}: {took / GIB:.2f} GiB, plan {said / GIB:.2f} ({said / took - 1:+.1%});"
            f" {usual:.2f} s ({runs[0]:.2f} to {runs[-1]:.2f}), plan {plan:.2f}"
            f" ({plan / usual - 1:+.0%})"
        )
    return f"{name:10} " + " | ".join(cells)


def detail_lines(row: dict[str, Any]) -> list[str]:
    """By phase, in GiB: what was measured, what every pool held at its end, predicted parts."""
    lines = []
    for phase in ("rollout", "training"):
        took = ", ".join(f"{name} {size / GIB:.3f}" for name, size in row["peaks"][phase].items())
        held = ", ".join(
            f"{name} {reserved / GIB:.3f} ({allocated / GIB:.3f})"
            for name, (reserved, allocated) in row["pools"][phase].items()
        )
        said = row["predicted"][phase]
        parts = ", ".join(
            f"{part} {size / GIB:.3f}" for part, size in said["parts"].items() if size > 2**19
        )
        lines += [
            f"  {phase}: {took}",
            f"    pools at the end, allocated in brackets: {held}",
            f"    predicted: reserved {said['reserved'] / GIB:.3f}, played"
            f" {said['played'] / GIB:.3f}; {parts}",
        ]
    return lines


def again(output: Path) -> None:
    """Replace the predictions of what was measured by today's."""
    result = json.loads(output.read_text())
    for name, row in result["rows"].items():
        row["predicted"] = predicted(planned(row))
        print("\n".join([table_line(name, row), *detail_lines(row)]), flush=True)
    output.write_text(json.dumps(result, indent=1))


def main() -> None:
    if "--again" in sys.argv:
        again(Path(sys.argv[1]))
        return
    torch.manual_seed(0)
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    output, wanted = Path(sys.argv[1]), sys.argv[2:] or list(ROWS)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "rows": {},
    }  # fmt: skip
    for name in wanted:
        try:
            row = measured(ROWS[name])
        except Exception as problem:  # noqa: BLE001 - one row must not lose the others
            row = {**ROWS[name], "failed": repr(problem)[:400]}
        result["rows"][name] = row
        output.write_text(json.dumps(result, indent=1))
        if "failed" in row:
            print(name, "failed", row["failed"], flush=True)
        else:
            print("\n".join([table_line(name, row), *detail_lines(row)]), flush=True)


if __name__ == "__main__":
    main()
