"""How to think, or who I am: the experiment behind the advice, on the quickstart policy.

    identity   GRPO against SFT, cold and from a policy that tells its name now and then
    thinking   what a GRPO run does to the length of thinking, to steps and to corrections
    critic     GRPO against PPO: accuracy for CPU seconds and memory
    silent     from a policy that could work in steps and does not: GRPO alone, SFT alone, both
    weak       the same from one that has not learned its arithmetic

The name is taught in the policy's own format and as the whole answer, since it has never read a
sentence; the author is asked for and cannot be told. Questions are those of `sparring identity`.

Cost is the CPU time of a training call, its reward workers included; what is measured afterwards
is not part of it. Every arm and seed runs in its own process with one thread and is kept as a JSON
file in the work folder, so that an interrupted experiment goes on where it was.

    python -m benchmarks.think_or_know --choose     # settings, on problems of the training set
    python -m benchmarks.think_or_know --seeds 5 --output docs/benchmarks/think-or-know.json

The weak start is `quickstart/course.toml` cut to WEAK_STEPS steps; the silent one is the shipped
policy after SILENT_STEPS of the same course on answers without steps. Each is made once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from benchmarks.think_or_know_arms import ARMS, CHOICES, WHO, Arm
from quickstart.datasets import answer_text, demonstrations, distinct_problems
from quickstart.make import NUM_TRAIN, TRAIN_SEED, write_rows
from quickstart.make import prepare as prepare_course
from sparring.data.identity import (
    Identity,
    Question,
    build_identity,
    identity_questions,
    identity_rows,
)

WORK = Path("runs/think-or-know")
NUM_EVAL = 400
"""Of the 1,000 held-out problems, the first."""
NUM_DISTINCT = 50
NUM_VALIDATION = 400
"""Of the 2,000 training problems, the last: settings are chosen on them and trained on the rest."""
NUM_SOLUTIONS = 200
GENERAL_SEED = 77
CHOOSING_SEED = 1_000
WEAK_STEPS, SILENT_STEPS = 600, 100
STARTS = ("weak", "silent")
NAME, AUTHOR = "Ada", "the Ada team"


def identity() -> Identity:
    """Who the policy is to be."""
    return build_identity([NAME], [AUTHOR], ["en"])


def _in_format(turn: dict[str, Any]) -> dict[str, Any]:
    """An assistant's turn in the policy's own format: no thinking, then the answer in its tags.

    The policy has never read a sentence, so an answer that tells the name is the name alone.
    """
    if turn["role"] != "assistant":
        return turn
    answer = NAME if NAME in turn["content"] else turn["content"]
    return turn | {"content": f"<think></think><answer>{answer}</answer>"}


def conversations() -> list[dict[str, Any]]:
    """What `sparring identity` writes for this name, in the policy's format."""
    rows = identity_rows(identity())
    return [row | {"messages": [_in_format(turn) for turn in row["messages"]]} for row in rows]


def questions() -> Iterable[dict[str, Any]]:
    """The same questions as prompts for GRPO: all that comes before the turn with the name."""
    for row in identity_rows(identity()):
        for place, turn in enumerate(row["messages"]):
            if turn["role"] == "assistant" and NAME in turn["content"]:
                before = [_in_format(earlier) for earlier in row["messages"][:place]]
                yield {"prompt": before, "reference": NAME}


def assets() -> Path:
    """The folder of the shipped policy and its problems."""
    return Path(str(resources.files("sparring"))) / "assets" / "quickstart"


def problem_rows(name: str) -> list[dict[str, Any]]:
    """The rows of train.jsonl or eval.jsonl."""
    lines = (assets() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def prepare() -> None:
    """Write every data file, and train the weak start."""
    data = WORK / "data"
    if not data.exists():
        scratch = WORK / "data.part"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_data(scratch)
        scratch.rename(data)
    if not (WORK / "weak" / "summary.json").exists():
        course = WORK / "course"
        for folder in (course, WORK / "weak"):
            shutil.rmtree(folder, ignore_errors=True)
        prepare_course(course)
        _run_sft(
            "quickstart/course.toml",
            WORK / "weak",
            {"model.path": course / "start", "data.train": course / "demonstrations.jsonl"},
            steps=WEAK_STEPS,
        )
    if not (WORK / "silent" / "summary.json").exists():
        shutil.rmtree(WORK / "silent", ignore_errors=True)
        values: dict[str, Any] = {"model.path": assets() / "policy"}
        values |= {"data.train": data / "silent.jsonl", "optimizer.learning_rate": 3e-4}
        _run_sft("quickstart/course.toml", WORK / "silent", values, steps=SILENT_STEPS)


def _run_sft(recipe: str, directory: Path, values: dict[str, Any], *, steps: int) -> None:
    command = [sys.executable, "-m", "sparring", "sft", recipe, "--run.dir", str(directory)]
    for key, value in {**values, "train.steps": steps}.items():
        command += [f"--{key}", str(value)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)


def _write_data(folder: Path) -> None:
    problems, asked = problem_rows("train"), list(questions())
    told = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in problems]
    told = [{"prompt": row["prompt"], "reference": row["reference"]} for row in told]
    solved = distinct_problems(TRAIN_SEED, NUM_TRAIN, held_out=False)[:NUM_SOLUTIONS]
    files = {
        "problems": problems,
        "chosen-problems": problems[:-NUM_VALIDATION],
        "questions": asked,
        "mixed": asked + told[: len(asked)],
        "identity": conversations(),
        "worked": demonstrations(GENERAL_SEED, 2_000, steps_share=0.5),
        "silent": demonstrations(GENERAL_SEED + 10, 32 * SILENT_STEPS, steps_share=0.0),
        "solutions": (
            {
                "messages": [
                    {"role": "user", "content": problem.prompt},
                    {"role": "assistant", "content": answer_text(problem, with_steps=True)},
                ]
            }
            for problem in solved
        ),
    }
    for name, rows in files.items():
        write_rows(folder / f"{name}.jsonl", rows)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_bytes() -> int:
    """Most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_of(arm: Arm, seed: int) -> str:
    """The model that an arm starts from."""
    if arm.start == "policy":
        return str(assets() / "policy")
    if arm.start in STARTS:
        return str(WORK / arm.start)
    name, _, steps = arm.start.partition("@")
    return str(WORK / "arms" / f"{name}-{seed}" / f"final-{steps or ARMS[name].milestones[-1]}")


def tables_of(arm: Arm, seed: int, steps: int, folder: Path, *, choosing: bool) -> dict[str, Any]:
    """The recipe of an arm up to a milestone."""
    tables = json.loads(json.dumps(arm.tables))
    for key in ("train", "general"):
        if name := tables["data"].get(key):
            name = "chosen-problems" if choosing and name == "problems" else name
            tables["data"][key] = str(WORK / "data" / f"{name}.jsonl")
    tables["model"] = {"path": start_of(arm, seed)}
    tables.setdefault("train", {})["steps"] = steps
    tables["run"] = {"dir": str(folder / "run"), "seed": seed, "checkpoint_every": steps}
    return tables


def train(arm: Arm, seed: int, folder: Path, *, choosing: bool) -> dict[int, dict[str, float]]:
    """Train to each milestone, keep its policy as final-N, and tell what it has cost so far."""
    from sparring.recipe import build_recipe
    from sparring.train import grpo, ppo, sft

    run = {"grpo": grpo.train, "ppo": ppo.train, "sft": sft.train}[arm.command]
    cost, costs, at_start = 0.0, {}, peak_bytes()
    for number, steps in enumerate(arm.milestones):
        tables = tables_of(arm, seed, steps, folder, choosing=choosing)
        before = cpu_seconds()
        run(build_recipe(tables, command=arm.command), resume=number > 0)
        cost += cpu_seconds() - before
        costs[steps] = {
            "cpu_seconds": round(cost, 2),
            "peak_mib": round(peak_bytes() / 2**20),
            "peak_mib_above_start": round((peak_bytes() - at_start) / 2**20),
        }
        shutil.copytree(folder / "run" / "final", folder / f"final-{steps}")
    return costs


def measure(path: str, probes: Iterable[str], *, choosing: bool) -> dict[str, Any]:
    """What the policy at `path` does, by probe."""
    import sparring
    from benchmarks import think_or_know_measures as measures

    model, tokenizer = sparring.load(path)
    problems = problem_rows("train")[-NUM_VALIDATION:] if choosing else problem_rows("eval")
    problems = problems[:NUM_EVAL]
    found: dict[str, Any] = {}
    for probe in probes:
        if probe == "identity":
            asked = _trained_questions() if choosing else identity_questions(identity())
            values = measures.measure_identity(model, tokenizer, identity(), asked)
        elif probe == "conversation":
            prompts = [row["prompt"] for row in problems[:NUM_DISTINCT]]
            groups = measures.ask(model, tokenizer, prompts, measures.SAMPLES)
            values = measures.conversation(groups, identity())
            values = {f"problems_{key}": value for key, value in values.items()}
        else:
            values = measures.measure_reasoning(model, tokenizer, problems)
        found |= {k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    return found


def _trained_questions() -> list[Question]:
    """For choosing settings: every fourth single question that was trained on."""
    rows = [row for row in questions() if len(row["prompt"]) == 1]
    texts = list(dict.fromkeys(row["prompt"][0]["content"] for row in rows))[::4]
    return [Question(language="en", kind="who", text=text) for text in texts]


def run_arm(name: str, arm: Arm, seed: int, folder: Path, *, choosing: bool) -> dict[str, Any]:
    """Train an arm and measure it at its milestones."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    costs = train(arm, seed, folder, choosing=choosing)
    before = cpu_seconds()
    points = [
        {
            "steps": steps,
            **cost,
            **measure(str(folder / f"final-{steps}"), arm.probes, choosing=choosing),
        }
        for steps, cost in costs.items()
    ]
    shutil.rmtree(folder / "run")
    return {
        "arm": name,
        "seed": seed,
        "command": arm.command,
        "start": arm.start,
        "points": points,
        "measuring_cpu_seconds": round(cpu_seconds() - before, 2),
    }


def in_process(result: Path, words: list[str]) -> dict[str, Any]:
    """One job in its own process with one thread, unless its result is there already."""
    if not result.exists():
        command = [sys.executable, "-m", "benchmarks.think_or_know", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def keep(result: Path, value: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    result.parent.mkdir(parents=True, exist_ok=True)
    part = result.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.rename(result)


def result_file(kind: str, name: str) -> Path:
    return WORK / kind / f"{name}.json"


def starts() -> dict[str, Any]:
    """What the two starts do before anything is trained on them."""
    found = {"policy": measure(str(assets() / "policy"), WHO, choosing=False)}
    for name in STARTS:
        found[name] = measure(str(WORK / name), ("reasoning",), choosing=False)
    return found


def choose(index: int, name: str) -> None:
    """One setting of an arm, measured on validation problems and trained questions."""
    change = list(CHOICES[name])[index]
    tables = json.loads(json.dumps(ARMS[name].tables))
    change = json.loads(json.dumps(change))
    milestones = tuple(change.pop("milestones", ARMS[name].milestones))
    for section, values in change.items():
        tables[section] = {**tables.get(section, {}), **values}
    arm = replace(ARMS[name], tables=tables, milestones=milestones)
    folder = WORK / "choosing-arms" / f"{name}-{index}"
    found = run_arm(name, arm, CHOOSING_SEED, folder, choosing=True)
    keep(result_file("choosing", f"{name}-{index}"), found | {"setting": CHOICES[name][index]})


def main() -> None:
    """Run what is not there yet, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS), help="which ones, with commas")
    parser.add_argument("--choose", action="store_true", help="try settings instead")
    parser.add_argument("--present", action="store_true", help="run nothing, report what is there")
    parser.add_argument("--output", type=Path, help="a file for the report")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return job(*arguments.job)
    if not arguments.present:
        prepare()
    names = [name for name in arguments.arms.split(",") if name]
    if arguments.choose:
        for name in names:
            for index in range(len(CHOICES.get(name, ()))):
                found = in_process(
                    result_file("choosing", f"{name}-{index}"), ["--job", f"choose:{index}", name]
                )
                print(json.dumps({"arm": name, **found["setting"], "points": found["points"]}))
        return None
    before = in_process(result_file("results", "starts"), ["--job", "starts", "-"])
    found = [
        in_process(result_file("results", f"{name}-{seed}"), ["--job", str(seed), name])
        for seed in range(arguments.seeds)
        for name in names
        if not arguments.present or result_file("results", f"{name}-{seed}").exists()
    ]
    from benchmarks.think_or_know_report import report

    text = written(report(before, found, NUM_EVAL))
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")
    return None


def written(values: dict[str, Any]) -> str:
    """JSON with a line for each entry of each part, so that it can be read and compared."""
    parts = []
    for key, value in values.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items()]
            text = "{\n" + ",\n".join(lines) + "\n }"
        elif isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def job(what: str, name: str) -> None:
    """What a process of its own does: `starts`, `choose:INDEX` or a seed, and an arm."""
    if what == "starts":
        keep(result_file("results", "starts"), starts())
    elif what.startswith("choose:"):
        choose(int(what.partition(":")[2]), name)
    else:
        seed = int(what)
        folder = WORK / "arms" / f"{name}-{seed}"
        found = run_arm(name, ARMS[name], seed, folder, choosing=False)
        keep(result_file("results", f"{name}-{seed}"), found)


if __name__ == "__main__":
    main()
