"""One optimizer step, top to bottom: micro-batches -> scores -> loss -> backward -> clip -> update.

The loss is an argument, and so is the source of reference log-probabilities; rollouts, rewards and
recipes are not known here. If the loss or a gradient is not finite, nothing is updated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sparring.errors import RunError
from sparring.train.mismatch import check_mismatch, mismatch
from sparring.train.optimizer import Optimizer
from sparring.types import Batch, LossOutput, TokenScores


class Scorer(Protocol):
    """What a step needs of a model; `Decoder` has it."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def score(self, batch: Batch) -> TokenScores:
        """Log-probabilities and entropies of the batch's labels."""

    def refresh_shadows(self) -> None:
        """Called after each update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """What one optimizer step did; means are over the loss tokens that were scored.

    loss: of the whole step, before the update. gradient_norm: before clipping. num_tokens: rows
    that went through the model, prompts included. values: the loss's own metrics and, where batches
    carry sampler_logprobs_T, the mismatch of trainer and sampler (mismatch.py).
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    num_micro_batches: int
    num_tokens: int
    num_loss_tokens: float
    num_sequences: float
    seconds: float
    values: Mapping[str, float]


def train_step(
    model: Scorer,
    batches: Sequence[Batch],
    loss: Callable[[TokenScores, Batch], LossOutput],
    optimizer: Optimizer,
    *,
    max_grad_norm: float = 1.0,
    reference: Callable[[Batch], Tensor] | None = None,
    max_mismatch_kl: float = 0.0,
) -> StepMetrics:
    """One update from the micro-batches of one step; the same however they are split.

    loss: a function of losses.py with its knobs bound. reference: gives ref_logprobs_T of a batch,
    called without gradient; None where the loss has no KL term. max_grad_norm 0: no clipping.

    Where batches carry sampler_logprobs_T, the metrics of mismatch.py are among the values; in
    later passes over the same rollouts they hold the updates made since. max_mismatch_kl 0: no
    limit.

    Raises RunError where the loss or a gradient is not finite, or where trainer and sampler differ
    by more than max_mismatch_kl; nothing has changed then.
    """
    start = time.perf_counter()
    assert batches, "a step needs a micro-batch"
    batches = [to_device(batch, model.device) for batch in batches]
    if reference is not None:
        with torch.no_grad():
            batches = [replace(batch, ref_logprobs_T=reference(batch)) for batch in batches]
    while True:
        optimizer.zero_grad()
        parts, logprobs = [], []
        for batch in batches:
            scores = model.score(batch)
            output = loss(scores, batch)
            torch.autograd.backward(output.loss * optimizer.loss_scale)
            parts.append(_measure(output, batch))
            logprobs.append(scores.logprobs_T.detach())
        values = _combine(parts)
        if not math.isfinite(values["loss"]):
            optimizer.zero_grad()
            raise _loss_error(parts, batches, logprobs)
        disagreement = mismatch(logprobs, batches)
        try:
            check_mismatch(disagreement, max_mismatch_kl)
        except RunError:
            optimizer.zero_grad()
            raise
        gradient_norm = optimizer.gradient_norm()
        if math.isfinite(gradient_norm):
            break
        if not optimizer.shrink_loss_scale():
            raise _gradient_error(optimizer)
    learning_rate = optimizer.current_learning_rate()
    optimizer.step(gradient_norm=gradient_norm, max_grad_norm=max_grad_norm)
    model.refresh_shadows()
    return StepMetrics(
        loss=values.pop("loss"),
        gradient_norm=gradient_norm,
        learning_rate=learning_rate,
        num_micro_batches=len(batches),
        num_tokens=sum(len(batch.input_ids_T) for batch in batches),
        num_loss_tokens=batches[0].num_loss_tokens,
        num_sequences=batches[0].num_sequences,
        seconds=time.perf_counter() - start,
        values=values | disagreement,
    )


def with_old_logprobs(model: Scorer, batches: Sequence[Batch]) -> list[Batch]:
    """The batches with old_logprobs_T as the policy stands now.

    For several passes over the same rollouts: call it once, before the first.
    """
    with torch.no_grad():
        moved = [to_device(batch, model.device) for batch in batches]
        return [replace(batch, old_logprobs_T=model.score(batch).logprobs_T) for batch in moved]


def score_loss(
    model: Scorer, batches: Sequence[Batch], loss: Callable[[TokenScores, Batch], LossOutput]
) -> float:
    """The loss of these micro-batches together, without gradient and without a step."""
    return score_values(model, batches, loss)["loss"]


def score_values(
    model: Scorer,
    batches: Sequence[Batch],
    loss: Callable[[TokenScores, Batch], LossOutput],
    *,
    reference: Callable[[Batch], Tensor] | None = None,
) -> dict[str, float]:
    """The loss (under "loss") and its metrics over these micro-batches; nothing is trained."""
    parts = []
    with torch.no_grad():
        for batch in batches:
            batch = to_device(batch, model.device)
            if reference is not None:
                batch = replace(batch, ref_logprobs_T=reference(batch))
            scores = model.score(batch)
            parts.append(_measure(loss(scores, batch), batch))
    return _combine(parts)


def mean_of_updates(updates: Sequence[StepMetrics]) -> StepMetrics:
    """Several updates of one step as one: means, but totals of tokens, batches and seconds.

    learning_rate: the last one's; names that end in "_max" by maximum.
    """
    last = updates[-1]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    values = {
        name: (max if name.endswith("_max") else mean)([one.values[name] for one in updates])
        for name in last.values
    }
    return StepMetrics(
        loss=mean([one.loss for one in updates]),
        gradient_norm=mean([one.gradient_norm for one in updates]),
        learning_rate=last.learning_rate,
        num_micro_batches=sum(one.num_micro_batches for one in updates),
        num_tokens=sum(one.num_tokens for one in updates),
        num_loss_tokens=sum(one.num_loss_tokens for one in updates),
        num_sequences=sum(one.num_sequences for one in updates),
        seconds=sum(one.seconds for one in updates),
        values=values,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all of its tensors on the device."""
    tensors: dict[str, Any] = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)


def _measure(output: LossOutput, batch: Batch) -> dict[str, Tensor]:
    """A micro-batch's part of everything that is logged, still on the device."""
    weights_T = batch.loss_mask_T if batch.weights_T is None else batch.weights_T
    measured = {"loss": output.loss.detach(), **output.metrics}
    measured["scored_share"] = weights_T.sum() / max(batch.num_loss_tokens, 1.0)
    return measured


def _combine(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The step's values: parts added up in float64, names that end in "_max" by maximum.

    A mean (all but the losses) is divided by the share of the step's loss tokens that was scored:
    packing may leave out completions that cannot change the loss.
    """
    names = list(parts[0])
    table = torch.stack([torch.stack([part[name].double() for name in names]) for part in parts])
    sums = dict(zip(names, table.sum(dim=0).tolist(), strict=True))
    maxima = dict(zip(names, table.amax(dim=0).tolist(), strict=True))
    share = sums.pop("scored_share") or 1.0
    values = {}
    for name, total in sums.items():
        if name.endswith("_max"):
            values[name] = maxima[name]
        else:
            values[name] = total if name in ("loss", "policy_loss") else total / share
    return values


def _loss_error(
    parts: Sequence[Mapping[str, Tensor]], batches: Sequence[Batch], logprobs: Sequence[Tensor]
) -> RunError:
    """Names the first micro-batch whose loss is not finite and the completion that made it so."""
    index = next(i for i, part in enumerate(parts) if not part["loss"].isfinite())
    batch = batches[index]
    streams = {"log-probabilities": logprobs[index]}
    for name in ("advantages_T", "old_logprobs_T", "ref_logprobs_T", "weights_T"):
        if (stream := getattr(batch, name)) is not None:
            streams[name] = stream
    cause = "every log-probability is finite, but the ratio to the old or reference ones overflows"
    for name, stream in streams.items():
        rows = (~stream.isfinite() & batch.loss_mask_T).nonzero()
        if len(rows):
            row = int(rows[0])
            cause = (
                f"{name} of completion {int(batch.sequence_ids_T[row])} of"
                f" {batch.num_local_sequences} in it are {float(stream[row])} at row {row}"
                f" (token id {int(batch.labels_T[row])}); {len(rows)} rows are not finite"
            )
            break
    return RunError(
        f"the loss is {float(parts[index]['loss'])} in micro-batch {index + 1} of {len(batches)}:"
        f" {cause}. Weights and optimizer are as they were before this step. A lower learning rate,"
        " dtype bfloat16 instead of float16, or an earlier checkpoint are the usual remedies"
    )


def _gradient_error(optimizer: Optimizer) -> RunError:
    """Names the parameters whose gradients are not finite, and forgets all gradients."""
    gradients = optimizer.gradients()
    bad = [name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())]
    optimizer.zero_grad()
    what = f"{len(bad)} of {len(gradients)} gradients are not finite: {', '.join(bad[:5])}"
    if not bad:
        what = "the norm of the gradients overflows, though each of them is finite"
    return RunError(
        f"{what}. Weights and optimizer are as they were before this step. A lower learning rate or"
        " an earlier checkpoint are the usual remedies"
    )
