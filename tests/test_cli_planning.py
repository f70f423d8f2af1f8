"""What `sparring plan` says to a stranger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from sparring.cli.app import app

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 512,
    "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 32000, "tie_word_embeddings": True,
    "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[model]\npath = "{tmp_path}"\nmax_tokens = 400\n[lora]\nrank = 8\n'
        '[[reward]]\nname = "math"\n[rollout]\nprompts_per_step = 4\nmax_completion_tokens = 300\n'
    )
    return path


def plan(*words: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, words)])


def test_without_a_card_it_says_whose_seconds_they_are(recipe: Path) -> None:
    text = plan(recipe).output
    assert "on H200 (measured card)" in text
    assert "no limit was given" in text
    assert "no card was named: seconds are the H200's" in text


def test_a_budget_says_where_it_comes_from(recipe: Path) -> None:
    assert "fits into 3.00 GiB (--memory)" in plan(recipe, "--memory", "3GiB").output
    assert "fits into 4.00 GiB (run.memory)" in plan(recipe, "--run.memory", "4GiB").output
    text = plan(recipe, "--card", "4090").output
    assert "(RTX 4090: 23.99 GiB less what its driver keeps)" in text
    text += plan(recipe, "--card", "4090", "--memory", "24GiB").output
    assert "its driver keeps; --memory asks for more)" in text
    assert "no card was named" not in text
    assert "T4 has no" not in text


def test_what_an_older_card_cannot_compute_is_said(recipe: Path) -> None:
    text = plan(recipe, "--card", "T4").output
    assert 'a T4 has no bfloat16 arithmetic: write [model] dtype = "float16"' in text
    assert "attention is PyTorch's own on a T4" in text
    assert "no bfloat16" not in plan(recipe, "--card", "T4", "--model.dtype", "float16").output


def test_what_cannot_fit_is_refused_with_numbers(recipe: Path) -> None:
    result = plan(recipe, "--memory", "1100MiB")
    assert result.exit_code != 0
    assert "nothing fits into 1.07 GiB" in result.output


def test_a_machine_with_a_card_of_the_table_is_planned_for_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    own = plan(recipe).output
    assert "on A100-80GB (estimate)" in own
    assert "no card was named" not in own
    assert "on RTX 4090 (estimate)" in plan(recipe, "--card", "4090").output
