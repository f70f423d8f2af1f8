"""Every argument of TRL, PEFT and Unsloth has a place in the tables; refused ones raise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sparring import compat
from sparring.compat import arguments
from sparring.compat.arguments import Argument, check, is_same
from sparring.compat.grpo_table import GRPO
from sparring.compat.sft_table import DPO, SFT
from sparring.compat.training_table import TRAINING
from sparring.compat.unsloth_table import GENERATE, LOAD, LORA, MERGED, MODEL_INIT, PEFT, SAMPLING
from sparring.errors import UserError

CONFIGS = {"GRPOConfig": GRPO, "SFTConfig": SFT, "DPOConfig": DPO}
TABLES = {
    **CONFIGS,
    "TrainingArguments": TRAINING,
    "from_pretrained": LOAD,
    "get_peft_model": LORA,
    "LoraConfig": PEFT,
    "SamplingParams": SAMPLING,
    "generate": GENERATE,
    "save_pretrained_merged": MERGED,
    "model_init_kwargs": MODEL_INIT,
}


def default_of(field: dataclasses.Field) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_trl_is_in_the_table_with_its_default(name: str):
    trl = pytest.importorskip("trl")
    table = CONFIGS[name]
    theirs = [field for field in dataclasses.fields(getattr(trl, name)) if field.init]
    assert len(theirs) > 100
    missing = [field.name for field in theirs if field.name not in table]
    assert not missing
    other = {
        field.name: (default_of(field), table[field.name].default)
        for field in theirs
        if not is_same(table[field.name].default, default_of(field))
    }
    assert not other


@pytest.mark.filterwarnings("ignore")
def test_every_field_of_peft_is_in_the_table_with_its_default():
    peft = pytest.importorskip("peft")
    for field in dataclasses.fields(peft.LoraConfig):
        assert field.name in PEFT, field.name
        if field.name not in ("runtime_config", "peft_type"):
            assert is_same(PEFT[field.name].default, default_of(field)), field.name
    check("LoraConfig", PEFT, {})


@pytest.mark.parametrize("title", TABLES)
def test_each_argument_is_taken_refused_with_reason_and_way_or_said(
    title: str, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    monkeypatch.setattr(arguments, "say_once", said.append)
    for name, argument in TABLES[title].items():
        said.clear()
        hold(title, name, argument, said)


def hold(title: str, name: str, argument: Argument, said: list[str]) -> None:
    table, changed = TABLES[title], "something else"
    check(title, table, {name: argument.default})
    assert argument.why, name
    if argument.kind == "refused":
        assert argument.native, name
        with pytest.raises(UserError, match=f"{name} = 'something else' is refused: ") as caught:
            check(title, table, {name: changed})
        assert argument.why in str(caught.value)
        assert argument.native in str(caught.value)
        for same in argument.also:
            check(title, table, {name: same})
        assert not said
    elif argument.kind == "immaterial":
        check(title, table, {name: changed})
        assert len(said) == 1
        assert argument.why in said[0]
    elif argument.allowed:
        has_default = any(is_same(argument.default, one) for one in argument.allowed)
        assert has_default or argument.default is None, name
        with pytest.raises(UserError, match="allowed are"):
            check(title, table, {name: changed})


def test_defaults_are_trls():
    args = compat.GRPOConfig("outputs")
    assert args.output_dir == "outputs"
    assert (args.learning_rate, args.beta, args.loss_type) == (1e-6, 0.0, "dapo")
    assert (args.num_generations, args.max_completion_length) == (8, 512)
    assert compat.SFTConfig().learning_rate == 2e-5
    assert compat.DPOConfig().beta == 0.1


def test_a_configuration_is_a_dataclass_that_refuses_at_once():
    assert dataclasses.is_dataclass(compat.GRPOConfig)
    changed = dataclasses.replace(compat.GRPOConfig(), beta=0.04)
    assert changed.beta == 0.04
    with pytest.raises(UserError, match=r"deepspeed = 'zero\.json' is refused: one process"):
        compat.GRPOConfig(deepspeed="zero.json")
    with pytest.raises(TypeError, match="no_such_argument"):
        compat.GRPOConfig(no_such_argument=1)


def test_unknown_arguments_of_calls_list_the_known_ones():
    with pytest.raises(UserError, match=r"takes no 'maximum_tokens'; it takes .*max_tokens"):
        compat.SamplingParams(maximum_tokens=3)
    with pytest.raises(UserError, match="takes no 'model'"):
        compat.FastLanguageModel.from_pretrained("x", model="y")


@pytest.mark.filterwarnings("ignore")
def test_foreign_configurations_are_adopted_by_what_they_change(tmp_path: Any):
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments

    from sparring.compat.arguments import adopt

    theirs = TrainingArguments(
        output_dir=str(tmp_path), learning_rate=3e-4, report_to="none", use_cpu=True, max_steps=7
    )
    ours = adopt(theirs, compat.SFTConfig, {"max_seq_length": 64})
    assert (ours.learning_rate, ours.max_steps, ours.max_seq_length) == (3e-4, 7, 64)
    theirs = trl.GRPOConfig(output_dir=str(tmp_path), beta=0.1, use_cpu=True, bf16=False)
    assert adopt(theirs, compat.GRPOConfig, {}).beta == 0.1
    theirs.deepspeed = "zero.json"
    with pytest.raises(UserError, match="deepspeed"):
        adopt(theirs, compat.GRPOConfig, {})


def test_a_changed_argument_is_said_once(capsys: pytest.CaptureFixture[str]):
    compat.GRPOConfig(dataloader_num_workers=3)
    compat.GRPOConfig(dataloader_num_workers=3)
    compat.PatchFastRL("GRPO", compat.FastLanguageModel)
    compat.PatchFastRL("GRPO", compat.FastLanguageModel)
    said = capsys.readouterr().err
    assert said.count("dataloader_num_workers = 3 changes nothing here") == 1
    assert said.count("PatchFastRL is accepted and does nothing") <= 1
