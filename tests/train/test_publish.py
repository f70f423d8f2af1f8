"""sparring export: whole weights and adapters for other programs, the system prompt with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import sparring
from sparring.cli import app
from sparring.train import sft
from tests.train.tiny_run import sft_recipe, write_checkpoint, write_data

ASKED = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter with a system prompt of its own."""
    folder = tmp_path_factory.mktemp("export")
    write_checkpoint(folder / "model")
    write_data(folder)
    recipe = sft_recipe(
        folder,
        lora={"rank": 4},
        data={"system_prompt": 'Be "brief".\nSay 你好.'},
        optimizer={"learning_rate": 0.05},
    )
    sft.train(recipe)
    return folder


def export(*words: str) -> Any:
    return CliRunner().invoke(app, ["export", *words])


def logprobs(folder: Path) -> torch.Tensor:
    model, _ = sparring.load(str(folder))
    return sparring.score(model, [[5, 9, 30, 7, 100]])[0]


@pytest.mark.parametrize("kind", ["merged", "adapter"])
def test_what_is_written_speaks_as_the_run_does(run_folder: Path, tmp_path: Path, kind: str):
    done = export(str(run_folder / "run"), "--format", kind, "--output", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert "the system prompt goes along" in done.stderr
    ours, theirs = logprobs(run_folder / "run"), logprobs(tmp_path / "out")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - logprobs(run_folder / "model")).abs().max() > 0.01
    model, tokenizer = sparring.load(str(tmp_path / "out"))
    ((rollout,),) = sparring.generate(model, tokenizer, [ASKED], max_completion_tokens=1)
    assert rollout.prompt.text.count('Be "brief".\nSay 你好.') == 1


def test_other_programs_read_weights_and_system_prompt(run_folder: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert export(str(run_folder / "run"), "--output", str(tmp_path / "out")).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = tokenizer.apply_chat_template(ASKED, tokenize=False)
    assert said.startswith('<|system|>Be "brief".\nSay 你好.<|end|><|user|>Hi')
    own = [{"role": "system", "content": "Shout."}, *ASKED]
    assert "brief" not in tokenizer.apply_chat_template(own, tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 9, 30, 7, 100]])
    with torch.no_grad():
        found = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(found, logprobs(run_folder / "run"), atol=1e-4)


def test_a_system_prompt_by_hand_wins_and_is_named(run_folder: Path, tmp_path: Path):
    words = [str(run_folder / "run"), "--output", str(tmp_path / "out")]
    done = export(*words, "--system-prompt", "Shout.")
    assert done.exit_code == 0
    assert "'Shout.', replaces the one that the model was trained with" in done.stderr
    settings = json.loads((tmp_path / "out/sparring.json").read_text())
    assert settings["system_prompt"] == "Shout."


def test_wrong_exports_are_told(run_folder: Path, tmp_path: Path):
    source, out = str(run_folder / "run"), str(tmp_path / "out")
    cases = {
        "convert_hf_to_gguf.py": ["--format", "gguf"],
        "known: merged, adapter": ["--format", "onnx"],
        "known: auto, float32": ["--dtype", "int8"],
    }
    for message, words in cases.items():
        done = export(source, "--output", out, *words)
        assert done.exit_code == 2
        assert message in done.stderr
    assert not Path(out).exists()
    done = export(str(run_folder / "model"), "--format", "adapter", "--output", out)
    assert "has no adapter; export it by --format merged" in done.stderr
    assert "is there already" in export(source, "--output", str(run_folder)).stderr
