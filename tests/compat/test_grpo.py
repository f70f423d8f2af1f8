"""GRPOTrainer: reward functions and data sets of the ecosystem as they are, and its arithmetic."""

from __future__ import annotations

import functools
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sparring.compat import GRPOConfig, GRPOTrainer
from sparring.compat.grpo import _batches, _loss
from sparring.compat.rewards import build_rewards
from sparring.errors import DataError, RecipeError, RewardError, UserError
from sparring.runlog import read_steps

SMALL: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}


def trainer_of(model_path: str, rewards: Any, rows: Any, **changes: Any) -> GRPOTrainer:
    from peft import LoraConfig

    return GRPOTrainer(
        model=model_path,
        reward_funcs=rewards,
        args=GRPOConfig(output_dir="run", **(SMALL | changes)),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"),
    )


def texts(count: int = 6, **columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"say {n}", "answer": str(n), **columns} for n in range(count)]


def test_rewards_on_text_get_strings_columns_ids_and_the_state(model_path: str):
    seen: list[dict[str, Any]] = []

    def reward(completions, **kwargs):
        seen.append({"completions": completions, **kwargs})
        return [float(len(text)) for text in completions]

    trainer_of(model_path, reward, texts()).train()
    first = seen[0]
    assert set(first) == {
        *("prompts", "completions", "completion_ids", "answer", "trainer_state"),
        *("log_extra", "log_metric"),
    }
    assert all(isinstance(text, str) for text in first["completions"])
    assert first["prompts"][0] == first["prompts"][1]
    assert first["prompts"][0] == f"say {first['answer'][0]}"
    assert all(isinstance(ids[0], int) for ids in first["completion_ids"])
    assert [call["trainer_state"].global_step for call in seen] == [0, 1]
    assert first["trainer_state"].max_steps == 2


def test_rewards_on_conversations_get_one_assistant_message(tiny: ModuleType, model_path: str):
    seen: list[Any] = []

    def reward(prompts, completions, **kwargs):
        seen.append((prompts, completions))
        return [1.0 * len(completion[0]["content"]) for completion in completions]

    rows = [{"prompt": tiny.as_messages(f"say {n}")} for n in range(4)]
    trainer = trainer_of(model_path, reward, rows)
    trainer.train()
    prompts, completions = seen[0]
    assert prompts[0] == [{"role": "user", "content": prompts[0][0]["content"]}]
    assert list(completions[0][0]) == ["role", "content"]
    assert completions[0][0]["role"] == "assistant"
    row = json.loads(Path("run/rollouts/step_000001.jsonl").read_text().splitlines()[0])
    assert row["prompt"].endswith("<|im_start|>assistant\n")


def test_every_form_of_reward_function_runs_unchanged(model_path: str):
    main = threading.get_ident()
    threads: dict[str, int] = {}

    def keyword_only(*, completions, answer, **kwargs):
        threads["sync"] = threading.get_ident()
        return [0.25 if text else 0.0 for text, _ in zip(completions, answer, strict=True)]

    async def on_a_loop(completions, **kwargs):
        threads["async"] = threading.get_ident()
        return [0.5 for _ in completions]

    def scaled(completions, scale, **kwargs):
        return [scale for _ in completions]

    class Callable:
        def __call__(self, prompts, completions, log_metric, log_extra, **kwargs):
            log_metric("seen", float(len(prompts)))
            log_extra("length", [len(text) for text in completions])
            return [float(len(text)) for text in completions]

    class AsyncCallable:
        async def __call__(self, completions):
            return [0.125 for _ in completions]

    functions = [
        keyword_only,
        on_a_loop,
        functools.partial(scaled, scale=2.0),
        Callable(),
        AsyncCallable(),
        scaled_too := functools.partial(scaled, scale=3.0),
    ]
    assert scaled_too
    trainer = trainer_of(
        model_path, functions, texts(), reward_weights=[1.0, 2.0, 0.5, 0.0, 4.0, 1.0]
    )
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rewards/keyword_only/mean"] == 0.25
    assert row["rewards/on_a_loop/mean"] == 0.5
    assert row["rewards/scaled/mean"] == 2.0
    assert row["rewards/scaled_2/mean"] == 3.0
    assert row["rewards/AsyncCallable/mean"] == 0.125
    assert row["seen"] == 4.0
    assert row["reward"] == pytest.approx(0.25 + 1.0 + 1.0 + 0.0 + 0.5 + 3.0)
    assert threads["sync"] == main
    assert threads["async"] != main


def test_none_means_not_applicable_and_the_others_stand_in(model_path: str):
    def only_even(completions, answer, **kwargs):
        return [1.0 if int(n) % 2 == 0 else None for n in answer]

    def only_odd(completions, answer, **kwargs):
        return [5.0 if int(n) % 4 == 1 else None for n in answer]

    rows = [{"prompt": f"say {n}", "answer": n} for n in (0, 1, 3)]
    trainer = trainer_of(
        model_path, [only_even, only_odd], rows, per_device_train_batch_size=6, max_steps=1
    )
    trainer.train()
    lines = Path("run/rollouts/step_000001.jsonl").read_text().splitlines()
    found = {
        json.loads(line)["prompt"]: (json.loads(line)["reward"], json.loads(line)["rewards"])
        for line in lines
    }
    assert found["say 0"] == (1.0, {"only_even": 1.0, "only_odd": None})
    assert found["say 1"] == (5.0, {"only_even": None, "only_odd": 5.0})
    assert "say 3" not in found
    assert read_steps("run")[0].metrics["not_judged"] == 2.0


def test_an_error_in_a_reward_is_told_with_its_traceback(model_path: str):
    def broken(completions, **kwargs):
        raise KeyError("solution")

    with pytest.raises(RewardError, match=r"judged none of 4 completions[\s\S]*KeyError"):
        trainer_of(model_path, broken, texts()).train()

    def wants_more(completions, solution):
        return [0.0 for _ in completions]

    with pytest.raises(RewardError, match="'wants_more' needs 'solution', which is no column"):
        trainer_of(model_path, wants_more, texts()).train()


def test_named_rewards_and_wrong_ones():
    assert build_rewards("format", None, max_steps=1)[0].name == "format"
    with pytest.raises(UserError, match="reward_weights has 1 entries for 2"):
        build_rewards([len, len], [1.0], max_steps=1)
    with pytest.raises(UserError, match="reward_funcs is empty"):
        build_rewards(None, None, max_steps=1)
    with pytest.raises(UserError, match="a reward is a int"):
        build_rewards(3, None, max_steps=1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset is None"),
        ({"train": []}, "holds several splits"),
        (iter([{"prompt": "a"}]), "without a length"),
        ([{"text": "a"}], "has no column 'prompt'"),
        ([{"prompt": "a", "image": 1}], "models read text alone"),
        ([{"prompt": "a", "completions": "b"}], "a name that every reward is given"),
        ([{"prompt": "a"}, {"prompt": "b", "tools": ["x"]}], "row 2 has 'tools', which is refused"),
        ([{"prompt": "a"}, {"prompt": ""}], "train_dataset:row 2: 'prompt' is empty"),
    ],
)
def test_wrong_rows_are_one_clear_error(model_path: str, rows: Any, message: str):
    with pytest.raises((UserError, DataError), match=message):
        trainer_of(model_path, len, rows).train()


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ({}, 1),  # 8 x 1 rows, groups of 8
        ({"steps_per_generation": 4}, 4),  # four updates on a generation
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}, 2),
        ({"per_device_train_batch_size": 16, "num_generations": 4}, 4),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}, 1),  # raised to 8
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 2}, 4),
        ({"gradient_accumulation_steps": 4, "generation_batch_size": 16}, 4),
    ],
)
def test_rows_of_a_step_by_trls_arithmetic(given: dict, prompts: int):
    updates = given.get("steps_per_generation", 1) // given.get("gradient_accumulation_steps", 1)
    assert _batches(GRPOConfig(**given)) == (prompts, max(1, updates))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_generations": 1}, "takes at least 2"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "give a divisor or a multiple",
        ),
        (
            {"steps_per_generation": 2, "per_device_train_batch_size": 4},
            "a group is not split over updates",
        ),
        ({"generation_batch_size": 12}, "is no multiple of per_device_train_batch_size"),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "not both"),
    ],
)
def test_impossible_batches_are_refused(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        _batches(GRPOConfig(**given))


@pytest.mark.parametrize(
    ("given", "loss"),
    [
        ({}, {"name": "dapo", "clip_low": 0.2, "clip_high": 0.2}),
        ({"epsilon_high": 0.28}, {"name": "dapo", "clip_low": 0.2, "clip_high": 0.28}),
        ({"loss_type": "grpo"}, {"name": "grpo", "clip_low": 0.2, "clip_high": 0.2}),
        ({"loss_type": "cispo", "epsilon_high": 5.0}, {"name": "cispo", "clip_high": 5.0}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4},
            {"name": "gspo", "clip_low": 3e-4, "clip_high": 3e-4},
        ),
    ],
)
def test_losses_are_named_as_they_are_here(given: dict, loss: dict):
    assert _loss(GRPOConfig(**given)) == loss | {"kl_coef": 0.0, "kl_unbiased": False}
    with_kl = _loss(GRPOConfig(**given, beta=0.04))
    assert (with_kl["kl_coef"], with_kl["kl_unbiased"]) == (0.04, True)
    plain = _loss(GRPOConfig(**given, beta=0.04, use_bias_correction_kl=False))
    assert plain["kl_unbiased"] is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss_type": "bnpo"}, "its mean is taken over the tokens of each micro-batch"),
        ({"top_p": 0.9}, "two different policies"),
        ({"temperature": 0.0}, "a greedy group"),
        ({"generation_kwargs": {"typical_p": 1}}, "holds typical_p, which is refused"),
        ({"eval_strategy": "steps"}, "eval_dataset is None"),
    ],
)
def test_what_the_recipe_refuses_is_told_before_the_run(model_path: str, given: dict, message: str):
    with pytest.raises((RecipeError, UserError), match=message):
        trainer_of(model_path, lambda completions: [0.0], texts(), **given)


def test_evaluation_epochs_and_a_second_run_beside_the_first(model_path: str, own_folder: Path):
    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    trainer = GRPOTrainer(
        model_path,
        reward,
        GRPOConfig(
            output_dir="run",
            **(SMALL | {"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "steps"}),
            eval_steps=2,
        ),
        texts(6),
        texts(2),
    )
    assert trainer.num_steps() == 3  # six prompts, two a step
    outcome = trainer.train()
    assert outcome.global_step == 3
    assert trainer.state.epoch == 1.0
    assert any("eval_accuracy" in row for row in trainer.state.log_history)
    assert "eval_reward" in trainer.evaluate()
    assert json.loads((own_folder / "run/final/config.json").read_text())["model_type"] == "qwen2"
    trainer.train()
    assert (own_folder / "run-2/summary.json").is_file()
    assert (own_folder / "run/summary.json").is_file()


def test_a_run_goes_on_from_its_checkpoint(model_path: str, own_folder: Path):
    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    whole = trainer_of(model_path, reward, texts(), max_steps=4, save_steps=2)
    whole.train()
    first = trainer_of(
        model_path, reward, texts(), max_steps=2, save_steps=2, lr_scheduler_type="constant"
    )
    del first
    short = trainer_of(model_path, reward, texts(), max_steps=4, save_steps=2)
    import shutil

    shutil.rmtree("run/checkpoints/step_000004")
    shutil.rmtree("run/final")
    outcome = short.train(resume_from_checkpoint=True)
    assert outcome.global_step == 4
    ours, theirs = (
        {k: p.detach() for k, p in t.model.policy.model.trainable_parameters().items()}
        for t in (short, whole)
    )
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    with pytest.raises(UserError, match="is no run of Sparring's"):
        short.train(resume_from_checkpoint="elsewhere")


def test_foreign_models_and_hooks_are_refused_with_the_way(model_path: str):
    with pytest.raises(UserError, match="held twice, there and here"):
        trainer_of(object(), len, texts())
    with pytest.raises(UserError, match=r"callbacks is refused: a loop has no hooks; read metrics"):
        GRPOTrainer(model_path, len, GRPOConfig(), texts(), callbacks=[object()])
    with pytest.raises(UserError, match="takes no 'model_kwargs'"):
        GRPOTrainer(model_path, len, GRPOConfig(), texts(), model_kwargs=1)


@pytest.mark.filterwarnings("ignore")
def test_trls_own_rewards_run_unchanged(tiny: ModuleType, model_path: str):
    pytest.importorskip("trl")
    from trl.rewards import (
        accuracy_reward,
        get_soft_overlong_punishment,
        reasoning_accuracy_reward,
        think_format_reward,
    )

    rows = [
        {"prompt": tiny.as_messages(f"{n}+1="), "solution": f"$\\boxed{{{n + 1}}}$"}
        for n in range(4)
    ]
    overlong = get_soft_overlong_punishment(6, 3)
    functions = [accuracy_reward, reasoning_accuracy_reward, think_format_reward, overlong]
    trainer = trainer_of(model_path, functions, rows, max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["rewards/accuracy_reward/mean"] == 0.0
    assert row["rewards/think_format_reward/mean"] == 0.0
    assert row[f"rewards/{overlong.__name__}/mean"] < 0.0


def test_names_of_transformers_and_peft(model_path: str, own_folder: Path):
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from sparring.compat import (
        AutoModelForCausalLM,
        get_peft_model,
        prepare_model_for_kbit_training,
    )

    model = AutoModelForCausalLM.from_pretrained(
        model_path, torch_dtype="float32", device_map="auto", attn_implementation="sdpa"
    )
    model.config.use_cache = False
    assert model.config.hidden_size == 64
    with pytest.raises(UserError, match=r"model\.config\.hidden_size cannot be set"):
        model.config.hidden_size = 3
    assert model.to("cpu") is model
    with pytest.raises(UserError, match="is on cpu and stays there"):
        model.cuda()
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[lambda completions, **kwargs: [float(len(text)) for text in completions]],
        args=GRPOConfig(output_dir="run", **SMALL),
        train_dataset=texts(),
    )
    trainer.train()
    assert json.loads((own_folder / "run/final/adapter_config.json").read_text())["r"] == 4
    with pytest.raises(UserError, match="weights of four bits cannot be trained themselves"):
        GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(
                model_path, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            ),
            len,
            GRPOConfig(),
            texts(),
        )
    with pytest.raises(UserError, match="quantization_config is refused unless it is load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(model_path, quantization_config={"load_in_8bit": True})


def test_several_updates_on_a_generation(model_path: str):
    def reward(completions, **kwargs):
        return [float(len(text)) for text in completions]

    trainer = trainer_of(
        model_path,
        reward,
        texts(),
        num_iterations=2,
        steps_per_generation=2,
        max_steps=8,
        save_steps=4,
        mask_truncated_completions=True,
    )
    outcome = trainer.train()
    assert outcome.global_step == 8
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["step"] for row in logged] == [4, 8]
    recipe = Path("run/recipe.toml").read_text()
    for line in ("passes = 2", "mini_steps = 2", "learn_truncated = false", "prompts_per_step = 4"):
        assert line in recipe
    assert len(read_steps("run")) == 2


def test_vllms_sampling_of_a_configuration(model_path: str):
    from sparring.compat import SamplingParams

    def recipe_of(**given: Any) -> Any:
        params = SamplingParams(**given)
        trainer = trainer_of(
            model_path, lambda completions: [0.0], texts(), vllm_sampling_params=params
        )
        return trainer._recipe(Path("x"))

    given = {"top_k": -1, "seed": 3407, "include_stop_str_in_output": True}
    assert recipe_of(stop=["<|im_end|>"], **given).rollout.stop == ()
    assert recipe_of(stop=["END"]).rollout.stop == ("END",)
    with pytest.raises(UserError, match=r"has min_p = 0\.1, which is refused"):
        recipe_of(min_p=0.1)
    with pytest.raises(RecipeError, match="two different policies"):
        recipe_of(top_p=0.9)
    with pytest.raises(UserError, match="rewards see the text before a stop string"):
        recipe_of(stop=["END"], include_stop_str_in_output=True)


def test_rows_in_their_own_order_where_it_is_asked_for(model_path: str):
    for given in ({"shuffle_dataset": False}, {"train_sampling_strategy": "sequential"}, {}):
        seen: list[str] = []

        def reward(prompts, completions, *, seen=seen, **kwargs):
            seen += prompts[::2]
            return [0.0 for _ in completions]

        trainer_of(model_path, reward, texts(6), max_steps=4, **given).train()
        expected = [f"say {n}" for n in (0, 1, 2, 3, 4, 5, 0, 1)]
        assert (seen == expected) == bool(given)


def test_a_classifier_by_its_folder_scores_prompt_and_completion(
    tiny: ModuleType, model_path: str, tmp_path: Path
):
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=1,
        pad_token_id=257,
    )
    judge = Qwen2ForSequenceClassification(config).eval()
    folder = tmp_path / "my-judge"
    judge.save_pretrained(folder)
    tiny.write_tokenizer(folder, tiny.TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def expected(text: str) -> float:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            return float(judge(input_ids=ids).logits[0, 0])

    (reward,) = build_rewards(str(folder), None, max_steps=1)
    assert reward.name == "my-judge"
    found = reward.function(prompts=["2+2="] * 2, completions=["4", "four"])
    assert found == pytest.approx([expected("2+2=4"), expected("2+2=four")], abs=1e-4)
    asked, said = tiny.as_messages("2+2="), [{"role": "assistant", "content": "4"}]
    (found,) = reward.function(prompts=[asked], completions=[said])
    text = tokenizer.apply_chat_template(asked + said, tokenize=False)
    assert found == pytest.approx(expected(text), abs=1e-4)
    trainer = trainer_of(model_path, str(folder), texts(), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/my-judge/mean"] != 0.0
