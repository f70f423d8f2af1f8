"""Products of 1 to 256 rows with a 7B model's NF4 matrices on a GPU, as JSON.

    python -m benchmarks.nf4_matmul OUTPUT.json [--sweep]

The four matrices of a layer: qkv 4608 x 3584, o 3584 x 3584, gate_up 37888 x 3584, down 3584 x
18944. Columns: the fused kernel, the same with rows in its order of columns (column_order.py: as
norms and SwiGLU write them in decoding) begun after or while the launch before ends, the library's
bf16 product with a weight decoded before, decoding plus that product, bitsandbytes' where it can be
imported, and the first two with a rank 16 adapter (q, k, v; o). First bits and errors are checked.
The limit is the longest of: bytes at the bandwidth of a copy, FLOP at the rate of a large product
(both measured here), and on sm_90, up to 64 rows, the instructions of the compiled loop
(nf4_instructions.py). --sweep: tiles, warps and pipeline depths instead, what the tables in
nf4_matmul.py and nf4_hopper.py were filled from.

A time is that of one call in a CUDA graph that goes through copies of the weight larger than the L2
cache together; medians of replays.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from itertools import product

import torch

from benchmarks.nf4_instructions import counted
from benchmarks.rollouts import copy_bandwidth, environment, matmul_rate
from sparring.kernels import (
    capability_of,
    lora,
    matmul,
    nf4,
    nf4_hopper,
    nf4_hopper_wide,
    nf4_matmul,
)
from sparring.kernels.column_order import in_kernel_order
from sparring.kernels.low_rank import LowRank
from sparring.kernels.matmul import Tile

MATRICES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
PARTS = {
    "qkv": [[0, 3584, 0, 0], [3584, 4096, 3584, 16], [4096, 4608, 4096, 32]],
    "o": [[0, 3584, 0, 0]],
}
ROWS = (1, 4, 8, 16, 32, 64, 128, 256)
CUDA = torch.device("cuda")
BF16 = torch.bfloat16
SWEEP = {
    16: [(64, 4, 3, 0), (64, 4, 3, 128), (64, 4, 2, 128), (64, 4, 4, 128), (64, 4, 2, 96)],
    32: [(64, 4, 3, 0), (64, 4, 3, 168), (64, 4, 2, 168), (64, 4, 2, 128), (128, 8, 2, 128)],
    64: [(64, 4, 2, 0), (64, 4, 2, 168), (64, 4, 3, 168), (128, 8, 2, 128), (128, 8, 2, 0)],
    128: [(64, 4, 2, 0), (128, 8, 2, 0), (64, 8, 2, 128)],
}
ORDERED_SWEEP = {
    8: [(64, 4, 2, 96), (64, 4, 3, 96), (64, 4, 4, 96), (128, 8, 3, 96)],
    16: [(64, 4, 2, 96), (64, 4, 3, 96), (128, 8, 3, 96)],
    32: [(64, 4, 2, 96), (128, 8, 2, 128), (128, 8, 3, 128)],
    64: [(64, 4, 2, 128), (128, 8, 2, 128), (128, 8, 3, 128), (256, 16, 2, 128)],
}
"""Of kernels/nf4_hopper.py: weight rows, warps, stages, registers."""

SEGMENTS = {"qkv": (4, 7), "o": (4, 7), "gate_up": (2, 4), "down": (10, 13)}


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=CUDA) * scale).to(BF16)


def timed(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of one call, the list captured in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for repeat in range(8):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        if repeat:
            times.append(start.elapsed_time(stop) * 1000 / len(calls))
    return statistics.median(times)


def copies(num_bytes: int) -> int:
    return max(2, -(-160_000_000 // num_bytes))


def weights_of(name: str) -> list[nf4.NF4Matrix]:
    shape = MATRICES[name]
    first = nf4.quantize_nf4(normal(*shape, scale=0.02))
    many = [first]
    for _ in range(copies(first.num_bytes) - 1):
        roll = torch.roll(first.packed, 4096 * len(many))
        many.append(
            nf4.NF4Matrix(
                packed=roll,
                absmax=first.absmax.clone(),
                absmax2=first.absmax2.clone(),
                offset=first.offset.clone(),
                shape=shape,
                dtype=BF16,
            )
        )
    return many


def in_order_alone(x: torch.Tensor, w: nf4.NF4Matrix) -> torch.Tensor:
    """The product of rows in order that waits for the launch before it to end."""
    capability = capability_of(CUDA)
    if not nf4_hopper.serves(x, capability.arch, in_order=True):
        return nf4_matmul.nf4_matmul(x, w, in_order=True)
    segments = nf4_matmul.nf4_segments_of(capability, *w.shape)
    if len(x) > nf4_hopper.TILES[-1].block_t:
        return nf4_hopper_wide.launch(x, w, None, segments, overlaps=False)
    return nf4_hopper.launch(x, w, None, segments, overlaps=False)


loop_of = cache(counted)


def limits(shape: tuple[int, int], num_rows: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Microseconds that bytes, FLOP and instructions of a product take at least."""
    (num_outputs, num_inputs), device = shape, torch.cuda.get_device_properties(CUDA)
    weights = num_outputs * num_inputs
    num_bytes = weights * 0.516 + 2 * num_rows * (num_outputs + num_inputs)
    out = {
        "bytes us": num_bytes / ceilings["bandwidth"] * 1e6,
        "FLOP us": 2 * num_rows * weights / ceilings["matmul"] * 1e6,
    }
    if capability_of(CUDA).arch == nf4_hopper.ARCH and num_rows <= nf4_hopper.TILES[-1].block_t:
        found = loop_of(matmul.first_that_holds(nf4_hopper.TILES, num_rows))
        lanes = max(found["integer a weight"] / 64, found["all a weight"] / 128)
        clocks = weights * lanes / device.multi_processor_count
        out["instructions us"] = clocks / ceilings["hertz"] * 1e6
    return out


def adapter(name: str, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> LowRank:
    xa, scratch = lora.lora_shrink_beside(x, a, capability_of(CUDA))
    return LowRank(xa=xa, b=b, parts=TABLES[name], scale=1.0, granule=512, scratch=scratch)


TABLES: dict[str, torch.Tensor] = {}


def check() -> dict[str, float]:
    """Relative errors against float64, and bits that must agree."""
    out = {}
    for name, (num_outputs, num_inputs) in MATRICES.items():
        weight = nf4.quantize_nf4(normal(num_outputs, num_inputs, scale=0.02))
        dense = nf4.dequantize_nf4(weight)
        reference = nf4.dequantize_nf4_reference(weight)
        assert torch.equal(dense, reference), "decoded bits"
        x = normal(256, num_inputs)
        whole = nf4_matmul.launch(x, weight)
        for num_rows in (1, 7, 16, 33, 64, 100, 256):
            part = nf4_matmul.launch(x[:num_rows], weight)
            out[f"{name} {num_rows} rows: rows that differ"] = int(
                (part != whole[:num_rows]).any(dim=1).sum()
            )
            ordered = in_kernel_order(x[:num_rows])
            part = nf4_matmul.nf4_matmul(ordered, weight, in_order=True)
            out[f"{name} {num_rows} rows in order: rows that differ"] = int(
                (part != whole[:num_rows]).any(dim=1).sum()
            )
        out[f"{name} decoded before: rows that differ"] = int(
            (nf4_matmul.nf4_matmul(torch.cat([x, x]), weight)[256:] != whole).any(dim=1).sum()
        )
        want = x.double() @ dense.double().T
        out[f"{name} error"] = ((whole.double() - want).norm() / want.norm()).item()
        out[f"{name} error of the library"] = ((x @ dense.T).double() - want).norm().item() / (
            want.norm().item()
        )
    return out


def table(ceilings: dict[str, float]) -> list[dict[str, object]]:
    try:
        import bitsandbytes.functional as bnb
    except ImportError:
        bnb = None
    rows = []
    for name, num_rows in product(MATRICES, ROWS):
        if num_rows == ROWS[0]:
            weights = weights_of(name)
            theirs = [] if bnb is None else bitsandbytes_weights(bnb, weights)
            num_outputs, num_inputs = MATRICES[name]
            decoded = [
                nf4.dequantize_nf4(w) for w in weights[: copies(num_outputs * num_inputs * 2)]
            ]
        row = one_row(name, num_rows, weights, decoded, theirs)
        row["limit"] = limits(MATRICES[name], num_rows, ceilings)
        row["share of limit"] = max(row["limit"].values()) / row["rows in order, overlapping us"]
        rows.append(row)
        print({k: round(v, 2) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return rows


def one_row(name: str, num_rows: int, weights: list, decoded: list, theirs: list) -> dict:
    num_outputs, num_inputs = MATRICES[name]
    x = normal(num_rows, num_inputs)
    row: dict[str, object] = {"matrix": name, "rows": num_rows}
    row["fused us"] = timed([partial(nf4_matmul.launch, x, w) for w in weights])
    ordered = in_kernel_order(x)
    row["rows in order us"] = timed([partial(in_order_alone, ordered, w) for w in weights])
    row["rows in order, overlapping us"] = timed(
        [partial(nf4_matmul.nf4_matmul, ordered, w, in_order=True) for w in weights]
    )
    row["library us"] = timed([partial(torch.mm, x, w.T) for w in decoded])
    row["16-bit fixed order us"] = timed([partial(matmul.launch, x, w) for w in decoded])
    scratch = torch.empty_like(decoded[0])

    def decode_and_multiply(w: nf4.NF4Matrix) -> torch.Tensor:
        return x @ nf4.dequantize_nf4(w, out=scratch).T

    row["decode + library us"] = timed([partial(decode_and_multiply, w) for w in weights])
    if name in PARTS:
        a = normal(16 * len(PARTS[name]), num_inputs, scale=0.02)
        b = normal(num_outputs, 16, scale=0.02)

        def with_adapter(w: nf4.NF4Matrix) -> torch.Tensor:
            return nf4_matmul.launch(x, w, None, adapter(name, x, a, b))

        row["fused + adapter us"] = timed([partial(with_adapter, w) for w in weights])

        def ordered_with_adapter(w: nf4.NF4Matrix) -> torch.Tensor:
            low_rank = adapter(name, x, a, b)
            return nf4_matmul.nf4_matmul(ordered, w, None, low_rank, in_order=True)

        row["rows in order + adapter us"] = timed(
            [partial(ordered_with_adapter, w) for w in weights]
        )
    if theirs:
        import bitsandbytes

        row["bitsandbytes us"] = timed(
            [lambda p=p: bitsandbytes.matmul_4bit(x, p[0].t(), p[1]) for p in theirs]
        )
    return row


def bitsandbytes_weights(bnb: object, weights: list[nf4.NF4Matrix]) -> list[tuple]:
    """As many weights of the same shape in its own quantisation."""
    dense = normal(*weights[0].shape, scale=0.02)
    given = {"quant_type": "nf4", "compress_statistics": True}
    return [bnb.quantize_4bit(torch.roll(dense, i, 1), **given) for i in range(len(weights))]


def candidates() -> list[tuple[str, int, int, Tile, bool]]:
    """Matrix, rows, segments, tile, and whether rows come in order."""
    out = []
    for is_ordered, table in ((False, SWEEP), (True, ORDERED_SWEEP)):
        if is_ordered and capability_of(CUDA).arch != nf4_hopper.ARCH:
            continue
        for num_rows, tiles in table.items():
            for (bn, *rest), name in product(tiles, MATRICES):
                for segments in SEGMENTS[name]:
                    out.append((name, num_rows, segments, Tile(bn, num_rows, *rest), is_ordered))
    return out


def launch(x: torch.Tensor, w: nf4.NF4Matrix, segments: int, tile: Tile, is_ordered: bool) -> None:
    """One product by a given tile; x is taken for ordered, whatever it is."""
    if is_ordered:
        nf4_hopper.launch(x, w, None, segments, tile)
    else:
        nf4_matmul.launch(x, w, tile=tile, segments=segments)


def compile_some(which: int, of: int) -> None:
    """Fill Triton's cache: every of-th kernel of the sweep, once."""
    seen = sorted({(t, r, min(s, 2), o) for _, r, s, t, o in candidates()}, key=str)
    weight = nf4.quantize_nf4(normal(4608, 3584, scale=0.02))
    for tile, num_rows, segments, is_ordered in seen[which::of]:
        try:
            launch(normal(num_rows, 3584), weight, segments, tile, is_ordered)
        except Exception as problem:  # noqa: BLE001 - reported again by the sweep
            print(tile, repr(problem)[:100])


def compile_table(which: int, of: int) -> None:
    """Fill Triton's cache with every of-th kernel of the table."""
    put_tables()
    for num_rows, name in list(product(ROWS, MATRICES))[which::of]:
        num_outputs, num_inputs = MATRICES[name]
        weight = nf4.quantize_nf4(normal(*MATRICES[name], scale=0.02))
        x = normal(num_rows, num_inputs)
        ordered = in_kernel_order(x)
        nf4_matmul.launch(x, weight)
        nf4_matmul.nf4_matmul(ordered, weight, in_order=True)
        in_order_alone(ordered, weight)
        matmul.launch(x, nf4.dequantize_nf4(weight))
        if name in PARTS:
            a = normal(16 * len(PARTS[name]), num_inputs, scale=0.02)
            low_rank = adapter(name, x, a, normal(num_outputs, 16, scale=0.02))
            nf4_matmul.launch(x, weight, None, low_rank)
            nf4_matmul.nf4_matmul(ordered, weight, None, low_rank, in_order=True)
    torch.cuda.synchronize()


def put_tables() -> None:
    """Where adapters' parts lie, on the device."""
    for name, parts in PARTS.items():
        TABLES[name] = torch.tensor(parts, dtype=torch.int32, device=CUDA)


def sweep() -> list[dict[str, object]]:
    with multiprocessing.get_context("spawn").Pool(12) as pool:
        pool.starmap(compile_some, [(i, 12) for i in range(12)])
    rows = []
    for name in MATRICES:
        weights = weights_of(name)
        for _, num_rows, segments, tile, is_ordered in (c for c in candidates() if c[0] == name):
            x = normal(num_rows, MATRICES[name][1])
            row = {"matrix": name, "rows": num_rows, "tile": str(tile), "segments": segments}
            row["ordered"] = is_ordered
            try:
                row["us"] = timed(
                    [partial(launch, x, w, segments, tile, is_ordered) for w in weights]
                )
            except Exception as problem:  # noqa: BLE001 - one tile must not lose the others
                row["failed"] = repr(problem)[:200]
            rows.append(row)
    found: dict[tuple, list] = {}
    for r in rows:
        if "us" in r:
            best = (round(r["us"], 1), r["tile"].replace("block_", ""), r["segments"])
            found.setdefault((r["matrix"], r["rows"], r["ordered"]), []).append(best)
    for (name, num_rows, is_ordered), best in found.items():
        print(name, num_rows, "in order" if is_ordered else "", sorted(best)[:4])
    return rows


def clock_hertz() -> float:
    """The card's highest clock of its multiprocessors."""
    given = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    done = subprocess.run(given, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0]) * 1e6


def summed(rows: list[dict], num_rows: int) -> dict[str, float]:
    """Milliseconds of 28 layers' matrices, and how many times as fast the library and its peer."""
    mine = [r for r in rows if r["rows"] == num_rows]
    names = [n for n in mine[0] if n.endswith("us") and all(n in r for r in mine)]
    out = {n.removesuffix(" us"): sum(r[n] for r in mine) * 28 / 1e3 for n in names}
    ours = out["rows in order, overlapping"]
    out |= {f"times {n}": out[n] / ours for n in ("library", "bitsandbytes") if n in out}
    out["limit"] = sum(max(r["limit"].values()) for r in mine) * 28 / 1e3
    return {name: round(value, 3) for name, value in out.items()}


def main() -> None:
    torch.manual_seed(0)
    put_tables()
    ceilings = {"bandwidth": copy_bandwidth(), "matmul": matmul_rate(), "hertz": clock_hertz()}
    result: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), **environment(), "arch": capability_of(CUDA).arch,
        "ceilings": ceilings,
    }  # fmt: skip
    if "--sweep" in sys.argv:
        result["sweep"] = sweep()
    else:
        with multiprocessing.get_context("spawn").Pool(len(ROWS)) as pool:
            pool.starmap(compile_table, [(i, len(ROWS)) for i in range(len(ROWS))])
        result["checks"] = check()
        print(json.dumps(result["checks"], indent=0), flush=True)
        result["table"] = table(ceilings)
        for num_rows in ROWS:
            print(num_rows, "rows, 28 layers, ms:", summed(result["table"], num_rows), flush=True)
    with open(sys.argv[1], "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
