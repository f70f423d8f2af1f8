"""The training phase of a GRPO step on a GPU: seconds, peak memory, utilisation.

    python benchmarks/training_phase.py OUTPUT.json [ROW ...] [--profile] [--list]

Random weights of real shapes, LoRA of rank 16 on q, k, v and o with B drawn non-zero, distinct
prompts, advantages drawn non-zero. A phase is groups on the host to adapters updated: packing,
forward, backward, clipping and the optimizer. Peak is the allocator's largest reserved memory
since the weights are in place, with expandable segments, as runs have them. Three phases after one
to warm up; all are reported. Rows that end
in "plan" take the fastest settings that `sparring plan` finds for the whole step under their cap,
and must not take more memory than it says.

Under a cap of N GiB the allocator gets N - 1.0 GiB before its first allocation, and a row fails
where the device then holds more than 1.0 GiB beside what the allocator reserved. Rows with the same
model and cap share a process; other rows have processes of their own.

FLOP: P linear parameters, T rows, M rows of the head: 4 P T + 4 M D V + 3.5 times attention's
forward (4 H E a pair of query and key). MFU counts those; the hardware's utilisation also what
checkpointing computes again: 2 P T less the down projection, and attention unless it is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from shapes import ATTENTION, SHAPES, build

from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.environment import describe_environment
from sparring.models.checkpoint import family_of
from sparring.models.transformer import Decoder
from sparring.train.cards import find_card
from sparring.train.optimizer import build_optimizer
from sparring.train.plan import propose
from sparring.train.plan_job import Job, Settings, Trained, Work
from sparring.train.step import train_step
from sparring.types import Batch, Group, Prompt, Rollout

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; work: prompts, samples of each, prompt tokens, completion tokens."""

    name: str
    model: str
    quantization: str
    work: tuple[int, int, int, int]
    tokens: int
    checkpointing: str = "layers"
    offload: bool = False
    tile: int = 8192
    share: bool = True
    cap: float = 0.0
    runs: int = 3
    warm_up: tuple[int, int, int, int] | None = None
    plan: bool = False
    planned: dict[str, float] = field(default_factory=dict)
    must: dict[str, float] = field(default_factory=dict)


B7, B15, B06 = "qwen2.5-7b", "qwen2.5-1.5b", "qwen3-0.6b"
MAIN, SHARED, SMALL = (4, 8, 256, 768), (1, 8, 1024, 512), (1, 8, 256, 1024)
LONG, LONGER = (1, 8, 256, 32768), (1, 8, 256, 65536)
TIMES = {"seconds": 2.6, "peak GiB": 10.0}
ROWS = [
    Row(name="7b-nf4", model=B7, quantization="nf4", work=MAIN, tokens=8192, must=TIMES),
    Row(name="7b-nf4-tile4096", model=B7, quantization="nf4", work=MAIN, tokens=8192, tile=4096,
        must=TIMES),
    Row(name="7b-nf4-selective", model=B7, quantization="nf4", work=MAIN, tokens=8192,
        checkpointing="selective", must=TIMES),
    Row(name="7b-nf4-offload", model=B7, quantization="nf4", work=MAIN, tokens=8192,
        checkpointing="selective", offload=True, tile=4096, must=TIMES),
    Row(name="7b-nf4-none", model=B7, quantization="nf4", work=MAIN, tokens=8192,
        checkpointing="none"),
    Row(name="7b-nf4-shared", model=B7, quantization="nf4", work=SHARED, tokens=8192),
    Row(name="7b-nf4-repeated", model=B7, quantization="nf4", work=SHARED, tokens=16384,
        share=False, tile=0),
    Row(name="7b-nf4-24gib", model=B7, quantization="nf4", work=MAIN, tokens=4096,
        checkpointing="none", cap=24.0, must={"seconds": 2.4}),
    Row(name="7b-nf4-24gib-plan", model=B7, quantization="nf4", work=MAIN, tokens=0, cap=24.0,
        plan=True, must={"seconds": 2.4}),
    Row(name="7b-nf4-24gib-32k-plan", model=B7, quantization="nf4", work=LONG, tokens=0, cap=24.0,
        plan=True, runs=1, warm_up=(1, 1, 256, 2048), must={"seconds": 60.0}),
    Row(name="7b-nf4-24gib-64k-plan", model=B7, quantization="nf4", work=LONGER, tokens=0, cap=24.0,
        plan=True, runs=1, warm_up=(1, 1, 256, 2048)),
    Row(name="7b-nf4-24gib-32k", model=B7, quantization="nf4", work=LONG, tokens=33024,
        checkpointing="layers", cap=24.0, runs=1, warm_up=(1, 1, 256, 2048),
        must={"seconds": 60.0}),
    Row(name="7b-nf4-24gib-32k-offload", model=B7, quantization="nf4", work=LONG, tokens=33024,
        checkpointing="selective", offload=True, cap=24.0, runs=1, warm_up=(1, 1, 256, 2048),
        must={"seconds": 60.0}),
    Row(name="7b-nf4-24gib-64k", model=B7, quantization="nf4", work=LONGER, tokens=66048,
        checkpointing="layers", offload=True, cap=24.0, runs=1, warm_up=(1, 1, 256, 2048)),
    Row(name="7b-nf4-24gib-64k-two", model=B7, quantization="nf4", work=(1, 2, 256, 65536),
        tokens=66048, checkpointing="selective", offload=True, cap=24.0, runs=1,
        warm_up=(1, 1, 256, 2048)),
    Row(name="7b-bf16", model=B7, quantization="none", work=MAIN, tokens=8192,
        checkpointing="none", must={"mfu": 0.50}),
    Row(name="7b-bf16-selective", model=B7, quantization="none", work=MAIN, tokens=8192,
        checkpointing="selective", must={"mfu": 0.50}),
    Row(name="7b-bf16-layers", model=B7, quantization="none", work=MAIN, tokens=8192,
        must={"hardware utilisation": 0.65}),
    Row(name="1.5b-nf4-4gib", model=B15, quantization="nf4", work=SMALL, tokens=4400, cap=4.0),
    Row(name="1.5b-nf4-4gib-2048", model=B15, quantization="nf4", work=SMALL, tokens=2048, cap=4.0),
    Row(name="1.5b-nf4-3gib", model=B15, quantization="nf4", work=SMALL, tokens=2400, cap=3.0),
    Row(name="1.5b-nf4-4gib-plan", model=B15, quantization="nf4", work=SMALL, tokens=0, cap=4.0,
        plan=True),
    Row(name="1.5b-nf4-3gib-plan", model=B15, quantization="nf4", work=SMALL, tokens=0, cap=3.0,
        plan=True),
    Row(name="0.6b-16k", model=B06, quantization="none", work=(1, 1, 1, 16384), tokens=16384,
        must={"tokens a second": 28000.0}),
    Row(name="0.6b-16k-selective", model=B06, quantization="none", work=(1, 1, 1, 16384),
        tokens=16384, checkpointing="selective", must={"tokens a second": 28000.0}),
    Row(name="tiny", model="tiny", quantization="nf4", work=(2, 4, 16, 32), tokens=128,
        checkpointing="selective", tile=64),
]  # fmt: skip
SHOWN = (
    "name", "tokens", "checkpointing", "offload", "planned", "all seconds", "peak GiB",
    "peak allocated GiB", "device used GiB", "beside GiB",
    "tokens a second", "mfu", "hardware utilisation", "missed",
)  # fmt: skip
AT_MOST = ("seconds", "peak GiB")


def groups(work: Sequence[int], vocab_size: int) -> list[Group]:
    """Random prompts and completions of fixed lengths."""
    prompts, size, prompt_tokens, completion_tokens = work
    found = []
    for number in range(prompts):
        ids = tuple(torch.randint(10, vocab_size - 10, (prompt_tokens,)).tolist())
        prompt = Prompt(id=number, token_ids=ids, text="")
        rollouts = tuple(
            Rollout(
                prompt=prompt, sample_index=i,
                token_ids=torch.randint(10, vocab_size - 10, (completion_tokens,)),
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


def pairs_of(batch: Batch) -> int:
    """Pairs of query and key that attention sees."""
    lengths = [
        b - a for a, b in zip(batch.layout.cu_seqlens, batch.layout.cu_seqlens[1:], strict=False)
    ]
    return sum(
        n * (n + 1) // 2 + (n * lengths[parent] if parent >= 0 else 0)
        for n, parent in zip(lengths, batch.layout.parents, strict=True)
    )


def count_flop(model: Decoder, batches: Sequence[Batch], checkpointing: str) -> tuple[float, float]:
    """FLOP of the mathematics, and those that are computed."""
    config = model.config
    linear = sum(module.base.shape[0] * module.base.shape[1] for module in model.linears().values())
    down = config.num_layers * config.width * config.ffn_width
    tokens = sum(len(batch.input_ids_T) for batch in batches)
    rows = sum(int(batch.loss_mask_T.sum()) for batch in batches)
    pairs = sum(map(pairs_of, batches))
    attention = 4.0 * config.num_heads * config.head_size * pairs * config.num_layers
    needed = 4.0 * linear * tokens + 4.0 * rows * config.width * config.vocab_size + 3.5 * attention
    again = {"none": 0.0, "layers": attention, "selective": 0.0}[checkpointing]
    if checkpointing != "none":
        again += 2.0 * (linear - down) * tokens
    return needed, needed + again


def measure(model: Decoder, row: Row, ceiling: float) -> dict[str, Any]:
    """Seconds of the row's phases, the peak of memory and what follows from them."""
    device = model.device
    model.set_checkpointing(row.checkpointing, offload=row.offload, mlp_tile_tokens=row.tile)
    optimizer = build_optimizer(
        model.trainable_parameters(), learning_rate=1e-5, num_steps=10, compute_dtype=model.dtype
    )

    def phase(work: tuple[int, int, int, int]) -> tuple[float, list[Batch]]:
        made = groups(work, model.config.vocab_size)
        advantages = [torch.randn(work[1]) + 0.1 for _ in made]
        synchronize(device)
        start = time.perf_counter()
        batches = pack_groups(
            made, advantages, max_tokens=row.tokens, temperature=1.0, share_prompts=row.share
        )
        train_step(model, batches, dapo, optimizer, max_grad_norm=1.0)
        synchronize(device)
        return time.perf_counter() - start, batches

    reset_peak(device)
    weights = allocated(device)
    first, _ = phase(row.warm_up or row.work)
    seconds, batches = [], []
    for _ in range(row.runs):
        took, batches = phase(row.work)
        seconds.append(took)
    needed, computed = count_flop(model, batches, row.checkpointing)
    best = min(seconds)
    found: dict[str, Any] = {
        "first seconds": first, "seconds": best, "all seconds": seconds,
        "micro-batches": [len(batch.input_ids_T) for batch in batches],
        "tokens a second": sum(len(batch.input_ids_T) for batch in batches) / best,
        "TFLOP": needed / 1e12, "weights GiB": weights / GIB, **memory(device),
    }  # fmt: skip
    if ceiling:
        found["mfu"] = needed / best / 1e12 / ceiling
        found["hardware utilisation"] = computed / best / 1e12 / ceiling
    return found | verdict(row, found)


def planned(row: Row) -> Row:
    """The row with the settings that plan proposes for the whole step under its cap."""
    shape = SHAPES[row.model]
    model = Trained(
        config=family_of(shape).config(shape), is_quantised=row.quantization == "nf4",
        targets=frozenset(ATTENTION),
    )  # fmt: skip
    prompts, size, prompt_tokens, completion_tokens = row.work
    work = Work(
        prompts=prompts, group_size=size, prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
    )  # fmt: skip
    plan = propose(
        Job(policy=model, work=work), Settings(), budget=int(row.cap * GIB),
        card=find_card("H200"), exact=True,
    )  # fmt: skip
    assert plan.seconds is not None, "a card is named"
    chosen = plan.settings
    return replace(
        row, tokens=chosen.micro_batch_tokens, checkpointing=chosen.checkpointing,
        offload=chosen.offload, tile=chosen.mlp_tile_tokens,
        planned={"peak GiB": plan.training.reserved / GIB, "seconds": plan.seconds.training},
    )  # fmt: skip


def verdict(row: Row, found: dict[str, Any]) -> dict[str, Any]:
    """Whether the row keeps to its cap and reaches what it must."""
    missed = [
        f"{key} {found[key]:.3g}, must be {limit:g}"
        for key, limit in row.must.items()
        if key in found and (found[key] > limit if key in AT_MOST else found[key] < limit)
    ]
    if row.planned and found["peak GiB"] > row.planned["peak GiB"]:
        missed.append(f"peak {found['peak GiB']:.2f} GiB, planned {row.planned['peak GiB']:.2f}")
    if row.cap and found["beside GiB"] > 1.0:
        missed.append(f"{found['beside GiB']:.2f} GiB beside the allocator's, at most 1.0 allowed")
    return {"missed": missed}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def memory(device: torch.device) -> dict[str, float]:
    """Peaks in GiB, what the device holds now, and how much of that is not the allocator's."""
    if device.type != "cuda":
        return dict.fromkeys(
            ("peak GiB", "peak allocated GiB", "device used GiB", "beside GiB"), 0.0
        )
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / GIB
    return {
        "peak GiB": torch.cuda.max_memory_reserved() / GIB,
        "peak allocated GiB": torch.cuda.max_memory_allocated() / GIB,
        "device used GiB": used,
        "beside GiB": used - torch.cuda.memory_reserved() / GIB,
    }


def matmul_ceiling() -> float:
    """TFLOP/s of a bf16 product of 8192 cubed, random inputs."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(4):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            a @ b
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 10)
    return 2 * 8192**3 / min(times) / 1e9


def profile(model: Decoder, row: Row) -> str:
    """Tables of what one step of one prompt takes, by the host's time and by the device's."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    made = groups((1, *row.work[1:]), model.config.vocab_size)
    batches = pack_groups(made, [torch.ones(row.work[1])], max_tokens=row.tokens, temperature=1.0)[
        :1
    ]
    optimizer = build_optimizer(model.trainable_parameters(), learning_rate=1e-5, num_steps=10)
    train_step(model, batches, dapo, optimizer)
    kinds = [ProfilerActivity.CPU]
    kinds += [ProfilerActivity.CUDA] if model.device.type == "cuda" else []
    start = time.perf_counter()
    with record(activities=kinds) as recorded:
        train_step(model, batches, dapo, optimizer)
        synchronize(model.device)
    text = (
        f"one micro-batch of {row.name}: {time.perf_counter() - start:.3f} s under the profiler\n"
    )
    for key in ["self_cpu_time_total", "self_cuda_time_total"][: len(kinds)]:
        text += recorded.key_averages().table(sort_by=key, row_limit=30, max_name_column_width=55)
    return text


def run(rows: Sequence[Row], profiled: bool) -> Iterator[dict[str, Any]]:
    """Rows of one model and cap, in this process."""
    torch.manual_seed(0)
    has_gpu = torch.cuda.is_available()
    ceiling = 0.0
    if has_gpu:  # as every run on a GPU does (train/plan_recipe.py)
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    rows = [planned(row) if row.plan else row for row in rows]
    if has_gpu and rows[0].cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((rows[0].cap - 1.0) * GIB / total)
    elif has_gpu:
        ceiling = matmul_ceiling()
    start = time.perf_counter()
    model = build(
        rows[0].model, quantization=rows[0].quantization, device="cuda" if has_gpu else "cpu"
    )
    built = time.perf_counter() - start
    for row in rows:
        line: dict[str, Any] = asdict(row) | {"seconds to build": built, "ceiling TFLOP/s": ceiling}
        try:
            line |= measure(model, row, ceiling)
        except (RuntimeError, AssertionError) as problem:  # one row must not lose the others
            line |= {"missed": [f"failed: {repr(problem)[:400]}"]}
        model.zero_grad()
        yield line
        if profiled:
            print(profile(model, row), file=sys.stderr, flush=True)


def kind(row: Row) -> tuple[str, str, float, bool]:
    return row.model, row.quantization, row.cap, row.plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?")
    parser.add_argument("rows", nargs="*", help="names; all but tiny by default")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--here", action="store_true", help="in this process; rows of one kind")
    given = parser.parse_args()
    known = {row.name: row for row in ROWS}
    if given.list or not given.output:
        print("\n".join(known))
        return
    if unknown := [name for name in given.rows if name not in known]:
        parser.error(f"no row called {', '.join(unknown)}; rows: {', '.join(known)}")
    chosen = [known[name] for name in given.rows] or [row for row in ROWS if row.name != "tiny"]
    lines: list[dict[str, Any]] = []
    result = {"date": time.strftime("%Y-%m-%d"), "environment": describe_environment()}
    if given.here:
        for line in run(chosen, given.profile):
            lines.append(line)
            Path(given.output).write_text(json.dumps(lines))
        return
    for _, some in groupby(sorted(chosen, key=kind), key=kind):
        names = [row.name for row in some]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, __file__, str(file), *names, "--here"]
            done = subprocess.run([*command, *["--profile"] * given.profile], check=False)
            lines += json.loads(file.read_text()) if file.exists() else []
        if done.returncode:
            lines.append({"name": ", ".join(names), "missed": [f"exit code {done.returncode}"]})
        for line in lines[-len(names) :]:
            print({key: line[key] for key in SHOWN if key in line}, flush=True)
        Path(given.output).write_text(json.dumps(result | {"rows": lines}, indent=1))


if __name__ == "__main__":
    assert {row.model for row in ROWS} <= set(SHAPES), "rows name shapes that exist"
    main()
