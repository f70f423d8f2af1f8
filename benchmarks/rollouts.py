"""Rollouts and whole GRPO steps on a GPU: tokens a second, seconds, memory, share of the limit.

    python -m benchmarks.rollouts OUTPUT.json [ROW ...]       without rows: all of them
    python -m benchmarks.rollouts OUTPUT.json --list          their names
    python -m benchmarks.rollouts OUTPUT.json [ROW ...] --tiny      that they run, on a CPU

The rows are those of rollout_rows.py. Rows of one model run one after another in a process of their
own; a row's peak is the largest reserved memory since its engine was made. Random weights of real
shapes, distinct random prompts, fixed output lengths unless the row says otherwise, temperature 1
with the log-probability of every token. Tokens a second are output tokens over wall time, prefill
included; the best of three runs after one that compiles and captures (of 20 tokens a completion),
all reported.

Ragged rows run with many buckets of rows, and the seconds in which a graph was captured are left
out of their rates (`capture`, in each run). Their rate is compared with that of fixed lengths at
the same mean rows in flight, all at once, with the same mean prompt and completion. The quarter's
row has a quarter of the blocks that the same work takes at most where memory is no limit.

The limit is the formula of docs/benchmarks/README.md: weights read once a step, or arithmetic, or
the integer instructions of decoding four bits, whichever is more, and keys and values of the mean
context, at the bandwidth and matrix rate measured in the same process; of a ragged row, that of the
fixed lengths it is compared with; of a prefill, its arithmetic. A step is rollout, judging by
random advantages, training phase and wake-up.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import subprocess
import sys
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.launches import launches_a_step
from benchmarks.rollout_rows import (
    ROWS,
    Row,
    limits_of,
    prefill_seconds,
    prompts_of,
    same_rows,
    seconds_a_step,
    tiny,
)
from benchmarks.shapes import build
from sparring.algorithms.losses import dapo
from sparring.data.packing import pack_groups
from sparring.models.transformer import Decoder
from sparring.rollout.block_pool import blocks_for
from sparring.rollout.engine import KERNEL_BLOCK_SIZE, Engine
from sparring.rollout.sampler import Sampling
from sparring.train.optimizer import build_optimizer
from sparring.train.step import train_step
from sparring.types import Group, Prompt, Rollout

GIB = 2**30


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device reads and writes."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))


def matmul_rate() -> float:
    """FLOP a second of a bf16 product of 8192 cubed on random data."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / _median_seconds(lambda: a @ b)


def _median_seconds(call: Any, repeats: int = 12) -> float:
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return sorted(times)[repeats // 2]


def engine_for(
    row: Row, model: Decoder, prompts: list[Prompt], kv_bytes: int | None = None
) -> Engine:
    """An engine; by default with memory for every sequence at once, at its full length."""
    _, samples, _, _ = row.work
    limits = limits_of(row)
    block = KERNEL_BLOCK_SIZE
    tokens = sum(
        len(p.token_ids) + sum(n + block for n in line)
        for p, line in zip(prompts, limits, strict=True)
    ) + block * (len(prompts) + 2)
    longest = max(len(p.token_ids) for p in prompts) + max(map(max, limits))
    return Engine(
        model,
        kv_bytes=kv_bytes or tokens * row.kv_bytes_per_token(model),
        stop_ids=(),
        decode=lambda _: "",
        max_tokens=longest,
        max_running=min(row.max_running, len(prompts) * samples),
        cuda_graphs=row.cuda_graphs,
        steps_per_sync=row.steps_per_sync,
        caches_weights=row.caches_weights,
        kv_dtype=row.kv_dtype,
    )


def mismatch(model: Decoder, groups: list[Group]) -> dict[str, float]:
    """The trainer's log-probabilities against the sampler's, over the groups' completions."""
    ones = [torch.ones(len(group.rollouts)) for group in groups]
    batches = pack_groups(groups, ones, max_tokens=8192, temperature=1.0)
    gaps = []
    with torch.no_grad():
        for batch in batches:
            moved = {
                name: value.to(model.device) if isinstance(value, Tensor) else value
                for name in batch.__dataclass_fields__
                if (value := getattr(batch, name)) is not None
            }
            batch = replace(batch, **moved)
            logprobs = model.score(batch).logprobs_T
            mask = batch.loss_mask_T
            gaps.append((logprobs - batch.sampler_logprobs_T)[mask].double())
    gap = torch.cat(gaps)
    return {
        "mean": gap.abs().mean().item(),
        "max": gap.abs().max().item(),
        "kl": (gap.exp() - 1 - gap).mean().item(),
    }


def grouped(prompts: list[Prompt], rollouts: list[list[Rollout]]) -> list[Group]:
    return [
        Group(prompt=p, rollouts=tuple(r), rewards_G=torch.randn(len(r)), reward_parts={})
        for p, r in zip(prompts, rollouts, strict=True)
    ]


def memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    return {
        "peak reserved GiB": torch.cuda.max_memory_reserved() / GIB,
        "peak allocated GiB": torch.cuda.max_memory_allocated() / GIB,
        "device used GiB": (total - free) / GIB,
        "device used - reserved GiB": (total - free - reserved) / GIB,
    }


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def prepare(first: Row) -> dict[str, float]:
    """Sets the allocator up for the rows of a process; the card's measured ceilings."""
    if not torch.cuda.is_available():
        return {"bandwidth": 1e11, "matmul": 1e12}
    if first.kind == "step":  # as every run on a GPU does (train/plan_recipe.py)
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if first.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((first.cap_gib - 1.0) * GIB / total)
        return {"bandwidth": 4.26e12, "matmul": 801e12}  # measuring them takes more than the cap
    ceilings = {"bandwidth": copy_bandwidth(), "matmul": matmul_rate()}
    torch.cuda.empty_cache()
    return ceilings


def run_all(rows: dict[str, Row], output: Path) -> None:
    """Measures rows of one model in this process and writes them down as they come."""
    first = next(iter(rows.values()))
    ceilings = prepare(first)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(
        first.model, quantization=first.quantization, lora_rank=first.lora_rank, device=device
    )
    if not first.lora_rank:
        model.requires_grad_(False)
    found: dict[str, Any] = {}
    unlimited: dict[tuple[object, ...], dict[str, Any]] = {}
    for name, row in rows.items():
        try:
            found[name] = ceilings | Measurement(row, model, ceilings).run(unlimited)
            found[name] |= missed(row, found[name])
        except Exception as problem:  # noqa: BLE001 - one row must not lose the others
            found[name] = {"failed": repr(problem)[:2000] + traceback.format_exc()[-1500:]}
        output.write_text(json.dumps(found))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Measurement:
    """One row on a model: its engine, its runs, and what they gave."""

    def __init__(self, row: Row, model: Decoder, ceilings: dict[str, float]) -> None:
        self.row, self.model, self.ceilings = row, model, ceilings
        self.prompts = prompts_of(row, model.config.vocab_size)
        self.engine = engine_for(row, model, self.prompts)
        self.optimizer = None
        self.values: dict[str, float] = {}
        model.set_bitwise(row.bitwise)
        if row.kind == "step":
            model.set_checkpointing(row.checkpointing)
            self.optimizer = build_optimizer(
                model.trainable_parameters(),
                learning_rate=1e-6,
                num_steps=10,
                compute_dtype=model.dtype,
            )

    def once(self, row: Row, number: int, *, short: bool = False) -> tuple[dict[str, Any], Any]:
        """One rollout, or step, of the row's work: seconds and counts, and its groups.

        short: of at most 20 tokens a completion.
        """
        engine, is_own = self.engine, row is self.row
        prompts = self.prompts if is_own else prompts_of(row, self.model.config.vocab_size)
        limits = [[min(n, 20) if short else n for n in line] for line in limits_of(row)]
        captured = engine.graph_stats.seconds
        engine.weights_changed(policy_version=number)
        synchronize()
        start = time.perf_counter()
        rollouts = engine.generate(
            prompts,
            Sampling(max_completion_tokens=row.work[3]),
            num_samples=row.work[1],
            limits=limits,
        )
        synchronize()
        times: dict[str, Any] = {"rollout": time.perf_counter() - start}
        groups = grouped(prompts, rollouts)
        if self.optimizer is not None:
            self.train(groups)
            times["step"] = time.perf_counter() - start
        stats = engine.stats
        times |= {
            "prefill": stats.prefill_seconds,
            "decode": stats.decode_seconds,
            "capture": engine.graph_stats.seconds - captured,
            "tokens": stats.num_completion_tokens,
            "decode steps": stats.num_decode_steps,
            "mean rows": stats.mean_rows,
            "steps while some wait": stats.num_crowded_steps,
            "mean rows while some wait": stats.mean_crowded_rows,
            "preemptions": stats.num_preemptions,
            "recomputed tokens": stats.num_recomputed_tokens,
            "blocks": stats.num_blocks,
            "peak blocks": stats.peak_blocks,
        }
        return times, groups

    def train(self, groups: list[Group]) -> None:
        """The training phase of a step, on random advantages."""
        assert self.optimizer is not None, "the row is a step"
        self.engine.sleep()
        batches = pack_groups(
            groups,
            [torch.randn(len(group.rollouts)) + 0.1 for group in groups],
            max_tokens=self.row.micro_batch_tokens,
            temperature=1.0,
        )
        update = train_step(self.model, batches, dapo, self.optimizer, max_grad_norm=1.0)
        synchronize()
        self.values = dict(update.values)

    def run(self, unlimited: dict[tuple[object, ...], dict[str, Any]]) -> dict[str, Any]:
        """Measures the row; unlimited: runs where memory was no limit, by their work."""
        row = self.row
        work = row.work, row.caches_weights
        out: dict[str, Any] = {}
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        out["first"], _ = self.once(row, 0, short=True)
        if not row.runs:
            return out
        if row.kv_share < 1:
            if work not in unlimited:
                unlimited[work], _ = self.once(row, 0)
            out["without limit"] = unlimited[work]
            self.limit_blocks(unlimited[work])
        runs = []
        for number in range(1, 1 + row.runs):
            times, groups = self.once(row, number)
            runs.append(times)
        best = min(runs, key=lambda times: times["rollout"] - times["capture"])
        if row.kv_share == 1:
            unlimited[work] = best
        seconds = best["rollout"] - (best["capture"] if row.kind == "ragged" else 0.0)
        out |= {"runs": runs, "tokens/s": best["tokens"] / seconds, **memory()}
        out["best seconds"] = min(times.get("step", times["rollout"]) for times in runs)
        out["ms a step"] = 1e3 * best["decode"] / max(1, best["decode steps"])
        if row.kind == "prefill":
            out |= self.prefill(best["rollout"])
        elif row.kind == "ragged":
            out |= self.against_fixed(best, out)
        else:
            out |= self.share_of_limit(out["tokens/s"], row)
        out["graphs"] = asdict(self.engine.graph_stats)
        if self.values:
            out["values"] = self.values
        if row.kind == "rollout" and out["graphs"]["num_graphs"]:
            out["launches"] = self.launches(row, out["ms a step"])
        out["mismatch"] = mismatch(self.model, groups if row.kind == "prefill" else groups[:1])
        return out

    def launches(self, row: Row, ms_a_step: float) -> dict[str, float | str]:
        """Launches of a step of all rows, and microseconds each; or why they were not counted."""
        prompts, samples, prompt_tokens, output = row.work
        try:
            counts = launches_a_step(self.engine, prompts * samples, prompt_tokens + output)
        except (AttributeError, AssertionError, RuntimeError) as problem:
            return {"failed": repr(problem)[:500]}  # the row's other figures stand
        return counts | {"us each": 1e3 * ms_a_step / counts["nodes"]}

    def limit_blocks(self, whole: dict[str, Any]) -> None:
        """Another engine with the row's share of the blocks that the work takes at most.

        As one that has seen such work before: it knows how long completions are on average.
        """
        longest = blocks_for(self.engine.max_tokens, self.engine.block_size)
        self.renew(1 + max(longest, int(whole["peak blocks"] * self.row.kv_share)))
        prompts, samples, _, _ = self.row.work
        self.engine._mean_completion_tokens = whole["tokens"] / (prompts * samples)

    def renew(self, num_blocks: int | None) -> None:
        """Another engine, with so many blocks, in place of this one; None: with enough."""
        kv_bytes = None if num_blocks is None else num_blocks * self.engine.block_bytes
        self.engine.sleep()
        self.engine = engine_for(self.row, self.model, self.prompts, kv_bytes)

    def against_fixed(self, best: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
        """The rate against that of fixed lengths with the same mean rows, and of no limit."""
        lengths = [n for line in limits_of(self.row) for n in line]
        mean_prompt = sum(len(p.token_ids) for p in self.prompts) / len(self.prompts)
        fixed = same_rows(self.row, best["mean rows"], mean_prompt, sum(lengths) / len(lengths))
        if self.row.kv_share < 1:
            self.renew(None)
        self.once(fixed, 8, short=True)
        times, _ = self.once(fixed, 9)
        rate = times["tokens"] / (times["rollout"] - times["capture"])
        found = self.share_of_limit(out["tokens/s"], fixed) | {
            "fixed": times | {"work": fixed.work, "tokens/s": rate},
            "against fixed": out["tokens/s"] / rate,
            "recomputed share": best["recomputed tokens"] / best["tokens"],
            "rows while some wait": best["mean rows while some wait"] / self.engine.max_running,
        }
        if whole := out.get("without limit"):
            free = whole["tokens"] / (whole["rollout"] - whole["capture"])
            found["against no limit"] = out["tokens/s"] / free
        return found

    def share_of_limit(self, rate: float, row: Row) -> dict[str, float]:
        """row: the lengths and rows in flight that the limit is of."""
        bandwidth, matmul = self.ceilings["bandwidth"], self.ceilings["matmul"]
        prompts, samples, _, _ = row.work
        most = prompts * samples / seconds_a_step(row, self.model, bandwidth, matmul)
        return {"limit tokens/s": most, "share of limit": rate / most}

    def prefill(self, seconds: float) -> dict[str, float]:
        prompts, _, tokens, _ = self.row.work
        limit = prefill_seconds(
            self.row, self.model, self.ceilings["bandwidth"], self.ceilings["matmul"]
        )
        most = prompts * tokens / limit
        return {
            "prompt tokens/s": prompts * tokens / seconds,
            "limit prompt tokens/s": most,
            "share of limit": limit / seconds,
        }


def environment() -> dict[str, str]:
    import triton

    has_card = torch.cuda.is_available()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if has_card else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("rows", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--one", action="store_true", help="measure the rows in this process")
    parser.add_argument("--tiny", action="store_true", help="miniatures for a CPU: no figures")
    parser.add_argument("--runs", type=int, help="measured runs in place of the row's; 0: compile")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(ROWS))
        return
    rows = {name: ROWS[name] for name in arguments.rows or ROWS}
    if arguments.tiny:
        rows = {name: tiny(row) for name, row in rows.items()}
    if arguments.runs is not None:
        rows = {name: replace(row, runs=arguments.runs) for name, row in rows.items()}
    if arguments.one:
        run_all(rows, arguments.output)
        return
    result: dict[str, Any] = {"environment": environment(), "rows": {}}
    if arguments.tiny:
        result["tiny"] = True
    flags = ["--tiny"] * arguments.tiny
    if arguments.runs is not None:
        flags.append(f"--runs={arguments.runs}")
    part = arguments.output.with_suffix(".part")
    for _, group in itertools.groupby(rows, key=lambda name: process_of(rows[name])):
        names = list(group)
        part.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.rollouts", str(part), *names, "--one", *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        found = json.loads(part.read_text()) if part.exists() else {}
        for name in names:
            missing = {"failed": done.stderr[-3000:]}
            row = asdict(rows[name]) | found.get(name, missing)
            print(told(name, row), flush=True)
            result["rows"][name] = row
        arguments.output.write_text(json.dumps(result, indent=1))
    part.unlink(missing_ok=True)


def missed(row: Row, found: dict[str, Any]) -> dict[str, str]:
    """Why a row under a cap does not count; rows without one always do."""
    beside = found.get("device used - reserved GiB", 0.0)
    if not row.cap_gib or beside <= 1.0:
        return {}
    return {"missed": f"{beside:.2f} GiB beside the allocator's, at most 1.0 allowed"}


def process_of(row: Row) -> tuple[object, ...]:
    """Rows of which this is equal share a process."""
    return row.model, row.quantization, row.lora_rank, row.cap_gib, row.kind == "step"


def told(name: str, row: dict[str, Any]) -> str:
    """The row in one line."""
    if "failed" in row:
        return f"{name}: FAILED\n{row['failed'][-2500:]}"
    if not row["runs"]:
        return f"{name}: compiled and captured in {row['first']['rollout']:.1f} s"
    best = min(row["runs"], key=lambda times: times["rollout"])
    parts = [
        f"{row['tokens/s']:,.0f} tok/s, best {row['best seconds']:.3f} s of "
        f"{[round(times.get('step', times['rollout']), 3) for times in row['runs']]}",
        f"{row['ms a step']:.2f} ms a step, mean rows {best['mean rows']:.1f}",
        f"recomputed {best['recomputed tokens']}, preempted {best['preemptions']}",
    ]
    if "share of limit" in row:
        parts.append(f"share {row['share of limit']:.1%}")
    if "prompt tokens/s" in row:
        parts.append(f"prompt {row['prompt tokens/s']:,.0f} tok/s")
    if "fixed" in row:
        parts.append(
            f"{row['against fixed']:.3f} of {row['fixed']['tokens/s']:,.0f} tok/s at "
            f"{row['fixed']['mean rows']:.1f} rows of {row['fixed']['work']}; while some wait "
            f"{row['rows while some wait']:.1%} of the rows over "
            f"{best['steps while some wait']} of {best['decode steps']} steps; recomputed "
            f"{row['recomputed share']:.1%}; blocks {best['blocks']}, peak {best['peak blocks']}"
        )
    if "against no limit" in row:
        parts.append(f"{row['against no limit']:.3f} of the rate without limit")
    if "peak reserved GiB" in row:
        parts.append(
            f"reserved {row['peak reserved GiB']:.2f} GiB, "
            f"beside {row['device used - reserved GiB']:.2f}"
        )
    if "missed" in row:
        parts.append(f"MISSED: {row['missed']}")
    if "mismatch" in row:
        parts.append(f"mismatch {row['mismatch']['mean']:.4f} kl {row['mismatch']['kl']:.1e}")
    if "launches" in row:
        parts.append(f"launches {row['launches']}")
    parts.append(f"graphs {row['graphs']}, first {row['first']['rollout']:.1f} s")
    return f"{name}: " + ", ".join(parts)


if __name__ == "__main__":
    main()
