"""`sparring eval` on a tiny run: alone, against its base, with the prompt it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparring.errors import RecipeError, UserError
from sparring.recipe import build_recipe
from sparring.train import grpo, sft
from sparring.train.measure import measure
from tests.train.tiny_run import grpo_recipe, sft_recipe, write_checkpoint, write_data

JUDGE = '''
def has_e(completions, log_extra=None):
    """Right where the letter e was written; the answer is the first letter."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    if log_extra is not None:
        log_extra("answer", [text[:1] or None for text in texts])
        log_extra("reason", ["e is there" if "e" in text else "no e" for text in texts])
    return [float("e" in text) for text in texts]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model, an adapter trained on it with a system prompt, and a fully tuned copy."""
    folder = tmp_path_factory.mktemp("measure")
    write_checkpoint(folder / "model")
    write_data(folder)
    (folder / "judge.py").write_text(JUDGE)
    says_e = "".join(
        json.dumps({"prompt": f"Say {n}.", "completion": "eee"}) + "\n" for n in range(12)
    )
    (folder / "says_e.jsonl").write_text(says_e)
    sft.train(
        sft_recipe(
            folder,
            data={"train": f"{folder}/says_e.jsonl", "system_prompt": "Be brief."},
            lora={"rank": 4},
            optimizer={"learning_rate": 0.03},
            train={"steps": 25},
        )
    )
    sft.train(sft_recipe(folder, run={"dir": f"{folder}/full"}, train={"steps": 1}))
    return folder


def recipe(folder: Path, model: str = "run", **changes):
    tables = {
        "model": {"path": f"{folder}/{model}"},
        "data": {"eval": f"{folder}/prompts.jsonl"},
        "reward": [{"name": f"{folder}/judge.py:has_e"}],
        "rollout": {"max_completion_tokens": 6},
        "eval": {"num_samples": 4},
    }
    for section, values in changes.items():
        tables[section] = tables[section] | values
    return build_recipe(tables, command="eval")


def test_against_base_pairs_the_same_prompts(folder):
    lines: list[str] = []
    report = measure(recipe(folder), against="base", say=lines.append)
    values = report.as_dict()
    tuned, base = values["accuracy"], values["against"]["accuracy"]
    assert values["comparison"]["difference"] == pytest.approx(tuned - base)
    assert values["comparison"]["n"] == 12
    assert tuned > base
    assert "adapter off" in values["against"]["model"]
    rows = report.rows("tuned")
    assert len(rows) == 2 * 12 * 4
    half = len(rows) // 2
    for ours, theirs in zip(rows[:half], rows[half:], strict=True):
        assert ours["prompt_hash"] == theirs["prompt_hash"]
        assert ours["reason"] == ("e is there" if ours["correct"] else "no e")
    assert "Be brief." in rows[0]["prompt"]
    json.dumps(rows)


def test_against_the_same_weights_nothing_differs(folder):
    path = str(folder / "model")
    report = measure(recipe(folder, "model"), against=path, say=lambda line: None)
    assert report.comparison is not None
    assert report.comparison.tied == 12
    assert report.comparison.p_value == 1.0


def test_a_full_run_finds_its_base_in_its_recipe(folder):
    report = measure(recipe(folder, "full"), against="base", say=lambda line: None)
    assert report.other_name == str(folder / "model")
    with pytest.raises(RecipeError, match="--against MODEL"):
        measure(recipe(folder, "model"), against="base", say=lambda line: None)


def test_a_system_prompt_by_hand_wins_and_is_named(folder):
    lines: list[str] = []
    changed = recipe(folder, data={"system_prompt": "Be long."})
    report = measure(changed, say=lines.append)
    assert "Be long." in report.measured.rows[0]["prompt"]
    assert "Be brief." not in report.measured.rows[0]["prompt"]
    (line,) = [line for line in lines if "system prompt" in line]
    assert "'Be long.'" in line
    assert "'Be brief.'" in line
    silent: list[str] = []
    measure(recipe(folder), say=silent.append)
    assert not [line for line in silent if "system prompt" in line]


def test_training_goes_on_with_the_recorded_system_prompt(folder, capsys):
    base = {"path": f"{folder}/run"}
    changes = {"model": base, "lora": {"rank": 4}, "train": {"steps": 1}}
    grpo.train(grpo_recipe(folder, run={"dir": f"{folder}/kept"}, **changes))
    assert "own system prompt is kept: 'Be brief.'" in capsys.readouterr().err
    settings = json.loads((folder / "kept" / "final" / "sparring.json").read_text())
    assert settings["system_prompt"] == "Be brief."
    other = {"train": f"{folder}/chats.jsonl", "system_prompt": "Be long."}
    run = {"dir": f"{folder}/other"}
    sft.train(
        sft_recipe(folder, model=base, lora={"rank": 4}, train={"steps": 1}, data=other, run=run)
    )
    assert "replaces the system prompt" in capsys.readouterr().err
    settings = json.loads((folder / "other" / "final" / "sparring.json").read_text())
    assert settings["system_prompt"] == "Be long."


def test_a_missing_model_to_compare_with_is_a_users_error(folder):
    with pytest.raises(UserError):
        measure(recipe(folder), against=str(folder / "nowhere"), say=lambda line: None)


def test_without_a_length_completions_leave_room_for_prompts(folder: Path) -> None:
    tables = {
        "model": {"path": f"{folder}/run"},
        "data": {"eval": f"{folder}/prompts.jsonl"},
        "reward": [{"name": f"{folder}/judge.py:has_e"}],
    }
    said: list[str] = []
    report = measure(build_recipe(tables, ["--eval.limit", "2"], command="eval"), say=said.append)
    (line,) = [line for line in said if "tokens in all" in line]
    limit = int(line.split("at most ")[1].split()[0])
    assert max(len(r.token_ids) for g in report.measured.groups for r in g.rollouts) <= limit
    assert f"--rollout.max_completion_tokens {limit}" not in line
    with pytest.raises(RecipeError, match=rf"--rollout\.max_completion_tokens {limit}\)"):
        measure(
            build_recipe(tables, ["--rollout.max_completion_tokens", "512"], command="eval"),
            say=said.append,
        )
