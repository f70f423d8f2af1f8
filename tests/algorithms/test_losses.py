"""Every loss against a textbook computation in float64, and the invariants they share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.algorithms import losses
from sparring.algorithms.registry import build_loss
from sparring.types import Batch, LossOutput, TokenScores

Make = Callable[..., list[Any]]
Pack = Callable[..., list[Batch]]

LENGTHS = [2, 7, 1, 12, 5, 3]
POLICY = ["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
WIDE = {"gspo": {"clip_low": 0.05, "clip_high": 0.1}, "cispo": {"clip_high": 1.2}}
"""Knobs under which made-up log-ratios meet both bounds."""


def bound(name: str, **knobs: float) -> Callable[[TokenScores, Batch], LossOutput]:
    return build_loss(name, {**WIDE.get(name, {}), **knobs}, max_completion_tokens=16)


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def textbook(name: str, samples: list[Any], logprobs: list[Tensor], kl_coef: float) -> float:
    """The formulas as papers print them: nested sums over sequences and their tokens."""
    knobs = {"clip_low": 0.2, "clip_high": 0.28 if name == "dapo" else 0.2, **WIDE.get(name, {})}
    num_tokens = sum(int(sample.mask.sum()) for sample in samples)
    total = 0.0
    for sample, lp in zip(samples, logprobs, strict=True):
        tokens = [t for t in range(len(lp)) if sample.mask[t]]
        mean_l = sum(float(lp[t] - sample.old[t]) for t in tokens) / len(tokens)
        terms = []
        for t in tokens:
            ratio, a = math.exp(float(lp[t] - sample.old[t])), sample.advantage
            if name == "gspo":
                term = clipped(math.exp(mean_l), a, knobs["clip_low"], knobs["clip_high"])
            elif name == "cispo":
                term = -min(ratio, knobs["clip_high"]) * a * float(lp[t])
            else:
                term = clipped(ratio, a, knobs["clip_low"], knobs["clip_high"])
            d = float(lp[t] - sample.ref[t])
            terms.append(term + kl_coef * (math.exp(-d) - 1 + d))
        divisor = {
            "grpo": len(tokens) * len(samples),
            "gspo": len(tokens) * len(samples),
            "dr_grpo": 16 * len(samples),
        }.get(name, num_tokens)
        total += sum(terms) / divisor
    return total


def random_logprobs(samples: list[Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        s.old + 0.3 * torch.randn(len(s.old), generator=generator, dtype=torch.float64)
        for s in samples
    ]


def as_scores(batch: Batch, samples: list[Any], logprobs: list[Tensor]) -> TokenScores:
    rows = [
        torch.cat([s.prompt_ids[:-1].double(), lp]) for s, lp in zip(samples, logprobs, strict=True)
    ]
    logprobs_T = torch.where(batch.loss_mask_T, torch.cat(rows), 0.0)
    return TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_equal_the_textbook(
    name: str, kl_coef: float, make_samples: Make, pack: Pack
) -> None:
    samples = make_samples(LENGTHS)
    logprobs = random_logprobs(samples)
    (batch,) = pack(samples)
    found = bound(name, kl_coef=kl_coef)(as_scores(batch, samples, logprobs), batch)
    assert found.loss.item() == pytest.approx(textbook(name, samples, logprobs, kl_coef), abs=1e-12)
    assert float(found.metrics["policy_loss"]) == pytest.approx(
        textbook(name, samples, logprobs, 0.0), abs=1e-12
    )


@pytest.mark.parametrize("weighted", [False, True])
def test_sft_is_the_weighted_mean_over_the_step(
    weighted: bool, make_samples: Make, pack: Pack
) -> None:
    samples = make_samples(LENGTHS)
    logprobs = random_logprobs(samples)
    (batch,) = pack(samples, weights=weighted)
    numerator = denominator = 0.0
    for sample, lp in zip(samples, logprobs, strict=True):
        for t in range(len(lp)):
            weight = float(sample.weights[t]) if weighted else 1.0
            numerator -= float(sample.mask[t]) * weight * float(lp[t])
            denominator += float(sample.mask[t]) * weight
    found = losses.sft(as_scores(batch, samples, logprobs), batch)
    assert found.loss.item() == pytest.approx(numerator / denominator, abs=1e-12)


def bigram_scores(weights_VV: Tensor, batch: Batch) -> TokenScores:
    """The smallest model there is: next-token logits are a row of a table."""
    logprobs_TV = (weights_VV[batch.input_ids_T] / batch.temperature).log_softmax(dim=-1)
    labels_T = batch.labels_T.clamp(min=0)
    logprobs_T = logprobs_TV.gather(1, labels_T[:, None])[:, 0]
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1).detach()
    return TokenScores(logprobs_T=logprobs_T, entropy_T=entropy_T)


def step_totals(
    loss: Callable[[TokenScores, Batch], LossOutput], batches: list[Batch], vocabulary: int
) -> tuple[float, Tensor, dict[str, float]]:
    """Loss, gradient and metrics of a step accumulated over its micro-batches."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    total, metrics = 0.0, {}
    for batch in batches:
        output = loss(bigram_scores(weights, batch), batch)
        output.loss.backward()
        total += output.loss.item()
        for key, value in output.metrics.items():
            join = max if key.endswith("_max") else float.__add__
            metrics[key] = join(metrics.get(key, 0.0), float(value))
    assert weights.grad is not None
    return total, weights.grad, metrics


SPLITS = [
    [[0, 1, 2, 3, 4, 5]],
    [[0], [1], [2], [3], [4], [5]],
    [[5, 3, 1], [0, 2, 4]],
    [[4, 0, 5, 2], [3], [1]],
]


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", [*POLICY, "sft"])
def test_micro_batching_order_and_accumulation_change_nothing(
    name: str, on_policy: bool, make_samples: Make, pack: Pack
) -> None:
    samples = make_samples(LENGTHS)
    loss = losses.sft if name == "sft" else bound(name, kl_coef=0.1)
    build = partial(pack, samples, old=not on_policy, weights=name == "sft", temperature=0.8)
    total, gradient, metrics = step_totals(loss, build(SPLITS[0]), 11)
    assert float(gradient.abs().max()) > 1e-4
    for split in SPLITS[1:]:
        other_total, other_gradient, other_metrics = step_totals(loss, build(split), 11)
        assert other_total == pytest.approx(total, abs=1e-12)
        assert torch.allclose(other_gradient, gradient, rtol=0, atol=1e-12)
        assert other_metrics == pytest.approx(metrics, abs=1e-12)


def one_token_batch(advantage: float, old: float, pack: Pack, make_samples: Make) -> Batch:
    (sample,) = make_samples([1])
    (batch,) = pack(
        [replace(sample, advantage=advantage, old=torch.tensor([old], dtype=torch.float64))]
    )
    return batch


@pytest.mark.parametrize(
    ("name", "advantage", "ratio", "expected"),
    [
        ("grpo", 1, 1.5, -1.2),
        ("dapo", 1, 1.5, -1.28),
        ("grpo", 1, 0.5, -0.5),
        ("grpo", -1, 1.5, 1.5),
        ("grpo", -1, 0.5, 0.8),
        ("grpo", -1, 10.0, 10.0),
        ("gspo", 1, 1.5, -1.0004),
        ("gspo", -1, 0.5, 0.9997),
    ],
)
def test_worked_clip_values(
    name: str, advantage: float, ratio: float, expected: float,
    make_samples: Make, pack: Pack,
) -> None:  # fmt: skip
    batch = one_token_batch(advantage, -math.log(ratio) - 1.0, pack, make_samples)
    logprobs_T = torch.where(batch.loss_mask_T, -1.0, 0.0).double().requires_grad_()
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))
    output = getattr(losses, name)(scores, batch)
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)
    output.loss.backward()
    is_clipped = abs(expected) != pytest.approx(ratio)
    assert (float(logprobs_T.grad.abs().sum()) == 0) is is_clipped
    assert float(output.metrics["clip_low_fraction"]) == (is_clipped and advantage < 0)
    assert float(output.metrics["clip_high_fraction"]) == (is_clipped and advantage > 0)
    assert float(output.metrics["ratio_max"]) == pytest.approx(ratio)


def test_sequence_ratio_is_the_geometric_mean(make_samples: Make, pack: Pack) -> None:
    (sample,) = make_samples([2])
    old = torch.tensor([-1.5, -0.9], dtype=torch.float64)
    sample = replace(sample, advantage=1.0, old=old, mask=torch.ones(2).bool())
    (batch,) = pack([sample])
    logprobs = [torch.tensor([-1.0, -1.0]).double()]
    scores = as_scores(batch, [sample], logprobs)
    assert losses.gspo(scores, batch, clip_high=0.2).loss.item() == pytest.approx(-1.2)
    assert losses.gspo(scores, batch, clip_high=0.5).loss.item() == pytest.approx(
        -1.221403, abs=1e-6
    )
    assert losses.grpo(scores, batch, clip_high=9.0).loss.item() == pytest.approx(
        -(math.exp(0.5) + math.exp(-0.1)) / 2
    )


def test_cispo_caps_the_weight_and_keeps_the_gradient(make_samples: Make, pack: Pack) -> None:
    batch = one_token_batch(2.0, -1.0 - math.log(7.0), pack, make_samples)
    logprobs_T = torch.where(batch.loss_mask_T, -1.0, 0.0).double().requires_grad_()
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))
    output = losses.cispo(scores, batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(10.0)  # -min(7, 5) * 2 * -1
    assert float(logprobs_T.grad[batch.loss_mask_T]) == pytest.approx(-10.0)
    assert float(output.metrics["clip_high_fraction"]) == 1


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("name", POLICY)
def test_on_policy_every_gradient_is_the_policy_gradient(
    name: str, explicit: bool, make_samples: Make, pack: Pack
) -> None:
    samples = make_samples(LENGTHS)
    (batch,) = pack(samples, old=False, ref=False)
    generator = torch.Generator().manual_seed(2)
    logprobs_T = -torch.rand(batch.input_ids_T.shape, generator=generator, dtype=torch.float64)
    logprobs_T = torch.where(batch.loss_mask_T, logprobs_T, 0.0).requires_grad_()
    if explicit:  # the same log-probabilities given as old ones
        batch = replace(batch, old_logprobs_T=logprobs_T.detach().clone())
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))
    build_loss(name, {}, max_completion_tokens=16)(scores, batch).loss.backward()
    lengths = [int(sample.mask.sum()) for sample in samples]
    for t in range(len(logprobs_T)):
        i = int(batch.sequence_ids_T[t])
        divisor = {"dr_grpo": 16 * len(samples), "dapo": sum(lengths), "cispo": sum(lengths)}.get(
            name, lengths[i] * len(samples)
        )
        expected = -samples[i].advantage / divisor if batch.loss_mask_T[t] else 0.0
        assert float(logprobs_T.grad[t]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", [*POLICY, "sft"])
def test_rows_outside_the_mask_receive_exactly_nothing(
    name: str, make_samples: Make, pack: Pack
) -> None:
    (batch,) = pack(make_samples(LENGTHS))
    poison = torch.where(batch.loss_mask_T, -1.5, math.nan).double()
    streams = {
        key: torch.where(batch.loss_mask_T, getattr(batch, key), math.nan)
        for key in ("advantages_T", "old_logprobs_T", "ref_logprobs_T")
    }
    batch = replace(batch, **streams)
    logprobs_T = poison.clone().requires_grad_()
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=poison)
    output = (losses.sft if name == "sft" else bound(name, kl_coef=0.1))(scores, batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(value) for value in output.metrics.values())
    assert (logprobs_T.grad[~batch.loss_mask_T] == 0).all()
    assert torch.isfinite(logprobs_T.grad).all()


@pytest.mark.parametrize("name", [*POLICY, "sft"])
def test_a_step_without_loss_tokens_is_zero_with_its_graph(
    name: str, make_samples: Make, pack: Pack
) -> None:
    samples = [replace(s, mask=torch.zeros_like(s.mask)) for s in make_samples(LENGTHS)]
    (batch,) = pack(samples)
    assert batch.num_loss_tokens == 0
    logprobs_T = torch.full(batch.input_ids_T.shape, -1.0, requires_grad=True)
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=torch.ones_like(logprobs_T))
    output = (losses.sft if name == "sft" else bound(name, kl_coef=0.1))(scores, batch)
    output.loss.backward()
    assert output.loss.item() == 0
    assert (logprobs_T.grad == 0).all()
    assert all(float(value) == 0 for value in output.metrics.values())


@pytest.mark.parametrize("name", POLICY)
def test_a_fully_masked_sequence_stays_in_the_count_of_sequences(
    name: str, make_samples: Make, pack: Pack
) -> None:
    samples = make_samples(LENGTHS)
    samples[1] = replace(samples[1], mask=torch.zeros_like(samples[1].mask))
    (batch,) = pack(samples, ref=False)
    without, logprobs = samples[:1] + samples[2:], random_logprobs(samples)
    (smaller,) = pack(without, ref=False)
    smaller = replace(smaller, num_sequences=float(len(samples)))
    found = bound(name)(as_scores(batch, samples, logprobs), batch)
    expected = bound(name)(as_scores(smaller, without, logprobs[:1] + logprobs[2:]), smaller)
    assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-12)
    assert {k: float(v) for k, v in found.metrics.items()} == pytest.approx(
        {k: float(v) for k, v in expected.metrics.items()}, abs=1e-12
    )


@pytest.mark.parametrize("name", POLICY)
def test_zero_advantages_give_zero_gradient(name: str, make_samples: Make, pack: Pack) -> None:
    samples = [replace(sample, advantage=0.0) for sample in make_samples(LENGTHS)]
    _, gradient, _ = step_totals(bound(name), pack(samples), 11)
    assert (gradient == 0).all()


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (0.1, 0.004837),
        (-0.1, 0.005171),
        (0.5, 0.106531),
        (-0.5, 0.148721),
        (1.0, 0.367879),
        (-1.0, 0.718282),
        (math.log(2), 0.193147),
        (-math.log(2), 0.306853),
        (0.0, 0.0),
    ],
)
def test_k3_matches_its_table(difference: float, expected: float) -> None:
    ref = torch.tensor(-3.0, dtype=torch.float64)
    assert float(losses.k3(ref + difference, ref)) == pytest.approx(expected, abs=5e-7)


def test_k3_keeps_its_precision_for_small_differences() -> None:
    """d^2 / 2 at d = 2^-13, where exp(-d) - 1 + d in float32 would have rounding alone."""
    found = losses.k3(torch.tensor(-1.0 + 2**-13), torch.tensor(-1.0))
    assert float(found) == pytest.approx(2.0**-27, rel=1e-2)


def test_k3_gradient_and_mean_of_two_outcomes() -> None:
    """pi = (.5, .5), ref = (.8, .2): mean k3 is KL(pi || ref); through k3 the gradient is -.3."""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(dim=0)
    ref = torch.tensor([0.8, 0.2], dtype=torch.float64).log()
    mean = (logprobs.exp().detach() * losses.k3(logprobs, ref)).sum()
    mean.backward()
    assert mean.item() == pytest.approx(0.223144, abs=5e-7)
    assert float(logits.grad[0]) == pytest.approx(-0.3, abs=1e-9)


def test_aggregations_differ_as_worked_out(make_samples: Make, pack: Pack) -> None:
    """G = 2, T = (2, 6), A = (1, -1), ratio 1."""
    samples = [
        replace(sample, mask=torch.ones_like(sample.mask), advantage=advantage)
        for sample, advantage in zip(make_samples([2, 6]), [1.0, -1.0], strict=True)
    ]
    (batch,) = pack(samples, old=False, ref=False)
    scores = as_scores(batch, samples, random_logprobs(samples))
    assert losses.grpo(scores, batch).loss.item() == pytest.approx(0, abs=1e-12)
    assert losses.gspo(scores, batch).loss.item() == pytest.approx(0, abs=1e-12)
    assert losses.dapo(scores, batch).loss.item() == pytest.approx(0.5)
    assert losses.dr_grpo(scores, batch, constant=8).loss.item() == pytest.approx(0.25)


def test_metrics_carry_no_gradient_and_entropy_is_a_token_mean(
    make_samples: Make, pack: Pack
) -> None:
    samples = make_samples(LENGTHS)
    (batch,) = pack(samples)
    weights = torch.zeros(11, 11, dtype=torch.float64, requires_grad=True)
    for name in POLICY:
        output = bound(name, kl_coef=0.1)(bigram_scores(weights, batch), batch)
        assert not any(value.requires_grad for value in output.metrics.values())
        assert float(output.metrics["entropy"]) == pytest.approx(math.log(11))
        assert output.loss.requires_grad


def test_float32_stays_float32(make_samples: Make, pack: Pack) -> None:
    (batch,) = pack(make_samples(LENGTHS))
    single = {
        key: getattr(batch, key).float()
        for key in ("advantages_T", "old_logprobs_T", "ref_logprobs_T")
    }
    weights = torch.zeros(11, 11, requires_grad=True)
    for name in POLICY:
        one = replace(batch, **single)
        output = bound(name, kl_coef=0.1)(bigram_scores(weights, one), one)
        assert output.loss.dtype == torch.float32
        reference = bound(name, kl_coef=0.1)(bigram_scores(weights.double(), batch), batch)
        assert output.loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
