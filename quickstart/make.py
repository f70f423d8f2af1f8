"""Make the quickstart's policy and problems: `make policy`.

    generator -> tokenizer, demonstrations -> random weights -> `sparring sft` -> sparring/assets

Work goes to runs/quickstart-policy/; only at the end is sparring/assets/quickstart/ replaced. The
same machine and seeds make the same files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quickstart.datasets import demonstrations, distinct_problems, prompt_row
from quickstart.start import write_start
from quickstart.tokenizer import save_tokenizer, train_tokenizer

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "sparring" / "assets" / "quickstart"
WORK = ROOT / "runs" / "quickstart-policy"

TOKENIZER_SEED, DEMONSTRATION_SEED, TRAIN_SEED, EVAL_SEED = 1, 2, 3, 4
NUM_DEMONSTRATIONS = 112_000
STEPS_SHARE = 0.5
DRILL_SHARE = 0.35
NUM_TRAIN, NUM_EVAL = 2_000, 1_000
NUM_THREADS = 1
"""One thread: the order of every sum, and so every bit of the result, is then fixed."""

POLICY_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def sft_rows() -> Iterable[dict[str, Any]]:
    """Every conversation that the policy was trained on."""
    return demonstrations(
        DEMONSTRATION_SEED,
        NUM_DEMONSTRATIONS,
        steps_share=STEPS_SHARE,
        drill_share=DRILL_SHARE,
    )


def train_rows() -> list[dict[str, Any]]:
    """The prompts that GRPO trains on."""
    return [prompt_row(p) for p in distinct_problems(TRAIN_SEED, NUM_TRAIN, held_out=False)]


def eval_rows() -> list[dict[str, Any]]:
    """The prompts that nothing is trained on."""
    return [prompt_row(p) for p in distinct_problems(EVAL_SEED, NUM_EVAL, held_out=True)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, Chinese as it is."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_problems(directory: Path) -> None:
    """Write train.jsonl and eval.jsonl."""
    write_rows(directory / "train.jsonl", train_rows())
    write_rows(directory / "eval.jsonl", eval_rows())


def prepare(work: Path) -> None:
    """Write the start (random weights, tokenizer) and the demonstrations into `work`."""
    start = work / "start"
    start.mkdir(parents=True)
    tokenizer = train_tokenizer(TOKENIZER_SEED)
    save_tokenizer(tokenizer, start)
    write_start(
        start,
        vocabulary_size=len(tokenizer),
        end_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )
    write_rows(work / "demonstrations.jsonl", sft_rows())


def train_policy() -> None:
    """Run the recipe quickstart/course.toml through the command line, in its own process."""
    command = [sys.executable, "-m", "sparring", "sft", "quickstart/course.toml"]
    environment = os.environ | {"OMP_NUM_THREADS": str(NUM_THREADS)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def install(work: Path, assets: Path) -> None:
    """Copy the trained policy and the problems to where the package carries them."""
    policy = assets / "policy"
    policy.mkdir(parents=True, exist_ok=True)
    for name in POLICY_FILES:
        shutil.copyfile(work / "start" / name, policy / name)
    shutil.copyfile(work / "run" / "final" / "model.safetensors", policy / "model.safetensors")
    write_problems(assets)


def main() -> None:
    """Make everything anew; an earlier attempt in the work folder is removed."""
    if WORK.exists():
        shutil.rmtree(WORK)
    WORK.mkdir(parents=True)
    prepare(WORK)
    train_policy()
    install(WORK, ASSETS)
    print(f"the policy and its problems are in {ASSETS}", file=sys.stderr)


if __name__ == "__main__":
    main()
