"""Does a recipe run on this card? The real shape, tokenizer and rows, with random weights.

Nothing can be learned from random weights, so this checks that a recipe loads, samples, judges,
trains, saves and resumes, and reports seconds and memory by step. A `random` reward is added, since
no completion of such a model is ever right and a step without signal trains nothing.

    python benchmarks/gsm8k_check.py --recipe recipes/gsm8k-qwen2.5-0.5b.toml \
        --config config.json --tokenizer qwen2.5/ --train train.jsonl --eval test.jsonl

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from sparring import runlog
from sparring.environment import describe_environment
from sparring.models import checkpoint
from sparring.recipe import build_recipe
from sparring.train import grpo
from sparring.train.policy import pick_device


def write_random_model(config_file: Path, tokenizer: Path, folder: Path) -> int:
    """A bfloat16 checkpoint of the config's shape with random weights; returns its parameters."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    model = checkpoint.build_model(config, device=pick_device(), dtype=torch.bfloat16)
    model.init_weights(0)
    folder.mkdir(parents=True)
    for file in tokenizer.glob("*.json"):
        shutil.copy(file, folder / file.name)
    checkpoint.save_model(model, folder)
    return sum(parameter.numel() for parameter in model.parameters())


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
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_random_model(
            Path(arguments.config), Path(arguments.tokenizer), folder / "model"
        )
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
