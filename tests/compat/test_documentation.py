"""The page for those who come from elsewhere: its script runs, and its refusals are the tables'."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from sparring.compat.grpo_table import GRPO
from sparring.compat.sft_table import DPO, SFT
from sparring.compat.trainer import REFUSED
from sparring.compat.unsloth_table import LOAD, LORA

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {name: DOCS / name / "coming-from-trl-or-unsloth.md" for name in ("how-to", "zh")}


def script(page: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", PAGES[page].read_text(encoding="utf-8"), re.S)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_the_script_of_the_page_runs(
    page: str, model_path: str, own_folder: Path, capsys: pytest.CaptureFixture[str]
):
    small = {
        "Qwen/Qwen2.5-7B-Instruct": model_path,
        "max_completion_length=512": "max_completion_length=8",
        "max_steps=250": "max_steps=2",
        "max_tokens=512": "max_tokens=8",
    }
    text = script(page)
    for old, new in small.items():
        assert old in text
        text = text.replace(old, new)
    (own_folder / "script.py").write_text(text, encoding="utf-8")
    runpy.run_path(str(own_folder / "script.py"))
    assert (own_folder / "multiplication/adapter_model.safetensors").is_file()
    assert (own_folder / "outputs/summary.json").is_file()
    assert capsys.readouterr().out


def test_both_languages_show_the_same_script():
    english, chinese = (
        re.sub(r"#.*|f\"[^\"]*\"", "", script(page)).replace(" ", "") for page in PAGES
    )
    assert english == chinese


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_calls_refused_is_refused(page: str):
    text = PAGES[page].read_text(encoding="utf-8")
    table = text[text.rindex("|---|---|---|") :]
    known = {**DPO, **SFT, **LOAD, **LORA, **GRPO}
    named = set()
    for line in table.splitlines()[1:]:
        if not line.startswith("|"):
            break
        named |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    assert len(named) > 20
    refused_by_code = {"steps_per_generation", "top_p", "top_k", "loss_type"}
    methods = {"model", "lm_head", "embed_tokens", "save_pretrained_gguf"}
    for name in named - refused_by_code - methods:
        assert (
            name in REFUSED
            or known[name].kind == "refused"
            or name
            in (
                "gradient_accumulation_steps",
                "min_p",
            )
        ), name
