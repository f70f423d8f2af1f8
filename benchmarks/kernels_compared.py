"""Each kernel of the training pass against torch eager, torch.compile, Liger and bitsandbytes.

    python benchmarks/kernels_compared.py OUTPUT.json

Forward and backward pass together, at the shapes of a 7B model in bf16: RMSNorm alone and with a
residual (frozen weight, and trained), rotary embedding of 32 heads, SwiGLU, and the frozen output
head (log-probability of a label; the others also materialise their logits); decoding an NF4 matrix
is forward only. Attention is in attention.py, products in nf4_matmul.py. Inputs are random, larger
than the L2 cache and used in turn; times are medians over replays of a CUDA graph of six passes, so
they are the device's and no host's launches; compile time is apart. A peer that cannot be imported
is reported as absent.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.environment import describe_environment
from sparring.kernels import capability_of
from sparring.kernels.head import linear_logprob
from sparring.kernels.nf4 import dequantize_nf4, quantize_nf4
from sparring.kernels.norm import add_rms_norm, rms_norm
from sparring.kernels.rope import rope
from sparring.kernels.swiglu import swiglu
from sparring.models.transformer import HEAD_CHUNK_ROWS

ROWS, HEAD_ROWS, WIDTH, FFN, VOCABULARY, HEADS = 16384, 4096, 3584, 18944, 152064, 32
CUDA = torch.device("cuda")
Function = Callable[..., Any]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=torch.bfloat16) * scale


def both(function: Function, inputs: list[Any], grads: list[Tensor]) -> None:
    """One forward and one backward pass; without gradients of outputs the forward pass alone."""
    if not grads:
        function(*inputs)
        return
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs[: len(grads)], [g.to(outputs[0].dtype) for g in grads])


def milliseconds(function: Function, sets: list[tuple[list[Any], list[Tensor]]]) -> float:
    """Median time of one pass of `both`, the sets of inputs in turn.

    The passes are captured in a CUDA graph, so the device is timed and nobody's launches.
    """
    calls = (sets * 6)[:6]

    def all_of_them() -> None:
        for inputs, grads in calls:
            both(function, inputs, grads)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        all_of_them()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    graph.replay()
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls))
    return statistics.median(times)


def hf_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def hf_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return x * torch.cat((cos, cos), -1)[:, None].to(x.dtype) + turned * torch.cat((sin, sin), -1)[
        :, None
    ].to(x.dtype)


def hf_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def hf_logprob(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(x, weight).float()
    return logits.gather(1, labels[:, None]).squeeze(1) - logits.logsumexp(-1)


def liger(module: str, name: str) -> Any:
    """Something of Liger's, or None where it is not installed."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.{module}"), name)
    except ImportError:
        return None


def cases() -> dict[str, tuple[Function, Function, Function | None, list[Any]]]:
    """Name -> ours, torch's, Liger's, sets of inputs and output gradients."""
    weight, vocabulary = normal(WIDTH), normal(VOCABULARY, WIDTH, scale=0.02)
    angles = torch.rand(ROWS, 64, device=CUDA) * 6
    cos, sin = angles.cos(), angles.sin()
    labels = torch.randint(VOCABULARY, (HEAD_ROWS,), device=CUDA)
    capability = capability_of(CUDA)
    assert capability.tensor_dots, "the comparison is made on cards with 16-bit tensor cores"

    def sets(count: int, *shapes: tuple[int, ...], outputs: tuple[tuple[int, ...], ...]) -> Any:
        return [([normal(*s) for s in shapes], [normal(*s) for s in outputs]) for _ in range(count)]

    row = (ROWS, WIDTH)
    norm_function = liger("ops.rms_norm", "LigerRMSNormFunction")
    silu_function = liger("ops.swiglu", "LigerSiLUMulFunction")
    return {
        "rms_norm": (
            lambda x: rms_norm(x, weight, 1e-6),
            lambda x: hf_norm(x, weight),
            norm_function and (lambda x: norm_function.apply(x, weight, 1e-6, 0.0, "llama", False)),
            sets(3, row, outputs=(row,)),
        ),
        "add_rms_norm": (
            lambda x, r: add_rms_norm(x, r, weight, 1e-6),
            lambda x, r: (hf_norm(x + r, weight), x + r),
            None,
            sets(3, row, row, outputs=(row, row)),
        ),
        "rms_norm, trained weight": (
            lambda x, w: rms_norm(x, w, 1e-6),
            hf_norm,
            norm_function and (lambda x, w: norm_function.apply(x, w, 1e-6, 0.0, "llama", False)),
            sets(3, row, (WIDTH,), outputs=(row,)),
        ),
        "rope": (
            lambda x: rope(x, cos, sin),
            lambda x: hf_rope(x, cos, sin),
            None,
            sets(3, (ROWS, HEADS, 128), outputs=((ROWS, HEADS, 128),)),
        ),
        "swiglu": (
            swiglu,
            hf_swiglu,
            silu_function and (lambda x: silu_function.apply(*x.chunk(2, -1))),
            sets(2, (ROWS, 2 * FFN), outputs=((ROWS, FFN),)),
        ),
        "frozen head": (
            lambda x: linear_logprob(x, vocabulary, labels, chunk_rows=HEAD_CHUNK_ROWS)[0],
            lambda x: hf_logprob(x, vocabulary, labels),
            None,
            sets(2, (HEAD_ROWS, WIDTH), outputs=((HEAD_ROWS,),)),
        ),
    }


def decoding() -> dict[str, Any]:
    """Decoding a 7B's gate_up from NF4 with double quantisation, and bitsandbytes' time."""
    matrices = [quantize_nf4(normal(2 * FFN, WIDTH, scale=0.02)) for _ in range(2)]
    out = torch.empty(2 * FFN, WIDTH, device=CUDA, dtype=torch.bfloat16)
    row: dict[str, Any] = {"kernel": "NF4 decoding"}
    row["ours ms"] = milliseconds(
        lambda index: dequantize_nf4(matrices[index], out=out), [([0], []), ([1], [])]
    )
    try:
        row["bitsandbytes ms"] = bitsandbytes_decoding(out)
    except Exception as problem:  # noqa: BLE001 - a peer's failure is a result too
        return row | {"bitsandbytes ms": f"failed: {repr(problem)[:200]}"}
    return row | {"best peer / ours": row["bitsandbytes ms"] / row["ours ms"]}


def bitsandbytes_decoding(out: Tensor) -> float:
    """Milliseconds that bitsandbytes takes for matrices of out's shape."""
    from bitsandbytes import functional as peer

    packed = [
        peer.quantize_4bit(
            normal(*out.shape, scale=0.02), quant_type="nf4", compress_statistics=True
        )
        for _ in range(2)
    ]
    return milliseconds(
        lambda index: peer.dequantize_4bit(*packed[index], out=out), [([0], []), ([1], [])]
    )


def main() -> None:
    torch.manual_seed(0)
    rows = [decoding()]
    print(rows[0], flush=True)
    for name, (ours, eager, ligers, sets) in cases().items():
        row: dict[str, Any] = {"kernel": name, "liger ms": "absent" if ligers is None else None}
        start = time.perf_counter()
        compiled = torch.compile(eager, dynamic=False)
        arms = {"ours": ours, "eager": eager, "compiled": compiled}
        arms |= {} if ligers is None else {"liger": ligers}
        for arm, function in arms.items():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                row[f"{arm} ms"] = milliseconds(function, sets)
                row[f"{arm} GiB"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            except Exception as problem:  # noqa: BLE001 - a peer's failure is a result too
                row[f"{arm} ms"] = f"failed: {repr(problem)[:200]}"
        times = {arm: row[f"{arm} ms"] for arm in arms}
        peers = [ms for arm, ms in times.items() if arm != "ours" and isinstance(ms, float)]
        if peers and isinstance(times["ours"], float):
            row["best peer / ours"] = min(peers) / times["ours"]
        row["seconds with compiling"] = time.perf_counter() - start
        rows.append(row)
        print(row, flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "environment": describe_environment()}
    with open(sys.argv[1], "w") as file:
        json.dump(result | {"rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
