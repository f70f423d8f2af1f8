"""AdamW on masters, schedules, clipping, loss scale, and a state that goes to a file and back."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sparring.errors import CheckpointError, RecipeError
from sparring.train.adamw import allocate_moments
from sparring.train.optimizer import (
    LOSS_SCALE_GROWTH_STEPS,
    Optimizer,
    build_optimizer,
    schedule_factor,
)


def make_parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"layer.weight": (4, 3), "layer.bias": (4,), "norm": (3,)}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def gradients(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (torch.randn(shape, generator=generator) for shape in ((4, 3), (4,), (3,)))


def update(optimizer: Optimizer, parameters: dict[str, nn.Parameter], seed: int) -> None:
    """One step with made-up gradients, delivered by backward as in a real step."""
    total = torch.zeros(())
    for parameter, gradient in zip(parameters.values(), gradients(seed), strict=False):
        total = total + (parameter.float() * gradient).sum()
    torch.autograd.backward(total * optimizer.loss_scale)
    optimizer.step(gradient_norm=optimizer.gradient_norm(), max_grad_norm=0.0)


def textbook_adamw(start: Tensor, grads: list[Tensor], *, lr: float, decay: float) -> Tensor:
    value, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    for step, gradient in enumerate(grads, start=1):
        value = value * (1 - lr * decay)
        m = 0.9 * m + 0.1 * gradient.double()
        v = 0.999 * v + 0.001 * gradient.double() ** 2
        value = value - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return value


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = make_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = build_optimizer(parameters, learning_rate=0.01, num_steps=5, weight_decay=0.5)
    for seed in range(5):
        update(optimizer, parameters, seed)
    steps = [dict(zip(parameters, gradients(seed), strict=False)) for seed in range(5)]
    for name, parameter in parameters.items():
        grads = [step[name] for step in steps]
        decay = 0.5 if parameter.ndim == 2 else 0.0
        expected = textbook_adamw(start[name], grads, lr=0.01, decay=decay)
        assert torch.allclose(parameter.double(), expected, atol=1e-6)
    assert optimizer.step_count == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_too_small_for_16_bits_are_not_lost(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2, 2, dtype=dtype))
    optimizer = build_optimizer({"w": parameter}, learning_rate=1e-5, num_steps=1000)
    bare = torch.ones(2, 2, dtype=dtype)
    for _ in range(1000):
        torch.autograd.backward(1e-3 * parameter.float().sum() * optimizer.loss_scale)
        optimizer.step(gradient_norm=optimizer.gradient_norm(), max_grad_norm=0.0)
        bare -= 1e-5
    assert (bare == 1).all()  # each update alone rounds away
    assert torch.allclose(parameter.float(), torch.full((2, 2), 0.99), atol=5e-3)
    assert parameter.dtype == dtype
    assert (parameter < 1).all()


def test_gradients_of_16_bit_parameters_add_up_in_float32() -> None:
    parameter = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    optimizer = build_optimizer({"w": parameter}, learning_rate=0.1, num_steps=1)
    for value in [256.0, *[0.5] * 8]:  # in bfloat16 256 + 0.5 is 256
        torch.autograd.backward((parameter * value).sum())
        assert parameter.grad is None
    assert optimizer.gradients()["w"].item() == 260.0
    assert optimizer.gradients()["w"].dtype == torch.float32


def test_clipping_scales_to_the_norm_and_leaves_smaller_gradients_alone() -> None:
    def moved(max_grad_norm: float, scale: float) -> tuple[float, Tensor]:
        parameters = {"a": nn.Parameter(torch.zeros(3, 1)), "b": nn.Parameter(torch.zeros(1))}
        optimizer = build_optimizer(
            parameters, learning_rate=1.0, num_steps=1, betas=(0.0, 0.0), epsilon=1e6
        )
        loss = scale * (2 * parameters["a"].sum() + 2 * parameters["b"].sum())  # norm 4 * scale
        torch.autograd.backward(loss)
        norm = optimizer.gradient_norm()
        optimizer.step(gradient_norm=norm, max_grad_norm=max_grad_norm)
        return norm, parameters["a"].detach() * -1e6  # about the gradient: epsilon is huge

    norm, change = moved(1.0, 1.0)
    assert norm == pytest.approx(4.0)
    assert torch.allclose(change, torch.full((3, 1), 0.5), rtol=1e-5)
    norm, change = moved(1.0, 0.125)
    assert norm == pytest.approx(0.5)
    assert torch.allclose(change, torch.full((3, 1), 0.25), rtol=1e-5)
    norm, change = moved(0.0, 1.0)
    assert torch.allclose(change, torch.full((3, 1), 2.0), rtol=1e-5)


def test_float16_scales_the_loss_and_takes_the_scale_out_again() -> None:
    plain, scaled = make_parameters(), make_parameters()
    first = build_optimizer(plain, learning_rate=0.01, num_steps=3)
    second = build_optimizer(scaled, learning_rate=0.01, num_steps=3, compute_dtype=torch.float16)
    assert (first.loss_scale, second.loss_scale) == (1.0, 2.0**16)
    for seed in range(3):
        update(first, plain, seed)
        update(second, scaled, seed)
    assert all(torch.allclose(plain[name], scaled[name], atol=1e-6) for name in plain)


def test_loss_scale_shrinks_to_one_and_grows_again() -> None:
    parameters = {"w": nn.Parameter(torch.ones(1, 1))}
    optimizer = build_optimizer(
        parameters, learning_rate=0.0, num_steps=1, compute_dtype=torch.float16
    )
    assert [optimizer.shrink_loss_scale() for _ in range(5)] == [True] * 4 + [False]
    assert optimizer.loss_scale == 1.0
    for _ in range(LOSS_SCALE_GROWTH_STEPS):
        optimizer.step(gradient_norm=0.0, max_grad_norm=1.0)
    assert optimizer.loss_scale == 2.0
    fixed = build_optimizer(parameters, learning_rate=0.0, num_steps=1)
    assert fixed.shrink_loss_scale() is False


def test_schedules() -> None:
    def factors(name: str, warmup: int = 0, steps: int = 4) -> list[float]:
        return [
            schedule_factor(name, step, warmup_steps=warmup, num_steps=steps)
            for step in range(steps)
        ]

    assert factors("constant") == [1, 1, 1, 1]
    assert factors("constant", warmup=2) == [0.5, 1, 1, 1]
    assert factors("linear") == [1, 0.75, 0.5, 0.25]
    assert factors("linear", warmup=2, steps=6) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors("cosine") == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-6)
    for name in ("linear", "cosine"):
        assert schedule_factor(name, 9, warmup_steps=0, num_steps=4) == 0  # beyond the end
        assert schedule_factor(name, 3, warmup_steps=8, num_steps=4) == 0.5  # ends in warm-up
        assert schedule_factor(name, 8, warmup_steps=8, num_steps=4) == 1


def test_the_schedule_sets_each_step() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(1, 1))}
    optimizer = build_optimizer(
        parameters, learning_rate=0.4, num_steps=4, schedule="linear", betas=(0.0, 0.0)
    )
    for expected in (0.4, 0.3, 0.2, 0.1):
        before = parameters["w"].item()
        assert optimizer.current_learning_rate() == pytest.approx(expected)
        torch.autograd.backward(parameters["w"].sum())
        optimizer.step(gradient_norm=1.0, max_grad_norm=0.0)
        assert before - parameters["w"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit(dtype: torch.dtype) -> None:
    straight, halted = make_parameters(dtype), make_parameters(dtype)
    settings = {"learning_rate": 0.01, "num_steps": 6, "schedule": "cosine", "weight_decay": 0.1}
    first = build_optimizer(straight, **settings)
    second = build_optimizer(halted, **settings)
    for seed in range(3):
        update(first, straight, seed)
        update(second, halted, seed)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in halted.items()}
    third = build_optimizer(resumed, **settings)
    tensors = {name: tensor.clone() for name, tensor in second.state_tensors().items()}
    third.load_state(tensors, second.state_numbers())
    for seed in range(3, 6):
        update(first, straight, seed)
        update(third, resumed, seed)
    assert third.step_count == 6
    for name in straight:
        assert torch.equal(straight[name], resumed[name])
    for name, tensor in first.state_tensors().items():
        assert torch.equal(tensor, third.state_tensors()[name])


def test_a_parameter_without_gradient_stays_and_has_no_state() -> None:
    parameters = make_parameters()
    before = parameters["norm"].detach().clone()
    optimizer = build_optimizer(parameters, learning_rate=0.1, num_steps=1, weight_decay=0.1)
    torch.autograd.backward(parameters["layer.weight"].sum())
    optimizer.step(gradient_norm=optimizer.gradient_norm(), max_grad_norm=1.0)
    assert torch.equal(parameters["norm"], before)
    assert set(optimizer.state_tensors()) == {
        f"{kind}/layer.weight" for kind in ("step", "exp_avg", "exp_avg_sq")
    }
    other = build_optimizer(make_parameters(), learning_rate=0.1, num_steps=1)
    other.load_state(optimizer.state_tensors(), optimizer.state_numbers())
    assert set(other.state_tensors()) == set(optimizer.state_tensors())


def test_a_state_that_does_not_fit_is_refused() -> None:
    parameters = make_parameters()
    optimizer = build_optimizer(parameters, learning_rate=0.1, num_steps=1)
    update(optimizer, parameters, 0)
    tensors, numbers = optimizer.state_tensors(), optimizer.state_numbers()
    fresh = build_optimizer(make_parameters(), learning_rate=0.1, num_steps=1)
    with pytest.raises(CheckpointError, match=r"not trained here, such as exp_avg/other"):
        fresh.load_state({**tensors, "exp_avg/other": torch.zeros(1)}, numbers)
    with pytest.raises(CheckpointError, match=r"'exp_avg/norm' has the shape \[5\].*needs \[3\]"):
        fresh.load_state({**tensors, "exp_avg/norm": torch.zeros(5)}, numbers)
    without = {key: value for key, value in tensors.items() if key != "exp_avg_sq/norm"}
    with pytest.raises(CheckpointError, match="has no 'exp_avg_sq/norm'"):
        fresh.load_state(without, numbers)
    half = build_optimizer(make_parameters(torch.bfloat16), learning_rate=0.1, num_steps=1)
    with pytest.raises(CheckpointError, match=r"has no 'master/layer\.weight'"):
        half.load_state(tensors, numbers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "adamw_4bit"}, "'adamw_4bit' is not known; known: adamw"),
        ({"schedule": "step"}, "'step' is not known; known: constant, cosine, linear"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and at least 0, got nan"),
        ({"learning_rate": -1e-6}, "learning_rate must be finite and at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas are two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be finite and at least 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_optimizer(make_parameters(), **{"learning_rate": 0.1, "num_steps": 1, **settings})


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        build_optimizer({}, learning_rate=0.1, num_steps=1)


def test_a_later_optimizer_over_16_bit_parameters_takes_the_gradients() -> None:
    parameters = make_parameters(torch.bfloat16)
    first = build_optimizer(parameters, learning_rate=0.1, num_steps=4)
    update(first, parameters, seed=0)
    second = build_optimizer(parameters, learning_rate=0.1, num_steps=4)
    before = parameters["norm"].detach().clone()
    update(second, parameters, seed=1)
    assert not torch.equal(parameters["norm"], before)
    assert not first.gradients()


def test_moments_taken_beforehand_are_those_of_a_first_update() -> None:
    made = []
    for is_early in (False, True):
        parameter = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
        optimizer = build_optimizer({"w": parameter}, learning_rate=0.1, num_steps=5)
        if is_early:
            allocate_moments(optimizer._rule, optimizer._masters["w"])
        for _ in range(3):
            parameter.grad = parameter.detach() * 2 + 1
            optimizer.step(gradient_norm=1.0, max_grad_norm=0.0)
        made.append((parameter.detach().clone(), optimizer.state_tensors()))
    (plain, state), (early, early_state) = made
    assert torch.equal(plain, early)
    assert all(torch.equal(value, early_state[key]) for key, value in state.items())
