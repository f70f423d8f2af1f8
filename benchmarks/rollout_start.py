"""The rollout engine's start, its graphs' memory, and what a launch costs, on a GPU.

    python -m benchmarks.rollout_start OUTPUT.json [--model qwen2.5-7b] [--quantization nf4]

Two processes, one after the other: the first with an empty folder for compiled kernels (cold), the
second with the folder that the first has filled (warm). In each the weights are made first. Then:

start: seconds to make an engine and write 4 x 8 completions of 32 tokens; and to write a rollout in
every bucket of rows up to 256 and of context up to 1,024 tokens, so that every graph is captured.
memory: what the device has used more than before, without the pool of keys and values, after the
allocator has given back what it does not need; and of it the graphs' own pool.
launches (warm): kernels of one decode step, from a profile of replayed graphs; milliseconds a step
without a profiler; the kernels' own time; gaps between two kernels of more than 10 us, by burst.

--tiny: a miniature on a CPU, which has no graphs and no launches: it shows that the rest runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollouts import GIB, environment, synchronize
from benchmarks.shapes import build
from sparring.models.transformer import Decoder, kv_bytes_per_token
from sparring.rollout.cuda_graph import MIN_CONTEXT, context_bucket, row_bucket
from sparring.rollout.engine import Engine
from sparring.rollout.sampler import Sampling
from sparring.types import Prompt

GAP_US = 10.0


def prompts_of(model: Decoder, count: int, tokens: int) -> list[Prompt]:
    generator = torch.Generator().manual_seed(count * tokens)
    high = model.config.vocab_size - 100
    return [
        Prompt(
            id=i,
            text="",
            token_ids=tuple(torch.randint(high, (tokens,), generator=generator).tolist()),
        )
        for i in range(count)
    ]


def write(engine: Engine, count: int, samples: int, tokens: int, new: int) -> float:
    """Seconds of a rollout of `count` prompts of `tokens` tokens, `new` tokens a completion."""
    prompts = prompts_of(engine.model, count, tokens)
    synchronize()
    started = time.perf_counter()
    engine.generate(prompts, Sampling(max_completion_tokens=new), num_samples=samples)
    synchronize()
    return time.perf_counter() - started


def buckets(max_rows: int, max_tokens: int) -> list[tuple[int, int]]:
    """Every pair of rows and context that graphs are captured for, the largest first."""
    rows = {row_bucket(n, max_rows) for n in range(1, max_rows + 1)}
    contexts = {context_bucket(n, max_tokens) for n in range(1, max_tokens + 1)}
    return [(r, c) for c in sorted(contexts, reverse=True) for r in sorted(rows, reverse=True)]


def used_bytes() -> int:
    """Bytes of the device in use, by whatever, after the allocator has given back what it can."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def reserved_bytes() -> int:
    """Bytes that this process's allocator holds; other processes do not change it."""
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0


def measure(
    name: str, quantization: str, max_rows: int, max_tokens: int, *, counts_launches: bool
) -> dict[str, Any]:
    """Start, memory and launches of a model of that shape, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(name, quantization=quantization, device=device)
    before, reserved = used_bytes(), reserved_bytes()
    started = time.perf_counter()
    engine = Engine(
        model,
        kv_bytes=(max_rows + 1) * (max_tokens + 64) * kv_bytes_per_token(model.config, model.dtype),
        stop_ids=(),
        decode=lambda _: "",
        max_tokens=max_tokens,
        max_running=max_rows,
    )
    making = time.perf_counter() - started
    prompt = max_tokens // 4
    first = write(engine, max(1, max_rows // 64), 8, prompt, max(2, max_tokens // 32))
    every = 0.0
    for rows, context in buckets(max_rows, max_tokens):
        shortest = 1 if context == MIN_CONTEXT else context // 2 + 1
        every += write(engine, 1, rows, shortest, 3)
    pool = engine.num_blocks * engine.block_bytes
    stats = engine.graph_stats
    return {
        "first rollout seconds": making + first,
        "every bucket seconds": every,
        "start seconds": making + first + every,
        "capture seconds": stats.seconds,
        "graphs": asdict(stats),
        "keys and values GiB": pool / GIB,
        "graphs and workspaces GiB": (used_bytes() - before - pool) / GIB,
        "of it reserved GiB": (reserved_bytes() - reserved - pool) / GIB,
        "launches": {
            str(rows): launches(engine, rows, prompt, max_tokens // 8)
            for rows in (1, 8, 32, 128)
            if rows <= max_rows and counts_launches
        },
    }


def launches(engine: Engine, rows: int, prompt: int, new: int) -> dict[str, float]:
    """Milliseconds of a decode step of so many rows and, on a GPU, its kernels."""
    short = new // 2
    write(engine, 1, rows, prompt, new)
    times = {n: min(write(engine, 1, rows, prompt, n) for _ in range(3)) for n in (short, new)}
    step = (times[new] - times[short]) / (new - short)
    found = {"ms a step": 1e3 * step}
    if torch.cuda.is_available():
        kernels = profiled(engine, rows, prompt, new)
        steps = new - 1
        number = len(kernels) / steps  # those of the one prefill are few beside them
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(kernels)]
        long = [gap for gap in gaps if gap > GAP_US]
        found |= {
            "launches a step": number,
            "launches a layer": number / engine.model.config.num_layers,
            "us a launch": 1e6 * step / number,
            "ms of kernels a step": sum(end - start for start, end in kernels) / steps / 1e3,
            "gaps over 10 us": len(long),
            "ms of gaps a burst": sum(long) / 1e3 / max(1, steps / 16),
        }
    return found


def profiled(engine: Engine, rows: int, prompt: int, new: int) -> list[tuple[float, float]]:
    """Start and end, in us, of every kernel of a rollout, in order."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        write(engine, 1, rows, prompt, new)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and "Mem" not in event.name
    ]
    return sorted(spans)


def told(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"{name}: FAILED {found['failed']}"
    lines = [
        f"{name}: start {found['start seconds']:.1f} s (first rollout "
        f"{found['first rollout seconds']:.1f}, every bucket {found['every bucket seconds']:.1f}); "
        f"{found['graphs']['num_graphs']} graphs, pool {found['graphs']['num_bytes'] / GIB:.3f} "
        f"GiB, graphs and workspaces {found['graphs and workspaces GiB']:.3f} GiB, of it reserved "
        f"{found['of it reserved GiB']:.3f}"
    ]
    for rows, values in found["launches"].items():
        told_values = ", ".join(f"{key} {value:.3f}" for key, value in values.items())
        lines.append(f"  {rows} rows: {told_values}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--launches", action="store_true", help="with --one: count them too")
    parser.add_argument("--one", action="store_true", help="measure in this process")
    arguments = parser.parse_args()
    name, size = ("tiny", (16, 64)) if arguments.tiny else (arguments.model, (256, 1024))
    if arguments.one:
        found = measure(name, arguments.quantization, *size, counts_launches=arguments.launches)
        arguments.output.write_text(json.dumps(found, indent=1))
        return
    result: dict[str, Any] = {
        "environment": environment(),
        "model": name,
        "quantization": arguments.quantization,
    }
    with tempfile.TemporaryDirectory() as folder:
        for start in ("cold", "warm"):
            part = Path(folder) / f"{start}.json"
            command = [
                sys.executable, "-m", "benchmarks.rollout_start", str(part), "--one",
                "--model", arguments.model, "--quantization", arguments.quantization,
                *["--tiny"] * arguments.tiny, *["--launches"] * (start == "warm"),
            ]  # fmt: skip
            environ = {**os.environ, "TRITON_CACHE_DIR": str(Path(folder) / "kernels")}
            done = subprocess.run(command, capture_output=True, text=True, env=environ)
            failed = {"failed": done.stderr[-3000:]}
            result[start] = json.loads(part.read_text()) if part.exists() else failed
            print(told(start, result[start]), flush=True)
            arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
