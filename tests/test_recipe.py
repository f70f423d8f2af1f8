"""Recipes: every key has one reading, every mistake one message with its place."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.errors import RecipeError, RunDirectoryError
from sparring.recipe import (
    build_recipe,
    check_resume,
    load_recipe,
    locate,
    locate_model,
    packaged_recipes,
    parse_size,
    recipe_differences,
    recipe_tables,
    recipe_text,
)
from sparring.recipe.sections import SECTIONS
from sparring.recipe.toml_text import read_toml, read_value, write_toml
from sparring.train.inputs import evaluation_sampling

GRPO = """\
# a recipe
[model]
path = "somewhere"

[data]
train = "train.jsonl"
system_prompt = \"\"\"
[loss]
clip_lo = 3
\"\"\"

[[reward]]
name = "math"

[[reward]]
name = "mine.py:short"
weight = 0.5
longest = 40

[loss]
name = "dapo"
clip_high = 0.3

[optimizer]
learning_rate = 1e-5

[train]
steps = 10

[run]
dir = "runs/x"
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str = GRPO) -> str:
        Path("a.toml").write_text(text, encoding="utf-8")
        return "a.toml"

    return write


def refusal(source: str, *overrides: str, command: Any = "grpo") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides, command=command)
    return str(caught.value)


def test_defaults_and_knobs(write):
    recipe = load_recipe(write(), command="grpo")
    assert recipe.model.path == "somewhere"
    assert recipe.lora is None
    assert recipe.rollout.group_size == 8
    assert recipe.rollout.kv_memory == "auto"
    assert recipe.advantage.name == "group"
    assert recipe.loss.knobs == {"clip_high": 0.3}
    assert recipe.reward[1].knobs == {"longest": 40}
    assert recipe.data.system_prompt == "[loss]\nclip_lo = 3\n"


def test_a_recipe_is_frozen(write):
    recipe = load_recipe(write(), command="grpo")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 3


def test_there_are_fewer_than_80_keys():
    assert sum(len(set(s.model_fields) - {"knobs"}) for s in SECTIONS.values()) < 80


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--train.steps", "5"], "train.steps", 5),
        (["--train.steps=5"], "train.steps", 5),
        (["--rollout.temperature", "0.7"], "rollout.temperature", 0.7),
        (["--optimizer.betas", "[0.9, 0.99]"], "optimizer.betas", (0.9, 0.99)),
        (["--optimizer.learning_rate", "1"], "optimizer.learning_rate", 1.0),
        (["--model.path", "Qwen/Qwen2.5-7B"], "model.path", "Qwen/Qwen2.5-7B"),
        (["--run.dir", "2026"], "run.dir", "2026"),
        (["--run.dir", "2026-11-24"], "run.dir", "2026-11-24"),
        (["--run.dir=a=b"], "run.dir", "a=b"),
        (["--data.system_prompt", "a\nb = 1"], "data.system_prompt", "a\nb = 1"),
        (["--data.system_prompt", '"quoted"'], "data.system_prompt", "quoted"),
        (["--run.memory", "24GiB"], "run.memory", 24 * 2**30),
        (["--rollout.stop", '["</answer>"]'], "rollout.stop", ("</answer>",)),
        (["--lora.rank", "4"], "lora.rank", 4),
        (["--lora.target_modules", "all-linear"], "lora.target_modules", "all-linear"),
        (["--lora.target_modules", '["q_proj"]'], "lora.target_modules", ("q_proj",)),
        (["--train.steps", "3", "--train.steps", "7"], "train.steps", 7),
    ],
)
def test_overrides(write, words, key, value):
    recipe = load_recipe(write(), words, command="grpo")
    section, name = key.split(".")
    assert getattr(getattr(recipe, section), name) == value


def test_rewards_are_overridden_by_name(write):
    words = ["--reward.math.weight", "2", "--reward.short.longest", "9"]
    recipe = load_recipe(write(), [*words, "--reward.mine.py:short.gate=math"], command="grpo")
    assert recipe.reward[0].weight == 2.0
    assert recipe.reward[1].knobs == {"longest": 9}
    assert recipe.reward[1].gate == "math"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("steps = 10", "step = 10", ["a.toml: grpo also needs [train] steps"]),
        ("steps = 10", "steps = 10\nstep = 1", ["a.toml:29: [train] takes no 'step'", "micro_"]),
        ("clip_high = 0.3", "clip_lo = 1", ["a.toml:22: [loss] dapo takes no 'clip_lo'", "kl_"]),
        ("clip_high = 0.3", "clip_high = -1", ["a.toml:22: [loss] dapo: clip_high must"]),
        ('"dapo"', '"ppo"', ["a.toml:21: [loss] name 'ppo' is not known", "cispo", "gspo"]),
        ('"dapo"', '"bnpo"', ["a.toml:21:", "dapo with equal clips"]),
        ('"dapo"', '"sft"', ["a.toml:21: [loss] name", "grpo takes any other"]),
        ("[train]", "[trian]", ["a.toml:27: no section [trian]; sections: model, lora, data"]),
        ("steps = 10", 'steps = "ten"', ["a.toml:28: [train] steps = \"ten\"", "valid integer"]),
        ("steps = 10", "steps = true", ["a.toml:28: [train] steps = true"]),
        ("steps = 10", "steps = 0", ["a.toml:28:", "greater than or equal to 1"]),
        ("1e-5", "nan", ["a.toml:25: [optimizer] learning_rate = nan"]),
        ("steps = 10", "steps = = 10", ["a.toml:28: this is not TOML"]),
        ("steps = 10", "steps = 1\nsteps = 2", ["a.toml", "this is not TOML"]),
        ("[run]", "[rollout]\ngroup_size = 1\n[run]", ["group_size = 1", "'group'", "at least 2"]),
        ("[run]", "[rollout]\ntop_p = 0.9\n[run]", ["a.toml:31: [rollout] top_p = 0.9", "before"]),
        ("[run]", "[rollout]\ntop_k = 5\n[run]", ["top_k = 5", "two different policies"]),
        ("[run]", "[rollout]\nmin_p = 0.1\n[run]", ["a.toml:31: [rollout] min_p = 0.1", "whole"]),
        ("[run]", "[rollout]\nmin_p = 1\n[run]", ["min_p = 1", "less than 1"]),
        ("[run]", "[rollout]\nlogit_bias = 1\n[run]", ["no 'logit_bias'", "another distribution"]),
        ("[run]", "[rollout]\nmin_tokens = 1\n[run]", ["no 'min_tokens'", "group_length"]),
        ("[run]", "[rollout]\ntemperature = 0.0\n[run]", ["temperature = 0.0", "greedy"]),
        ("[run]", "[eval]\nevery = 5\n[run]", ["[eval] every = 5", "[data] eval"]),
        ('path = "somewhere"', 'path = "x"\nquantization = "int4"', ["'none' or 'nf4'"]),
        ('path = "somewhere"', 'path = "x"\nmax_tokens = 512', ["leaves no room for a prompt"]),
        ('path = "somewhere"', "path = 3", ["[model] path = 3", "valid string"]),
        ("[run]", '[run]\nmemory = "24 gigs"', ["memory", "512MiB, 8GiB, 8GB"]),
        ("[run]", '[run]\ntrack = "x"', ["track", 'for example ["one", "two"]']),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(write, old, new, parts):
    assert old in GRPO
    message = refusal(write(GRPO.replace(old, new, 1)))
    assert all(part in message for part in parts), message


CUTS = ["--rollout.top_p=0.9", "--rollout.top_k=5", "--rollout.min_p=0.1"]


@pytest.mark.parametrize("option", CUTS)
def test_cut_distributions_are_for_evaluation_alone(write, option):
    source = write()
    for command in ("grpo", "ppo", "advise"):
        message = refusal(source, option, command=command)
        assert "the trainer's distribution is the whole one" in message
        assert f"{command} samples with top_p = 1.0, top_k = 0 and min_p = 0.0" in message
    recipe = load_recipe(source, [option, "--data.eval=rows.jsonl"], command="eval")
    sampling = evaluation_sampling(recipe)
    assert sampling.is_cut
    cuts = (sampling.top_p, sampling.top_k, sampling.min_p)
    assert cuts == (recipe.rollout.top_p, recipe.rollout.top_k, recipe.rollout.min_p)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--train.step", "1"], ["--train.step: [train] takes no 'step'; it takes steps"]),
        (["--trian.steps", "1"], ["no section [trian]"]),
        (["--train.steps"], ["--train.steps needs a value"]),
        (["steps"], ["'steps' is no override"]),
        (["--loss.clip_lo", "1"], ["--loss.clip_lo: [loss] dapo takes no 'clip_lo'"]),
        (["--reward.code.weight", "1"], ["--reward.NAME.KEY", "math, mine.py:short"]),
        (["--reward.math", "1"], ["--reward.NAME.KEY"]),
        (["--optimizer.betas", "[0.9]"], ["--optimizer.betas"]),
        (["--optimizer.betas", "[0.9, 1.0]"], ["--optimizer.betas", "less than 1"]),
        (["--reward.math.weight", "0", "--reward.short.weight", "0"], ["every [[reward]]"]),
    ],
)
def test_wrong_overrides_are_named(write, words, parts):
    message = refusal(write(), *words)
    assert all(part in message for part in parts), message


def test_single_bracket_reward_is_explained(write):
    text = GRPO.replace('[[reward]]\nname = "mine.py:short"', "[x]").replace(
        "[[reward]]", "[reward]"
    )
    assert "write [[reward]] with two brackets" in refusal(write(text))


def test_a_missing_recipe_names_the_path_and_what_there_is(write):
    message = refusal("nowhere.toml")
    assert str(Path("nowhere.toml").absolute()) in message
    assert all(name in message for name in packaged_recipes())


def test_a_run_directory_is_a_recipe_too(write):
    write()
    Path("runs").mkdir()
    Path("runs/recipe.toml").write_text(GRPO, encoding="utf-8")
    assert load_recipe("runs", command="grpo") == load_recipe("a.toml", command="grpo")


def test_commands_need_different_keys():
    model = {"model": {"path": "m"}}
    with pytest.raises(RecipeError, match="eval also needs"):
        build_recipe(model, command="eval")
    rest = {"data": {"eval": "e"}, "reward": [{"name": "math"}]}
    assert build_recipe(model | rest, command="eval").data.eval == "e"
    with pytest.raises(RecipeError, match=r"grpo also needs .*\[\[reward\]\]"):
        build_recipe(model, command="grpo")


def test_an_sft_recipe_has_one_loss():
    tables = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "optimizer": {"learning_rate": 1e-4},
        "train": {"steps": 3},
        "run": {"dir": "r"},
    }
    recipe = build_recipe(tables, command="sft")
    assert recipe.loss.name == "sft"
    assert build_recipe(recipe_tables(recipe), command="sft") == recipe
    with pytest.raises(RecipeError, match="one loss"):
        build_recipe(tables | {"loss": {"name": "dapo"}}, command="sft")
    with pytest.raises(RecipeError, match="no advantages"):
        build_recipe(tables | {"advantage": {"name": "mean"}}, command="sft")


def test_group_size_1_needs_no_group_with_advantage_none(write):
    words = ["--rollout.group_size", "1", "--advantage.name", "none"]
    assert load_recipe(write(), words, command="grpo").rollout.group_size == 1


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 2**29), ("8GiB", 2**33), ("8GB", 8 * 10**9), ("1.5gib", 3 * 2**29), (77000, 77000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "8 gigs", "8G", "-1GiB", 0, -5, True, "0MiB", 1.5, "1e9", 24, "24"]
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="512MiB, 8GiB, 8GB"):
        parse_size(text)


def test_the_resolved_recipe_reads_back_the_same(write, tmp_path):
    words = ["--data.system_prompt", 'a "b"\\ \u4f60\U0001f600\n\x7f\x01', "--lora.alpha", "8"]
    recipe = load_recipe(write(), [*words, "--run.memory", "1GiB"], command="grpo")
    Path("b.toml").write_text(recipe_text(recipe), encoding="utf-8")
    assert load_recipe("b.toml", command="grpo") == recipe
    assert recipe_differences(recipe, load_recipe("b.toml", command="grpo")) == []
    assert tomllib.loads(recipe_text(recipe))["run"]["memory"] == 2**30


def test_packaged_paths_are_found_and_written_portably():
    tables = {
        "model": {"path": "quickstart"},
        "data": {"eval": "package:quickstart/test.jsonl"},
        "reward": [{"name": "math"}],
    }
    recipe = build_recipe(tables, command="eval")
    assert recipe.data.eval == locate("package:quickstart/test.jsonl")
    assert Path(recipe.model.path).parts[-3:] == ("assets", "quickstart", "policy")
    written = recipe_tables(recipe)
    assert written["data"]["eval"] == "package:quickstart/test.jsonl"
    assert written["model"]["path"] == "package:quickstart/policy"


def test_a_model_folder_named_quickstart_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert locate_model("quickstart") != "quickstart"
    Path("quickstart/config.json").write_text("{}")
    assert locate_model("quickstart") == "quickstart"


def test_every_shipped_recipe_is_valid():
    folder = Path(__file__).resolve().parents[1] / "recipes"
    sources = [str(path) for path in folder.glob("*.toml")] + packaged_recipes()
    assert len(sources) >= 4
    for source in sources:
        command = "sft" if "sft" in Path(source).stem else "grpo"
        load_recipe(source, command=command)


def test_resume_allows_some_changes_and_lists_the_others(write):
    old = load_recipe(write(), command="grpo")
    allowed = ["--train.steps", "20", "--eval.limit", "3", "--run.keep_checkpoints", "1"]
    assert [d.key for d in check_resume(old, load_recipe("a.toml", allowed, command="grpo"))] == [
        "train.steps",
        "eval.limit",
        "run.keep_checkpoints",
    ]
    refused = ["--reward.short.longest", "41", "--rollout.group_size=4", "--lora.rank=2"]
    with pytest.raises(RunDirectoryError) as caught:
        check_resume(old, load_recipe("a.toml", [*allowed, *refused], command="grpo"))
    message = str(caught.value)
    assert "rollout.group_size: 8 -> 4" in message
    assert "longest: 40 -> 41" in message
    assert "lora.rank: absent -> 2" in message
    assert "train.steps: 10" not in message
    assert "--run.dir" in message


scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
values = st.one_of(
    scalars, st.lists(scalars, max_size=3), st.dictionaries(names, scalars, max_size=3)
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, st.dictionaries(names, values, max_size=4), max_size=3))
def test_written_toml_reads_back_exactly(tables):
    assert tomllib.loads(write_toml(tables)) == tables


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_is_some_value(text):
    value = read_value(text)
    assert value == text or not isinstance(value, str) or text.strip()[:1] in "\"'"


def test_lines_are_those_of_the_file():
    text = (
        'a.b = 1\n[t]\n"x y" = [\n  1, # c\n]\nz = """\n[no]\nq = 1\n"""\n[[r]]\nk = 1\n[[r]]\nk=2'
    )
    _, lines = read_toml(text, source="s")
    assert lines["a", "b"] == 1
    assert lines["t",] == 2
    assert lines["t", "x y"] == 3
    assert lines["t", "z"] == 6
    assert ("no",) not in lines
    assert lines["r", 0, "k"] == 11
    assert lines["r", 1, "k"] == 13
