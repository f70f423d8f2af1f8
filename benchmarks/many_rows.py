"""A decode step of many rows on a GPU: in how many lanes it is fastest, and what it consists of.

    python -m benchmarks.many_rows OUTPUT.json [--models qwen2.5-0.5b ...] [--rows 128 256]

Random weights of real shapes; a step runs from the rows' tokens to the next ones in a captured
graph, over random keys and values of --context tokens a row (768: a prompt of 256 and half of 1,024
new tokens), none shared. Forms: the layers' own forward (one lane), and two to four lanes
(models/lanes.py) with norms and SwiGLU launched in turn or early. Before anything is timed, logits
of each form are held against those of a float32 model on the same keys and values, and replays with
other tokens must give the bits of the same form without a graph. The kernels are those of a profile
of one replay in one lane; a step reads more than the L2 cache holds, so nothing is left there from
the step before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode_step import Step, captured, microseconds
from benchmarks.launches import counted
from benchmarks.rollouts import environment
from benchmarks.shapes import build
from sparring.models import lanes
from sparring.models.few_rows import step_logits
from sparring.models.lanes import LaneRule, lane_streams
from sparring.models.transformer import Decoder, new_kv_pool

FORMS = {
    "one lane": (1, False),
    "two lanes": (2, False),
    "two lanes, early": (2, True),
    "three lanes, early": (3, True),
    "four lanes, early": (4, True),
}


class LaneStep(Step):
    """A step whose lanes run on streams of their own."""

    beside: tuple[torch.cuda.Stream, ...] = ()

    def logits(self) -> torch.Tensor:
        """Logits [R, V]."""
        given = self.tokens_R, self.positions_R, self.layout, self.pool
        with torch.no_grad():
            return step_logits(self.model, *given, adapter=None, beside=self.beside)


@contextmanager
def form_of_step(step: LaneStep, num_lanes: int, is_early: bool) -> Iterator[None]:
    """The step is computed in so many lanes."""
    arch = step.model.capability.arch
    kept = lanes.RULES.get(arch), lanes.EARLY
    lanes.RULES[arch] = LaneRule(1, 1 << 40, num_lanes)
    lanes.EARLY = is_early
    step.beside = lane_streams(step.model, len(step.tokens_R), None)
    try:
        yield
    finally:
        del lanes.RULES[arch]
        if kept[0] is not None:
            lanes.RULES[arch] = kept[0]
        lanes.EARLY = kept[1]


def wide_logits(step: LaneStep) -> torch.Tensor:
    """The logits of a float32 model over the same keys and values."""
    model, pool = step.model, step.pool
    wide = Decoder(model.config, device=model.device, dtype=torch.float32)
    wide.load_state_dict({k: v.float() for k, v in model.state_dict().items()})
    twin = LaneStep.__new__(LaneStep)
    twin.__dict__ |= step.__dict__
    twin.model, twin.beside = wide.requires_grad_(False), ()
    shape = pool.data.shape
    twin.pool = new_kv_pool(model.config, shape[1], shape[4], torch.float32, model.device)
    twin.pool.data.copy_(pool.data)
    return twin.logits()


def checked(step: LaneStep, want: torch.Tensor | None, replays: int = 20) -> dict[str, float]:
    """Distance from the float32 logits, and how many replays differ from the same without graph."""
    found: dict[str, float] = {}
    if want is not None:
        gap = (step.logits().double() - want.double()).norm() / want.double().norm()
        found["relative error"] = gap.item()
    graph, out = captured(step.logits)
    wrong = 0
    for _ in range(replays):
        step.tokens_R.random_(0, step.model.config.vocab_size)
        out.fill_(float("nan"))
        graph.replay()
        wrong += int((out != step.logits()).any())
    return found | {"replays that differ": wrong, "of": replays}


def profiled(graph: torch.cuda.CUDAGraph) -> list[tuple[str, int, float]]:
    """(kernel, launches, microseconds in all) of one replay, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    rows = [(e.key[:90], e.count, e.self_device_time_total) for e in profile.key_averages()]
    return sorted((row for row in rows if row[2]), key=lambda row: -row[2])[:18]


def measure(name: str, num_rows: int, context: int, *, checks: bool) -> dict[str, Any]:
    """Every form of a model's step of so many rows."""
    model = build(name, lora_rank=0)
    model.requires_grad_(False)
    step = LaneStep(model, num_rows, context)
    want = wide_logits(step) if checks else None
    tokens = step.tokens_R.clone()
    out: dict[str, Any] = {}
    for told, (num_lanes, is_early) in FORMS.items():
        step.tokens_R.copy_(tokens)
        with form_of_step(step, num_lanes, is_early):
            found: dict[str, Any] = checked(step, want) if checks else {}
            graph, _ = captured(step)
            found |= {"us": microseconds(graph, 20), **counted(graph)}
            print(f"{name} {num_rows} rows, {told}: {found}", flush=True)
            if num_lanes == 1:
                found["kernels"] = profiled(graph)
                for row in found["kernels"]:
                    print("     ", *row, flush=True)
            out[told] = found
            del graph
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="*", default=["qwen2.5-0.5b", "qwen2.5-1.5b"])
    parser.add_argument("--rows", nargs="*", type=int, default=[256, 128])
    parser.add_argument("--context", type=int, default=768)
    parser.add_argument("--no-checks", action="store_true", help="times alone")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(), "context": arguments.context}
    for name in arguments.models:
        for rows in arguments.rows:
            result[f"{name} {rows}"] = measure(
                name, rows, arguments.context, checks=not arguments.no_checks
            )
            torch.cuda.empty_cache()
            arguments.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
