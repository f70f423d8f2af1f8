"""Products of a decode step joined with the norm or the gate behind them, against the library's.

    python -m benchmarks.split_product OUTPUT.json [--models qwen2.5-7b ...] [--rows 128]

For o, down, gate and up of each model: the library's product and the launch that follows it (norm
with the residual, SwiGLU), and both as kernels/split_product.py computes them in several forms. In
captured graphs, over as many weights as the L2 cache cannot hold, microseconds a pair. Before
anything is timed, each form is held against float64 on outputs that begin as NaN. Then whole steps
(benchmarks/many_rows.py) with the fastest form of each product, in one lane and in two, beside the
layers' own forward. --no-search: the table that ships is measured, nothing is tried.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.decode_step import captured, microseconds
from benchmarks.launches import counted
from benchmarks.many_rows import LaneStep, form_of_step
from benchmarks.rollouts import environment
from benchmarks.shapes import build
from sparring.kernels import split_product as kernels
from sparring.kernels.norm import add_rms_norm
from sparring.kernels.split_product import SplitForm
from sparring.kernels.swiglu import swiglu
from sparring.models.transformer import Decoder

CACHE_BYTES = 200 << 20
"""Weights that a graph goes through, so that none is found in the L2 cache."""
PROGRAMS = 132
EPS = 1e-6


def split_forms(num_outputs: int, num_inputs: int, num_rows: int) -> list[SplitForm]:
    """Tiles, and pieces of k that fill the card once with one program or two a multiprocessor."""
    most = max(1, num_inputs // kernels.BLOCK_K // 3)
    sizes = [(128, 128, 8, 6, 1), (128, 128, 8, 3, 2), (64, 128, 8, 6, 1), (64, 128, 4, 4, 2)]
    if num_rows > 128:
        sizes += [(128, 256, 8, 4, 1), (64, 256, 8, 5, 1)]
    found = []
    for block_n, block_t, num_warps, num_stages, each in sizes:
        tiles = -(-num_outputs // block_n) * -(-num_rows // block_t)
        segments = min(most, max(1, PROGRAMS * each // tiles))
        found.append(SplitForm(block_n, block_t, segments, num_warps, num_stages))
        if segments > 3:
            found.append(SplitForm(block_n, block_t, segments // 2, num_warps, num_stages))
    return found


def gated_forms(num_rows: int) -> list[SplitForm]:
    """Tiles of a gated product; block_n counts gates."""
    found = [SplitForm(64, 128, 1, 8, 6), SplitForm(64, 128, 1, 8, 3), SplitForm(32, 128, 1, 4, 4)]
    return found + [SplitForm(64, 256, 1, 8, 4)] * (num_rows > 128)


def layer_shapes(model: Decoder) -> dict[str, tuple[int, int]]:
    """[N, K] of the products that can be joined."""
    layer = model.layers[0]
    return {
        which: tuple(getattr(layer, which).base.shape) for which in ("output", "down", "gate_up")
    }


class Pair:
    """A product and what follows it, over several weights."""

    def __init__(self, which: str, shape: tuple[int, int], num_rows: int) -> None:
        self.which, (outputs, columns) = which, shape
        count = max(2, -(-CACHE_BYTES // (2 * outputs * columns)))
        self.x = torch.randn(num_rows, columns, device="cuda").bfloat16()
        self.weights = [
            (torch.randn(outputs, columns, device="cuda") / columns**0.5).bfloat16()
            for _ in range(count)
        ]
        self.residual = torch.randn(num_rows, outputs, device="cuda").bfloat16()
        self.gain = 1 + 0.1 * torch.randn(outputs, device="cuda").bfloat16()

    def once(self, weight: Tensor, form: SplitForm | None) -> Tensor:
        if self.which == "gate_up":
            if form is None:
                return swiglu(F.linear(self.x, weight))
            return kernels.gated_product(self.x, weight, None, form, overlaps=True)
        if form is None:
            added = F.linear(self.x, weight)
            return add_rms_norm(added, self.residual, self.gain, EPS)[0]
        parts = kernels.split_product(self.x, weight, form, overlaps=True)
        given = parts, None, self.residual, self.gain, EPS
        return kernels.add_norm_of_parts(*given, overlaps=True)[0]

    def all(self, form: SplitForm | None) -> Callable[[], Tensor]:
        def call() -> Tensor:
            for weight in self.weights:
                out = self.once(weight, form)
            return out

        return call

    def error(self, form: SplitForm | None) -> float:
        """Relative distance from float64, memory that is handed out beginning as NaN."""
        weight = self.weights[0]
        y = (self.x.double() @ weight.double().T).bfloat16()
        if self.which == "gate_up":
            half = y.shape[1] // 2
            want = F.silu(y[:, :half].double()) * y[:, half:].double()
        else:
            total = (y + self.residual).double()
            want = total / (total.square().mean(1, keepdim=True) + EPS).sqrt() * self.gain.double()
        empty = torch.empty

        def poisoned(*size: Any, **more: Any) -> Tensor:
            out = empty(*size, **more)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        torch.empty = poisoned  # type: ignore[assignment]
        try:
            got = self.once(weight, form).double()
        finally:
            torch.empty = empty
        return ((got - want).norm() / want.norm()).item()


def searched(which: str, shape: tuple[int, int], num_rows: int) -> tuple[SplitForm | None, Any]:
    """The fastest form of a product, None for the library's, and all that were tried."""
    pair = Pair(which, shape, num_rows)
    tried = gated_forms(num_rows) if which == "gate_up" else split_forms(*shape, num_rows)
    found = []
    with torch.no_grad():
        for form in [None, *tried]:
            error = pair.error(form)
            assert error < 0.01, f"{which} {shape} {num_rows} rows, {form}: error {error}"
            graph, _ = captured(pair.all(form))
            each = microseconds(graph, 10) / len(pair.weights)
            found.append({"us": each, "form": str(form), "error": error})
            print(f"   {which} {shape}, {num_rows} rows: {each:.2f} us, {form}", flush=True)
    best = min(range(len(found)), key=lambda i: found[i]["us"])
    return [None, *tried][best], found


def whole_steps(step: LaneStep) -> dict[str, Any]:
    """A step in one lane and in two, with the table as it is."""
    out: dict[str, Any] = {}
    for told, form in {"one lane": (1, False), "two lanes": (2, False)}.items():
        with form_of_step(step, *form):
            graph, _ = captured(step)
            out[told] = {"us": microseconds(graph, 20), **counted(graph)}
        print(f"  {told}: {out[told]}", flush=True)
    return out


def measure(name: str, num_rows: int, *, searches: bool) -> dict[str, Any]:
    """Forms of a model's products, and its steps without and with them."""
    model = build(name, lora_rank=0)
    model.requires_grad_(False)
    step, arch = LaneStep(model, num_rows, 768), model.capability.arch
    shipped = kernels.FORMS.pop(arch, {})
    print(f"{name} {num_rows} rows, the library's products", flush=True)
    out: dict[str, Any] = {"library": whole_steps(step)}
    kernels.FORMS[arch] = dict(shipped)
    if searches:
        out["products"] = {}
        for which, shape in layer_shapes(model).items():
            best, out["products"][which] = searched(which, shape, num_rows)
            kernels.FORMS[arch].pop(shape, None)
            if best is not None:
                kernels.FORMS[arch][shape] = ((num_rows // 2, num_rows, best),)
    print(f"{name} {num_rows} rows, joined: {kernels.FORMS[arch]}", flush=True)
    out["joined"] = whole_steps(step)
    kernels.FORMS[arch] = shipped
    return out


def compile_part(part: int, parts: int) -> None:
    """Every nth form on a small weight, so that they are compiled."""
    forms = {form for rows in (128, 256) for form in split_forms(1024, 512, rows)}
    both = [("down", form) for form in forms] + [("gate_up", form) for form in gated_forms(256)]
    seen = {(which, f.block_n, f.block_t, f.num_warps, f.num_stages): f for which, f in both}
    for (which, *_), form in sorted(seen.items(), key=str)[part::parts]:
        with torch.no_grad():
            Pair(which, (1024, 512), 128).all(form)()
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="*", default=["qwen2.5-7b", "qwen2.5-1.5b"])
    parser.add_argument("--rows", nargs="*", type=int, default=[128])
    parser.add_argument("--no-search", action="store_true")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("PART", "PARTS"))
    parser.add_argument("--processes", type=int, default=8, help="that compile; 0: it was done")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_part(*arguments.compile)
        return
    command = [sys.executable, "-m", "benchmarks.split_product", "-", "--compile"]
    parts = arguments.processes
    compilers = [subprocess.Popen([*command, str(i), str(parts)]) for i in range(parts)]
    assert not any(process.wait() for process in compilers), "a form does not compile"
    result: dict[str, Any] = {"environment": environment()}
    for name in arguments.models:
        for rows in arguments.rows:
            result[f"{name} {rows}"] = measure(name, rows, searches=not arguments.no_search)
            torch.cuda.empty_cache()
            arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
