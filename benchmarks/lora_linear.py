"""LoRA linears over frozen weights against plain cuBLAS on the same bfloat16 matrices (one GPU).

    python benchmarks/lora_linear.py --output docs/benchmarks/lora-linear-h200.json

Per layer of a model: two products x W^T and dy W by cuBLAS; forward and dx of the LoRA layer on the
same matrix; the same with dA and dB; and all of it on NF4. "share" is cuBLAS' time over ours, "nf4
adds" is NF4's time over ours on 16-bit weights. The feed-forward block is measured as a whole as
well, beside cuBLAS' four products with SwiGLU forward and backward between them, because there the
adapters' additions are part of SwiGLU. Inputs rotate through more bytes than L2 holds, B is not
zero. First the results are compared with float64 on a few rows.

Times are the card's, with work queued ahead, as in a training step, whose host runs ahead; "host
ms" is what the host takes to queue one call, and where that is longer, a step made of such calls
alone would wait for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import SHAPES
from sparring.environment import describe_environment
from sparring.kernels.swiglu import swiglu, swiglu_gradients
from sparring.models.blocks import lora_mlp
from sparring.models.linear import Linear
from sparring.models.lora import LoraConfig
from sparring.models.quantised import Quantised

CUDA = torch.device("cuda")
RANK = 16
ROTATION = 2
QUEUED_CYCLES = 60_000_000
"""About 30 ms, longer than the host takes for the calls of a run."""


def layers_of(name: str) -> dict[str, tuple[int, dict[str, int]]]:
    """Name -> inputs and parts of a layer's four fused linears."""
    shape = SHAPES[name]
    width, ffn, heads = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_attention_heads"],
    )
    size = shape.get("head_dim", width // heads)
    queries, keys = heads * size, shape["num_key_value_heads"] * size
    return {
        "qkv": (width, {"q_proj": queries, "k_proj": keys, "v_proj": keys}),
        "o": (queries, {"o_proj": width}),
        "gate_up": (width, {"gate_proj": ffn, "up_proj": ffn}),
        "down": (ffn, {"down_proj": width}),
    }


def make(inputs: int, parts: dict[str, int], *, nf4: bool, trained: bool) -> Linear:
    made = Linear(inputs, parts, bias=False, device=CUDA, dtype=torch.bfloat16, is_quantised=nf4)
    generator = torch.Generator(CUDA).manual_seed(0)
    with torch.no_grad():
        for index, rows in enumerate(made.parts.values()):
            weight = torch.empty(rows.stop - rows.start, inputs, device=CUDA, dtype=torch.bfloat16)
            weight.normal_(0.0, 0.02, generator=generator)
            if isinstance(made.base, Quantised):
                made.base.quantise(index, weight)
            else:
                made.base.weight[rows] = weight
    made.requires_grad_(False)
    config = LoraConfig(rank=RANK)
    made.add_adapter("policy", config, config.targets(), torch.Generator().manual_seed(0))
    adapter = made.adapters["policy"]
    torch.nn.init.normal_(adapter.b, std=0.01, generator=generator)
    adapter.refresh_shadow()
    adapter.requires_grad_(trained)
    return made


def milliseconds(call: Callable[[int], Any], calls: int = 8) -> float:
    """Of one call on the card, the best of three runs of several that are queued ahead."""
    return times(call, calls)[0]


def times(call: Callable[[int], Any], calls: int = 8) -> tuple[float, float]:
    """Milliseconds of one call on the card, and of the host that queues it."""
    for index in range(3):
        call(index)
    best = best_host = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda._sleep(QUEUED_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        started = perf_counter()
        for index in range(calls):
            call(index)
        best_host = min(best_host, 1e3 * (perf_counter() - started) / calls)
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) / calls)
    return best, best_host


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16, generator=generator)


def plain(weight: Tensor, xs: list[Tensor], dys: list[Tensor], i: int) -> None:
    torch.mm(xs[i % ROTATION], weight.T)
    torch.mm(dys[i % ROTATION], weight)


def step(layer: Linear, xs: list[Tensor], dys: list[Tensor], i: int) -> None:
    leaf = xs[i % ROTATION].detach().requires_grad_()
    layer(leaf, "policy").backward(dys[i % ROTATION])


def errors(layer: Linear, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Relative errors against float64 of y and dx, beside those of cuBLAS alone without adapter."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf, "policy")
    y.backward(dy)
    weight, lora = layer.base.dense().double(), layer.adapters["policy"]
    a, b = (matrix.double() for matrix in lora.matrices_used())
    for part in lora.parts.values():
        weight[part.output_rows] += lora.scale * b[part.b_rows] @ a[part.ranks]
    rounded = weight.bfloat16()
    found = {}
    for name, got, merged, left, right in (
        ("y", y, x @ rounded.T, x, weight.T),
        ("dx", leaf.grad, dy @ rounded, dy, weight),
    ):
        want = left.double() @ right
        found[name] = float((got.double() - want).norm() / want.norm())
        found[f"{name} of cuBLAS"] = float((merged.double() - want).norm() / want.norm())
    return found


def measure_layer(inputs: int, parts: dict[str, int], tokens: int) -> dict[str, Any]:
    xs = [normal(tokens, inputs, seed=i) for i in range(ROTATION)]
    dys = [normal(tokens, sum(parts.values()), seed=10 + i) for i in range(ROTATION)]
    found: dict[str, Any] = {}
    for nf4 in (False, True):
        layer = make(inputs, parts, nf4=nf4, trained=False)
        key = "nf4" if nf4 else "bf16"
        found[f"{key} errors"] = errors(layer, xs[0][:256], dys[0][:256])
        if not nf4:
            weight = layer.base.dense()
            found["cublas ms"] = milliseconds(partial(plain, weight, xs, dys))
        found[f"{key} ms"], found[f"{key} host ms"] = times(partial(step, layer, xs, dys))
        layer.adapters["policy"].requires_grad_(True)
        found[f"{key} with dA, dB ms"] = milliseconds(partial(step, layer, xs, dys))
    return found | shares(found)


def shares(found: dict[str, Any]) -> dict[str, float]:
    return {
        "share": found["cublas ms"] / found["bf16 ms"],
        "share with dA, dB": found["cublas ms"] / found["bf16 with dA, dB ms"],
        "nf4 adds": found["nf4 ms"] / found["bf16 ms"] - 1,
    }


def measure(name: str, tokens: int) -> dict[str, Any]:
    rows = {
        layer: measure_layer(inputs, parts, tokens)
        for layer, (inputs, parts) in layers_of(name).items()
    }
    names = [key for key in rows["o"] if key.endswith("ms")]
    total = {key: sum(row[key] for row in rows.values()) for key in names}
    return rows | {"all four": total | shares(total)}


def feed_forward(name: str, tokens: int) -> dict[str, float]:
    """Milliseconds of the feed-forward block, and transient bytes a token in NF4 with all adapters
    trained.
    """
    inputs, parts = layers_of(name)["gate_up"]
    xs = [normal(tokens, inputs, seed=i) for i in range(ROTATION)]
    dys = [normal(tokens, inputs, seed=10 + i) for i in range(ROTATION)]
    found: dict[str, float] = {}
    for nf4 in (False, True):
        gate_up = make(inputs, parts, nf4=nf4, trained=False)
        down = make(parts["up_proj"], {"down_proj": inputs}, nf4=nf4, trained=False)
        block = partial(block_step, gate_up, down, xs, dys)
        key = "nf4" if nf4 else "bf16"
        if not nf4:
            weights = gate_up.base.dense(), down.base.dense()
            found["cublas ms"] = milliseconds(partial(plain_block, *weights, xs, dys), calls=4)
        found[f"{key} ms"], found[f"{key} host ms"] = times(block, calls=4)
        for layer in (gate_up, down):
            layer.adapters["policy"].requires_grad_(True)
        found[f"{key} with dA, dB ms"] = milliseconds(block, calls=4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    block(0)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    memory = {"peak bytes a token": peak / tokens, "3 F 2 bytes": 6 * parts["up_proj"]}
    return found | shares(found) | memory


def block_step(gate_up: Linear, down: Linear, xs: list[Tensor], dys: list[Tensor], i: int) -> None:
    leaf = xs[i % ROTATION].detach().requires_grad_()
    lora_mlp(leaf, gate_up.frozen("policy"), down.frozen("policy")).backward(dys[i % ROTATION])


def plain_block(gate_up: Tensor, down: Tensor, xs: list[Tensor], dys: list[Tensor], i: int) -> None:
    """The block without adapters: cuBLAS and the kernels of swiglu.py."""
    projected = torch.mm(xs[i % ROTATION], gate_up.T)
    with torch.no_grad():
        torch.mm(swiglu(projected), down.T)
    dh = torch.mm(dys[i % ROTATION], down)
    swiglu_gradients(projected, dh)
    torch.mm(projected, gate_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "shape": asked.shape,
        "rank": RANK,
        "environment": describe_environment(),
        "tokens": {},
    }
    for tokens in asked.tokens:
        rows = measure(asked.shape, tokens)
        mlp = feed_forward(asked.shape, tokens)
        result["tokens"][str(tokens)] = {"layers": rows, "feed-forward block": mlp}
        for layer, row in rows.items():
            shown = {key: round(value, 4) for key, value in row.items() if "errors" not in key}
            print(tokens, layer, shown, flush=True)
        print(tokens, "feed-forward", {key: round(value, 3) for key, value in mlp.items()})
    print({key: rows["gate_up"][key] for key in ("bf16 errors", "nf4 errors")})
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
