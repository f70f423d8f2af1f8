"""The script of interface.md, completed with a math reward and a trainer, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from sparring.compat import (
    FastLanguageModel,
    GRPOConfig,
    GRPOTrainer,
    PatchFastRL,
    SamplingParams,
    is_bfloat16_supported,
)
from sparring.errors import UserError
from sparring.rewards.math import MathReward
from sparring.train.inference import open_policy

PatchFastRL("GRPO", FastLanguageModel)


def math_reward(prompts, completions, answer, **kwargs):
    """1 where the last number of the answer is right, by the same rules as the native reward."""
    texts = [completion[0]["content"] for completion in completions]
    return MathReward()(completions=texts, reference=answer)


def digits(completions, **kwargs):
    return [
        sum(letter.isdigit() for letter in completion[0]["content"]) / 10
        for completion in completions
    ]


def test_the_script_of_the_interface(tiny: ModuleType, model_path: str, own_folder: Path):
    from datasets import Dataset

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=model_path, max_seq_length=2048, load_in_4bit=True, fast_inference=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        lora_alpha=16,
        lora_dropout=0,
    )
    assert model.policy.model.is_quantised
    rows = [
        {"prompt": tiny.as_messages(f"{a}+{b}="), "answer": str(a + b)}
        for a in (1, 2, 3)
        for b in (4, 5)
    ]
    args = GRPOConfig(
        use_vllm=True,
        learning_rate=5e-3,
        adam_beta1=0.9,
        adam_beta2=0.99,
        weight_decay=0.1,
        warmup_ratio=0.1,
        lr_scheduler_type="cosine",
        optim="adamw_8bit",
        logging_steps=1,
        bf16=is_bfloat16_supported(),
        fp16=not is_bfloat16_supported(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        num_generations=4,
        max_prompt_length=200,
        max_completion_length=8,
        max_steps=3,
        save_steps=3,
        max_grad_norm=0.1,
        report_to="none",
        output_dir="outputs",
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=[math_reward, digits],
        args=args,
        train_dataset=Dataset.from_list(rows),
    )
    before = [p.detach().clone() for p in model.policy.model.trainable_parameters().values()]
    outcome = trainer.train()
    assert outcome.global_step == 3
    assert any(
        not torch.equal(old, new)
        for old, new in zip(before, model.policy.model.trainable_parameters().values(), strict=True)
    )
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    assert {"loss", "reward", "rewards/math_reward/mean", "rewards/digits/mean", "epoch"} <= set(
        logged[0]
    )
    rollouts = (own_folder / "outputs/rollouts/step_000001.jsonl").read_text().splitlines()
    assert len(rollouts) == 4

    model.save_lora("grpo_saved_lora")
    assert (own_folder / "grpo_saved_lora/adapter_model.safetensors").is_file()
    text = tokenizer.apply_chat_template(
        tiny.as_messages("1+4="), tokenize=False, add_generation_prompt=True
    )
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=6, seed=1)
    answers = model.fast_generate(
        [text], sampling_params=params, lora_request=model.load_lora("grpo_saved_lora")
    )
    assert isinstance(answers[0].outputs[0].text, str)
    assert 0 < len(answers[0].outputs[0].token_ids) <= 6
    trainer.save_model("final")
    settings = json.loads((own_folder / "final/sparring.json").read_text())
    assert settings["template"] == "auto"
    assert open_policy("final").model.has_adapter()


def test_a_saved_adapter_answers_as_the_live_one_and_the_base_without_it(
    model_path: str, own_folder: Path
):
    model, _ = FastLanguageModel.from_pretrained(model_path, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules="all-linear")
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=5)
    base = model.fast_generate("abc", params)[0].outputs[0].token_ids
    for adapter in model.policy.model.adapter_modules("policy").values():
        torch.nn.init.normal_(adapter.b, std=0.3)
    model.save_lora("lora")
    saved = model.load_lora("lora")
    live = model.load_lora("nowhere", load_tensors=True)
    by_file = model.fast_generate("abc", params, lora_request=saved)[0].outputs[0].token_ids
    by_live = model.fast_generate("abc", params, lora_request=live)[0].outputs[0].token_ids
    assert by_file == by_live != base
    assert model.fast_generate("abc", params)[0].outputs[0].token_ids == base
    assert model.load_lora("lora").lora_name == saved.lora_name
    trained = model.policy.model.trainable_parameters()
    assert all("policy" in name for name in trained)
    with pytest.raises(UserError, match="holds no adapter; save_lora writes one"):
        model.load_lora("nowhere")


def test_outputs_have_the_shape_of_vllms(model_path: str):
    model, tokenizer = FastLanguageModel.from_pretrained(model_path, load_in_4bit=False)
    params = SamplingParams(n=3, max_tokens=4)
    first, second = model.fast_generate(["ab", "cde"], sampling_params=params)
    assert first.prompt == "ab"
    assert second.prompt_token_ids == tokenizer("cde")["input_ids"]
    assert [one.index for one in first.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in first.outputs}) > 1
    assert {one.finish_reason for one in first.outputs} <= {"stop", "length"}
    again = model.fast_generate(["ab"], sampling_params=params)[0]
    assert [o.token_ids for o in again.outputs] != [o.token_ids for o in first.outputs]


def test_generate_of_transformers_continues_padded_prompts(model_path: str):
    model, tokenizer = FastLanguageModel.from_pretrained(model_path, load_in_4bit=False)
    model = FastLanguageModel.for_inference(model)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    inputs = tokenizer(["a", "abcd"], return_tensors="pt", padding=True)
    both = model.generate(**inputs, max_new_tokens=5, use_cache=True)
    assert both[:, :4].tolist() == inputs["input_ids"].tolist()
    alone = model.generate(**tokenizer(["a"], return_tensors="pt"), max_new_tokens=5)
    end = tokenizer.eos_token_id
    said = [token for token in both[0, 4:].tolist() if token != end]
    assert said == [token for token in alone[0, 1:].tolist() if token != end]

    chat = [{"role": "user", "content": "a"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert len(model.generate(input_ids=asked, max_new_tokens=2)[0]) > 2

    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, value):
            self.seen.append(value)

        def end(self):
            self.seen.append("end")

    streamer = Streamer()
    model.generate(**inputs, max_new_tokens=3, streamer=streamer)
    assert streamer.seen[-1] == "end"
    assert len(streamer.seen) == 3


def test_merged_weights_speak_as_base_and_adapter_do(model_path: str, own_folder: Path):
    for four_bits in (False, True):
        model, tokenizer = FastLanguageModel.from_pretrained(model_path, load_in_4bit=four_bits)
        model = FastLanguageModel.get_peft_model(model, r=4)
        for adapter in model.policy.model.adapter_modules("policy").values():
            torch.nn.init.normal_(adapter.b, std=0.2)
        folder = own_folder / f"merged{four_bits}"
        model.save_pretrained_merged(str(folder), tokenizer, save_method="merged_16bit")
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        written = load_file(folder / "model.safetensors")
        assert written["model.layers.0.self_attn.q_proj.weight"].dtype == torch.bfloat16
        merged = open_policy(str(folder), dtype="float32").model
        from sparring.api import score

        ours, theirs = (score(one, [[1, 5, 9, 30, 7]])[0] for one in (model.policy.model, merged))
        assert torch.allclose(ours, theirs, atol=0.05)
        base, _ = FastLanguageModel.from_pretrained(model_path, load_in_4bit=four_bits)
        plain = score(base.policy.model, [[1, 5, 9, 30, 7]])[0]
        assert (plain - ours).abs().max() > 0.2
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded.dtype == torch.bfloat16
    with pytest.raises(UserError, match="rounding a merged matrix to four bits"):
        model.save_pretrained_merged("x", save_method="merged_4bit_forced")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_in_8bit": True}, "weights of 8 bits are not built; load_in_4bit = True"),
        ({"trust_remote_code": True}, "no code of a checkpoint is ever run"),
        ({"token": "hf_x"}, "hf auth login"),
        ({"device_map": {"a": 0, "b": 1}}, "one holds the model"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_loading_refuses_with_the_native_way(model_path: str, change: dict, message: str):
    with pytest.raises(UserError, match=message):
        FastLanguageModel.from_pretrained(model_path, **change)


def test_adapters_are_held_to_what_is_computed(model_path: str):
    model, _ = FastLanguageModel.from_pretrained(
        model_path, max_lora_rank=8, load_in_4bit=False, fast_inference=True
    )
    with pytest.raises(UserError, match="r = 16 is above max_lora_rank = 8"):
        FastLanguageModel.get_peft_model(model, r=16)
    with pytest.raises(UserError, match=r"lora_dropout = 0\.1 is refused: sampler and trainer"):
        FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.1)
    with pytest.raises(UserError, match="embeddings and the output head"):
        FastLanguageModel.get_peft_model(model, r=8, modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="nothing of this model is trained"):
        GRPOTrainer(model=model, reward_funcs=digits, train_dataset=[{"prompt": "a"}])
    FastLanguageModel.get_peft_model(model, r=8, use_rslora=True)
    assert model.policy.model.lora["policy"].rslora
    with pytest.raises(UserError, match="has an adapter already"):
        FastLanguageModel.get_peft_model(model, r=8)


def test_full_finetuning_trains_every_weight(model_path: str):
    model, _ = FastLanguageModel.from_pretrained(model_path, full_finetuning=True)
    assert FastLanguageModel.get_peft_model(model) is model
    assert not model.policy.model.is_quantised
    model.make_trainable()
    trained, total = model.get_nb_trainable_parameters()
    assert trained == total


def test_arguments_by_position_are_unsloths(model_path: str):
    model, _ = FastLanguageModel.from_pretrained(model_path, 128, None, False)
    assert (model.max_seq_length, model.policy.model.is_quantised) == (128, False)
    FastLanguageModel.get_peft_model(model, 4, ["q_proj"], 8)
    assert (model.policy.model.lora["policy"].rank, model.policy.model.lora["policy"].alpha) == (
        4,
        8,
    )
    with pytest.raises(UserError, match="'r' is given by position and by name"):
        FastLanguageModel.get_peft_model(model, 4, r=4)


def test_stop_strings_are_left_out_or_kept(model_path: str):
    model, _ = FastLanguageModel.from_pretrained(model_path, load_in_4bit=False)
    whole = model.fast_generate("abc", SamplingParams(max_tokens=12, seed=3))[0].outputs[0]
    stop = whole.text[4]
    given = {"max_tokens": 12, "seed": 3, "stop": [stop]}
    cut = model.fast_generate("abc", SamplingParams(**given))[0].outputs[0].text
    kept = SamplingParams(**given, include_stop_str_in_output=True)
    assert model.fast_generate("abc", kept)[0].outputs[0].text == cut + stop
    assert whole.text.startswith(cut + stop)
