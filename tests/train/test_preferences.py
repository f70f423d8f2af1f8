"""DPO on a tiny checkpoint: it learns its pairs, resumes bit for bit, and refuses wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sparring import runlog
from sparring.algorithms.registry import build_preference_loss
from sparring.cli import app
from sparring.data.packing import pack_pairs
from sparring.data.pairs import Pair
from sparring.errors import DataError, RecipeError, RunDirectoryError
from sparring.models.reference import build_reference
from sparring.recipe import Recipe, build_recipe
from sparring.recipe.toml_text import write_toml
from sparring.train import dpo, grpo
from sparring.train.pairs import pairs_of_run
from tests.train.test_step import gradients_of
from tests.train.tiny_run import grpo_recipe, grpo_tables, write_checkpoint, write_data


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and data, copied for each test."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model")
    write_data(folder)
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": f"No {n}{n}."} for n in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the made folder that a test may write into."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def dpo_recipe(folder: Path, **changes: Any) -> Recipe:
    tables: dict[str, Any] = {
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "pairs.jsonl")},
        "optimizer": {"learning_rate": 0.003},
        "train": {"steps": 4, "pairs_per_step": 6},
        "run": {"dir": str(folder / "run"), "checkpoint_every": 2},
    }
    for section, values in changes.items():
        tables[section] = tables.get(section, {}) | values
    return build_recipe(tables, command="dpo")


def final_weights(folder: Path, run: str = "run") -> dict[str, torch.Tensor]:
    (file,) = (folder / run / "final").glob("*.safetensors")
    return load_file(file)


def test_dpo_learns_its_pairs(folder: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"eval": str(folder / "pairs.jsonl"), "eval_split": "train"},
        "eval": {"every": 10},
        "lora": {"rank": 4},
        "train": {"steps": 25, "micro_batch_tokens": 64},
        "loss": {"sft_coef": 0.1},
        "optimizer": {"learning_rate": 0.02},
    }
    summary = dpo.train(dpo_recipe(folder, **changes))
    steps = [record.metrics for record in runlog.read_steps(folder / "run")]
    assert steps[0]["policy_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert steps[-1]["policy_loss"] < 0.3
    assert steps[-1]["rewards/margins"] > 1.0
    assert steps[-1]["rewards/accuracies"] == steps[-1]["accuracy"] == pytest.approx(1.0)
    assert steps[-1]["rewards/chosen"] > steps[-1]["rewards/rejected"]
    assert steps[-1]["logprobs/chosen"] > steps[0]["logprobs/chosen"]
    assert steps[0]["num_micro_batches"] > 1
    assert summary["eval_accuracy"] == pytest.approx(1.0)
    assert summary["eval_loss"] < 0.5
    assert {"loss", "accuracy", "margin"} <= runlog.read_evaluations(folder / "run")[
        0
    ].values.keys()
    assert (folder / "run" / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_resume_is_the_run_that_was_not_interrupted(
    folder: Path, lora: dict[str, Any] | None
) -> None:
    changes: dict[str, Any] = {"lora": lora} if lora else {}
    dpo.train(dpo_recipe(folder, **changes))
    other = {"dir": str(folder / "other")}
    dpo.train(dpo_recipe(folder, run=other, train={"steps": 2}, **changes))
    dpo.train(dpo_recipe(folder, run=other, **changes), resume=True)
    straight, resumed = final_weights(folder), final_weights(folder, "other")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    margins = [
        [record.metrics["rewards/margins"] for record in runlog.read_steps(folder / name)]
        for name in ("run", "other")
    ]
    assert margins[0] == margins[1]
    assert margins[0][-1] != 0


def make_pairs() -> list[Pair]:
    """Pairs of unequal lengths over the golden run's vocabulary."""
    pairs = []
    for row in range(5):
        sides = []
        for side in (0, 1):
            size = 2 + (5 * row + 3 * side) % 7
            sides.append((torch.arange(size) * 11 + 13 * side + row) % 64)
        pairs.append(
            Pair(
                context_ids=(torch.arange(1 + 2 * row) * 5 + row) % 64,
                chosen_ids=sides[0],
                chosen_mask=torch.ones(len(sides[0]), dtype=torch.bool),
                rejected_ids=sides[1],
                rejected_mask=torch.ones(len(sides[1]), dtype=torch.bool),
            )
        )
    return pairs


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_micro_batches_and_order_change_nothing(name: str, golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(torch.float64)
    loss = build_preference_loss(name, {"sft_coef": 0.5, "reference_free": True})
    pairs = make_pairs()
    whole = pack_pairs(pairs, max_tokens=1000)
    assert len(whole) == 1
    expected, gradients = gradients_of(model, whole, loss)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
    for batches in (pack_pairs(pairs, max_tokens=40), pack_pairs(pairs[::-1], max_tokens=10)):
        assert len(batches) > 1
        found, others = gradients_of(model, batches, loss)
        assert found == pytest.approx(expected, abs=1e-12)
        for key, gradient in gradients.items():
            assert torch.allclose(others[key], gradient, rtol=0, atol=1e-12), key


def test_the_reference_is_the_model_with_its_adapter_off(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(lora=True)
    for adapter in model.adapter_modules("policy").values():
        torch.nn.init.zeros_(adapter.b)
    reference = build_reference(model)
    assert reference.kind == "base"
    (batch,) = pack_pairs(make_pairs(), max_tokens=1000)
    before = reference.logprobs(batch)
    assert torch.equal(before, model.score(batch).logprobs_T)
    for adapter in model.adapter_modules("policy").values():
        torch.nn.init.constant_(adapter.b, 0.1)
    assert torch.equal(before, reference.logprobs(batch))
    assert not torch.allclose(before, model.score(batch).logprobs_T)


def test_reference_free_keeps_no_reference(folder: Path) -> None:
    dpo.train(dpo_recipe(folder, loss={"reference_free": True}, train={"steps": 1}))
    (step,) = runlog.read_steps(folder / "run")
    assert step.metrics["rewards/chosen"] == pytest.approx(0.1 * step.metrics["logprobs/chosen"])


def test_wrong_pairs_end_the_run_before_it_begins(folder: Path) -> None:
    file = folder / "pairs.jsonl"
    same = json.dumps({"prompt": "Say 1.", "chosen": "1!", "rejected": "1!"}) + "\n"
    file.write_text(file.read_text() + same)
    with pytest.raises(DataError, match=r"pairs.jsonl:13: 'chosen' and 'rejected' are the same"):
        dpo.train(dpo_recipe(folder))
    dpo.train(dpo_recipe(folder, data={"bad_rows": "skip"}, train={"steps": 1}))
    with pytest.raises(DataError, match="no column chosen and no column rejected"):
        dpo.train(
            dpo_recipe(
                folder,
                data={"train": str(folder / "prompts.jsonl")},
                run={"dir": str(folder / "other")},
            )
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "dapo"}}, "'dapo' is not known; known: hinge, ipo, robust, sigmoid"),
        ({"loss": {"beta": 0.1}}, "sigmoid takes no 'beta'"),
        ({"advantage": {"name": "mean"}}, "dpo has no advantages"),
        ({"value": {"rank": 4}}, "dpo has none; remove it"),
        ({"train": {"passes": 2}}, "dpo updates once a step"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        dpo_recipe(tmp_path, **changes)


def test_pairs_of_a_run_are_its_best_and_worst_and_can_be_learned(folder: Path) -> None:
    with pytest.raises(RunDirectoryError, match="holds no run"):
        pairs_of_run(str(folder / "run"))
    rollout = {"group_size": 48, "max_completion_tokens": 60}
    grpo.train(grpo_recipe(folder, train={"steps": 3}, rollout=rollout))
    report = pairs_of_run(str(folder / "run"))
    assert report.num_groups == 9
    assert len(report.rows) + report.num_close + report.num_alike + report.num_small == 9
    assert len(report.rows) >= 2
    for row in report.rows:
        assert row["prompt"] == f"Say {row['prompt_id']}."
        asked = [
            other
            for other in runlog.read_rollouts(folder / "run", row["step"])
            if other["prompt_id"] == row["prompt_id"] and other["finish_reason"] == "stop"
        ]
        rewards = {other["completion"]: other["reward"] for other in asked if other["completion"]}
        assert row["reward_chosen"] == max(rewards.values()) == rewards[row["chosen"]]
        assert row["reward_rejected"] == min(rewards.values()) == rewards[row["rejected"]]
        assert row["reward_chosen"] > row["reward_rejected"]
    margin = max(row["reward_chosen"] - row["reward_rejected"] for row in report.rows)
    assert not pairs_of_run(str(folder / "run"), margin=margin).rows
    file = folder / "made.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in report.rows))
    dpo.train(
        dpo_recipe(
            folder,
            data={"train": str(file)},
            run={"dir": str(folder / "other")},
            train={"steps": 1},
        )
    )
    prompts = folder / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("Say", "Tell"))
    with pytest.raises(DataError, match="the data has changed since"):
        pairs_of_run(str(folder / "run"))


def test_rollouts_of_ppo_become_pairs_and_a_dpo_run_on_the_command_line(folder: Path) -> None:
    def run(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result.stdout

    rollout = {"group_size": 48, "max_completion_tokens": 60}
    tables = grpo_tables(folder, rollout=rollout, train={"steps": 2}, lora={"rank": 2})
    (folder / "grpo.toml").write_text(write_toml(tables))
    assert run("ppo", folder / "grpo.toml", "--train.passes", "2") == ""
    assert runlog.read_steps(folder / "run")[0].metrics["value/loss"] is not None
    printed = run("pairs", folder / "run")
    assert run("pairs", folder / "run", "--output", folder / "new.jsonl") == ""
    assert (folder / "new.jsonl").read_text() == printed != ""
    del tables["rollout"], tables["reward"]
    (folder / "dpo.toml").write_text(write_toml(tables))
    words = ["--data.train", folder / "new.jsonl", "--run.dir", folder / "other"]
    assert run("dpo", folder / "dpo.toml", *words, "--loss.name", "ipo") == ""
    assert runlog.read_steps(folder / "other")[-1].metrics["accuracy"] is not None
    wrong = CliRunner().invoke(app, ["pairs", str(folder / "other")])
    assert wrong.exit_code == 2
    assert "holds no rollouts (sft and dpo write none)" in wrong.stderr
