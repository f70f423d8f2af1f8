"""Whole runs on a tiny checkpoint: what they write, how they go on, and how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparring
from sparring import runlog
from sparring.data.chat import build_template
from sparring.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    RecipeError,
    RewardError,
    RunDirectoryError,
    RunError,
    UserError,
)
from sparring.kernels import capability_for
from sparring.models import checkpoint
from sparring.recipe import build_recipe
from sparring.rewards.sandbox.runner import run_level
from sparring.train import grpo, sft
from sparring.train.inference import template_of
from sparring.train.inputs import load_rewards
from sparring.train.policy import build_policy
from tests.train.tiny_run import (
    grpo_recipe,
    sft_recipe,
    write_checkpoint,
    write_data,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, data and rewards, copied for each test."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model")
    write_data(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the made folder that a test may write into."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_run_with_what_a_t4_can_do(folder: Path):
    """float16 over NF4: the loss is scaled, the same value of the card is seen everywhere."""
    write_checkpoint(folder / "wide", width=64)
    model = {"path": str(folder / "wide"), "dtype": "float16", "quantization": "nf4"}
    loss = {"kl_coef": 0.01}
    recipe = grpo_recipe(folder, model=model, lora={"rank": 4}, loss=loss)
    policy = build_policy(recipe, capability=capability_for(75))
    assert policy.model.capability == capability_for(75)
    assert policy.model.layers[0].qkv.base.capability == policy.model.capability
    with pytest.raises(UserError, match=r"compute capability 8.0 or later; this one has 7.5"):
        policy.model.set_bitwise(True)
    grpo.train(recipe, capability=capability_for(75))
    steps = [record.metrics for record in runlog.read_steps(folder / "run")]
    assert all(0.0 < step["mismatch_mean"] < 0.02 for step in steps)
    state = json.loads((folder / "run/checkpoints/step_000004/state.json").read_text())
    assert state["optimizer"]["loss_scale"] > 1.0
    with pytest.raises(CheckpointError, match="no bfloat16"):
        build_policy(
            grpo_recipe(folder, model={**model, "dtype": "bfloat16"}, lora={"rank": 4}),
            capability=capability_for(75),
        )


def final_weights(folder: Path, run: str = "run") -> dict[str, torch.Tensor]:
    (file,) = (folder / run / "final").glob("*.safetensors")
    return load_file(file)


def test_saving_memory_changes_no_bit_of_a_run(folder: Path) -> None:
    kept: list[dict[str, torch.Tensor]] = []
    for train in (
        {"checkpointing": "none"},
        {"checkpointing": "layers", "mlp_tile_tokens": 0},
        {"checkpointing": "selective", "offload": True},
    ):
        run = {"dir": str(folder / train["checkpointing"])}
        grpo.train(grpo_recipe(folder, lora={"rank": 4}, run=run, train={"steps": 2, **train}))
        kept.append(final_weights(folder, str(train["checkpointing"])))
    for other in kept[1:]:
        assert all(torch.equal(other[name], weight) for name, weight in kept[0].items())


def test_a_run_whose_sampler_and_trainer_disagree_stops_with_a_checkpoint(folder: Path) -> None:
    with pytest.raises(RunError, match=r"max_mismatch_kl = 1e-30 .*Likely causes"):
        grpo.train(grpo_recipe(folder, train={"steps": 4, "max_mismatch_kl": 1e-30}))
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step_000000"]


def test_eight_bit_moments_go_on_after_a_resume(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    optimizer = {"name": "adamw_8bit", "learning_rate": 0.01}
    other = {"dir": str(folder / "other"), "checkpoint_every": 2}
    grpo.train(grpo_recipe(folder, optimizer=optimizer))
    grpo.train(grpo_recipe(folder, optimizer=optimizer, run=other, train={"steps": 2}))
    grpo.train(grpo_recipe(folder, optimizer=optimizer, run=other), resume=True)
    straight, resumed = final_weights(folder), final_weights(folder, "other")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_run_writes_what_is_promised(folder: Path) -> None:
    changes: dict[str, Any] = {
        "data": {"eval": str(folder / "prompts.jsonl")},
        "lora": {"rank": 4},
        "reward": [
            {"name": f"{folder}/rewards.py:many_e"},
            {"name": f"{folder}/rewards.py:full_credit"},
        ],
    }
    summary = grpo.train(grpo_recipe(folder, **changes))
    run = folder / "run"
    names = {path.name for path in run.iterdir()}
    assert {
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "rollouts",
        "checkpoints",
        "final",
    } <= names
    steps = runlog.read_steps(run)
    assert [record.step for record in steps] == [1, 2, 3, 4]
    mismatches = [record.metrics.get("mismatch_max") for record in steps]
    assert mismatches[0] is not None
    assert all(found is None or found < 1e-4 for found in mismatches)
    rows = runlog.read_rollouts(run, 1)
    assert len(rows) == 12
    assert set(rows[0]) >= {"prompt", "completion", "rewards", "advantage", "finish_reason"}
    assert sorted(rows[0]["rewards"]) == ["full_credit", "many_e"]
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step_000002",
        "step_000004",
    ]
    assert (run / "final" / "adapter_model.safetensors").is_file()
    assert json.loads((run / "summary.json").read_text()) == summary
    assert set(summary["before"]) >= {"accuracy", "low", "high", "n", "greedy"}
    assert summary["before"]["n"] == 12
    assert summary["seconds"] > 0
    text = (run / "environment.json").read_text()
    assert str(Path.home()) not in text


def test_reward_rises_when_it_can_be_learned(folder: Path) -> None:
    grpo.train(grpo_recipe(folder, train={"steps": 25}, rollout={"group_size": 8}))
    rewards = [record.metrics["reward"] for record in runlog.read_steps(folder / "run")]
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:3]) / 3


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_resume_is_the_run_that_was_not_interrupted(
    folder: Path, lora: dict[str, Any] | None
) -> None:
    changes: dict[str, Any] = {"loss": {"kl_coef": 0.1}} | ({"lora": lora} if lora else {})
    grpo.train(grpo_recipe(folder, **changes))
    grpo.train(
        grpo_recipe(folder, run={"dir": str(folder / "other")}, train={"steps": 2}, **changes)
    )
    grpo.train(grpo_recipe(folder, run={"dir": str(folder / "other")}, **changes), resume=True)
    straight, resumed = final_weights(folder), final_weights(folder, "other")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    kls = [
        [record.metrics["kl"] for record in runlog.read_steps(folder / name)]
        for name in ("run", "other")
    ]
    assert kls[0] == kls[1]
    assert kls[0][-1] > 0


def test_sigterm_writes_a_checkpoint_and_resume_goes_on(folder: Path) -> None:
    reward = [{"name": f"{folder}/rewards.py:interrupts"}]
    with pytest.raises(Interrupted) as caught:
        grpo.train(grpo_recipe(folder, reward=reward, run={"checkpoint_every": 100}))
    assert caught.value.exit_code == 143
    assert [path.name for path in (folder / "run" / "checkpoints").iterdir()] == ["step_000002"]
    grpo.train(grpo_recipe(folder, reward=reward, run={"checkpoint_every": 100}), resume=True)
    grpo.train(grpo_recipe(folder, reward=reward, run={"dir": str(folder / "other")}))
    one, two = final_weights(folder), final_weights(folder, "other")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_directory_with_a_run_is_refused(folder: Path) -> None:
    sft.train(sft_recipe(folder))
    with pytest.raises(RunDirectoryError, match=r"--resume.*--run.dir"):
        sft.train(sft_recipe(folder))
    with pytest.raises(RunDirectoryError, match=r"optimizer.learning_rate: 0.01 -> 0.5"):
        sft.train(sft_recipe(folder, optimizer={"learning_rate": 0.5}), resume=True)


def test_resume_without_a_checkpoint_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sft.train(sft_recipe(folder), resume=True)
    assert "no checkpoint: starting at step 0" in capsys.readouterr().err


def test_sft_learns_its_rows(folder: Path) -> None:
    changes = {
        "data": {"eval": str(folder / "chats.jsonl"), "eval_split": "train"},
        "eval": {"every": 20},
    }
    summary = sft.train(sft_recipe(folder, train={"steps": 60}, **changes))
    losses = [record.metrics["loss"] for record in runlog.read_steps(folder / "run")]
    assert losses[-1] < 0.35 * losses[0]
    assert summary["eval_loss"] == pytest.approx(losses[-1], rel=0.5)
    assert len(runlog.read_evaluations(folder / "run")) >= 2


def test_group_rewards_that_say_nothing_change_nothing(folder: Path) -> None:
    reward = [{"name": f"{folder}/rewards.py:full_credit"}]
    grpo.train(grpo_recipe(folder, reward=reward))
    before = load_file(folder / "model" / "model.safetensors")
    after = final_weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {r.metrics["groups_without_signal"] for r in runlog.read_steps(folder / "run")} == {3}


def test_rewards_that_judge_nothing_stop_the_run(folder: Path) -> None:
    with pytest.raises(RewardError, match="judged none"):
        grpo.train(grpo_recipe(folder, reward=[{"name": f"{folder}/rewards.py:nothing"}]))
    later = [{"name": f"{folder}/rewards.py:fails_later"}]
    with pytest.raises(RunError, match="judged none"):
        grpo.train(grpo_recipe(folder, reward=later, run={"dir": str(folder / "later")}))
    assert [path.name for path in (folder / "later" / "checkpoints").iterdir()] == ["step_000002"]


def test_a_broken_reward_names_itself(folder: Path) -> None:
    with pytest.raises(RewardError, match="wrong_length"):
        grpo.train(grpo_recipe(folder, reward=[{"name": f"{folder}/rewards.py:wrong_length"}]))


def test_limits_that_leave_no_room_for_a_prompt(folder: Path) -> None:
    with pytest.raises(RecipeError, match="leaves no room"):
        grpo.train(grpo_recipe(folder, rollout={"max_completion_tokens": 128}))
    with pytest.raises(DataError, match="all 12 prompts are longer"):
        grpo.train(
            grpo_recipe(
                folder, rollout={"max_completion_tokens": 120}, run={"dir": str(folder / "other")}
            )
        )


def test_an_adapter_needs_a_lora_section(folder: Path) -> None:
    tables = {
        "model": {"path": str(folder / "model"), "adapter": str(folder / "model")},
        "data": {"train": str(folder / "chats.jsonl")},
        "optimizer": {"learning_rate": 0.01},
        "train": {"steps": 1},
        "run": {"dir": str(folder / "run")},
    }
    with pytest.raises(RecipeError, match=r"needs a \[lora\] section"):
        sft.train(build_recipe(tables, command="sft"))


def test_wrong_input_leaves_no_run_behind(folder: Path) -> None:
    reward = [{"name": f"{folder}/rewards.py:nothing"}]
    with pytest.raises(RewardError):
        grpo.train(grpo_recipe(folder, reward=reward))
    with pytest.raises(DataError):
        grpo.train(grpo_recipe(folder, data={"train": str(folder / "absent.jsonl")}))
    assert not (folder / "run").exists()
    grpo.train(grpo_recipe(folder))
    assert (folder / "run" / "summary.json").is_file()


@pytest.mark.parametrize("template", ["think", "think-open", "auto", "none"])
def test_a_reloaded_policy_is_asked_as_it_was_trained(folder: Path, template: str) -> None:
    write_tokenizer(folder / "model", begins=True)
    changes = {"data": {"template": template}, "model": {"max_tokens": 512}}
    sft.train(sft_recipe(folder, train={"steps": 1}, **changes))
    tokenizer = checkpoint.load_tokenizer(folder / "model")
    trained = build_template(tokenizer, template)
    _, reloaded = sparring.load(str(folder / "run"))
    asked = template_of(reloaded)
    text = trained.render_text("Say 3.").text
    assert asked.render_text("Say 3.").text == text
    assert asked.encode(text) == trained.encode(text)


def test_the_sandbox_is_told_in_the_environment(folder: Path) -> None:
    try:
        level = run_level(require="landlock+seccomp")
    except RewardError as error:
        pytest.skip(f"no sandbox of level landlock+seccomp here: {error}")
    rows = [
        {"prompt": f"Write {n}.", "reference": "", "tests": "assert f() == 1"} for n in range(4)
    ]
    (folder / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"data": {"train": str(folder / "code.jsonl")}, "train": {"steps": 1}}
    grpo.train(
        grpo_recipe(folder, reward=[{"name": "code", "sandbox": "landlock+seccomp"}], **changes)
    )
    told = json.loads((folder / "run" / "environment.json").read_text())["sandbox"]["code"]
    assert told["name"] == level.name


def test_a_judge_gets_its_key_from_the_command_line_alone(folder: Path) -> None:
    judge = {
        "name": "judge",
        "url": "http://127.0.0.1:9",
        "model": "m",
        "api_key_env": "NO_SUCH_KEY",
    }
    recipe = grpo_recipe(folder, reward=[judge])
    with pytest.raises(RewardError, match=r"NO_SUCH_KEY.*is not set.*export NO_SUCH_KEY="):
        grpo.train(recipe)
    rewards = load_rewards(recipe, {"NO_SUCH_KEY": "secret"})
    assert "secret" not in repr(rewards)
    for reward in rewards:
        reward.close()


def test_several_updates_a_step_are_measured_against_the_policy_that_sampled(folder):
    rollout = {"group_size": 8, "prompts_per_step": 4}
    recipe = grpo_recipe(folder, rollout=rollout, train={"steps": 4, "passes": 2, "mini_steps": 2})
    grpo.train(recipe)
    updated = [r.metrics for r in runlog.read_steps(recipe.run.dir) if "loss" in r.metrics]
    assert updated
    assert all(abs(metrics["ratio_mean"] - 1.0) > 1e-6 for metrics in updated)
    assert all(metrics["mismatch_max"] < 1e-3 for metrics in updated)
    single = grpo_recipe(folder, rollout=rollout, run={"dir": str(folder / "single")})
    grpo.train(single)
    updated = [r.metrics for r in runlog.read_steps(single.run.dir) if "loss" in r.metrics]
    assert updated
    assert all(metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6) for metrics in updated)


def test_a_run_of_several_updates_goes_on_bit_for_bit(folder):
    train = {"steps": 4, "passes": 2, "mini_steps": 3}
    loss = {"name": "grpo", "kl_coef": 0.1}
    whole = grpo_recipe(folder, train=train, loss=loss)
    grpo.train(whole)
    short = grpo_recipe(folder, train=train, loss=loss, run={"dir": str(folder / "short")})
    shutil.copytree(folder / "run", folder / "short")
    shutil.rmtree(folder / "short/checkpoints/step_000004")
    shutil.rmtree(folder / "short/final")
    (folder / "short/recipe.toml").write_text(
        (folder / "run/recipe.toml").read_text().replace(str(folder / "run"), str(folder / "short"))
    )
    grpo.train(short, resume=True)
    ours, theirs = (
        load_file(folder / name / "final/model.safetensors") for name in ("short", "run")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_cut_completions_may_bear_no_loss(folder):
    recipe = grpo_recipe(folder, train={"steps": 2, "learn_truncated": False})
    grpo.train(recipe)
    for record in runlog.read_steps(recipe.run.dir):
        rows = runlog.read_rollouts(recipe.run.dir, record.step)
        ended = sum(row["num_tokens"] for row in rows if row["finish_reason"] == "stop")
        assert any(row["finish_reason"] == "length" for row in rows)
        assert record.metrics.get("num_loss_tokens", ended) == ended


def test_a_step_may_end_with_enough_groups_that_have_a_signal(folder: Path) -> None:
    recipe = grpo_recipe(
        folder,
        rollout={
            "prompts_per_step": 6,
            "group_size": 6,
            "enough_groups": 2,
            "kv_memory": "120KiB",
        },
        run={"dir": str(folder / "enough")},
    )
    grpo.train(recipe)
    num_early = 0
    for step in range(1, 5):
        rows = runlog.read_rollouts(folder / "enough", step)
        groups: dict[str, set[float]] = {}
        for row in rows:
            groups.setdefault(row["prompt"], set()).add(row["rewards"]["many_e"])
        assert len(rows) == 6 * len(groups), "groups are whole"
        if len(groups) < 6:
            num_early += 1
            assert sum(len(rewards) > 1 for rewards in groups.values()) >= 2
    assert num_early
    with pytest.raises(RecipeError, match="enough_groups"):
        grpo_recipe(folder, rollout={"enough_groups": 4})
