"""The policy that ships with the package, its tokenizer, and a short run of the packaged recipe."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparring
from quickstart.make import POLICY_FILES, TOKENIZER_SEED
from quickstart.start import model_config, random_weights
from quickstart.tokenizer import TAGS, train_tokenizer
from sparring.recipe import load_recipe
from sparring.train.grpo import train

ASSETS = Path(__file__).parent.parent / "sparring" / "assets"
POLICY = ASSETS / "quickstart" / "policy"
MIB = 1024**2


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    return sparring.load("quickstart")


@pytest.fixture(scope="module")
def tokenizer(policy: tuple[Any, Any]) -> Any:
    return policy[1]


def held_out_rows(count: int) -> list[dict[str, Any]]:
    lines = (ASSETS / "quickstart" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def test_the_assets_are_small() -> None:
    assert (POLICY / "model.safetensors").stat().st_size <= 8 * MIB
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 12 * MIB
    assert {path.name for path in POLICY.iterdir()} == {*POLICY_FILES, "model.safetensors"}


def test_the_policy_has_one_to_two_million_parameters(policy: tuple[Any, Any]) -> None:
    model = policy[0]
    assert 1_000_000 <= sum(p.numel() for p in model.parameters()) <= 2_000_000
    assert model.dtype == torch.float32


def test_the_start_is_the_same_for_the_same_seed() -> None:
    config = model_config(vocabulary_size=300, end_id=1, pad_id=0)
    first, second, other = (random_weights(config, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_shipped_tokenizer_is_what_training_makes(tokenizer: Any) -> None:
    again = train_tokenizer(TOKENIZER_SEED)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text())
def test_any_text_comes_back_from_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n  x\t", "12 * 3 = 36", "你好，世界", "🙂é\u0301", "a  b"]
)
def test_awkward_texts_come_back_from_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_digits_and_tags_are_single_tokens_that_survive_decoding(tokenizer: Any) -> None:
    assert len(tokenizer("0123456789", add_special_tokens=False)["input_ids"]) == 10
    for tag in TAGS:
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == tag
    assert tokenizer.decode([tokenizer.eos_token_id], skip_special_tokens=True) == ""


def test_the_chat_template_opens_the_assistants_turn(tokenizer: Any) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>Be brief.<|end|><|user|>1 + 1?<|end|><|assistant|>"
    answer = {"role": "assistant", "reasoning_content": "1+1=2", "content": "<answer>2</answer>"}
    whole = tokenizer.apply_chat_template([*asked, answer], tokenize=False)
    assert whole == prompt + "<think>1+1=2</think><answer>2</answer><|end|>"


def test_transformers_reads_the_policy_and_agrees(policy: tuple[Any, Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = policy
    other = AutoModelForCausalLM.from_pretrained(str(POLICY)).eval()
    assert len(AutoTokenizer.from_pretrained(str(POLICY))) == len(tokenizer)
    ids = tokenizer("Compute 3 * 7 + 20.<think>3*7=21", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logprobs = other(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.allclose(sparring.score(model, [ids])[0], expected, atol=1e-4)


def test_the_policy_can_reason_but_does_not_do_so_reliably(policy: tuple[Any, Any]) -> None:
    model, tokenizer = policy
    rows = held_out_rows(300)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    rollouts = sparring.generate(model, tokenizer, asked, max_completion_tokens=96)
    outcomes = []
    for row, samples in zip(rows, rollouts, strict=True):
        found = re.fullmatch(
            r"<think>(.*)</think><answer>(.*)</answer>", samples[0].text, re.DOTALL
        )
        outcomes.append((bool(found and found[1]), bool(found and found[2] == row["reference"])))
    with_steps = [right for has_steps, right in outcomes if has_steps]
    bare = [right for has_steps, right in outcomes if not has_steps]
    assert 0.35 < len(with_steps) / len(outcomes) < 0.65
    assert sum(with_steps) / len(with_steps) > 0.65
    assert sum(bare) / len(bare) < 0.25
    assert 0.25 <= (sum(with_steps) + sum(bare)) / len(outcomes) <= 0.60


def test_the_packaged_recipe_runs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = ["--run.dir", str(run), "--train.steps", "2", "--eval.limit", "16"]
    overrides += ["--rollout.prompts_per_step", "4", "--rollout.group_size", "4"]
    summary = train(load_recipe("quickstart", overrides, command="grpo"))
    written = json.loads((run / "summary.json").read_text())
    assert written["before"]["n"] == written["after"]["n"] == 16
    assert {"accuracy", "low", "high", "n"} <= written["before"].keys()
    assert written["seconds"] == summary["seconds"] > 0
    steps = (run / "metrics.jsonl").read_text().splitlines()
    assert len(steps) == 2
    assert (run / "final" / "model.safetensors").is_file()


def test_the_control_differs_from_the_recipe_in_its_reward_alone() -> None:
    recipe, control = (
        tomllib.loads((ASSETS / "recipes" / f"{name}.toml").read_text())
        for name in ("quickstart", "quickstart-random")
    )
    for tables in (recipe, control):
        tables.pop("reward")
        tables["run"].pop("dir")
    assert recipe == control
    rewards = load_recipe("quickstart-random", command="grpo").reward
    assert [(r.name, r.weight, r.required) for r in rewards] == [
        ("math", 0.0, True),
        ("random", 1.0, False),
    ]


@pytest.mark.slow
def test_grpo_on_the_quickstart_gains_twenty_points(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ["--run.dir", str(tmp_path / "run")], command="grpo")
    summary = train(recipe)
    before, after = summary["before"], summary["after"]
    assert 0.25 <= before["accuracy"] <= 0.60
    assert after["accuracy"] >= before["accuracy"] + 0.20
    assert after["low"] > before["high"]
    assert before["n"] >= 500
    assert summary["seconds"] <= 360
