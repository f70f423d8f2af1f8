"""Linear layers in the fixed order of bitwise mode: values, gradients, and bits of single rows."""

from __future__ import annotations

import pytest
import torch

from sparring.models.linear import Linear, fix_order
from sparring.models.lora import LoraConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PARTS = {"q_proj": 128, "k_proj": 32, "v_proj": 32}


def layer_of(device, dtype, *, is_quantised, has_adapter, inputs=192, parts=PARTS):
    torch.manual_seed(0)
    layer = Linear(inputs, parts, bias=True, device=device, dtype=dtype, is_quantised=is_quantised)
    weight = (torch.randn(layer.base.shape) * 0.1).to(device, dtype)
    if is_quantised:
        for index, rows in enumerate(layer.parts.values()):
            layer.base.quantise(index, weight[rows])
    else:
        layer.base.weight.data.copy_(weight)
    layer.bias.data.normal_()
    if has_adapter:
        config = LoraConfig(rank=8, alpha=4.0)
        layer.add_adapter(
            "policy", config, frozenset(["q_proj", "v_proj"]), torch.Generator().manual_seed(1)
        )
        layer.adapters["policy"].b.data.normal_()
        layer.adapters["policy"].refresh_shadow()
        layer.requires_grad_(False)
        layer.adapters.requires_grad_(True)
    return layer


def run(layer, x, dy):
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaf, "policy")
    y.backward(dy)
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad, **found}


@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_values_and_gradients_are_those_of_the_default(is_quantised, has_adapter):
    layer = layer_of(CPU, torch.float32, is_quantised=is_quantised, has_adapter=has_adapter)
    x, dy = torch.randn(9, 192), torch.randn(9, 192)
    want = run(layer, x, dy)
    fix_order(layer)
    got = run(layer, x, dy)
    assert got.keys() == want.keys()
    assert len(got) == (4 if has_adapter or not is_quantised else 3)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)
    with torch.no_grad():
        assert torch.equal(layer(x, "policy"), got["y"])
    fix_order(layer, False)
    assert torch.equal(run(layer, x, dy)["y"], want["y"])


@pytest.mark.parametrize(
    "device",
    [
        pytest.param(CPU, id="cpu"),
        pytest.param(
            CUDA,
            id="gpu",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("is_quantised", [False, True])
@pytest.mark.parametrize("has_adapter", [False, True])
def test_decoding_and_training_give_the_same_bits(is_quantised, has_adapter, device):
    size = {} if device == CPU else {"inputs": 3584, "parts": {n: 8 * r for n, r in PARTS.items()}}
    layer = layer_of(
        device, torch.bfloat16, is_quantised=is_quantised, has_adapter=has_adapter, **size
    )
    fix_order(layer)
    x = torch.randn(40 if device == CPU else 1000, layer.base.shape[1]).to(device, torch.bfloat16)
    trained = layer(x, "policy").detach()
    with torch.no_grad():
        for rows in (slice(0, 1), slice(3, 11), slice(5, 38), slice(-64, None)):
            assert torch.equal(layer(x[rows], "policy"), trained[rows]), rows
        if is_quantised:
            layer.base.cache()
            assert torch.equal(layer(x[7:15], "policy"), trained[7:15]), "with the decoded copy"
