"""Shared-prompt attention on a GPU: TFLOP/s of our kernel and of torch's varlen flash.

    python benchmarks/attention.py OUTPUT.json [sweep]

Shape of a 7B model's layer (28 query heads, 4 key heads of 128), bf16, random data. Causal rows
count half the pairs of query and key; forward 4 H E pairs, backward 2.5 times that. `sweep` tries
other tiles.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton

from sparring.kernels import capability_of
from sparring.kernels.attention import shared_attention_reference, shared_attention_triton
from sparring.kernels.attention_plan import TILES, SharedPlan

HEADS, KV_HEADS, SIZE = 28, 4, 128
CUDA = torch.device("cuda")


def timed(call: Callable[[], object], repeats: int = 5, inner: int = 4) -> float:
    """Median milliseconds of one call."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(inner):
            call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / inner)
    return statistics.median(times)


def layout(prompt: int, completion: int, group: int, groups: int) -> tuple[list[int], list[int]]:
    """cu_seqlens and parents of groups with shared prompts; prompt 0: plain sequences."""
    bounds, parents = [0], []
    for _ in range(groups):
        parent = -1
        if prompt:
            parent = len(parents)
            parents.append(-1)
            bounds.append(bounds[-1] + prompt)
        for _ in range(group):
            parents.append(parent)
            bounds.append(bounds[-1] + completion)
    return bounds, parents


CASES = {
    "one sequence of 8192": layout(0, 8192, 1, 1),
    "two sequences of 8192": layout(0, 8192, 2, 1),
    "4 x 8, 256 + 768": layout(256, 768, 8, 4),
    "1 x 8, 1024 + 512": layout(1024, 512, 8, 1),
    "1 x 4, 256 + 8192": layout(256, 8192, 4, 1),
}


def pairs(bounds: list[int], parents: list[int]) -> float:
    total = 0.0
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    for length, parent in zip(lengths, parents, strict=True):
        total += length * (length + 1) / 2 + (length * lengths[parent] if parent >= 0 else 0)
    return total


def inputs(num_tokens: int, kv_heads: int = KV_HEADS) -> list[torch.Tensor]:
    shapes = [(num_tokens, HEADS, SIZE)] + [(num_tokens, kv_heads, SIZE)] * 2
    return [torch.randn(s, device=CUDA).bfloat16().requires_grad_() for s in shapes]


def both(function: Callable, x: list[torch.Tensor], flop: float) -> dict[str, float]:
    out = function(*x)
    grad = torch.randn_like(out)
    with torch.no_grad():
        forward = timed(lambda: function(*x))
    backward = timed(lambda: torch.autograd.grad(out, x, grad, retain_graph=True))
    return {
        "forward ms": forward, "forward TFLOP/s": flop / forward / 1e9,
        "backward ms": backward, "backward TFLOP/s": 2.5 * flop / backward / 1e9,
    }  # fmt: skip


def torch_varlen(bounds: list[int]) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    starts = torch.tensor(bounds, dtype=torch.int32, device=CUDA)
    longest = max(b - a for a, b in itertools.pairwise(bounds))

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0))

    return call


def check() -> dict[str, float]:
    bounds, parents = layout(100, 130, 3, 2)
    capability = capability_of(CUDA)
    plan = SharedPlan(bounds, parents, device=CUDA, capability=capability)
    x = inputs(bounds[-1])
    wide = [t.detach().double().requires_grad_() for t in x]
    out, want = shared_attention_triton(*x, plan), shared_attention_reference(*wide, plan)
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, x, grad)
    wanted = torch.autograd.grad(want, wide, grad.double())
    names = ("out", "dq", "dk", "dv")
    errors = {
        name: ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, (out, *got), (want, *wanted), strict=True)
    }
    assert max(errors.values()) < 1e-2, errors
    return errors


def run(name: str) -> dict[str, object]:
    bounds, parents = CASES[name]
    flop = 4.0 * HEADS * SIZE * pairs(bounds, parents)
    plan = SharedPlan(bounds, parents, device=CUDA, capability=capability_of(CUDA))
    row: dict[str, object] = {"case": name}
    x = inputs(bounds[-1])
    row["ours"] = both(lambda q, k, v: shared_attention_triton(q, k, v, plan), x, flop)
    if all(parent < 0 for parent in parents):
        for kv_heads in (KV_HEADS, HEADS):
            key = f"torch varlen, {kv_heads} key heads"
            try:
                row[key] = both(torch_varlen(bounds), inputs(bounds[-1], kv_heads), flop)
            except Exception as problem:  # noqa: BLE001 - a version may refuse unequal heads
                row[key] = repr(problem)[:200]
    return row


TRIED = {
    "forward": [
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3),
        (64, 64, 4, 3), (64, 128, 4, 2),
    ],
    "dq": [
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2),
        (128, 32, 4, 2), (128, 128, 8, 1),
    ],
    "dkv": [
        (32, 64, 8, 2), (32, 64, 4, 2), (32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2),
        (64, 128, 8, 1), (64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 1), (64, 64, 4, 1),
    ],
}  # fmt: skip
"""Rows, keys, warps and stages that `sweep` times."""


def sweep() -> list[dict[str, object]]:
    """Other tiles at 8192 tokens, head size 128; the best stays for what follows."""
    bounds, parents = CASES["one sequence of 8192"]
    flop = 4.0 * HEADS * SIZE * pairs(bounds, parents)
    x, rows = inputs(bounds[-1]), []
    for which, tried in TRIED.items():
        key = ("227 KiB", 128, which)
        best = (0.0, TILES[key])
        for tile in tried:
            names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
            TILES[key] = dict(zip(names, tile, strict=True))
            plan = SharedPlan(bounds, parents, device=CUDA, capability=capability_of(CUDA))
            row: dict[str, object] = {"pass": which, **TILES[key]}
            try:
                figures = both(lambda q, k, v, p=plan: shared_attention_triton(q, k, v, p), x, flop)
            except Exception as problem:  # noqa: BLE001 - too much shared memory, say
                rows.append({**row, "failed": repr(problem)[:80]})
                continue
            name = "forward" if which == "forward" else "backward"
            rate = figures[f"{name} TFLOP/s"]
            rows.append({**row, "TFLOP/s of the pass": rate})
            best = max(best, (rate, TILES[key]), key=lambda pair: pair[0])
        TILES[key] = best[1]
        print(which, best, flush=True)
    return rows


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "errors": check(),
    }  # fmt: skip
    print(result, flush=True)
    rows = [run(name) for name in CASES]
    result["rows"] = rows
    for row in rows:
        print(json.dumps(row), flush=True)
    if "sweep" in sys.argv:
        result["sweep"] = sweep()
        for line in result["sweep"]:
            print(line)
        result["rows after the sweep"] = [run(name) for name in CASES]
        for row in result["rows after the sweep"]:
            print(json.dumps(row), flush=True)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
