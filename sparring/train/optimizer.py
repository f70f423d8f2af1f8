"""The optimizer: AdamW on float32 masters, with schedules and clipping by global norm.

A parameter of 16 bits gets a float32 master here: its gradients are added up in float32 over the
micro-batches and updates too small for 16 bits are not lost. Other parameters are their own master.
Matrices decay, vectors (norms, biases) do not. The state is plain tensors by parameter name and a
few numbers, ready for safetensors and JSON. Losses and models are not known here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparring.errors import CheckpointError, RecipeError
from sparring.train.adamw import (
    RULES,
    allocate_moments,
    build_rule,
    fitting,
    load_moments,
    moments,
)

SCHEDULES = ("constant", "cosine", "linear")
HALF = (torch.bfloat16, torch.float16)

_COLLECTOR = "gradient_collector"
"""Attribute of a 16-bit parameter: the hook of the optimizer that trains it."""

FIRST_LOSS_SCALE = 2.0**16
MAX_LOSS_SCALE = 2.0**24
LOSS_SCALE_GROWTH_STEPS = 200
"""Steps without an overflow after which the loss scale of float16 doubles."""


def schedule_factor(name: str, step: int, *, warmup_steps: int, num_steps: int) -> float:
    """What the learning rate is multiplied by at optimizer step `step` (0-based).

    Warm-up rises linearly over warmup_steps and reaches 1 at its last step; step 0 is above 0.
    Then constant stays at 1; linear and cosine fall towards 0, reached only by step num_steps.
    """
    if name not in SCHEDULES:
        raise RecipeError(
            f"[optimizer] schedule '{name}' is not known; known: {', '.join(SCHEDULES)}"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    passed = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
    return 1.0 - passed if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))


class Optimizer:
    """AdamW (arXiv 1711.05101) over named parameters; made by `build_optimizer`.

    step_count: updates made so far; it places the schedule. loss_scale: what the loss is multiplied
    by before backward, so that gradients survive float16; 1 for the other dtypes.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        rule: str,
        learning_rate: float,
        betas: tuple[float, float],
        epsilon: float,
        weight_decay: float,
        schedule: str,
        warmup_steps: int,
        num_steps: int,
        scales_loss: bool,
    ) -> None:
        self.learning_rate = learning_rate
        self.schedule, self.warmup_steps, self.num_steps = schedule, warmup_steps, num_steps
        self.step_count = 0
        self.loss_scale = FIRST_LOSS_SCALE if scales_loss else 1.0
        self._scales_loss = scales_loss
        self._steps_since_overflow = 0
        self._parameters = dict(parameters)
        self._masters = {name: _master(parameter) for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            if parameter.dtype in HALF:
                _collect_gradients(parameter, self._masters[name])
        masters = list(self._masters.values())
        groups = [
            {"params": [m for m in masters if m.ndim >= 2], "weight_decay": weight_decay},
            {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
        ]
        self._rule = build_rule(
            rule,
            [group for group in groups if group["params"]],
            learning_rate=learning_rate,
            betas=betas,
            epsilon=epsilon,
        )
        # on a card it lies below the keys and values, whose memory must come back in one piece
        for master in masters:
            if master.is_cuda:
                allocate_moments(self._rule, master)

    def current_learning_rate(self) -> float:
        """The learning rate of the next step."""
        factor = schedule_factor(
            self.schedule, self.step_count, warmup_steps=self.warmup_steps, num_steps=self.num_steps
        )
        return self.learning_rate * factor

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in (*self._parameters.values(), *self._masters.values()):
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients so far, multiplied by loss_scale; parameters without one are left out."""
        return {name: m.grad for name, m in self._masters.items() if m.grad is not None}

    def gradient_norm(self) -> float:
        """Global 2-norm of all gradients without the loss scale; not finite if one is not."""
        gradients = list(self.gradients().values())
        if not gradients:
            return 0.0
        return float(torch.nn.utils.get_total_norm(gradients)) / self.loss_scale

    @torch.no_grad()
    def step(self, *, gradient_norm: float, max_grad_norm: float) -> None:
        """One update, gradients scaled down to a norm of at most max_grad_norm (0: no limit)."""
        factor = 1.0 / self.loss_scale
        if 0 < max_grad_norm < gradient_norm:
            factor *= max_grad_norm / gradient_norm
        if factor != 1.0:
            for gradient in self.gradients().values():
                gradient.mul_(factor)
        for group in self._rule.param_groups:
            group["lr"] = self.current_learning_rate()
        self._rule.step()
        for name, parameter in self._parameters.items():
            if parameter.dtype in HALF:
                parameter.copy_(self._masters[name])
        self.zero_grad()
        self.step_count += 1
        self._grow_loss_scale()

    def skip_step(self) -> None:
        """Count a step without anything to learn from: the schedule goes on, nothing else."""
        self.step_count += 1

    def shrink_loss_scale(self) -> bool:
        """A smaller loss scale after an overflow; False where there is nothing left to shrink."""
        if self.loss_scale <= 1.0:
            return False
        self.loss_scale = max(1.0, self.loss_scale / 16.0)
        self._steps_since_overflow = 0
        return True

    def _grow_loss_scale(self) -> None:
        self._steps_since_overflow += 1
        if self._scales_loss and self._steps_since_overflow >= LOSS_SCALE_GROWTH_STEPS:
            self.loss_scale = min(2.0 * self.loss_scale, MAX_LOSS_SCALE)
            self._steps_since_overflow = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments, update counts and 16-bit parameters' masters as "<kind>/<parameter name>"."""
        tensors = {}
        for name, master in self._masters.items():
            for kind, value in moments(self._rule, master).items():
                tensors[f"{kind}/{name}"] = value
            if master is not self._parameters[name]:
                tensors[f"master/{name}"] = master.detach()
        return tensors

    def state_numbers(self) -> dict[str, float]:
        """What of the state is not a tensor."""
        return {
            "step_count": self.step_count,
            "loss_scale": self.loss_scale,
            "steps_since_overflow": self._steps_since_overflow,
        }

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> None:
        """Go on from what state_tensors and state_numbers gave.

        Raises CheckpointError where a tensor is missing, left over or of another shape.
        """
        expected: set[str] = set()
        for name, master in self._masters.items():
            expected |= load_moments(self._rule, master, name, tensors)
            if master is not self._parameters[name]:
                master.copy_(fitting(tensors, f"master/{name}", master))
                self._parameters[name].copy_(master)
                expected.add(f"master/{name}")
        if left_over := sorted(set(tensors) - expected):
            raise CheckpointError(
                f"the optimizer's state has {len(left_over)} tensors of parameters that are not"
                f" trained here, such as {', '.join(left_over[:3])}; was it written with another"
                " model, [lora] section or [optimizer] name?"
            )
        self.step_count = int(numbers["step_count"])
        self.loss_scale = float(numbers["loss_scale"])
        self._steps_since_overflow = int(numbers["steps_since_overflow"])


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    num_steps: int,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    schedule: str = "constant",
    warmup_steps: int = 0,
    compute_dtype: torch.dtype = torch.float32,
) -> Optimizer:
    """An optimizer over the named parameters of a model that computes in compute_dtype.

    num_steps: the run's optimizer steps, where linear and cosine schedules end. With float16 among
    the dtypes the loss is scaled so that small gradients survive. Build it once the weights are
    loaded. RecipeError for an unknown name or an impossible number; ValueError without parameters.
    """
    if name not in RULES:
        raise RecipeError(f"[optimizer] name '{name}' is not known; known: {', '.join(RULES)}")
    _check_numbers(learning_rate, betas, epsilon, weight_decay, warmup_steps)
    schedule_factor(schedule, 0, warmup_steps=warmup_steps, num_steps=num_steps)
    if not parameters:
        raise ValueError("there is no parameter to train: all of them are frozen")
    is_float16 = torch.float16 in {compute_dtype, *(p.dtype for p in parameters.values())}
    return Optimizer(
        parameters,
        rule=name,
        learning_rate=learning_rate,
        betas=betas,
        epsilon=epsilon,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        scales_loss=is_float16,
    )


def _check_numbers(
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    warmup_steps: int,
) -> None:
    at_least_zero = {
        "learning_rate": learning_rate,
        "epsilon": epsilon,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
    }
    for key, value in at_least_zero.items():
        if not (math.isfinite(value) and value >= 0):
            raise RecipeError(f"[optimizer] {key} must be finite and at least 0, got {value}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise RecipeError(f"[optimizer] betas are two numbers from 0 to below 1, got {betas}")


def _master(parameter: nn.Parameter) -> Tensor:
    """What AdamW changes: a float32 copy of a 16-bit parameter, else the parameter itself."""
    if parameter.dtype in HALF:
        return parameter.detach().float().requires_grad_()
    return parameter


def _collect_gradients(parameter: nn.Parameter, master: Tensor) -> None:
    """Move each gradient that arrives at a 16-bit parameter into its master's, in float32.

    What an earlier optimizer over this parameter had set up is taken off: it has been replaced.
    """
    if (earlier := getattr(parameter, _COLLECTOR, None)) is not None:
        earlier.remove()

    def move(arrived: Tensor) -> None:
        assert arrived.grad is not None, "called when a gradient has arrived"
        gradient = arrived.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        arrived.grad = None

    setattr(parameter, _COLLECTOR, parameter.register_post_accumulate_grad_hook(move))
