"""Checkpointing, offload and tiles: no bit changes, less is kept, attention is not done again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.models.attention_packed import PackedPlan
from sparring.models.checkpoint import build_model
from sparring.models.linear import Dense
from sparring.models.lora import LoraConfig
from sparring.models.quantised import Quantised
from sparring.models.transformer import Decoder
from tests.models.tiny import CONFIGS, batch_of, random_ids

WIDE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip
ADAPTERS: dict[str, Any] = {
    "all": "all-linear",
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "down": ("down_proj",),
    "full": None,
}


def small(
    name: str = "qwen3",
    adapter: str = "all",
    *,
    quantised: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **changes: Any,
) -> Decoder:
    config = {**CONFIGS[name], **WIDE, **changes}
    model = build_model(config, device=device, dtype=dtype, is_quantised=quantised)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    for linear in model.linears().values():
        if isinstance(linear.base, Quantised):
            for index, rows in enumerate(linear.base.part_rows):
                weight = torch.empty(rows, linear.base.num_inputs)
                linear.base.quantise(index, weight.normal_(0, 0.05, generator=generator))
    if ADAPTERS[adapter] is not None:
        model.add_adapter(LoraConfig(rank=4, target_modules=ADAPTERS[adapter]))
        with torch.no_grad():
            for part in model.adapter_modules("policy").values():
                values = torch.empty(part.b.shape)
                part.b.copy_(values.normal_(0, 0.05, generator=generator))
        model.refresh_shadows()
    return model


def batch(device: str = "cpu", longest: int = 70) -> Any:
    made = batch_of(
        random_ids((6, 30), 97),
        [random_ids((7, longest), 97), random_ids((1, 40), 97, seed=3)],
        share=True,
    )
    fields = {name: getattr(made, name) for name in made.__dataclass_fields__}
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()}
    return type(made)(**moved)


def loss_and_gradients(model: Decoder, made: Any) -> dict[str, Tensor]:
    """Two backward passes, so that gradients are added up as over micro-batches."""
    for parameter in model.parameters():
        parameter.grad = None
    found = {}
    for number in range(2):
        scores = model.score(made)
        weights = torch.linspace(-1, 2, len(scores.logprobs_T), device=model.device)
        loss = (scores.logprobs_T * weights).sum()
        loss.backward()
        found[f"loss {number}"] = loss.detach()
    found |= {n: p.grad for n, p in model.trainable_parameters().items() if p.grad is not None}
    return found


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    ("adapter", "quantised"),
    [("full", False), *itertools.product(["all", "attention", "down"], [False, True])],
)
@pytest.mark.parametrize("name", ["qwen2_upper_layers_window", "qwen3"])
def test_no_mode_changes_a_bit(name: str, adapter: str, quantised: bool):
    model, made = small(name, adapter, quantised=quantised), batch()
    plain = loss_and_gradients(model, made)
    assert len(plain) > 4
    for mode in ("layers", "selective"):
        for offload in (False, True):
            model.set_checkpointing(mode, offload=offload)
            assert_same_bits(loss_and_gradients(model, made), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_bit_in_other_dtypes(dtype: torch.dtype):
    model, made = small(dtype=dtype), batch()
    plain = loss_and_gradients(model, made)
    for mode in ("layers", "selective"):
        model.set_checkpointing(mode)
        assert_same_bits(loss_and_gradients(model, made), plain)


def test_two_passes_before_their_backwards():
    model, first, second = small(), batch(), batch(longest=50)
    results = []
    for mode in ("none", "layers", "selective"):
        model.set_checkpointing(mode)
        for parameter in model.parameters():
            parameter.grad = None
        losses = [model.score(made).logprobs_T.sum() for made in (first, second)]
        for loss in losses:
            loss.backward()
        results.append({n: p.grad for n, p in model.trainable_parameters().items()})
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_each_mode_keeps_less_and_selective_attends_once(monkeypatch: pytest.MonkeyPatch):
    model, made = small(), batch(longest=150)
    attended = []
    attend = PackedPlan.attend
    monkeypatch.setattr(
        PackedPlan, "attend", lambda *args: (attended.append(args[4]), attend(*args))[1]
    )
    kept, times = {}, {}
    for mode in ("none", "layers", "selective"):
        model.set_checkpointing(mode)
        sizes: list[int] = []
        attended.clear()

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.score(made).logprobs_T.sum()
        loss.backward()
        kept[mode], times[mode] = sum(sizes), len(attended)
    assert kept["layers"] < kept["none"] / 3
    assert kept["layers"] < kept["selective"] < kept["none"]
    assert times == {"none": 3, "layers": 6, "selective": 3}


def test_the_last_product_of_a_layer_is_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    model, made = small("qwen2"), batch()
    products: list[int] = []
    matmul = Dense.matmul

    def counted(weight: Dense, *args: Any) -> Tensor:
        products.append(weight.shape[1])
        return matmul(weight, *args)

    monkeypatch.setattr(Dense, "matmul", counted)
    model.set_checkpointing("layers")
    model.score(made).logprobs_T.sum().backward()
    assert products.count(128) == 3  # down_proj alone has so many inputs; once a layer
    assert products.count(64) == 2 * 3 * 3  # the other three twice


def test_tiles_of_the_feed_forward():
    model, made = small(adapter="all"), batch()
    plain = loss_and_gradients(model, made)
    rows: list[int] = []
    matmul = Dense.matmul

    def counted(weight: Dense, x: Tensor, *args: Any) -> Tensor:
        if weight is model.layers[1].gate_up.base:
            rows.append(len(x))
        return matmul(weight, x, *args)

    for mode in ("layers", "selective"):
        model.set_checkpointing(mode, mlp_tile_tokens=64)
        rows.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dense, "matmul", counted)
            tiled = loss_and_gradients(model, made)
        assert max(rows) == 64
        assert sum(rows) == 4 * len(made.input_ids_T)  # two passes, forward and backward
        for name, value in plain.items():
            error = (tiled[name] - value).norm() / value.norm()
            assert error < 1e-5, name
        assert_same_bits(loss_and_gradients(model, made), tiled)


def test_a_frozen_model_needs_no_backward():
    model = small()
    model.requires_grad_(False)
    model.set_checkpointing("layers")
    assert not model.score(batch()).logprobs_T.requires_grad


def test_an_unknown_mode():
    with pytest.raises(ValueError, match="'layer'; known: none, layers, selective"):
        small().set_checkpointing("layer")


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_no_bit_on_a_card(name: str, quantised: bool):
    model = small(
        name, quantised=quantised, dtype=torch.bfloat16, device="cuda", head_dim=64,
        hidden_size=512, intermediate_size=1024,
    )  # fmt: skip
    made = batch("cuda", longest=600)
    plain = loss_and_gradients(model, made)
    assert_same_bits(loss_and_gradients(model, made), plain)
    for mode in ("layers", "selective"):
        for offload in (False, True):
            model.set_checkpointing(mode, offload=offload)
            for _ in range(2):  # the second time with buffers that were used before
                assert_same_bits(loss_and_gradients(model, made), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("quantised", [False, True])
def test_tiles_on_a_card(quantised: bool):
    """In float32, where another order of a sum is all that a tile changes."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = small(
        quantised=quantised, device="cuda", head_dim=64, hidden_size=512, intermediate_size=1024
    )
    made = batch("cuda", longest=600)
    plain = loss_and_gradients(model, made)
    for mode in ("layers", "selective"):
        model.set_checkpointing(mode, offload=True, mlp_tile_tokens=256)
        for key, value in loss_and_gradients(model, made).items():
            assert (value - plain[key]).norm() <= 1e-5 * plain[key].norm(), key
