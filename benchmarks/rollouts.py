"""Rollouts and whole GRPO steps on a GPU: tokens a second, seconds, memory, share of the limit.

    python benchmarks/rollouts.py OUTPUT.json [ROW ...]       without rows: all of them
    python benchmarks/rollouts.py OUTPUT.json --list

Rows of one model run one after another in a process of their own; a row's peak is the largest
reserved memory since its engine was made. Random weights of real shapes, distinct random prompts,
fixed output lengths unless the row says otherwise, temperature 1 with the log-probability of every
token. Tokens a second are output tokens over wall time, prefill included; the best of three runs
after one that compiles and captures (of 20 tokens a completion), all reported.

The limit is the formula of docs/benchmarks/README.md: weights read once a step, keys and values of
the mean context, or arithmetic, whichever is more, at the bandwidth and matrix rate measured in the
same process. A step is rollout, judging by random advantages, training phase and wake-up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import build
from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.models.transformer import Decoder, kv_bytes_per_token
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.train.optimizer import build_optimizer
from sparring.train.step import train_step
from sparring.types import Group, Prompt, Rollout

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; work = prompts, samples, prompt tokens, output tokens."""

    model: str
    work: tuple[int, int, int, int]
    quantization: str = "none"
    lora_rank: int = 0
    caches_weights: bool = False
    kind: str = "rollout"
    cap_gib: float = 0.0
    max_running: int = 512
    kv_share: float = 1.0
    checkpointing: str = "layers"
    micro_batch_tokens: int = 8192
    bitwise: bool = False
    cuda_graphs: bool = True
    steps_per_sync: int = 16
    extra: tuple[tuple[str, Any], ...] = ()


SMALL, LARGE = "qwen2.5-1.5b", "qwen2.5-7b"
NF4 = {"model": LARGE, "quantization": "nf4"}
STEP = {**NF4, "lora_rank": 16, "kind": "step"}
RAGGED = {**NF4, "lora_rank": 16, "work": (32, 8, 1024, 4096), "max_running": 128}
ROWS: dict[str, Row] = {
    "1.5b 1x8x256x512": Row(model=SMALL, work=(1, 8, 256, 512)),
    "1.5b bitwise 1x8x256x512": Row(model=SMALL, work=(1, 8, 256, 512), bitwise=True),
    "1.5b 16x8x256x512": Row(model=SMALL, work=(16, 8, 256, 512)),
    "1.5b 32x8x256x1024": Row(model=SMALL, work=(32, 8, 256, 1024)),
    "7b 4x8x256x768": Row(model=LARGE, work=(4, 8, 256, 768)),
    "7b 16x8x256x512": Row(model=LARGE, work=(16, 8, 256, 512)),
    "7b 32x8x256x1024": Row(model=LARGE, work=(32, 8, 256, 1024)),
    "7b nf4 fused 4x8x256x768": Row(**NF4, work=(4, 8, 256, 768)),
    "7b nf4 cached 4x8x256x768": Row(**NF4, work=(4, 8, 256, 768), caches_weights=True),
    "7b nf4 fused 16x8x256x512": Row(**NF4, work=(16, 8, 256, 512)),
    "7b nf4 cached 16x8x256x512": Row(**NF4, work=(16, 8, 256, 512), caches_weights=True),
    "7b nf4 lora fused 4x8x256x768": Row(**NF4, work=(4, 8, 256, 768), lora_rank=16),
    "7b nf4 lora cached 4x8x256x768": Row(
        **NF4, work=(4, 8, 256, 768), lora_rank=16, caches_weights=True
    ),
    "step 4x8x256x768": Row(**STEP, work=(4, 8, 256, 768)),
    "step cached 4x8x256x768": Row(**STEP, work=(4, 8, 256, 768), caches_weights=True),
    "step 4x8x256x768 in 24 GiB": Row(**STEP, work=(4, 8, 256, 768), cap_gib=24),
    "step 4x8x256x256": Row(**STEP, work=(4, 8, 256, 256), micro_batch_tokens=2400),
    "step bitwise 4x8x256x768": Row(**STEP, work=(4, 8, 256, 768), bitwise=True),
    "prefill 32x2048": Row(model=LARGE, work=(32, 1, 2048, 1), kind="prefill"),
    "prefill nf4 32x2048": Row(**NF4, work=(32, 1, 2048, 1), kind="prefill"),
    "ragged": Row(**RAGGED, kind="ragged"),
    "ragged quarter": Row(**RAGGED, kind="ragged", kv_share=0.25),
    "0.5b 32x8x256x1024": Row(model="qwen2.5-0.5b", work=(32, 8, 256, 1024)),
    "qwen3-0.6b 32x8x256x1024": Row(model="qwen3-0.6b", work=(32, 8, 256, 1024)),
}


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """FLOP a second of a bf16 product of 8192 cubed on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / _median_seconds(lambda: a @ b)


def _median_seconds(call: Any, repeats: int = 12) -> float:
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeats // 2]


def seconds_a_step(
    model: Decoder, rows: float, context: float, bandwidth: float, rate: float
) -> float:
    """The limit of one decode step of `rows` rows that each attend to `context` tokens."""
    config = model.config
    parameters = sum(
        linear.base.shape[0] * linear.base.shape[1] for linear in model.linears().values()
    )
    a_weight = 0.516 if model.is_quantised else 2.0
    head = config.vocab_size * config.width
    return (
        max(parameters * a_weight / bandwidth, 2 * parameters * rows / rate)
        + max(2 * head / bandwidth, 2 * head * rows / rate)
        + rows * context * kv_bytes_per_token(config, model.dtype) / bandwidth
    )


def prompts_of(model: Decoder, count: int, tokens: int, *, ragged: bool) -> list[Prompt]:
    generator = torch.Generator().manual_seed(1)
    lengths = [tokens] * count
    if ragged:
        lengths = torch.randint(64, tokens + 1, (count,), generator=generator).tolist()
    high = model.config.vocab_size - 100
    return [
        Prompt(
            id=i, text="", token_ids=tuple(torch.randint(high, (n,), generator=generator).tolist())
        )
        for i, n in enumerate(lengths)
    ]


def limits_of(row: Row) -> list[list[int]] | None:
    """Log-normal completion lengths (median 400) cut at the row's output tokens."""
    if row.kind != "ragged":
        return None
    prompts, samples, _, most = row.work
    normal = torch.randn(prompts, samples, generator=torch.Generator().manual_seed(2))
    lengths = (400 * normal.mul(0.8).exp()).clamp(1, most).long()
    return [[int(n) for n in line] for line in lengths]


def engine_for(row: Row, model: Decoder, prompts: list[Prompt]) -> Engine:
    _, samples, _, output = row.work
    limits = limits_of(row) or [[output] * samples] * len(prompts)
    block = 64
    tokens = sum(
        len(p.token_ids) + sum(n + block for n in line)
        for p, line in zip(prompts, limits, strict=True)
    ) + block * (len(prompts) + 2)
    longest = max(len(p.token_ids) for p in prompts) + max(map(max, limits))
    return Engine(
        model,
        kv_bytes=int(tokens * kv_bytes_per_token(model.config, model.dtype) * row.kv_share),
        stop_ids=(),
        decode=lambda _: "",
        max_tokens=longest,
        max_running=min(row.max_running, len(prompts) * samples),
        cuda_graphs=row.cuda_graphs,
        steps_per_sync=row.steps_per_sync,
        caches_weights=row.caches_weights,
    )


def mismatch(model: Decoder, groups: list[Group]) -> dict[str, float]:
    """The trainer's log-probabilities against the sampler's, over one prompt's completions."""
    batches = pack_groups(
        groups[:1], [torch.ones(len(groups[0].rollouts))], max_tokens=8192, temperature=1.0
    )
    gaps = []
    with torch.no_grad():
        for batch in batches:
            moved = {
                name: value.cuda() if isinstance(value, Tensor) else value
                for name in batch.__dataclass_fields__
                if (value := getattr(batch, name)) is not None
            }
            batch = replace(batch, **moved)
            logprobs = model.score(batch).logprobs_T
            mask = batch.loss_mask_T
            gaps.append((logprobs - batch.sampler_logprobs_T)[mask].double())
    gap = torch.cat(gaps)
    return {
        "mean": gap.abs().mean().item(),
        "max": gap.abs().max().item(),
        "kl": (gap.exp() - 1 - gap).mean().item(),
    }


def grouped(prompts: list[Prompt], rollouts: list[list[Rollout]]) -> list[Group]:
    return [
        Group(prompt=p, rollouts=tuple(r), rewards_G=torch.randn(len(r)), reward_parts={})
        for p, r in zip(prompts, rollouts, strict=True)
    ]


def memory() -> dict[str, float]:
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "peak reserved GiB": torch.cuda.max_memory_reserved() / GIB,
        "peak allocated GiB": torch.cuda.max_memory_allocated() / GIB,
        "device used GiB": (total - free) / GIB,
        "device used - reserved GiB": (total - free - reserved) / GIB,
    }


def run_all(names: list[str], output: Path) -> None:
    """Measures rows of one model in this process and writes them down as they come."""
    first = ROWS[names[0]]
    if first.kind == "step":  # as every run on a GPU does (train/plan_recipe.py)
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    total = torch.cuda.get_device_properties(0).total_memory
    if first.cap_gib:
        torch.cuda.set_per_process_memory_fraction((first.cap_gib - 1.0) * GIB / total)
    ceilings = {"bandwidth": 4.26e12, "matmul": 801e12}
    if not first.cap_gib:
        ceilings = {"bandwidth": copy_bandwidth(), "matmul": matmul_rate()}
    torch.cuda.empty_cache()
    started = time.perf_counter()
    model = build(first.model, quantization=first.quantization, lora_rank=first.lora_rank)
    seconds = time.perf_counter() - started
    if not first.lora_rank:
        model.requires_grad_(False)
    found = {}
    for name in names:
        try:
            found[name] = {"build seconds": seconds, **ceilings} | run(ROWS[name], model, ceilings)
        except Exception as problem:  # noqa: BLE001 - one row must not lose the others
            found[name] = {"failed": repr(problem)[:2000]}
        output.write_text(json.dumps(found))
        gc.collect()
        torch.cuda.empty_cache()


def run(row: Row, model: Decoder, ceilings: dict[str, float]) -> dict[str, Any]:
    """Measures one row."""
    out: dict[str, Any] = {}
    model.set_bitwise(row.bitwise)
    num_prompts, samples, prompt_tokens, output = row.work
    prompts = prompts_of(model, num_prompts, prompt_tokens, ragged=row.kind == "ragged")
    engine = engine_for(row, model, prompts)
    sampling = Sampling(max_completion_tokens=output)
    optimizer = None
    if row.kind == "step":
        model.set_checkpointing(row.checkpointing)
        optimizer = build_optimizer(
            model.trainable_parameters(),
            learning_rate=1e-6,
            num_steps=10,
            compute_dtype=torch.bfloat16,
        )
    torch.cuda.reset_peak_memory_stats()

    def once(number: int) -> tuple[dict[str, float], list[Group]]:
        engine.weights_changed(policy_version=number)
        torch.cuda.synchronize()
        start = time.perf_counter()
        limits = limits_of(row) if number else [[min(20, output)] * samples] * num_prompts
        rollouts = engine.generate(prompts, sampling, num_samples=samples, limits=limits)
        torch.cuda.synchronize()
        times = {"rollout": time.perf_counter() - start}
        groups = grouped(prompts, rollouts)
        if optimizer is not None:
            engine.sleep()
            batches = pack_groups(
                groups,
                [torch.randn(samples) + 0.1 for _ in groups],
                max_tokens=row.micro_batch_tokens,
                temperature=1.0,
            )
            update = train_step(model, batches, dapo, optimizer, max_grad_norm=1.0)
            torch.cuda.synchronize()
            times["step"] = time.perf_counter() - start
            out["values"] = dict(update.values)
        stats = engine.stats
        times |= {
            "prefill": stats.prefill_seconds,
            "decode": stats.decode_seconds,
            "tokens": stats.num_completion_tokens,
        }
        return times, groups

    first, _ = once(0)
    runs = []
    for number in range(1, 4):
        times, groups = once(number)
        runs.append(times)
    out |= {"first": first, "runs": runs, **memory()}
    stats = engine.stats
    best = min(runs, key=lambda times: times["rollout"])
    out["tokens/s"] = best["tokens"] / best["rollout"]
    out["best seconds"] = min(times.get("step", times["rollout"]) for times in runs)
    out["ms a step"] = 1e3 * best["decode"] / max(1, stats.num_decode_steps)
    out["mean rows"] = stats.mean_rows
    out["preemptions"] = stats.num_preemptions
    out["recomputed tokens"] = stats.num_recomputed_tokens
    if row.kind == "prefill":
        out["prompt tokens/s"] = num_prompts * prompt_tokens / best["rollout"]
    elif row.kind != "ragged":
        limit = seconds_a_step(
            model,
            num_prompts * samples,
            prompt_tokens + output / 2,
            ceilings["bandwidth"],
            ceilings["matmul"],
        )
        out["limit tokens/s"] = num_prompts * samples / limit
        out["share of limit"] = out["tokens/s"] / out["limit tokens/s"]
    out["graphs"] = asdict(engine.graph_stats)
    if row.kind != "prefill":
        out["mismatch"] = mismatch(model, groups)
    return out


def environment() -> dict[str, str]:
    import triton

    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", action="store_true", help="measure the row in this process")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(ROWS))
        return
    if arguments.one:
        run_all(arguments.rows, arguments.output)
        return
    result: dict[str, Any] = {"environment": environment(), "rows": {}}
    chosen = arguments.rows or list(ROWS)
    for _, group in itertools.groupby(chosen, key=lambda name: process_of(ROWS[name])):
        names = list(group)
        part = arguments.output.with_suffix(".part")
        part.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.rollouts", str(part), *names, "--one"]
        done = subprocess.run(command, capture_output=True, text=True)
        found = json.loads(part.read_text()) if part.exists() else {}
        for name in names:
            missing = {"failed": done.stderr[-3000:]}
            row = asdict(ROWS[name]) | found.get(name, missing)
            print(told(name, row), flush=True)
            result["rows"][name] = row
        arguments.output.write_text(json.dumps(result, indent=1))
    part.unlink(missing_ok=True)


def process_of(row: Row) -> tuple[object, ...]:
    """Rows of which this is equal share a process."""
    return row.model, row.quantization, row.lora_rank, row.cap_gib, row.kind == "step"


def told(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name}: FAILED\n{row['failed'][-1500:]}"
    gap = row.get("mismatch", {"mean": 0.0, "kl": 0.0})
    return (
        f"{name}: {row['tokens/s']:,.0f} tok/s, best {row['best seconds']:.3f} s of "
        f"{[round(times.get('step', times['rollout']), 3) for times in row['runs']]}, "
        f"{row['ms a step']:.2f} ms a step, share {row.get('share of limit', 0):.0%}, "
        f"rows {row['mean rows']:.1f}, recomputed {row['recomputed tokens']}, "
        f"reserved {row['peak reserved GiB']:.2f} GiB, "
        f"beside {row['device used - reserved GiB']:.2f}, "
        f"mismatch {gap['mean']:.4f} kl {gap['kl']:.1e}, graphs {row['graphs']}"
        f", first {row['first']['rollout']:.1f} s"
        + (f", prompt {row['prompt tokens/s']:,.0f} tok/s" if "prompt tokens/s" in row else "")
    )


if __name__ == "__main__":
    main()
