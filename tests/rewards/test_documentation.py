"""The examples of "Write a reward": the good ones load and judge, in both languages."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from sparring.rewards.registry import NAMED, find, named_rewards
from sparring.rewards.rows import judge_rows
from sparring.rewards.signatures import constructor_knobs, parameters_of
from sparring.rewards.verdicts import load_reward

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"en": DOCS / "how-to" / "write-a-reward.md", "zh": DOCS / "zh" / "write-a-reward.md"}
ROW = {
    "completion": "1+1",
    "prompt": "?",
    "reference": "1+1",
    "target": 2,
    "completion_ids": [1, 2],
    "finish_reason": "stop",
}


def blocks(page, language):
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_the_good_examples_work(page, tmp_path):
    good = [block for block in blocks(page, "python") if block.startswith("# good")]
    assert len(good) == 10
    for number, block in enumerate(good):
        file = tmp_path / f"example_{number}.py"
        file.write_text(block, encoding="utf-8")
        name = re.search(r"^(?:async )?def (\w+)", block, re.MULTILINE).group(1)
        reward = load_reward(f"{file}:{name}")
        judged = judge_rows(reward, [ROW, {**ROW, "completion": "no", "reference": None}][:1])
        assert isinstance(judged[0]["reward"], float), (name, judged[0]["reason"])
        reward.close()


def test_both_pages_show_the_same_ten_pairs():
    for page in PAGES:
        text = PAGES[page].read_text(encoding="utf-8")
        assert len(re.findall(r"^### \d+\. ", text, re.MULTILINE)) == 10
        assert text.count("\n# bad") == 10
    names = [re.findall(r"def (\w+)", "".join(blocks(page, "python"))) for page in PAGES]
    assert names[0] == names[1]
    for page in PAGES:
        for block in blocks(page, "toml"):
            assert tomllib.loads(block)["reward"]


@pytest.mark.parametrize("page", PAGES)
def test_the_table_names_every_knob(page):
    """A row a reward of this page, with every knob it takes."""
    text = PAGES[page].read_text(encoding="utf-8")
    for line in re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|$", text, re.MULTILINE):
        name, _, knobs = line
        if name not in NAMED or name not in named_rewards():
            continue
        found, _ = find(name)
        is_built = isinstance(found, type)
        wanted = constructor_knobs(found) if is_built else parameters_of(found).knobs
        assert set(re.findall(r"`(\w+)`", knobs)) == set(wanted), name
