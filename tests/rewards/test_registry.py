"""Names and files: where a reward comes from, and clear words where it does not."""

from __future__ import annotations

import sys

import pytest

from sparring.errors import RewardError
from sparring.rewards.registry import NAMED, find, named_rewards
from sparring.rewards.signatures import parameters_of
from sparring.rewards.verdicts import load_reward


def test_every_named_reward_can_be_found_and_takes_keywords():
    assert {"math", "format", "random", "tags", "language", "repetition", "countdown"} <= set(
        named_rewards()
    )
    for name in set(named_rewards()) & set(NAMED):
        found, short = find(name)
        assert short == name
        assert callable(found)
        parameters_of(found.__call__ if isinstance(found, type) else found)


def test_an_unknown_name_lists_the_known_ones_and_the_way_to_ones_own():
    with pytest.raises(
        RewardError, match=r"'maths'.*format.*math.*random.*path/to/file.py:function"
    ):
        load_reward("maths")
    with pytest.raises(RewardError, match="no reward named"):
        load_reward("package.module:function")


def test_a_file_is_loaded_by_path_alone(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n\n"
        "@dataclass\nclass Settings:\n    scale: float = 1.0\n\n"
        "def mine(completions):\n    return [Settings().scale] * len(completions)\n",
        encoding="utf-8",
    )
    path_before, modules_before = list(sys.path), set(sys.modules)
    found, short = find(f"{file}:mine")
    assert short == "mine"
    assert found(completions=["a"]) == [1.0]
    assert sys.path == path_before
    assert "mine" not in sys.modules
    assert all("sparring_user_reward" in name for name in set(sys.modules) - modules_before)


def test_files_and_functions_that_are_not_there(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import math\nVALUE = 3\ndef mine(completions): ...\n", encoding="utf-8")
    with pytest.raises(RewardError, match="no such file"):
        find(f"{tmp_path}/other.py:mine")
    with pytest.raises(RewardError, match=r"'mime' is not there; functions of this file: mine$"):
        find(f"{file}:mime")
    with pytest.raises(RewardError, match="'VALUE' is not a function"):
        find(f"{file}:VALUE")
    file.write_text("def mine(:\n", encoding="utf-8")
    with pytest.raises(RewardError, match="cannot be imported: SyntaxError"):
        find(f"{file}:mine")
    file.write_text("import no_such_package_here\n", encoding="utf-8")
    with pytest.raises(RewardError, match="no_such_package_here"):
        find(f"{file}:mine")


def test_positional_only_parameters_are_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions, /): return [1.0]\n", encoding="utf-8")
    with pytest.raises(RewardError, match="drop the"):
        load_reward(f"{file}:mine")


def test_annotations_that_only_type_checkers_know_do_no_harm(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "def mine(completions: NoSuchType, *, scale: Nope = 1):\n"
        "    return [scale] * len(completions)\n",
        encoding="utf-8",
    )
    assert load_reward(f"{file}:mine", knobs={"scale": 2}).knobs == {"scale": 2}
