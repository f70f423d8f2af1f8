"""How large the slices of a decoded NF4 weight should be where thousands of rows meet it (one GPU).

    python benchmarks/weight_slices.py OUTPUT.json [--rows 6399 8192]

x W^T by slices of rows and dy W by slices of columns, as new tensors and added to old ones, with
the decoding, for the four fused matrices of a 7B layer, against the library's product on the whole
decoded matrix. Every size is timed in every round, so that a card's clock does not favour one;
medians of the rounds. Data is random and larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sparring.environment import describe_environment
from sparring.models import quantised
from sparring.models.quantised import Quantised

CUDA = torch.device("cuda")
MATRICES = {
    "qkv": ((3584, 512, 512), 3584),
    "o": ((3584,), 3584),
    "gate_up": ((18944, 18944), 3584),
    "down": ((3584,), 18944),
}
SIZES = (48, 64, 80, 96, 112, 128, 144, 288)
COLUMNS = (1024, 1280, 1792, 2560, 6400, 9472, 12800, 18944)
ROUNDS, CALLS = 5, 3


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=CUDA, dtype=torch.bfloat16) * scale


def milliseconds(call: Callable[[], object]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / CALLS


def weight_of(name: str) -> Quantised:
    part_rows, inputs = MATRICES[name]
    weight = Quantised(part_rows, inputs, device=CUDA, dtype=torch.bfloat16)
    for index, rows in enumerate(part_rows):
        weight.quantise(index, normal(rows, inputs, scale=0.02))
    return weight


def measure(name: str, rows: int) -> dict[str, Any]:
    """Milliseconds by slice size, forward and backward, and of the library alone."""
    weight = weight_of(name)
    outputs, inputs = weight.shape
    x, y, dense = normal(rows, inputs), normal(rows, outputs), weight.dense()
    rows_of, columns_of = "SLICE_BYTES", "COLUMN_SLICE_BYTES"
    forms: dict[str, tuple[str, Callable[[], object], Callable[[], object]]] = {
        "y = x W^T": (rows_of, lambda: weight.matmul(x), lambda: x @ dense.T),
        "dx = dy W": (columns_of, lambda: weight.matmul_transposed(y), lambda: y @ dense),
        "dx += dy W": (
            columns_of,
            lambda: weight.add_matmul_transposed(x, y),
            lambda: x.addmm_(y, dense),
        ),
    }
    found: dict[str, Any] = {"matrix": name, "rows": rows}
    for form, (constant, call, library) in forms.items():
        times: dict[str, list[float]] = {"library": [], **{f"{size} MiB": [] for size in SIZES}}
        for round_number in range(ROUNDS + 1):
            some = {"library": milliseconds(library)}
            for size in SIZES:
                setattr(quantised, constant, size * 2**20)
                some[f"{size} MiB"] = milliseconds(call)
            if round_number:
                for key, value in some.items():
                    times[key].append(value)
            x.normal_()
            y.normal_()
        found[form] = {key: round(statistics.median(values), 3) for key, values in times.items()}
    return found


def plain(name: str, rows: int) -> dict[str, Any]:
    """Milliseconds of products with a plain matrix, whole and by parts of the result."""
    part_rows, inputs = MATRICES[name]
    outputs = sum(part_rows)
    x, y, weight = normal(rows, inputs), normal(rows, outputs), normal(outputs, inputs, scale=0.02)
    forms = {
        "y = x W^T": (y, x, weight.T, 0.0),
        "y += x W^T": (y, x, weight.T, 1.0),
        "dx = dy W": (x, y, weight, 0.0),
        "dx += dy W": (x, y, weight, 1.0),
    }

    def product(form: str, columns: int) -> None:
        to, left, right, beta = forms[form]
        for first in range(0, right.shape[1], columns):
            here = slice(first, first + columns)
            torch.addmm(to[:, here], left, right[:, here], beta=beta, out=to[:, here])

    found: dict[str, Any] = {"plain matrix": name, "rows": rows}
    for form, (to, _, _, _) in forms.items():
        width = to.shape[1]
        steps = [width, *(step for step in COLUMNS if step < width)]
        times: dict[int, list[float]] = {step: [] for step in steps}
        for round_number in range(ROUNDS + 1):
            for step in steps:
                took = milliseconds(lambda form=form, step=step: product(form, step))
                if round_number:
                    times[step].append(took)
            x.normal_()
            y.normal_()
        found[form] = {step: round(statistics.median(some), 3) for step, some in times.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[6399, 8192])
    asked = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": describe_environment(),
    }
    result["lines"] = [measure(name, rows) for rows in asked.rows for name in MATRICES]
    result["lines"] += [plain(name, rows) for rows in asked.rows for name in MATRICES]
    for line in result["lines"]:
        print(line, flush=True)
    asked.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        main()
