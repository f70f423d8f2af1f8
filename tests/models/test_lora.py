"""Adapters: PEFT reads ours and we read PEFT's, with the same logits and the same gradients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparring.errors import CheckpointError
from sparring.models.checkpoint import (
    build_model,
    load_adapter_onto,
    load_model,
    save_adapter,
    save_model,
)
from sparring.models.lora import PROJECTIONS, LoraConfig
from sparring.models.transformer import Decoder
from tests.models.tiny import CONFIGS, batch_of, hugging_face_model, logits_of, random_ids

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

QV = ("q_proj", "v_proj", "down_proj")


def adapted(
    folder: Path, config: LoraConfig, *, dtype: str = "float32", spread: float = 0.2
) -> Decoder:
    """The model of a folder with an adapter whose matrices are all random."""
    model = load_model(folder, dtype=dtype)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            values = torch.empty(parameter.shape).normal_(0, spread, generator=generator)
            parameter.copy_(values)
    model.refresh_shadows()
    return model


def peft_model(base: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("name", "targets"), [("qwen2", "all-linear"), ("qwen3", QV)])
def test_peft_loads_what_is_saved_and_gives_the_same_logits(
    name: str, targets: Any, rslora: bool, tmp_path: Path
):
    base = hugging_face_model(CONFIGS[name], tmp_path / "base")
    config = LoraConfig(rank=4, alpha=7.0, rslora=rslora, target_modules=targets)
    model = adapted(tmp_path / "base", config)
    save_adapter(model, tmp_path / "adapter", str(tmp_path / "base"))
    theirs = peft_model(base, tmp_path / "adapter").eval()
    sequences = random_ids((1, 40, 133), 97)
    with torch.no_grad():
        off = logits_of(model, sequences, adapter=None)
        for ids, ours, without in zip(sequences, logits_of(model, sequences), off, strict=True):
            torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=2e-4, rtol=0)
            with theirs.disable_adapter():
                expected = theirs(ids[None]).logits[0]
            torch.testing.assert_close(without, expected, atol=2e-4, rtol=0)
            assert (ours - without).abs().max() > 0.05
    again = load_model(tmp_path / "adapter", dtype="float32")
    assert again.lora["policy"].scale == config.scale
    with torch.no_grad():
        for ours, theirs_again in zip(
            logits_of(model, sequences), logits_of(again, sequences), strict=True
        ):
            assert torch.equal(ours, theirs_again)


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "o_proj", "up_proj"]])
def test_what_peft_saves_loads_with_the_same_logits(targets: Any, tmp_path: Path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    base = hugging_face_model(CONFIGS["llama31"], tmp_path / "base")
    torch.manual_seed(1)
    theirs = get_peft_model(
        base,
        PeftConfig(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=targets,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32")
    assert model.lora["policy"].targets() == frozenset(
        PROJECTIONS if targets == "all-linear" else targets
    )
    sequences = random_ids((2, 77), 97)
    with torch.no_grad():
        for ids, ours in zip(sequences, logits_of(model, sequences), strict=True):
            torch.testing.assert_close(ours, theirs(ids[None]).logits[0], atol=2e-4, rtol=0)


def test_gradients_equal_those_of_peft(tmp_path: Path):
    base = hugging_face_model(CONFIGS["qwen2"], tmp_path / "base").double()
    config = LoraConfig(rank=4, alpha=8.0)
    save_adapter(adapted(tmp_path / "base", config), tmp_path / "adapter", str(tmp_path / "base"))
    model = build_model(CONFIGS["qwen2"], dtype=torch.float64)
    reread = load_model(tmp_path / "base", dtype="float32")
    model.load_state_dict({name: t.double() for name, t in reread.state_dict().items()})
    load_adapter_onto(model, tmp_path / "adapter")
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).double()
    prompts, completions = random_ids((6, 9), 97), [random_ids((5, 11), 97, seed=s) for s in (1, 2)]
    model.set_checkpointing("layers")
    model.score(batch_of(prompts, completions, share=True)).logprobs_T.sum().backward()
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            ids = torch.cat([prompt, completion])
            rows = theirs(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            rows.gather(1, completion[:, None]).sum().backward()
    theirs_by_name = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    from sparring.models.adapter_files import _PREFIX
    from sparring.models.checkpoint import module_names

    names = module_names(model)
    compared = 0
    for path, adapter in model.adapter_modules("policy").items():
        assert adapter.a.grad is not None
        assert adapter.b.grad is not None
        for part, where in adapter.parts.items():
            module = _PREFIX + names[path, part]
            for ours, kind in (
                (adapter.a.grad[where.ranks], "A"),
                (adapter.b.grad[where.b_rows], "B"),
            ):
                expected = theirs_by_name[f"{module}.lora_{kind}.weight"]
                # transformers norms in float32 even in a float64 model
                torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-3)
                compared += 1
    assert compared == len(theirs_by_name) == 2 * 2 * len(PROJECTIONS)


def test_logits_and_gradients_equal_those_of_merged_weights():
    config = LoraConfig(rank=3, alpha=5.0, target_modules=("q_proj", "v_proj", "up_proj"))
    model = build_model(CONFIGS["qwen3"], dtype=torch.float64)
    model.init_weights(0)
    merged = build_model(CONFIGS["qwen3"], dtype=torch.float64)
    merged.init_weights(0)
    model.add_adapter(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.normal_(0, 0.1, generator=generator)
        for path, adapter in model.adapter_modules("policy").items():
            linear = merged.linears()[path]
            for part in adapter.parts:
                a, b = adapter.matrices(part)
                linear.base.weight[linear.parts[part]] += config.scale * b @ a
    batch = batch_of(random_ids((6, 2), 97), [random_ids((5, 11), 97)] * 2, share=True)
    ours, theirs = model.score(batch).logprobs_T, merged.score(batch).logprobs_T
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)
    ours.sum().backward()
    theirs.sum().backward()
    for path, adapter in model.adapter_modules("policy").items():
        linear = merged.linears()[path]
        assert linear.base.weight.grad is not None
        for part, where in adapter.parts.items():
            a, b = adapter.matrices(part)
            weight_gradient = linear.base.weight.grad[linear.parts[part]]
            expected_a = config.scale * b.T @ weight_gradient
            expected_b = config.scale * weight_gradient @ a.T
            assert expected_a.abs().max() > 1e-3
            torch.testing.assert_close(adapter.a.grad[where.ranks], expected_a, atol=1e-10, rtol=0)
            torch.testing.assert_close(adapter.b.grad[where.b_rows], expected_b, atol=1e-10, rtol=0)


def test_only_the_adapter_is_trained_and_a_fresh_one_changes_nothing(tmp_path: Path):
    model = build_model(CONFIGS["llama2"], dtype=torch.float32)
    model.init_weights(0)
    everything = model.trainable_parameters()
    assert list(everything) == sorted(everything)
    assert len(everything) == sum(1 for _ in model.parameters())
    sequences = random_ids((20,), 97)
    with torch.no_grad():
        before = logits_of(model, sequences)[0]
        model.add_adapter(LoraConfig(rank=2, target_modules=("q_proj", "o_proj")))
        assert torch.equal(logits_of(model, sequences)[0], before)
    names = list(model.trainable_parameters())
    assert len(names) == 2 * 2 * 2
    assert all(".adapters.policy." in name for name in names)
    model.score(batch_of(sequences, [random_ids((4,), 97)], share=True)).logprobs_T.sum().backward()
    assert all(p.grad is not None for p in model.trainable_parameters().values())
    assert model.embed.weight.grad is None


def test_the_seed_draws_the_adapter_and_the_bound_is_pefts(tmp_path: Path):
    models = [build_model(CONFIGS["llama2"], dtype=torch.float32) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        model.add_adapter(LoraConfig(rank=8, seed=seed))
    a = [model.adapter_modules("policy")["layers.0.down"].a for model in models]
    assert torch.equal(a[0], a[1])
    assert not torch.equal(a[0], a[2])
    bound = CONFIGS["llama2"]["intermediate_size"] ** -0.5  # kaiming_uniform_ with a = sqrt(5)
    assert 0.95 * bound < a[0].abs().max() <= bound


def test_sixteen_bit_models_train_float32_parameters_and_read_shadows(tmp_path: Path):
    hugging_face_model(CONFIGS["qwen2"], tmp_path)
    model = adapted(tmp_path, LoraConfig(rank=4), dtype="bfloat16", spread=0.05)
    adapter = model.adapter_modules("policy")["layers.0.qkv"]
    shadow = adapter.a_shadow
    assert adapter.a.dtype == torch.float32
    assert shadow is not None
    assert shadow.dtype == torch.bfloat16
    address = shadow.data_ptr()
    sequences = random_ids((15,), 97)
    with torch.no_grad():
        before = logits_of(model, sequences)[0]
        for parameter in model.trainable_parameters().values():
            parameter.add_(0.02)
        assert torch.equal(logits_of(model, sequences)[0], before)
        model.refresh_shadows()
        assert not torch.equal(logits_of(model, sequences)[0], before)
    assert adapter.a_shadow is shadow
    assert shadow.data_ptr() == address
    assert torch.equal(shadow, adapter.a.to(torch.bfloat16))
    batch = batch_of(sequences, [random_ids((12, 7), 97)], share=True)
    model.score(batch).logprobs_T.mean().backward()
    wide = load_model(tmp_path, dtype="float32")
    wide.add_adapter(LoraConfig(rank=4))
    with torch.no_grad():
        for ours, theirs in zip(
            wide.trainable_parameters().values(), model.trainable_parameters().values(), strict=True
        ):
            ours.copy_(theirs)
    wide.score(batch).logprobs_T.mean().backward()
    for name, parameter in model.trainable_parameters().items():
        gradient, expected = parameter.grad, wide.trainable_parameters()[name].grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        error = (gradient - expected).norm() / expected.norm()
        assert error < 0.15, (name, error)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (("q_proj", "lm_head"), ("lm_head", "embeddings", "q_proj")),
        (("embed_tokens",), ("embed_tokens", "embeddings")),
        (("q_proj", "wq"), ("'wq'", "all-linear", "gate_proj")),
        ((), ("empty", "all-linear")),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(targets: Any, words: tuple[str, ...]):
    with pytest.raises(CheckpointError) as caught:
        LoraConfig(target_modules=targets)
    for word in words:
        assert word in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and an adapter for it."""
    folder = tmp_path_factory.mktemp("saved")
    hugging_face_model(CONFIGS["llama2"], folder / "base")
    save_adapter(
        adapted(folder / "base", LoraConfig(rank=2, target_modules=QV)),
        folder / "adapter",
        str(folder / "base"),
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "all"}, "bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"some_new_feature": True}, "some_new_feature"),
        ({"r": None}, "r is None"),
    ],
)
def test_features_of_peft_that_are_not_computed_are_refused_by_name(
    changes: dict[str, Any], word: str, saved: Path, tmp_path: Path
):
    config = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=word):
        load_model(saved / "base", adapter=tmp_path)


def test_an_adapter_of_another_base_or_shape_is_refused_and_changes_nothing(
    saved: Path, tmp_path: Path
):
    hugging_face_model({**CONFIGS["llama2"], "num_hidden_layers": 1}, tmp_path / "fewer")
    hugging_face_model({**CONFIGS["llama2"], "intermediate_size": 64}, tmp_path / "thinner")
    hugging_face_model(CONFIGS["llama2"], tmp_path / "other", seed=9)
    with pytest.raises(CheckpointError, match=r"trained on a base with other weights.*base"):
        load_model(tmp_path / "other", adapter=saved / "adapter")
    file = saved / "adapter" / "adapter_model.safetensors"
    (tmp_path / "foreign").mkdir()
    foreign = tmp_path / "foreign"
    save_file(load_file(file), foreign / "adapter_model.safetensors")
    (foreign / "adapter_config.json").write_text(
        (saved / "adapter" / "adapter_config.json").read_text()
    )
    with pytest.raises(CheckpointError, match=r"does not fit this base.*unexpected"):
        load_model(tmp_path / "fewer", adapter=foreign)
    model = load_model(tmp_path / "thinner", dtype="float32")
    with pytest.raises(CheckpointError, match=r"is \[2, 80\], the base needs \[2, 64\]"):
        load_adapter_onto(model, foreign)
    assert not model.has_adapter()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("drop", "is missing"),
        ("embedding", "embed_tokens"),
        ("bin", "pickled"),
        ("none", "has no adapter_model.safetensors"),
        ("cut", "cut off"),
    ],
)
def test_damaged_adapters_are_refused(damage: str, words: str, saved: Path, tmp_path: Path):
    config = (saved / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    tensors = load_file(saved / "adapter" / "adapter_model.safetensors")
    target = tmp_path / "adapter_model.safetensors"
    if damage == "drop":
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, target)
    elif damage == "embedding":
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 97)
        save_file(tensors, target)
    elif damage == "bin":
        (tmp_path / "adapter_model.bin").write_bytes(b"")
    elif damage == "cut":
        whole = (saved / "adapter" / "adapter_model.safetensors").read_bytes()
        target.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=words):
        load_model(saved / "base", adapter=tmp_path)


def test_a_model_is_saved_without_its_adapter(saved: Path, tmp_path: Path):
    model = load_model(saved / "adapter", dtype="float32")
    save_model(model, tmp_path)
    again = load_model(tmp_path, dtype="float32")
    sequences = random_ids((9,), 97)
    with torch.no_grad():
        ours, theirs = logits_of(model, sequences, adapter=None), logits_of(again, sequences)
    assert torch.equal(ours[0], theirs[0])
