"""The blocks over frozen weights: every gradient by name against float64, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparring.models.blocks import lora_mlp
from sparring.models.linear import Linear
from sparring.models.lora import LoraAdapter, LoraConfig
from sparring.models.quantised import Quantised

CPU = torch.device("cpu")
QKV = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
GATE_UP, DOWN = {"gate_proj": 192, "up_proj": 192}, {"down_proj": 64}


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def linear(
    inputs: int,
    parts: dict[str, int],
    *,
    dtype: torch.dtype,
    bias: bool = False,
    is_quantised: bool = False,
    targets: tuple[str, ...] = (),
) -> Linear:
    """A frozen layer with a trained adapter on `targets`, B not zero."""
    made = Linear(inputs, parts, bias=bias, device=CPU, dtype=dtype, is_quantised=is_quantised)
    with torch.no_grad():
        for index, rows in enumerate(made.parts.values()):
            weight = normal(rows.stop - rows.start, inputs, seed=index, scale=inputs**-0.5)
            if isinstance(made.base, Quantised):
                made.base.quantise(index, weight.to(dtype))
            else:
                made.base.weight[rows] = weight.to(dtype)
        if made.bias is not None:
            made.bias.copy_(normal(len(made.bias), seed=9))
    made.requires_grad_(False)
    config = LoraConfig(rank=4, alpha=6.0, target_modules=targets or "all-linear")
    made.add_adapter("policy", config, config.targets() if targets else frozenset(), _generator())
    for adapter in made.adapters.values():
        torch.nn.init.normal_(adapter.b, std=0.2, generator=_generator())
        adapter.refresh_shadow()
    return made


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def plain(x: Tensor, layer: Linear, leaves: dict[str, Tensor], name: str) -> Tensor:
    """The formula in float64, differentiable in x and copies of the adapter's matrices."""
    y = x @ layer.base.dense().double().T
    if layer.bias is not None:
        y = y + layer.bias.double()
    if "policy" not in layer.adapters:
        return y
    lora = layer.adapters["policy"]
    used = lora.matrices_used()
    for kind, matrix in zip("ab", used, strict=True):
        leaves[f"{name}.{kind}"] = matrix.detach().double().requires_grad_()
    a, b = leaves[f"{name}.a"], leaves[f"{name}.b"]
    for part in lora.parts.values():
        added = lora.scale * (x @ a[part.ranks].T) @ b[part.b_rows].T
        y = y + F.pad(added, (part.output_rows.start, y.shape[1] - part.output_rows.stop))
    return y


def compare(
    run: Callable[[Tensor], Tensor],
    reference: Callable[[Tensor, dict[str, Tensor]], Tensor],
    layers: dict[str, Linear],
    x: Tensor,
    limit: float,
) -> None:
    leaf, wide, leaves = x.clone().requires_grad_(), x.double().requires_grad_(), {}
    y, want = run(leaf), reference(wide, leaves)
    grad = normal(*y.shape, seed=7).to(x.dtype)
    y.backward(grad)
    want.backward(grad.double())
    with torch.no_grad():
        assert torch.equal(run(x), y), "the same bits with and without gradient"
    found = {"y": y, "x": leaf.grad}
    for name, layer in layers.items():
        for adapter in layer.adapters.values():
            assert adapter.a.grad.dtype == adapter.a.dtype
            found |= {f"{name}.a": adapter.a.grad, f"{name}.b": adapter.b.grad}
    wanted = {"y": want, "x": wide.grad, **{name: leaf.grad for name, leaf in leaves.items()}}
    assert found.keys() == wanted.keys()
    for name, got in found.items():
        error = (got.double() - wanted[name]).norm() / wanted[name].norm()
        assert error < limit, f"{name}: {error:.2e}"


LIMITS = [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "targets", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj"), ("k_proj",)]
)
def test_a_fused_linear_layer(targets, bias, dtype, limit):
    is_quantised = dtype != torch.float64 and bias
    layer = linear(64, QKV, dtype=dtype, bias=bias, is_quantised=is_quantised, targets=targets)
    compare(
        layer_of(layer),
        lambda x, leaves: plain(x, layer, leaves, "qkv"),
        {"qkv": layer},
        normal(11, 64, seed=3).to(dtype),
        limit,
    )


def layer_of(layer: Linear) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, "policy")


@pytest.mark.parametrize(("dtype", "limit"), LIMITS)
@pytest.mark.parametrize(
    "targets",
    [
        (),
        ("gate_proj", "up_proj", "down_proj"),
        ("gate_proj", "up_proj"),
        ("down_proj",),
        ("up_proj",),
    ],
)
@pytest.mark.parametrize("in_swiglu", [True, False])
def test_the_feed_forward(in_swiglu, targets, dtype, limit, monkeypatch):
    if in_swiglu:  # as on a GPU, with the reference of its kernels
        monkeypatch.setattr(
            LoraAdapter, "adds_in_swiglu", lambda self, _: len(self.b) == self.num_outputs
        )
    is_quantised = dtype == torch.bfloat16
    kinds = {"dtype": dtype, "is_quantised": is_quantised}
    names = [tuple(t for t in targets if t in parts) for parts in (GATE_UP, DOWN)]
    gate_up = linear(64, GATE_UP, bias=dtype == torch.float32, targets=names[0], **kinds)
    down = linear(192, DOWN, targets=names[1], **kinds)

    def reference(x: Tensor, leaves: dict[str, Tensor]) -> Tensor:
        gate, up = plain(x, gate_up, leaves, "gate_up").chunk(2, dim=1)
        return plain(F.silu(gate) * up, down, leaves, "down")

    compare(
        lambda x: lora_mlp(x, gate_up.frozen("policy"), down.frozen("policy")),
        reference,
        {"gate_up": gate_up, "down": down},
        normal(11, 64, seed=3).to(dtype),
        2 * limit,
    )


def test_what_the_feed_forward_keeps():
    everything = ("gate_proj", "up_proj", "down_proj")
    kinds: dict[str, Any] = {"dtype": torch.bfloat16, "is_quantised": True, "targets": everything}
    gate_up, down = linear(64, GATE_UP, **kinds), linear(192, DOWN, **kinds)
    kept = []
    x = normal(11, 64, seed=3).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = lora_mlp(x, gate_up.frozen("policy"), down.frozen("policy"))
    per_token = sum(t.shape[1] for t in kept if len(t) == 11)
    assert per_token == 64 + 2 * 192 + 2 * 4 + 4, "x, gate and up, x A^T twice: not what down reads"
    others = {tuple(t.shape) for t in kept if len(t) != 11}
    assert others == {(8, 64), (384, 4), (4, 192), (64, 4)}, "no decoded weight"
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        y.sum().backward()


def test_an_adapter_changed_between_forward_and_backward_is_an_error():
    layer = linear(64, QKV, dtype=torch.bfloat16, targets=("q_proj",))
    y = layer(normal(3, 64, seed=1).bfloat16().requires_grad_(), "policy")
    layer.adapters["policy"].refresh_shadow()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_add_up_in_float32_over_micro_batches():
    layer = linear(64, QKV, dtype=torch.bfloat16, targets=("q_proj", "v_proj"))
    adapter, halves = layer.adapters["policy"], normal(12, 64, seed=1).bfloat16().split(6)
    apart = []
    for x in halves:
        layer(x, "policy").sum().backward()
        apart.append((adapter.a.grad.clone(), adapter.b.grad.clone()))
        adapter.a.grad = adapter.b.grad = None
    for x in halves:
        layer(x, "policy").sum().backward()
    assert adapter.a.grad.dtype == torch.float32
    assert torch.equal(adapter.a.grad, apart[0][0] + apart[1][0])
    assert torch.equal(adapter.b.grad, apart[0][1] + apart[1][1])
