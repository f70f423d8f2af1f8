"""AdamW with 8-bit moments: bitsandbytes' own numbers, near AdamW's, and a state that goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparring.errors import CheckpointError, RecipeError
from sparring.train.optimizer import Optimizer, build_optimizer

SHAPES = {"big": (96, 64), "odd": (71, 61), "small": (5, 4), "norm": (4500,)}


def made(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for name, shape in SHAPES.items()
    }


def gradients(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def build(parameters: dict[str, nn.Parameter], name: str = "adamw_8bit") -> Optimizer:
    return build_optimizer(
        parameters, name=name, learning_rate=1e-2, num_steps=10, weight_decay=0.1,
        schedule="linear",
    )  # fmt: skip


def update(optimizer: Optimizer, parameters: dict[str, nn.Parameter], seed: int) -> None:
    for name, gradient in gradients(seed).items():
        parameter = parameters[name]
        product = (parameter.float() * gradient.to(parameter.device)).sum()
        torch.autograd.backward(product)
    optimizer.step(gradient_norm=optimizer.gradient_norm(), max_grad_norm=1.0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_numbers_are_those_of_bitsandbytes_and_near_adamw(device: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    parameters, plain = made(device=device), made(device=device)
    optimizer, adamw = build(parameters), build(plain, "adamw")
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    groups = [
        {"params": [theirs[n] for n in ("big", "odd", "small")], "weight_decay": 0.1},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
    ]
    own = bitsandbytes.optim.AdamW8bit(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    for step in range(5):
        norm = torch.stack([g.norm() for g in gradients(step).values()]).norm().item()
        for name, parameter in theirs.items():
            parameter.grad = gradients(step)[name].to(device) * (1.0 / norm)
        for group in own.param_groups:
            group["lr"] = 1e-2 * (1 - step / 10)
        own.step()
        update(optimizer, parameters, step)
        update(adamw, plain, step)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-6)
        moved = (plain[name] - start[name]).norm()
        assert (parameter - plain[name]).norm() < 0.1 * moved, name
    kinds = {key.split("/")[0] for key in optimizer.state_tensors() if key.endswith("/big")}
    assert kinds == {"step", "state1", "state2", "absmax1", "absmax2"}
    tensors = optimizer.state_tensors()
    assert {tensors[f"state1/{n}"].dtype for n in ("big", "odd", "norm")} == {torch.uint8}
    assert tensors["state1/small"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_goes_on_bit_for_bit_from_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    straight, halted = made(dtype), made(dtype)
    first, second = build(straight), build(halted)
    for seed in range(3):
        update(first, straight, seed)
        update(second, halted, seed)
    save_file(second.state_tensors(), tmp_path / "state.safetensors")
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in halted.items()}
    third = build(resumed)
    third.load_state(load_file(tmp_path / "state.safetensors"), second.state_numbers())
    for seed in range(3, 6):
        update(first, straight, seed)
        update(third, resumed, seed)
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name
    for name, tensor in first.state_tensors().items():
        assert torch.equal(tensor, third.state_tensors()[name]), name


def test_the_state_of_another_rule_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    parameters = made()
    optimizer = build(parameters)
    update(optimizer, parameters, 0)
    with pytest.raises(CheckpointError, match=r"another model, \[lora\] section or \[optimizer\]"):
        build(made(), "adamw").load_state(optimizer.state_tensors(), optimizer.state_numbers())
    tensors = optimizer.state_tensors()
    del tensors["absmax2/big"]
    with pytest.raises(CheckpointError, match="has no 'absmax2/big'"):
        build(made()).load_state(tensors, optimizer.state_numbers())


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="runs on cuda and cpu, not on meta"):
        build({"w": nn.Parameter(torch.empty(3, 3, device="meta"))})
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(RecipeError, match=r"needs bitsandbytes.*pip install 'bitsandbytes>=0.50'"):
        build(made())
