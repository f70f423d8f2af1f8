"""Kernels on a GPU: right first (float64), then time, as JSON.

    python benchmarks/kernels.py OUTPUT.json

Ceilings (a copy, a matrix product), then each kernel at the shapes of a 7B model (D 3584, F 18944,
V 152064), 16,384 rows. Bandwidth-bound kernels rotate among inputs larger than the L2 cache; data
is random. Times are medians of CUDA events; shares are of the ceilings measured in the same run.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import triton

from sparring.kernels import head, nf4, norm, rope, swiglu

ROWS, WIDTH, FFN, VOCABULARY = 16384, 3584, 18944, 152064
CUDA = torch.device("cuda")


def timed(calls: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median milliseconds of one call; the list is gone through in turn.

    Short calls are captured, twelve of them, in a CUDA graph: what is timed is the device, not how
    fast the host launches.
    """
    many = (calls * 12)[:12] if repeats > 10 else calls
    for call in many:
        call()
    torch.cuda.synchronize()

    def all_of_them() -> None:
        for call in many:
            call()

    run = all_of_them
    if repeats > 10:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            all_of_them()
        run = graph.replay
        run()
    times = []
    for _ in range(max(3, repeats // len(many) * 2)):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(many))
    return statistics.median(times)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=CUDA, dtype=torch.float32) * scale).to(dtype)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def gradient(function: Callable, x: torch.Tensor, grad: torch.Tensor) -> tuple:
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(grad.to(y.dtype))
    return y.detach(), leaf.grad


def check() -> dict[str, float]:
    """Relative errors against float64; bits where bits are promised."""
    out: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        weight = normal(256, dtype=dtype)
        cos, sin = normal(33, 64, dtype=torch.float32), normal(33, 64, dtype=torch.float32)
        vocabulary = normal(5003, 256, dtype=dtype, scale=0.2)
        labels = torch.randint(5003, (37,), device=CUDA)
        cases = {
            "norm": (
                lambda x, w=weight: norm.rms_norm_triton(x, w, 1e-6),
                lambda x, w=weight: norm.rms_norm_reference(x, w.double(), 1e-6),
                normal(37, 256, dtype=dtype),
            ),
            "rope": (
                lambda x, c=cos, s=sin: rope.rope_triton(x, c, s),
                lambda x, c=cos, s=sin: rope.rope_reference(x, c, s),
                normal(33, 7, 128, dtype=dtype),
            ),
            "swiglu": (swiglu.swiglu_triton, swiglu.swiglu_reference, normal(9, 3000, dtype=dtype)),
            "head": (
                lambda x, w=vocabulary, y=labels: head.linear_logprob_triton(
                    x, w, y, chunk_rows=16
                ),
                lambda x, w=vocabulary, y=labels: head.linear_logprob_reference(x, w.double(), y),
                normal(37, 256, dtype=dtype),
            ),
        }
        for kernel, (ours, reference, x) in cases.items():
            y = ours(x)
            y = y[0] if isinstance(y, tuple) else y
            grad = torch.randn_like(y.float())
            got, got_grad = gradient(ours, x, grad)
            again, again_grad = gradient(ours, x, grad)
            want, want_grad = gradient(reference, x.double(), grad.double())
            assert torch.equal(got, again), f"{kernel}: bits"
            assert torch.equal(got_grad, again_grad), f"{kernel}: bits of the gradient"
            out[f"{kernel} {name}"] = error(got, want)
            out[f"{kernel} {name} gradient"] = error(got_grad, want_grad)
            assert error(got_grad, want_grad) < 1e-2, (kernel, name, error(got_grad, want_grad))
        matrix = nf4.quantize_nf4(normal(1000, 3584, dtype=dtype, scale=0.02))
        for target in (torch.bfloat16, torch.float16, torch.float32):
            want = nf4.dequantize_nf4_reference(matrix, dtype=target)
            got = nf4.dequantize_nf4_triton(matrix, dtype=target)
            out[f"nf4 {name} to {target} wrong"] = (got != want).sum().item()
    return out


def bandwidth(copy_gbs: float, name: str, num_bytes: float, calls: list) -> dict[str, object]:
    ms = timed(calls)
    rate = num_bytes / ms / 1e6
    return {"what": name, "ms": ms, "GB/s": rate, "share of copy": rate / copy_gbs}


def memory_bound(copy_gbs: float) -> list[dict[str, object]]:
    """Norm, rotation, SwiGLU and NF4 decoding."""
    rows: list[dict[str, object]] = []

    def add(name: str, num_bytes: float, calls: list) -> None:
        try:
            rows.append(bandwidth(copy_gbs, name, num_bytes, calls))
        except Exception as problem:  # noqa: BLE001 - one failure must not lose the other rows
            rows.append({"what": name, "failed": repr(problem)[:300]})

    weight = normal(WIDTH)
    sets = [[normal(ROWS, WIDTH) for _ in range(3)] for _ in range(3)]
    size = ROWS * WIDTH * 2
    add(
        "rms_norm forward",
        2 * size,
        [lambda s=s: norm._forward_triton(s[0], None, weight, 1e-6) for s in sets],
    )
    add(
        "add_rms_norm forward",
        4 * size,
        [lambda s=s: norm._forward_triton(s[0], s[1], weight, 1e-6) for s in sets],
    )
    add(
        "rms_norm backward",
        3 * size,
        [lambda s=s: norm._backward_triton(s[0], None, s[1], weight, 1e-6, False) for s in sets],
    )
    add(
        "add_rms_norm backward",
        4 * size,
        [lambda s=s: norm._backward_triton(s[0], s[1], s[2], weight, 1e-6, False) for s in sets],
    )
    add(
        "rms_norm backward, trained weight",
        3 * size,
        [lambda s=s: norm._backward_triton(s[0], None, s[1], weight, 1e-6, True) for s in sets],
    )
    add(
        "add_rms_norm backward, trained weight",
        4 * size,
        [lambda s=s: norm._backward_triton(s[0], s[1], s[2], weight, 1e-6, True) for s in sets],
    )
    add(
        "torch F.rms_norm forward",
        2 * size,
        [lambda s=s: torch.nn.functional.rms_norm(s[0], (WIDTH,), weight, 1e-6) for s in sets],
    )
    del sets
    heads = [normal(ROWS, 36, 128)[:, :32] for _ in range(3)]
    cos, sin = normal(ROWS, 64, dtype=torch.float32), normal(ROWS, 64, dtype=torch.float32)
    add(
        "rope 32 heads",
        ROWS * 32 * 128 * 4 + ROWS * 512,
        [lambda x=x: rope._rotate_triton(x, cos, sin, False) for x in heads],
    )
    head_weight, size = normal(128), ROWS * 32 * 128 * 2
    grads = [normal(ROWS, 32, 128) for _ in range(3)]
    for trained in (False, True):
        add(
            f"rms_norm backward, 32 heads of 128{', trained weight' if trained else ''}",
            3 * size,
            [
                lambda x=x, dy=dy, t=trained: norm._backward_triton(
                    dy, None, x, head_weight, 1e-6, t
                )
                for x, dy in zip(heads, grads, strict=True)
            ],
        )
    del heads, grads
    pairs = [(normal(ROWS, 2 * FFN), normal(ROWS, FFN)) for _ in range(2)]
    add("swiglu forward", 6 * ROWS * FFN, [lambda p=p: swiglu._forward_triton(p[0]) for p in pairs])

    def swiglu_backward(x: torch.Tensor, dh: torch.Tensor, dx: torch.Tensor) -> None:
        swiglu._backward_kernel[(len(x), triton.cdiv(FFN, swiglu.BLOCK_F))](
            x, dh, dx, x.stride(0), F=FFN, BLOCK_F=swiglu.BLOCK_F, KEEPS_H=False,
            num_warps=swiglu.NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip

    spare = torch.empty_like(pairs[0][0])
    add("swiglu backward", 10 * ROWS * FFN, [lambda p=p: swiglu_backward(*p, spare) for p in pairs])
    pairs = spare = None
    matrices = [nf4.quantize_nf4(normal(2 * FFN, WIDTH, scale=0.02)) for _ in range(2)]
    out = torch.empty(2 * FFN, WIDTH, device=CUDA, dtype=torch.bfloat16)
    read = matrices[0].num_bytes
    add(
        "nf4 decode gate_up bf16",
        read + out.numel() * 2,
        [lambda m=m: nf4.dequantize_nf4_triton(m, out=out) for m in matrices],
    )
    return rows


def matmul_bound(peak: float) -> list[dict[str, object]]:
    """The frozen head, forward and backward, and its parts."""
    num_rows = 8192
    x = normal(num_rows, WIDTH).requires_grad_()
    weight = normal(VOCABULARY, WIDTH, scale=0.02)
    labels = torch.randint(VOCABULARY, (num_rows,), device=CUDA)
    rows = []
    for chunk in (512, 768, 1152):

        def both(chunk: int = chunk) -> None:
            head.linear_logprob_triton(x, weight, labels, chunk_rows=chunk)[0].sum().backward()

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        ms = timed([both], 6)
        rate = 4 * num_rows * WIDTH * VOCABULARY / ms / 1e9
        peak_bytes = torch.cuda.max_memory_allocated() - before
        rows.append({
            "what": f"frozen head, chunk {chunk}", "ms": ms, "TFLOP/s": rate,
            "share of matmul": rate / peak, "transient GiB": peak_bytes / 2**30,
        })  # fmt: skip
    logits = torch.empty(1024, VOCABULARY, device=CUDA)
    ms = timed([lambda: torch.mm(x.detach()[:1024], weight.T, out_dtype=torch.float32, out=logits)])
    rows.append(
        {
            "what": "logits product 1024 rows",
            "ms": ms,
            "TFLOP/s": 2 * 1024 * WIDTH * VOCABULARY / ms / 1e9,
        }
    )
    dz = normal(1024, VOCABULARY, scale=1e-3)
    ms = timed([lambda: torch.mm(dz, weight)])
    rows.append(
        {
            "what": "row gradient product 1024 rows",
            "ms": ms,
            "TFLOP/s": 2 * 1024 * WIDTH * VOCABULARY / ms / 1e9,
        }
    )
    scratch = torch.empty(2, 1024, device=CUDA)
    ms = timed(
        [lambda: head._launch_rows(logits, labels[:1024], None, scratch[0], scratch[1], dz, 1.0)]
    )
    rows.append({"what": "row pass 1024 rows", "ms": ms, "GB/s": 10 * 1024 * VOCABULARY / ms / 1e6})
    return rows


def main() -> None:
    torch.manual_seed(0)
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip
    result["correctness"] = check()
    print(json.dumps(result["correctness"], indent=0))
    source, target = normal(1 << 31), torch.empty(1 << 31, device=CUDA, dtype=torch.bfloat16)
    copy = 2 * source.numel() * 2 / timed([lambda: target.copy_(source)], 10) / 1e6
    source = target = None
    a, b = normal(8192, 8192), normal(8192, 8192)
    peak = 2 * 8192**3 / timed([lambda: a @ b], 20) / 1e9
    result["copy GB/s"], result["matmul TFLOP/s"] = copy, peak
    result["memory bound"] = memory_bound(copy)
    result["matmul bound"] = matmul_bound(peak)
    for line in [copy, peak, *result["memory bound"], *result["matmul bound"]]:
        print(line)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
