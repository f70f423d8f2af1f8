"""SFTTrainer and DPOTrainer: TRL's data sets and masks, and the native loops behind them."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparring.compat import (
    DPOConfig,
    DPOTrainer,
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    get_chat_template,
    train_on_responses_only,
)
from sparring.compat.dpo import _loss
from sparring.errors import DataError, UserError
from sparring.train.inference import saved_settings

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so"},
]
WHOLE = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CHAT)


def sft(model_path: str, rows: Any, *, eval_dataset: Any = None, **changes: Any) -> SFTTrainer:
    formatting_func = changes.pop("formatting_func", None)
    args = SFTConfig(output_dir="run", max_steps=2, per_device_train_batch_size=2, **changes)
    return SFTTrainer(
        model=model_path,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        formatting_func=formatting_func,
    )


def learned(trainer: SFTTrainer, index: int = 0) -> str:
    sample = trainer.rows[index]
    return trainer.tokenizer.decode(sample.token_ids[sample.loss_mask])


def whole(trainer: SFTTrainer, index: int = 0) -> str:
    return trainer.tokenizer.decode(trainer.rows[index].token_ids)


@pytest.mark.parametrize(
    ("row", "changes", "text", "expected"),
    [
        ({"text": "hello"}, {}, "hello<|im_end|>", "ello<|im_end|>"),
        ({"body": "hello"}, {"dataset_text_field": "body"}, "hello<|im_end|>", "ello<|im_end|>"),
        ({"messages": CHAT}, {}, WHOLE, WHOLE.removeprefix("<|im_start|>")),
        ({"messages": CHAT}, {"assistant_only_loss": True}, WHOLE[:-1], "yo<|im_end|>so<|im_end|>"),
        (
            {"prompt": "1+1=", "completion": "2"},
            {},
            "1+1=2<|im_end|>",
            "2<|im_end|>",
        ),
        (
            {"prompt": "1+1=", "completion": "2"},
            {"completion_only_loss": False},
            "1+1=2<|im_end|>",
            "+1=2<|im_end|>",
        ),
        (
            {"prompt": CHAT[:3], "completion": CHAT[3:]},
            {},
            WHOLE[:-1],
            "so<|im_end|>",
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
            {"assistant_only_loss": True},
            WHOLE[: WHOLE.index("<|im_start|>", 40) - 1],
            "yo<|im_end|>",
        ),
        ({"text": "hello"}, {"max_length": 3}, "hel", "el"),
    ],
)
def test_rows_are_learned_as_trl_learns_them(
    model_path: str, row: dict, changes: dict, text: str, expected: str
):
    trainer = sft(model_path, [row, row], **changes)
    assert whole(trainer) == text
    assert learned(trainer) == expected


@pytest.mark.parametrize(
    ("rows", "changes", "error", "message"),
    [
        ([{"text": "a"}], {"completion_only_loss": True}, UserError, "needs rows with prompt"),
        ([{"text": "a"}], {"assistant_only_loss": True}, UserError, "needs rows of messages"),
        ([{"text": "ab"}, {"text": " "}], {}, DataError, "train_dataset:row 2: 'text' is empty"),
        ([{"label": 1}], {}, DataError, "holds no conversations"),
        ([{"messages": CHAT[:1]}], {"assistant_only_loss": True}, DataError, "row 1: .*no assist"),
        ([{"text": "a"}], {"formatting_func": lambda row: [row]}, UserError, "gives one text"),
        ([{"text": "a"}], {"eval_strategy": "epoch"}, UserError, "eval_dataset is None"),
        ([{"text": "a"}], {"loss_type": "dft"}, UserError, "allowed are 'nll', 'chunked_nll'"),
        ([{"text": "a"}], {"eos_token": "<nope>"}, UserError, "'<nope>' is no token"),
        ([{"text": "a"}], {"chat_template_path": "x"}, UserError, "neither a .jinja file"),
    ],
)
def test_wrong_rows_and_arguments_are_told(
    model_path: str, rows: Any, changes: dict, error: type, message: str
):
    with pytest.raises(error, match=message):
        sft(model_path, rows, **changes)


def test_answers_alone_are_learned_behind_their_header(model_path: str):
    trainer = sft(model_path, [{"text": WHOLE}, {"text": WHOLE}], eval_dataset=[{"text": WHOLE}])
    trainer = train_on_responses_only(
        trainer,
        instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
    )
    assert learned(trainer) == "yo<|im_end|>\nso<|im_end|>\n<|im_end|>"
    assert trainer.eval_rows is not None
    with pytest.raises(DataError, match="no row has the response part '### Response'"):
        train_on_responses_only(trainer, "### Instruction", "### Response")


def test_sft_trains_evaluates_and_saves(tiny: ModuleType, model_path: str, own_folder: Path):
    model, tokenizer = FastLanguageModel.from_pretrained(model_path, max_seq_length=256)
    tokenizer = get_chat_template(tokenizer, chat_template="chatml")
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    rows = [{"text": tokenizer.apply_chat_template(CHAT, tokenize=False)} for _ in range(8)]
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        eval_dataset=rows[:2],
        dataset_text_field="text",
        max_seq_length=128,
        dataset_num_proc=2,
        packing=False,
        args=SFTConfig(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            warmup_steps=1,
            num_train_epochs=2,
            learning_rate=2e-2,
            logging_steps=1,
            eval_strategy="epoch",
            optim="adamw_8bit",
            weight_decay=0.01,
            lr_scheduler_type="linear",
            seed=3407,
            output_dir="outputs",
            report_to="none",
        ),
    )
    assert trainer.num_steps() == 4
    before = trainer.evaluate()["eval_loss"]
    stats = trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert trainer.evaluate()["eval_loss"] < before
    assert [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert stats.metrics["train_runtime"] > 0
    assert stats.training_loss == pytest.approx(sum(losses) / 4)
    model.save_pretrained("lora_model")
    tokenizer.save_pretrained("lora_model")
    again, _ = FastLanguageModel.from_pretrained("lora_model", load_in_4bit=True)
    for name, parameter in again.policy.model.named_parameters():
        if "adapters" in name:
            assert torch.equal(parameter, dict(model.policy.model.named_parameters())[name])
    again.make_trainable()
    assert again.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert saved_settings(str(own_folder / "outputs"))["template"] == "none"


def test_packing_takes_as_many_rows_as_full_sequences_hold(model_path: str):
    rows = [{"text": "abcdefg"} for _ in range(64)]  # 8 tokens each
    trainer = sft(model_path, rows, packing=True, max_length=32)
    assert trainer._per_step() == 8
    assert trainer._steps_of_epoch() == 8


def test_the_history_is_of_windows_of_steps(model_path: str):
    trainer = SFTTrainer(
        model_path,
        SFTConfig(output_dir="run", max_steps=5, logging_steps=2, logging_first_step=True),
        [{"text": "hello"} for _ in range(4)],
    )
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 4]
    assert trainer.state.log_history[-1]["train_loss"] > 0


PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def dpo(model_path: str, rows: Any, **changes: Any) -> DPOTrainer:
    from peft import LoraConfig

    args = DPOConfig(
        output_dir="run",
        **{"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **changes},
    )
    return DPOTrainer(
        model=model_path, args=args, train_dataset=rows, peft_config=LoraConfig(r=4, lora_alpha=8)
    )


@pytest.mark.parametrize(
    ("row", "context", "chosen"),
    [
        (PAIR, "1+1=", "2<|im_end|>"),
        ({"chosen": "1+1=2", "rejected": "1+1=3"}, "1+1=", "2<|im_end|>"),
        (
            {
                "prompt": CHAT[:1],
                "chosen": [{"role": "assistant", "content": "yo"}],
                "rejected": [{"role": "assistant", "content": "no"}],
            },
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "yo<|im_end|>",
        ),
        (
            {"chosen": CHAT[:2], "rejected": [CHAT[0], {"role": "assistant", "content": "no"}]},
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
            "yo<|im_end|>",
        ),
    ],
)
def test_pairs_in_every_form(model_path: str, row: dict, context: str, chosen: str):
    trainer = dpo(model_path, [row, row])
    pair = trainer.pairs[0]
    assert trainer.tokenizer.decode(pair.context_ids) == context
    assert trainer.tokenizer.decode(pair.chosen_ids[pair.chosen_mask]) == chosen


def test_dpo_learns_its_pairs(model_path: str, own_folder: Path):
    trainer = dpo(model_path, [PAIR, {**PAIR, "prompt": "2+2="}], logging_steps=1)
    outcome = trainer.train()
    assert outcome.global_step == 6
    rows = [row for row in trainer.state.log_history if "rewards/margins" in row]
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["rewards/margins"] > 0.01
    assert {"logps/chosen", "logps/rejected", "rewards/accuracies"} <= set(rows[0])
    assert json.loads((own_folder / "run/final/adapter_config.json").read_text())["r"] == 4


def test_a_pair_is_cut_behind_max_length_and_dropped_where_nothing_is_left(model_path: str):
    trainer = dpo(
        model_path, [{**PAIR, "chosen": "2345678"}, {**PAIR, "prompt": "9" * 9}], max_length=8
    )
    assert len(trainer.pairs) == 1
    assert len(trainer.pairs[0].context_ids) + len(trainer.pairs[0].chosen_ids) == 8
    with pytest.raises(DataError, match="every prompt alone fills max_length = 3"):
        dpo(model_path, [PAIR], max_length=3)
    with pytest.raises(
        DataError, match="train_dataset:row 1: 'chosen' and 'rejected' are the same"
    ):
        dpo(model_path, [{**PAIR, "rejected": "2"}])


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({}, {"name": "sigmoid", "kl_coef": 0.1}),
        ({"loss_type": "ipo", "beta": 0.5}, {"name": "ipo", "kl_coef": 0.5}),
        (
            {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
            {"name": "sigmoid", "kl_coef": 0.1, "sft_coef": 0.2},
        ),
        (
            {"loss_type": ["robust"], "label_smoothing": 0.1},
            {"name": "robust", "kl_coef": 0.1, "label_smoothing": 0.1},
        ),
        ({"rpo_alpha": 1.0}, {"name": "sigmoid", "kl_coef": 0.1, "sft_coef": 1.0}),
    ],
)
def test_dpo_losses_are_named_as_they_are_here(given: dict, loss: dict):
    assert _loss(DPOConfig(**given)) == loss


def test_dpo_losses_that_are_not_built_are_refused(model_path: str):
    for name in ("exo_pair", "nca_pair", "bco_pair", "apo_zero", "discopop"):
        with pytest.raises(UserError, match=f"'{name}'.* is refused: one of sigmoid"):
            _loss(DPOConfig(loss_type=[name]))
    with pytest.raises(UserError, match="it weighs 1 here"):
        _loss(DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[0.5, 1.0]))
    with pytest.raises(UserError, match="ref_model is refused: the reference is the policy"):
        DPOTrainer(model_path, object(), DPOConfig(), [PAIR])
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo(model_path, [PAIR], loss_type="hinge", label_smoothing=0.1)


def test_chat_templates_are_the_tokenizers_own(tiny: ModuleType, model_path: str, tmp_path: Path):
    _, tokenizer = FastLanguageModel.from_pretrained(model_path, load_in_4bit=False)
    for name in ("chatml", "qwen-2.5", "qwen3"):
        assert get_chat_template(tokenizer, name).chat_template == tokenizer.chat_template
    with pytest.raises(UserError, match=r"'llama-3\.1' is refused: templates are the tokenizers'"):
        get_chat_template(tokenizer, "llama-3.1")
    own = get_chat_template(tokenizer, ("{{ messages[0].content }}", "<|im_start|>"))
    assert (own.chat_template, own.eos_token) == ("{{ messages[0].content }}", "<|im_start|>")
    assert tokenizer.eos_token == "<|im_end|>"
    bare = tiny.write_model(tmp_path / "bare", template=None)
    _, plain = FastLanguageModel.from_pretrained(str(bare), load_in_4bit=False)
    made = get_chat_template(plain, "chatml")
    assert "<|im_start|>user" in made.apply_chat_template(CHAT[:1], tokenize=False)
    with pytest.raises(UserError, match="mapping is refused"):
        get_chat_template(tokenizer, "chatml", mapping={"role": "from"})


def test_each_run_has_its_own_reference(model_path: str):
    model, _ = FastLanguageModel.from_pretrained(model_path, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    for turn in range(2):
        trainer = DPOTrainer(
            model,
            args=DPOConfig(output_dir="run", logging_steps=1, **settings),
            train_dataset=[PAIR, PAIR],
            eval_dataset=[PAIR],
        )
        assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6), turn
        trainer.train()
        assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
        assert trainer.evaluate()["eval_rewards/margins"] > 0.001


def test_full_weights_of_16_bits_are_trained_twice(model_path: str):
    model, _ = FastLanguageModel.from_pretrained(
        model_path, full_finetuning=True, dtype=torch.bfloat16
    )
    losses = []
    for _ in range(2):
        args = SFTConfig(output_dir="run", max_steps=3, learning_rate=1e-2)
        trainer = SFTTrainer(model, args, [{"text": "hello"} for _ in range(8)])
        losses.append(trainer.train().training_loss)
    assert losses[1] < losses[0]
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir="run", max_steps=1, beta=0.2),
        train_dataset=[PAIR, PAIR],
        eval_dataset=[PAIR],
    )
    trainer.evaluate()
    trainer.train()
    with pytest.raises(UserError, match="the reference of a model whose weights are all trained"):
        trainer.evaluate()


def test_sharegpt_rows_become_messages():
    from datasets import Dataset

    from sparring.compat import standardize_sharegpt

    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}]
    for given in (rows, Dataset.from_list(rows)):
        (row,) = list(standardize_sharegpt(given))
        assert row["conversations"] == CHAT[:2]
    with pytest.raises(DataError, match="a turn is 'from' 'alien'"):
        standardize_sharegpt([{"conversations": [{"from": "alien", "value": "x"}]}])


def test_long_prompts_are_dropped_and_long_answers_cut(model_path: str):
    rows = [PAIR, {**PAIR, "prompt": "9" * 30}, {**PAIR, "chosen": "2" * 30}]
    trainer = dpo(model_path, rows, max_prompt_length=20, max_completion_length=5)
    assert (len(trainer.pairs), trainer.pairs.num_too_long) == (2, 1)
    assert [len(pair.chosen_ids) for pair in trainer.pairs] == [2, 5]


def test_what_is_kept_for_backward_is_what_the_arguments_say(model_path: str):
    rows = [{"text": "hello"} for _ in range(4)]
    for wanted, mode in ((True, "layers"), (False, "none")):
        trainer = sft(model_path, rows, gradient_checkpointing=wanted, full_determinism=True)
        trainer.train()
        assert trainer.model.policy.model.checkpointing.mode == mode
        assert f'checkpointing = "{mode}"' in (trainer.run_dir / "recipe.toml").read_text()
