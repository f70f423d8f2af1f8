"""Attention over blocks on a GPU: right first (float64, bits), then time, as JSON.

    python benchmarks/paged_attention.py OUTPUT.json [SECTION ...] [--vary]
    python benchmarks/paged_attention.py --compile [SECTION ...]

Decode: bytes of keys and values / time, as a share of a copy's bandwidth in the same run, at the
shapes of four models; the calls of one CUDA graph go through layers that together exceed the L2
cache. Prefill: TFLOP/s of 32 prompts of 2,048 tokens. --vary: other sizes of decoding instead.
--compile: only compiles, in several processes. Sections by name: the others of OUTPUT stay; each
says when and where it was measured. Random data; medians of replays.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton

from sparring.kernels import capability_of, paged_attention
from sparring.kernels.attention import shared_attention_triton
from sparring.kernels.attention_plan import SharedPlan, tile_of
from sparring.kernels.norm import rms_norm_triton
from sparring.kernels.paged_plan import DecodeWorkspace, PrefillTiles, split_of
from sparring.kernels.paged_prefill import paged_prefill_triton
from sparring.kernels.rope import rope_triton
from sparring.kernels.rotate_write import rotate_write_triton
from sparring.kernels.shared_decode import chunk_of, shared_splits
from sparring.kernels.split_attention import split_attention_paged
from sparring.layout import KVPool

CUDA = torch.device("cuda")
SHAPES = {
    "7B": (28, 4, 128),
    "Llama-3.1-8B": (32, 8, 128),
    "1.5B": (12, 2, 128),
    "Qwen3-0.6B": (16, 8, 128),
    "0.5B": (14, 2, 64),
}
ROWS, CONTEXTS, BLOCK = (8, 32, 128, 256), (512, 1024, 4096), 64
VARIANTS = [
    (256, 64, 3, 1), (256, 64, 3, 4), (256, 64, 3, 8), (256, 64, 2, 4), (512, 64, 3, 1),
    (512, 64, 3, 4), (128, 64, 3, 1), (128, 64, 3, 16),
]  # fmt: skip
VARIED = ("7B", "1.5B", "0.5B")
VARIED_CASES = ((8, 768), (32, 640), (64, 768), (128, 512), (256, 768), (256, 1280))
SHARED_CASES = (
    (32, 8, 256, 384), (128, 8, 256, 256), (256, 8, 256, 512), (128, 16, 1024, 64),
    (128, 16, 1024, 512),
)  # fmt: skip
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
Sizes = tuple[int, int, int, int]
SHIPPED = paged_attention.split_of, paged_attention.span_of


def choose(sizes: Sizes | None) -> None:
    """Make the decode kernel use (split, key tile, stages, splits a program), or what ships."""
    paged_attention.split_of, paged_attention.span_of = SHIPPED
    if sizes is not None:
        split, tile, stages, span = sizes
        chosen = {"SPLIT": split, "BLOCK_N": tile, "num_stages": stages}
        paged_attention.split_of = lambda *_: chosen  # type: ignore[assignment]
        paged_attention.span_of = lambda *_: span  # type: ignore[assignment]


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=CUDA, dtype=torch.float32).to(dtype)


def pool_of(
    lengths: list[int],
    shape: tuple[int, int, int],
    layers: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple:
    """A pool, int32 tables in random order and lengths; slots that hold no token are NaN (in 8
    bits: their scales).
    """
    _, kv_heads, size = shape
    counts = [-(-n // BLOCK) for n in lengths]
    total = sum(counts)
    places = (layers, total + 1, 2, kv_heads, BLOCK)
    data = torch.empty(*places, size, device=CUDA, dtype=torch.bfloat16)
    for layer in data:
        layer.normal_()
    scales = None
    if dtype.itemsize == 1:
        data = (data * (30.0 if dtype == torch.int8 else 100.0)).to(dtype)
        scales = torch.rand(*places, device=CUDA) / 30
    order = (torch.randperm(total) + 1).tolist()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    at = 0
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor(order[at : at + count], dtype=torch.int32)
        at += count
        if lengths[row] % BLOCK:
            poisoned = data if scales is None else scales
            poisoned[:, order[at - 1], :, :, lengths[row] % BLOCK :] = float("nan")
    (data if scales is None else scales)[:, 0] = float("nan")
    addresses = [tensor.data_ptr() for tensor in (data, scales) if tensor is not None]
    pool = KVPool(data=data, scales=scales, address=torch.tensor(addresses, device=CUDA))
    lengths_R = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    return pool, tables.to(CUDA), lengths_R


def replayed(calls: list[Callable[[], object]], num_replays: int = 7) -> float:
    """Median microseconds of one call, from replays of a graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(num_replays + 2):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / len(calls) * 1e3)
    return statistics.median(times[2:])


def copy_bandwidth() -> float:
    """GB/s read and written by copies of 2 GiB (by a kernel, not by a graph's memory copy)."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device=CUDA).normal_()
    target = torch.empty_like(source)
    times = []
    for _ in range(7):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return 4 * source.numel() / statistics.median(times[2:]) / 1e6


def decode_row(
    name: str,
    rows: int,
    context: int,
    copy_gbs: float,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, object]:
    """A decode step's launch: rotation, writing and attention. sizes: not as shipped, but so.
    dtype: of keys and values.
    """
    shape = SHAPES[name]
    heads, kv_heads, size = shape
    capability = capability_of(CUDA)
    choose(sizes)
    split = paged_attention.split_of(capability, size)
    num_bytes = rows * context * 2 * kv_heads * (size * dtype.itemsize + 4 * (dtype.itemsize == 1))
    layers = max(2, min(24, int(400e6 / num_bytes) + 1))
    pool, tables, lengths = pool_of([context] * rows, shape, layers, dtype)
    qkv, out = normal(rows, (heads + 2 * kv_heads) * size), normal(rows, heads, size)
    angles = normal(rows, size // 2, dtype=torch.float32)
    norms = [normal(size), normal(size)] if name.startswith("Qwen3") else [None, None]
    slots = tables[:, (context - 1) // BLOCK].long() * BLOCK + (context - 1) % BLOCK
    most = -(-context // split["SPLIT"])
    call = partial(
        paged_attention.rotate_decode_triton, qkv, angles.cos(), angles.sin(), *norms, 1e-6, slots,
        pool, tables_RN=tables, lengths_R=lengths, max_splits=most, capability=capability, out=out,
        workspace=DecodeWorkspace.new(rows, heads, kv_heads, size, most, CUDA),
    )  # fmt: skip
    micros = replayed([partial(call, layer=i) for i in range(layers)] * max(1, 8 // layers))
    rate = num_bytes / micros / 1e3
    row: dict[str, object] = {
        "shape": name, "kv": str(dtype).removeprefix("torch."), "rows": rows, "context": context,
        **split,
        "span": paged_attention.span_of(capability, rows * kv_heads, size),
        "us": round(micros, 2),
        "GB/s": round(rate), "share of copy": round(rate / copy_gbs, 3),
    }  # fmt: skip
    if sizes is not None:
        got = call(layer=0, out=torch.full_like(out, float("nan")))
        choose((*sizes[:3], 1))
        row["bits equal"] = torch.equal(got, call(layer=0, out=torch.full_like(out, float("nan"))))
    return row


def shared_prompts() -> list[dict[str, object]]:
    """Groups of rows over one prompt: every split once a row, and once for neighbours."""
    rows = []
    capability = capability_of(CUDA)
    for name, (heads, kv_heads, size) in SHAPES.items():
        for num_rows, group, prompt, own in SHARED_CASES:
            lengths = [prompt + own] * num_rows
            layers = 24 if num_rows * own < 32768 else 8
            pool, tables, lengths_R = pool_of(lengths, (heads, kv_heads, size), layers)
            whole = prompt // BLOCK
            tables[:, :whole] = tables[::group, :whole].repeat_interleave(group, 0)
            split = paged_attention.split_of(capability, size)["SPLIT"]
            most = -(-lengths[0] // split)
            counted = partial(
                shared_splits, tables, lengths_R, chunk=chunk_of(heads // kv_heads),
                block_size=BLOCK, split=split, max_splits=most,
            )  # fmt: skip
            qkv = normal(num_rows, (heads + 2 * kv_heads) * size)
            angles = normal(num_rows, size // 2, dtype=torch.float32)
            norms = [normal(size), normal(size)] if name.startswith("Qwen3") else [None, None]
            slots = tables[:, (lengths[0] - 1) // BLOCK].long() * BLOCK + (lengths[0] - 1) % BLOCK
            outputs: list[torch.Tensor] = []
            row: dict[str, object] = {
                "shape": name, "rows": num_rows, "group": group, "prompt": prompt, "own": own,
                "span": paged_attention.span_of(capability, num_rows * kv_heads, size),
            }  # fmt: skip
            for what, shared_R in (("us", None), ("us, computed once", counted())):
                call = partial(
                    paged_attention.rotate_decode_triton, qkv, angles.cos(), angles.sin(), *norms,
                    1e-6, slots, pool, tables_RN=tables, lengths_R=lengths_R, max_splits=most,
                    capability=capability, shared_R=shared_R,
                    workspace=DecodeWorkspace.new(num_rows, heads, kv_heads, size, most, CUDA),
                )  # fmt: skip
                outputs.append(call(layer=0))
                row[what] = round(replayed([partial(call, layer=i) for i in range(layers)]), 2)
            row["us to count"] = round(replayed([counted] * 24), 2)
            row["bits equal"] = torch.equal(*outputs) and not bool(outputs[0].isnan().any())
            rows.append(row)
    return rows


def launches() -> list[dict[str, object]]:
    """Rotation, writing and decoding in two launches and in one; bits of both."""
    rows = []
    for name, (heads, kv_heads, size) in SHAPES.items():
        for num_rows, context in ((8, 64), (32, 64), (32, 512), (128, 1024)):
            pool, tables, lengths_R = pool_of([context] * num_rows, (heads, kv_heads, size), 12)
            qkv = normal(num_rows, (heads + 2 * kv_heads) * size)
            angles = normal(num_rows, size // 2, dtype=torch.float32)
            norms = [normal(size), normal(size)] if name.startswith("Qwen3") else [None, None]
            slots = tables[:, (context - 1) // BLOCK].long() * BLOCK + (context - 1) % BLOCK
            most = -(-context // paged_attention.split_of(capability_of(CUDA), size)["SPLIT"])
            rotation = (angles.cos(), angles.sin(), *norms, 1e-6, slots)
            how = {
                "max_splits": most, "capability": capability_of(CUDA),
                "workspace": DecodeWorkspace.new(num_rows, heads, kv_heads, size, most, CUDA),
            }  # fmt: skip

            def two(
                layer: int, qkv: torch.Tensor = qkv, rotation: tuple = rotation, how: dict = how,
                pool: KVPool = pool, tables: torch.Tensor = tables,
                lengths_R: torch.Tensor = lengths_R,
            ) -> torch.Tensor:  # fmt: skip
                q = rotate_write_triton(qkv, *rotation, pool, layer)
                return paged_attention.paged_decode_triton(q, pool, layer, tables, lengths_R, **how)

            one = partial(
                paged_attention.rotate_decode_triton, qkv, *rotation, pool, tables_RN=tables,
                lengths_R=lengths_R, **how,
            )  # fmt: skip
            same = torch.equal(two(0), one(layer=0))
            micros = [
                replayed([partial(call, layer=layer) for layer in range(12)]) for call in (two, one)
            ]
            rows.append({
                "shape": name, "rows": num_rows, "context": context, "us, two": round(micros[0], 2),
                "us, one": round(micros[1], 2), "bits equal": same,
            })  # fmt: skip
    return rows


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_decode() -> dict[str, object]:
    """Errors against float64, and bits: twice, in company or alone, in wider tiles of queries."""
    lengths = [1, 0, 63, 64, 65, 255, 256, 257, 700, 1029]
    out: dict[str, object] = {}
    for name, shape in SHAPES.items():
        heads, _, size = shape
        pool, tables, lengths_R = pool_of([max(1, n) for n in lengths], shape, 2)
        lengths_R[1] = 0
        q = normal(len(lengths), heads, size)
        most = -(-max(lengths) // split_of(capability_of(CUDA), size)["SPLIT"])

        def decode(
            q: torch.Tensor, tables: torch.Tensor, lengths_R: torch.Tensor, window: int = 0,
            pool: KVPool = pool, most: int = most,
        ) -> torch.Tensor:  # fmt: skip
            return paged_attention.paged_decode_triton(
                q, pool, 1, tables, lengths_R, max_splits=most, capability=capability_of(CUDA),
                window=window,
            )  # fmt: skip

        got = decode(q, tables, lengths_R)
        wide = KVPool(data=pool.data.double())
        for window in (0, 100):
            want = paged_attention.paged_decode_reference(
                q.double(), wide, 1, tables, lengths_R, window=window
            )
            out[f"{name} window {window}"] = relative(decode(q, tables, lengths_R, window), want)
        assert torch.equal(decode(q, tables, lengths_R), got), "bits of two calls"
        some = [9, 4, 6]
        alone = decode(q[some], tables[some], lengths_R[some])
        out[f"{name} alone = in company"] = torch.equal(alone, got[some])
        original = paged_attention.constants_of
        for columns in (32, 64, 128):
            paged_attention.constants_of = (  # type: ignore[assignment]
                lambda *a, n=columns, o=original: o(*a) | {"BLOCK_M": n}
            )
            out[f"{name} {columns} columns = 16"] = torch.equal(decode(q, tables, lengths_R), got)
        paged_attention.constants_of = original
    return out


def check_rotate_write() -> dict[str, object]:
    """Bits against norm and rotation one after the other."""
    out: dict[str, object] = {}
    for name, (heads, kv_heads, size) in SHAPES.items():
        for has_norm in (True, False):
            pool, tables, _ = pool_of([64] * 33, (heads, kv_heads, size), 2)
            qkv = normal(33, (heads + 2 * kv_heads) * size)
            angles = normal(33, size // 2, dtype=torch.float32)
            cos, sin = angles.cos(), angles.sin()
            norms = [normal(size) if has_norm else None for _ in range(2)]
            slots = tables[:, 0].long() * BLOCK + torch.arange(33, device=CUDA)
            q = rotate_write_triton(qkv, cos, sin, *norms, 1e-6, slots, pool, 1)
            with torch.no_grad():
                want_q, k, v = qkv.view(33, -1, size).split([heads, kv_heads, kv_heads], 1)
                if has_norm:
                    want_q, k = (
                        rms_norm_triton(x, w, 1e-6) for x, w in zip((want_q, k), norms, strict=True)
                    )
                want_q, k = rope_triton(want_q, cos, sin), rope_triton(k, cos, sin)
            written = pool.data[1, slots // BLOCK, :, :, slots % BLOCK]
            same = torch.equal(q, want_q) and torch.equal(written[:, 0], k)
            out[f"{name} norm {has_norm}"] = same and torch.equal(written[:, 1], v)
    return out


def prefill() -> list[dict[str, object]]:
    """32 prompts of 2,048 tokens: from the pool, packed, and both in bitwise mode, whose results
    are the same bits.
    """
    rows = []
    for name, (heads, kv_heads, size) in SHAPES.items():
        pool, tables, _ = pool_of([2048] * 32, (heads, kv_heads, size), 2)
        q = normal(32 * 2048, heads, size)
        bounds = list(range(0, 32 * 2048 + 1, 2048))
        tiles = PrefillTiles(bounds, [2048] * 32, CUDA)
        capability = capability_of(CUDA)
        flop = 32 * 4 * heads * size * 2048 * 2049 / 2
        k, v = (
            pool.data[1, tables.long(), i].transpose(2, 3).reshape(-1, kv_heads, size)
            for i in range(2)
        )
        plans = [
            SharedPlan(bounds, [-1] * 32, device=CUDA, capability=capability, bitwise=bitwise)
            for bitwise in (False, True)
        ]
        calls: dict[str, Callable[[], torch.Tensor]] = {
            "paged": partial(
                paged_prefill_triton, q, pool, 1, tables, tiles, capability=capability
            ),
            "packed": partial(shared_attention_triton, q, k, v, plans[0]),
            "paged bitwise": partial(
                split_attention_paged, q, pool, 1, tables, tiles, capability=capability
            ),
            "packed bitwise": partial(shared_attention_triton, q, k, v, plans[1]),
        }
        row: dict[str, object] = {"shape": name}
        with torch.no_grad():
            outputs = {what: call() for what, call in calls.items()}
            for what, call in calls.items():
                micros = replayed([call] * 2, 3)
                row[f"{what} TFLOP/s"] = round(flop / micros / 1e6)
        row["paged against packed"] = relative(outputs["paged"], outputs["packed"])
        row["bitwise against packed"] = relative(outputs["paged bitwise"], outputs["packed"])
        row["bitwise bits equal"] = torch.equal(outputs["paged bitwise"], outputs["packed bitwise"])
        rows.append(row)
    return rows


def decode_rows(copy_gbs: float) -> list[dict[str, object]]:
    return [decode_row(name, r, c, copy_gbs) for name in SHAPES for r in ROWS for c in CONTEXTS]


def eight_bits(copy_gbs: float) -> list[dict[str, object]]:
    """Keys and values in 8 bits, at 1,024 tokens."""
    names = [name for name in SHAPES if name in ("7B", "Qwen3-0.6B")]
    return [
        decode_row(name, r, 1024, copy_gbs, dtype=dtype)
        for name in names
        for dtype in EIGHT_BITS
        for r in ROWS
    ]


SECTIONS: dict[str, Callable[[float], object]] = {
    "shared prompts": lambda _: shared_prompts(),
    "decode": decode_rows,
    "decode, 8 bits": eight_bits,
    "decode checks": lambda _: check_decode(),
    "rotate_write checks": lambda _: check_rotate_write(),
    "prefill": lambda _: prefill(),
    "launches": lambda _: launches(),
}


def compiled(task: tuple[str, str | Sizes]) -> tuple[tuple[str, str | Sizes], str] | None:
    """Runs a section or a variant for one model's heads, so that its kernels are found on disk; the
    task and what went wrong, if something did.
    """
    name, what = task
    try:
        if isinstance(what, str):
            for other in [*SHAPES]:
                if other != name:
                    del SHAPES[other]
            SECTIONS[what](1.0)
        else:
            decode_row(name, 8, 64, 1.0, what)
    except Exception as problem:  # noqa: BLE001 - one failure must not lose the other tasks
        return task, repr(problem)[:200]
    return None


def compile_all(tasks: list[tuple[str, str | Sizes]]) -> dict[tuple[str, str | Sizes], str]:
    """Every task in a process of its own, several at a time; those that failed, and how."""
    started = time.time()
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(14, len(os.sched_getaffinity(0))), maxtasksperchild=1) as workers:
        failed = dict(filter(None, workers.map(compiled, tasks, chunksize=1)))
    print(f"compiled {len(tasks)} in {time.time() - started:.0f} s", failed, flush=True)
    return failed


def varied(copy_gbs: float) -> list[dict[str, object]]:
    """VARIANTS at VARIED_CASES; each must give the bits that programs of one split give."""
    tasks: list[tuple[str, str | Sizes]] = [(name, v) for name in VARIED for v in VARIANTS]
    failed = compile_all(tasks)
    rows: list[dict[str, object]] = []
    for name in VARIED:
        for sizes in VARIANTS:
            if (name, sizes) in failed:
                rows.append({"shape": name, "sizes": sizes, "failed": failed[name, sizes]})
            else:
                rows += [decode_row(name, r, c, copy_gbs, sizes) for r, c in VARIED_CASES]
    return rows


def main() -> None:
    started = time.time()
    named = [name for name in sys.argv[1:] if name in SECTIONS] or [*SECTIONS]
    if "--compile" in sys.argv:
        compile_all([(name, section) for section in named for name in SHAPES])
        return
    output = Path(sys.argv[1])
    copy_gbs = copy_bandwidth()
    results: dict[str, object] = json.loads(output.read_text()) if output.exists() else {}
    conditions = {
        "date": time.strftime("%Y-%m-%d"), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": triton.__version__, "block size": BLOCK,
        "copy GB/s": round(copy_gbs), "prefill tile": tile_of(capability_of(CUDA), 128, "forward"),
    }  # fmt: skip
    sections = {name: SECTIONS[name] for name in named}
    if "--vary" in sys.argv:
        sections = {"decode, varied": varied}
    for name, section in sections.items():
        rows = section(copy_gbs)
        results[name] = {**conditions, "rows": rows}
        print(name, *(rows if isinstance(rows, list) else [rows]), sep="\n ", flush=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
