"""A decode step of few rows on a GPU: launches, microseconds a launch, and which form is fastest.

    python -m benchmarks.decode_step OUTPUT.json [--models qwen2.5-1.5b ...] [--rows 8 16 32]
    python -m benchmarks.decode_step OUTPUT.json --search       the form of each product

Random weights of real shapes. A step runs from the rows' tokens to the next ones in a captured
graph, at a context of 512 tokens in keys and values that are random; forms of it: "library" (the
layers' own forward), "in turn" (models/few_rows.py, launches one after the other), "overlapped"
(the same, launches beginning while the one before runs). Before anything is timed, logits are held
against a float32 model's, and replays with other tokens must give the same bits in all forms. Nodes
and edges are counted in the captured graph. A step reads all weights, so nothing of it is in the L2
cache from the step before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.launches import counted
from benchmarks.rollouts import environment
from benchmarks.shapes import SHAPES, build
from sparring.kernels import (
    few_rows,
    few_rows_attention,
    paged_attention,
)
from sparring.kernels.few_rows import Form, Own
from sparring.kernels.few_rows_hopper import Ring
from sparring.kernels.few_rows_strips import Strips
from sparring.kernels.few_rows_tiles import Tiles
from sparring.kernels.matmul import Tile
from sparring.kernels.sampling import draw_tokens
from sparring.layout import DecodeLayout
from sparring.models.few_rows import step_logits
from sparring.models.transformer import Decoder, new_kv_pool
from sparring.rollout.sampler import Sampling, draw_rules

CONTEXT = 512
BLOCK_SIZE = 64
FORMS = ("library", "in turn", "overlapped")


@contextmanager
def form_of_step(model: Decoder, name: str) -> Iterator[None]:
    """The model computes few rows in that form."""
    kept = few_rows.PDL_ARCH
    model.max_folded_rows = 0 if name == "library" else few_rows.MAX_ROWS
    few_rows.PDL_ARCH = kept if name == "overlapped" else 1000
    try:
        yield
    finally:
        few_rows.PDL_ARCH = kept


class Step:
    """One decode step of R rows over random keys and values, from tokens_R to drawn tokens."""

    def __init__(self, model: Decoder, num_rows: int, context: int = CONTEXT) -> None:
        config, device = model.config, model.device
        each = context // BLOCK_SIZE
        self.model = model
        self.pool = new_kv_pool(config, num_rows * each + 1, BLOCK_SIZE, model.dtype, device)
        self.pool.data.normal_(0.0, 0.5)
        tables = torch.arange(num_rows * each, device=device, dtype=torch.int32) + 1
        self.layout = DecodeLayout(
            kv_lengths_R=torch.full((num_rows,), context, dtype=torch.int32, device=device),
            block_tables_RN=tables.view(num_rows, each),
            slots_R=(tables.view(num_rows, each)[:, -1].long() + 1) * BLOCK_SIZE - 1,
            block_size=BLOCK_SIZE,
            max_kv_length=context,
        )
        self.tokens_R = torch.randint(config.vocab_size, (num_rows,), device=device)
        self.positions_R = torch.full((num_rows,), context - 1, device=device)
        self.ids_R2 = torch.arange(2 * num_rows, device=device).view(num_rows, 2)
        none = torch.empty(0, dtype=torch.int64, device=device)
        self.rules = draw_rules(Sampling(max_completion_tokens=1), num_rows, none, device)

    def logits(self) -> torch.Tensor:
        """Logits [R, V]."""
        with torch.no_grad():
            return step_logits(
                self.model, self.tokens_R, self.positions_R, self.layout, self.pool, adapter=None
            )

    def __call__(self) -> None:
        self.drawn = draw_tokens(self.logits(), self.ids_R2, self.positions_R, self.rules)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of the call, which has run before, and what it gives."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.no_grad(), torch.cuda.graph(graph):
        out = call()
    graph.instantiate()
    return graph, out


def microseconds(graph: torch.cuda.CUDAGraph, replays: int = 40) -> float:
    """The median of five runs of so many replays, a replay."""
    times = []
    for _ in range(6):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / replays)
    return sorted(times[1:])[2]


def errors(model: Decoder, step: Step) -> dict[str, float]:
    """Relative distance of the forms' logits from a float32 model's, and of each other."""
    found = {}
    for name in FORMS:
        with form_of_step(model, name):
            found[name] = step.logits().double()
    wide = Decoder(model.config, device=model.device, dtype=torch.float32)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    wide.requires_grad_(False)
    twin = Step.__new__(Step)
    twin.__dict__ |= step.__dict__
    twin.model = wide
    twin.pool = new_kv_pool(
        model.config, step.pool.data.shape[1], BLOCK_SIZE, torch.float32, model.device
    )
    twin.pool.data.copy_(step.pool.data)
    want = twin.logits().double()
    out = {name: ((got - want).norm() / want.norm()).item() for name, got in found.items()}
    print("  relative error:", out, flush=True)
    return out


def same_bits(model: Decoder, step: Step, replays: int) -> dict[str, int]:
    """Of so many replays with other tokens, how many differ from the overlapped form's."""
    made = {}
    for name in FORMS:
        with form_of_step(model, name):
            made[name] = captured(step.logits)
    others = [name for name in FORMS if name != "overlapped"]
    wrong = {n: torch.zeros((), dtype=torch.int64, device=model.device) for n in others}
    for _ in range(replays):
        step.tokens_R.random_(0, model.config.vocab_size)
        for graph, out in made.values():
            out.fill_(float("nan"))
            graph.replay()
        for name in others:
            wrong[name] += (made[name][1] != made["overlapped"][1]).any()
    return {name: int(count) for name, count in wrong.items()} | {"of": replays}


def a_layer(graph: torch.cuda.CUDAGraph, num_layers: int) -> list[tuple[str, float, float, float]]:
    """(kernel, microseconds from the launch before's end to its own, its duration, how long before
    that end it began), of each launch of a layer, the middle of the layers.
    """
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    events = sorted(profile.events(), key=lambda e: e.time_range.end)
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in events]
    starts = [i for i, name in enumerate(names) if name in ("_attention_kernel", "_decode_kernel")]
    assert len(starts) == num_layers, "one launch of attention a layer"
    each = starts[1] - starts[0]
    rows = []
    for k in range(each):
        spans = []
        for start in starts[2 : num_layers - 2]:
            before, here = events[start + k - 1].time_range, events[start + k].time_range
            spans.append((here.end - before.end, here.end - here.start, before.end - here.start))
        middle = [sorted(values)[len(spans) // 2] for values in zip(*spans, strict=True)]
        rows.append((names[starts[2] + k][:40], *(round(value, 2) for value in middle)))
    return rows


@contextmanager
def knobs(model: Decoder, chosen: dict[str, Any]) -> Iterator[None]:
    """The chain's attention, and products that are left to the library, changed for a while."""
    kept_forms = few_rows.FORMS, few_rows.RINGS
    keys, pairs = paged_attention.ASKED_BYTES, few_rows_attention.MAX_PAIRS
    paged_attention.ASKED_BYTES = chosen.get("keys", keys)
    few_rows_attention.MAX_PAIRS = chosen.get("pairs", pairs)
    left = {shapes_of(model)[which] for which in chosen.get("library", ())}
    arch = model.capability.arch
    few_rows.FORMS = {arch: {k: v for k, v in kept_forms[0].get(arch, {}).items() if k not in left}}
    few_rows.RINGS = {k: v for k, v in kept_forms[1].items() if k not in left}
    try:
        yield
    finally:
        few_rows.FORMS, few_rows.RINGS = kept_forms
        paged_attention.ASKED_BYTES, few_rows_attention.MAX_PAIRS = keys, pairs


def variants_of(num_rows: int) -> dict[str, dict[str, Any]]:
    """What is varied of an overlapping step."""
    products = ("qkv", "output", "gate_up", "down", "head")
    found: dict[str, dict[str, Any]] = {
        "keys after their turn": {"pairs": 0},
        "and not asked for": {"pairs": 0, "keys": 0},
        "library's products": {"library": products},
    }
    if num_rows > 32:
        return found
    return found | {f"library's {which}": {"library": (which,)} for which in products}


def steps(name: str, rows: list[int], replays: int) -> dict[str, Any]:
    """Every form of a model's step at some numbers of rows."""
    model = build(name, lora_rank=0)
    model.requires_grad_(False)
    result: dict[str, Any] = {}
    for num_rows in rows:
        step, out = Step(model, num_rows), {}
        if num_rows == rows[0] and replays >= 200:
            out["relative error"] = errors(model, step)
            torch.cuda.empty_cache()
        wrong = same_bits(model, step, replays)
        out["replays that differ"] = wrong
        print(f"{name} {num_rows} rows: replays that differ: {wrong}", flush=True)
        for each in FORMS:
            with form_of_step(model, each):
                graph, _ = captured(step)
            counts, time = counted(graph), microseconds(graph)
            out[each] = {"us": time, "us a launch": time / counts["nodes"], **counts}
            print(f"  {each}: {out[each]}", flush=True)
            if replays >= 200 and each != "library":
                out[each]["a layer"] = a_layer(graph, len(model.layers))
                print("     ", *out[each]["a layer"], sep="\n      ", flush=True)
            del graph
        for told, chosen in variants_of(num_rows).items():
            with knobs(model, chosen), form_of_step(model, "overlapped"):
                out[told] = microseconds(captured(step)[0], 20)
            print(f"  {out[told]:.1f} us: {told}", flush=True)
        result[str(num_rows)] = out
    return result


def rings_of(num_rows: int) -> dict[str, Form | Own | None]:
    """Where the search begins."""
    if num_rows > 64:
        tiles = Tiles(32, 9) if num_rows <= 128 else Tiles(64, 6)
        return {"qkv": tiles, "output": tiles, "gate_up": None, "down": None, "head": None}
    if num_rows <= 8:
        return {
            "qkv": Strips(128, 6),
            "output": Strips(96, 6),
            "gate_up": Strips(264, 8),
            "down": Ring(264, 128, 4),
            "head": Ring(264, 128, 4),
        }
    return {
        "qkv": None,
        "output": Ring(96, 128, 4),
        "gate_up": Form(Tile(64, 32, 4, 3), folds_norm=False),
        "down": Ring(132, 128, 5),
        "head": Ring(264, 128, 4),
    }


def candidates(which: str, num_rows: int) -> list[Form | Own | None]:
    """Forms that are tried for a product; None: the library's."""
    few = num_rows <= 8
    if num_rows > 64:
        depths = ((16, 10), (32, 4), (32, 7), (32, 9), (64, 3), (64, 6), (64, 7))
        tiles = [Tiles(*each) for each in depths]
        return [None, *tiles] if which in ("qkv", "output") else [None]
    tried: dict[str, list[Form | Own | None]] = {
        "qkv": [Strips(128, 6), Strips(128, 4), Ring(96, 128, 4)],
        "output": [Strips(96, 6), Ring(96, 128, 4), Ring(72, 128, 4)],
        "gate_up": [
            *(Strips(n, 8) for n in (264, 224)),
            *(Strips(264, s) for s in (6, 10)),
            *(Strips(n, 6) for n in (280, 374)),
            *(Strips(264, 8, ahead) for ahead in (1, 2, 3)),
            Strips(224, 8, 2), Strips(132, 12), Strips(132, 12, 4),
            Ring(264, 64, 4, 2), Ring(132, 128, 4, 2), Ring(140, 64, 6, 2),
        ],
        "down": [
            *(Ring(n, 128, s) for n, s in ((264, 4), (240, 4), (240, 5), (336, 4), (168, 5))),
            Ring(120, 128, 8), Ring(120, 256, 4),
        ],
        "head": [None, Ring(264, 128, 4), Ring(264, 256, 3), Strips(264, 8, 1)],
    } if few else {
        "qkv": [None, Ring(252, 128, 4), Ring(144, 128, 4), Ring(132, 64, 6, 2)],
        "output": [Ring(96, 128, 4), Ring(112, 128, 4), Ring(224, 128, 3)],
        "gate_up": [
            Form(Tile(64, 32, 4, 3), folds_norm=False), Ring(264, 64, 4, 2), Ring(296, 64, 3, 2),
            Ring(132, 128, 4, 2), Ring(148, 64, 6, 2), Ring(132, 64, 7, 2),
        ],
        "down": [
            *(Ring(n, 128, s) for n, s in ((132, 5), (224, 4), (112, 6), (264, 4), (168, 4))),
            Ring(264, 64, 5, 2),
        ],
        "head": [None, Ring(264, 128, 4)],
    }  # fmt: skip
    return tried[which]


def shapes_of(model: Decoder) -> dict[str, tuple[int, int]]:
    """[N, K] of each product."""
    layer = model.layers[0]
    kinds = ("qkv", "output", "gate_up", "down")
    found = {which: tuple(getattr(layer, which).base.shape) for which in kinds}
    return found | {"head": tuple(model.head.shape)}


def told_form(form: Form | Own | None) -> str:
    """A form in a line."""
    if form is None:
        return "library"
    if isinstance(form, Own):
        return str(form)
    apart = "" if form.folds_norm else ", norm apart"
    return f"{str(form.tile)[5:-1]} segments {form.segments}{apart}"


def use_forms(
    model: Decoder, chosen: dict[tuple[int, int], Form | Own | None], num_rows: int
) -> None:
    """Products [N, K] take these forms, all others the library's."""
    rows = max(8, 1 << (num_rows - 1).bit_length())
    few_rows.FORMS = {
        model.capability.arch: {k: v for k, v in chosen.items() if isinstance(v, Form)}
    }
    few_rows.RINGS = {k: {rows: v} for k, v in chosen.items() if isinstance(v, Own)}


def search(name: str, num_rows: int, part: int, parts: int) -> dict[str, Any]:
    """One product after the other: the form with which the whole step is fastest.

    With parts: only compiles every nth variant, over two layers.
    """
    if parts:
        SHAPES[name] = SHAPES[name] | {"num_hidden_layers": 2}
    model = build(name, lora_rank=0)
    model.requires_grad_(False)
    step, shapes = Step(model, num_rows), shapes_of(model)
    forms: dict[str, Form | Own | None] = rings_of(num_rows)
    result: dict[str, Any] = {}

    def use(chosen: dict[str, Form | Own | None]) -> None:
        use_forms(model, {shapes[k]: v for k, v in chosen.items()}, num_rows)

    if parts:
        variants = [forms | {k: form} for k in forms for form in candidates(k, num_rows)]
        for variant in variants[part::parts]:
            use(variant)
            with form_of_step(model, "overlapped"):
                step.logits()
        return result
    with form_of_step(model, "library"):
        result["library"] = microseconds(captured(step)[0])
    print(f"{name} {num_rows} rows, library: {result['library']:.1f} us", flush=True)
    use(forms)
    with form_of_step(model, "overlapped"):
        result["rings"] = microseconds(captured(step)[0])
    print(f"{name} {num_rows} rows, rings: {result['rings']:.1f} us", flush=True)
    for which in ("gate_up", "down", "qkv", "output", "head"):
        found = []
        for form in candidates(which, num_rows):
            use(forms | {which: form})
            with form_of_step(model, "overlapped"):
                found.append((microseconds(captured(step)[0], 10), told_form(form), form))
        found.sort(key=lambda one: one[0])
        forms[which] = found[0][2]
        result[which] = [one[:2] for one in found]
        for time, what, _ in found:
            print(f"   {which}: {time:.1f} us a step, {what}")
        sys.stdout.flush()
    use(forms)
    for each in ("in turn", "overlapped"):
        with form_of_step(model, each):
            graph, _ = captured(step)
            result[each] = {"us": microseconds(graph), **counted(graph)}
    for each in ("in turn", "overlapped"):
        with form_of_step(model, each):
            result[f"a layer {each}"] = a_layer(captured(step)[0], len(model.layers))
        print(f"   {each}: {result[each]}", *result[f"a layer {each}"], sep="\n     ", flush=True)
    result["kept"] = {k: told_form(form) for k, form in forms.items()}
    result["replays that differ"] = same_bits(model, step, 200)
    logits = {}
    for each in ("library", "overlapped"):
        with form_of_step(model, each):
            logits[each] = step.logits().double()
    gap = (logits["library"] - logits["overlapped"]).norm() / logits["library"].norm()
    result["distance from the library"] = gap.item()
    for key in ("kept", "replays that differ", "distance from the library"):
        print("  ", key, result[key], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="*", default=["qwen2.5-1.5b", "qwen2.5-7b"])
    parser.add_argument("--rows", nargs="*", type=int, default=[8, 16, 32])
    parser.add_argument("--replays", type=int, default=1000, help="that must give the same bits")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--compile", nargs=2, type=int, metavar=("PART", "PARTS"))
    parser.add_argument(
        "--processes", type=int, default=12, help="that compile before timing; 0: it was done"
    )
    arguments = parser.parse_args()
    if arguments.compile:
        for name in arguments.models:
            for num_rows in arguments.rows:
                search(name, num_rows, *arguments.compile)
        return
    result: dict[str, Any] = {"environment": environment()}
    for name in arguments.models:
        if arguments.search:
            command = [sys.executable, "-m", "benchmarks.decode_step", "-", "--models", name]
            command += ["--rows", *map(str, arguments.rows), "--compile"]
            compilers = [
                subprocess.Popen([*command, str(i), str(arguments.processes)])
                for i in range(arguments.processes)
            ]
            codes = [process.wait() for process in compilers]
            assert not any(codes), "a variant does not compile"
            result[name] = {n: search(name, n, 0, 0) for n in arguments.rows}
        else:
            result[name] = steps(name, arguments.rows, arguments.replays)
        arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
