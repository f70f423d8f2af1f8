"""Does a recipe run on this card? The real shape, tokenizer and rows, with random weights.

Nothing can be learned from random weights, so this checks that a recipe loads, samples, judges,
trains, saves and resumes, and reports seconds and memory by step. A `random` reward is added, since
no completion of such a model is ever right and a step without signal trains nothing.

    python benchmarks/gsm8k_check.py --recipe recipes/gsm8k-qwen2.5-0.5b.toml \
        --config config.json --tokenizer qwen2.5/ --train train.jsonl --eval test.jsonl

The checkpoint is written by another process, in 16 bit or, with --stored nf4, quantised already: a
third of the bytes to write, and the same bits once loaded. Prints one JSON object. On a GPU it
holds the allocator's largest reserved memory and what the device used beside it, other processes
included. Under a run.memory of N GiB the former may be N - 1.0 GiB, and with --alone the latter
1.0 GiB: the script fails otherwise.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import shapes
import torch

from sparring import runlog
from sparring.environment import describe_environment
from sparring.models import checkpoint
from sparring.recipe import build_recipe
from sparring.train import grpo
from sparring.train.policy import pick_device

GIB = 2**30


def write_random_model(config_file: Path, tokenizer: Path, folder: Path, stored: str) -> int:
    """A bfloat16 or NF4 checkpoint of the config's shape with random weights; its parameters."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    model = shapes.build(config, quantization=stored, device=pick_device(), lora_rank=0)
    folder.mkdir(parents=True)
    for file in tokenizer.glob("*.json"):
        shutil.copy(file, folder / file.name)
    checkpoint.save_model(model, folder)
    shape = checkpoint.build_model(config, device="meta", dtype=torch.bfloat16)
    return sum(parameter.numel() for parameter in shape.parameters())


def memory(limit: int | str, *, is_alone: bool) -> dict[str, float]:
    """GiB of the device; raises AssertionError where a limit of bytes is not kept to."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    peak, beside = torch.cuda.max_memory_reserved(), total - free - torch.cuda.memory_reserved()
    if isinstance(limit, int):
        assert peak <= limit - GIB, f"{peak / GIB:.2f} GiB reserved of {limit / GIB:.2f} - 1.0"
        is_within = beside <= GIB or not is_alone
        assert is_within, f"{beside / GIB:.2f} GiB beside the allocator's, at most 1.0 allowed"
    return {"peak reserved": peak / GIB, "beside": beside / GIB}


def tables_of(arguments: argparse.Namespace, model: Path, run: Path, steps: int) -> dict[str, Any]:
    """The recipe's tables with this check's model, data and number of steps."""
    tables = tomllib.loads(Path(arguments.recipe).read_text(encoding="utf-8"))
    tables["model"]["path"] = str(model)
    columns = {"prompt": "prompt", "reference": "reference"}
    tables["data"] |= {"train": arguments.train, "eval": arguments.eval} | columns
    tables["data"] |= {"prompt": "prompt", "reference": "reference"}
    tables["reward"].append({"name": "random"})
    tables["rollout"] |= {"max_completion_tokens": arguments.max_completion_tokens}
    tables["eval"] = tables.get("eval", {}) | {"limit": 16, "every": 0}
    tables["train"]["steps"] = steps
    tables["run"] = tables.get("run", {}) | {"dir": str(run), "checkpoint_every": 2}
    return tables


def main() -> None:
    """Run the recipe for a few steps, then resume it for one more."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("recipe", "config", "tokenizer", "train", "eval"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--max-completion-tokens", type=int, default=256)
    parser.add_argument("--stored", choices=("none", "nf4"), default="none")
    parser.add_argument("--alone", action="store_true", help="nothing else is on the card")
    parser.add_argument("--write", type=Path, help="only write the checkpoint, into this folder")
    arguments = parser.parse_args()
    if arguments.write:
        files = Path(arguments.config), Path(arguments.tokenizer)
        print(write_random_model(*files, arguments.write, arguments.stored))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.monotonic()
        writer = [sys.executable, *sys.argv, "--write", str(folder / "model")]
        parameters = int(subprocess.run(writer, check=True, stdout=subprocess.PIPE).stdout)
        written = time.monotonic() - began
        began = time.monotonic()
        first = build_recipe(
            tables_of(arguments, folder / "model", folder / "run", arguments.steps), command="grpo"
        )
        grpo.train(first)
        longer = build_recipe(
            tables_of(arguments, folder / "model", folder / "run", arguments.steps + 1),
            command="grpo",
        )
        summary = grpo.train(longer, resume=True)
        steps = runlog.read_steps(folder / "run")
        final = sorted(path.name for path in (folder / "run" / "final").iterdir())
        result = {
            "recipe": Path(arguments.recipe).name,
            "parameters": parameters,
            "stored": arguments.stored,
            "seconds to write": written,
            "GiB": memory(longer.run.memory, is_alone=arguments.alone),
            "seconds": time.monotonic() - began,
            "steps": [{"step": record.step, **record.metrics} for record in steps],
            "final": final,
            "summary": summary,
            "environment": describe_environment(),
        }
    json.dump(result, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
