"""PPO on a tiny checkpoint: it learns, resumes bit for bit, and says what cannot work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparring import runlog
from sparring.errors import Interrupted, MemoryBudgetError, RecipeError, RunDirectoryError, RunError
from sparring.recipe import Recipe, build_recipe
from sparring.rewards.verdicts import judge
from sparring.train import ppo
from sparring.train.inputs import load_rewards
from sparring.train.session import open_session
from sparring.train.step import StepMetrics
from tests.train.tiny_run import grpo_tables, write_checkpoint, write_data


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


def ppo_recipe(folder: Path, **changes: Any) -> Recipe:
    tables = grpo_tables(folder)
    tables["value"] = {"rank": 4, "learning_rate": 0.02}
    tables["train"] = {"steps": 4, "passes": 2, "mini_steps": 2}
    for section, values in changes.items():
        tables[section] = (tables.get(section, {}) | values) if isinstance(values, dict) else values
    return build_recipe(tables, command="ppo")


def weights(folder: Path, run: str = "run") -> dict[str, torch.Tensor]:
    """All that the last checkpoint holds of policy, critic and both optimizers."""
    step = max((folder / run / "checkpoints").iterdir())
    found = {}
    for file in sorted(step.rglob("*.safetensors")):
        part = file.relative_to(step).as_posix()
        found |= {f"{part}/{name}": tensor for name, tensor in load_file(file).items()}
    return found


def metrics(folder: Path, run: str = "run") -> list[dict[str, Any]]:
    return [dict(record.metrics) for record in runlog.read_steps(folder / run)]


def test_reward_rises_and_the_critic_learns_to_expect_it(folder: Path) -> None:
    changes: dict[str, Any] = {
        "train": {"steps": 30, "mini_steps": 1},
        "rollout": {"group_size": 8},
        "data": {"eval": str(folder / "prompts.jsonl")},
    }
    summary = ppo.train(ppo_recipe(folder, **changes))
    steps = metrics(folder)
    rewards = [step["reward"] for step in steps]
    assert sum(rewards[-3:]) / 3 > 3 * sum(rewards[:3]) / 3 + 0.1
    assert steps[0]["value/mean"] != 0, "the second pass sees what the first has taught"
    late = steps[-1]
    assert late["returns"] == pytest.approx(late["value/mean"], abs=0.5 * late["returns"])
    assert late["num_sequences"] == 2 * 24
    assert {"ratio_max", "clip_high_fraction", "value/loss", "value/explained"} <= late.keys()
    assert late["ratio_max"] > 1.0
    assert max(step["mismatch_max"] for step in steps) < 1e-4
    assert set(summary["before"]) == set(summary["after"])
    rows = runlog.read_rollouts(folder / "run", 1)
    assert len(rows) == 24
    assert {path.name for path in (folder / "run" / "final").iterdir()} >= {"model.safetensors"}


@pytest.mark.parametrize(
    ("changes", "passes_before"),
    [
        ({"train": {"passes": 1, "mini_steps": 1}}, 0),
        ({"train": {"passes": 1, "mini_steps": 1}, "advantage": {"kl_coef": 0.1}}, 2),
        ({"train": {"passes": 2, "mini_steps": 1}}, 2),
    ],
    ids=["on-policy", "kl-term", "two-passes"],
)
def test_old_logprobs_take_a_pass_only_where_they_are_needed(
    folder: Path, changes: dict[str, Any], passes_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = ppo.with_old_logprobs
    monkeypatch.setattr(ppo, "with_old_logprobs", lambda *args: (asked.append(1), whole(*args))[1])
    changes = {**changes, "train": {"steps": 2, **changes["train"]}}
    ppo.train(ppo_recipe(folder, **changes))
    assert len(asked) == passes_before
    for step in metrics(folder):
        assert 0 <= step["mismatch_max"] < 1e-4
        assert (step["ratio_max"] == 1.0) == (changes["train"]["passes"] == 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"rank": 4}, "advantage": {"kl_coef": 0.1}},
        {"advantage": {"kl_coef": 0.1}},
        {"lora": {"rank": 4}, "value": {"rank": 0}},
        {"value": {"path": "model", "rank": 0}},
        {"value": {"path": "model", "rank": 4}, "lora": {"rank": 2}},
    ],
    ids=["adapters", "full", "head", "separate", "separate-adapter"],
)
def test_resume_is_the_run_that_was_not_interrupted(folder: Path, changes: dict[str, Any]) -> None:
    if path := changes.get("value", {}).get("path"):
        changes = {**changes, "value": {**changes["value"], "path": str(folder / path)}}
    ppo.train(ppo_recipe(folder, **changes))
    other = {"dir": str(folder / "other")}
    ppo.train(ppo_recipe(folder, run=other, train={"steps": 2}, **changes))
    ppo.train(ppo_recipe(folder, run=other, **changes), resume=True)
    straight, resumed = weights(folder), weights(folder, "other")
    assert straight.keys() == resumed.keys()
    assert any(name.startswith("value/optimizer") for name in straight)
    assert any(name.endswith("value_head.weight") and t.any() for name, t in straight.items())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    for name in ("reward", "value/loss", "policy_loss"):
        assert [s[name] for s in metrics(folder)] == [s[name] for s in metrics(folder, "other")]
    if "advantage" in changes:
        assert metrics(folder)[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert metrics(folder)[-1]["kl"] != pytest.approx(0.0, abs=1e-6)


def test_another_critic_cannot_go_on(folder: Path) -> None:
    ppo.train(ppo_recipe(folder, train={"steps": 2}))
    with pytest.raises(RunDirectoryError, match=r"value.rank: 4 -> 2"):
        ppo.train(ppo_recipe(folder, value={"rank": 2}), resume=True)


def test_a_signal_leaves_a_checkpoint_with_the_critic(folder: Path) -> None:
    reward = [{"name": f"{folder}/rewards.py:interrupts"}]
    with pytest.raises(Interrupted):
        ppo.train(ppo_recipe(folder, reward=reward, run={"checkpoint_every": 100}))
    (path,) = (folder / "run" / "checkpoints").iterdir()
    assert path.name == "step_000002"
    assert (path / "value" / "trainable.safetensors").is_file()
    ppo.train(ppo_recipe(folder, reward=reward), resume=True)
    ppo.train(ppo_recipe(folder, reward=reward, run={"dir": str(folder / "other")}))
    one, two = weights(folder), weights(folder, "other")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_failure_between_updates_leaves_whole_steps_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = ppo.train_step

    def fails_in_step_4(*args: Any, **kwargs: Any) -> StepMetrics:
        calls.append(args)
        if len(calls) == 3 * 8 + 3:  # the second update of the policy in the fourth step
            raise RunError("the loss is nan")
        return real(*args, **kwargs)

    monkeypatch.setattr(ppo, "train_step", fails_in_step_4)
    with pytest.raises(RunError, match="the loss is nan"):
        ppo.train(ppo_recipe(folder))
    names = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert names == ["step_000002"], "step 4 was under way: it cannot be written"
    monkeypatch.setattr(ppo, "train_step", real)
    ppo.train(ppo_recipe(folder), resume=True)
    ppo.train(ppo_recipe(folder, run={"dir": str(folder / "other")}))
    one, two = weights(folder), weights(folder, "other")
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"critic does not fit.*GiB.*lower \[value\] rank = 4.*or take GRPO"),
        ({"path": "model", "rank": 0}, r"leave \[value\] path empty.*set \[value\] rank"),
    ],
)
def test_a_critic_that_does_not_fit_is_one_error(
    folder: Path, value: dict[str, Any], message: str
) -> None:
    value = {**value, "path": str(folder / "model")} if "path" in value else value
    with pytest.raises(MemoryBudgetError, match=message):
        ppo.train(ppo_recipe(folder, lora={"rank": 1}, value=value, run={"memory": "150KiB"}))
    assert not runlog.holds_run(folder / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"name": "gspo"}}, "one advantage a completion, and a critic gives one a token"),
        ({"loss": {"name": "sft"}}, "learns from given answers; ppo takes any other loss"),
        ({"loss": {"kl_coef": 0.1}}, r"\[loss\] kl_coef is not allowed.*\[advantage\] kl_coef"),
        ({"advantage": {"name": "group"}}, "'group' is not known; known: gae"),
        ({"advantage": {"lam": 2}}, "lam must be at most 1"),
        ({"train": {"mini_steps": 4}}, "a group is not split over updates"),
        ({"rollout": {"top_p": 0.9}}, "ppo samples with top_p = 1.0"),
        ({"value": {"clip": -1.0}}, r"\[value\] clip = -1.0 is not allowed"),
        ({"value": {"lambda": 1}}, "takes no 'lambda'; it takes path, rank, learning_rate, clip"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        ppo_recipe(tmp_path, **changes)


def test_what_a_recipe_leaves_open_is_filled_in(tmp_path: Path) -> None:
    tables = grpo_tables(tmp_path, rollout={"group_size": 1})
    recipe = build_recipe(tables, command="ppo")
    assert (recipe.loss.name, recipe.loss.knobs) == ("dapo", {"clip_low": 0.2, "clip_high": 0.2})
    assert (recipe.advantage.name, recipe.train.passes) == ("gae", 4)
    assert recipe.value is not None
    named = build_recipe({**tables, "loss": {"name": "cispo"}}, command="ppo")
    assert named.loss.knobs == {}
    with pytest.raises(RecipeError, match=r"\[value\] is ppo's critic, and grpo has none"):
        build_recipe({**grpo_tables(tmp_path), "value": {}}, command="grpo")


def spread_reward(folder: Path) -> list[dict[str, Any]]:
    """A reward that tells completions apart."""
    (folder / "lengths.py").write_text(
        "def spread(completions):\n    return [len(t.encode()) / 10 + ord((t + 'a')[0]) / 99 "
        "for t in completions]\n"
    )
    return [{"name": f"{folder}/lengths.py:spread"}]


def test_experience_is_the_textbook_of_each_completion(folder: Path) -> None:
    """With a critic of 0, gamma = lam = 1 and no KL every token's return is the reward."""
    recipe = ppo_recipe(
        folder,
        advantage={"lam": 1.0},
        train={"micro_batch_tokens": 40},
        reward=spread_reward(folder),
    )
    seen: list[Any] = []
    with open_session(recipe, "ppo", resume=False) as session:
        rewards = load_rewards(recipe)
        parts = ppo._build(recipe, session, rewards)
        rollouts = parts.engine.generate(parts.train.prompts[:3], parts.sampling, num_samples=4)
        groups = judge(rollouts, rewards).groups
        groups[1].rewards_G[2] = float("nan")
        split, found = ppo._experience(recipe, parts, groups)
        for reward in rewards:
            reward.close()
    expected = {
        tuple(rollout.token_ids.tolist()): float(reward)
        for group in groups
        for rollout, reward in zip(group.rollouts, group.rewards_G, strict=True)
        if not reward.isnan()
    }
    tokens = [value for ids, value in expected.items() for _ in ids]
    mean = torch.tensor(tokens, dtype=torch.float64).mean()
    deviation = (torch.tensor(tokens, dtype=torch.float64).var() + 1e-8).sqrt()
    assert len(split) == 2
    assert sum(len(part) for part in split) > 4
    for batch in (batch for part in split for batch in part):
        for index in range(batch.num_local_sequences):
            rows = batch.loss_mask_T & (batch.sequence_ids_T == index)
            ids = tuple(batch.labels_T[rows].tolist())
            reward = expected[ids]
            assert batch.returns_T[rows].tolist() == pytest.approx([reward] * len(ids))
            whitened = float((reward - mean) / deviation)
            assert batch.advantages_T[rows].tolist() == pytest.approx([whitened] * len(ids))
            seen.append(ids)
    assert sorted(seen) == sorted(expected)
    assert found["returns"] == pytest.approx(float(mean))
    assert found["value/explained"] == pytest.approx(0.0)
