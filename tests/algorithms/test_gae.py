"""Advantages from a critic and its loss: a float64 textbook, worked values, one whitening."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.algorithms import losses
from sparring.algorithms.gae import gae
from sparring.algorithms.registry import build_estimator, build_loss
from sparring.algorithms.value import clipped
from sparring.errors import RecipeError
from sparring.types import Batch, TokenScores

LENGTHS = [2, 7, 1, 33, 5, 3]
SPLITS = [[[0, 1, 2, 3, 4, 5]], [[5, 0], [2], [4, 3, 1]]]


def textbook(
    rewards: list[float],
    values: list[Tensor],
    masks: list[Tensor],
    kl: list[Tensor],
    *,
    gamma: float,
    lam: float,
    kl_coef: float,
) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages and returns of each sequence's loss tokens, one token after another, backwards."""
    advantages, returns = [], []
    for reward, values_R, mask_R, kl_R in zip(rewards, values, masks, kl, strict=True):
        rows = [t for t in range(len(values_R)) if mask_R[t]]
        after_value, after_advantage, found = 0.0, 0.0, []
        for t in reversed(rows):
            earned = -kl_coef * float(kl_R[t]) + (reward if t == rows[-1] else 0.0)
            error = earned + gamma * after_value - float(values_R[t])
            after_advantage = error + gamma * lam * after_advantage
            after_value = float(values_R[t])
            found.append(after_advantage)
        advantages.append(found[::-1])
        returns.append([a + float(values_R[t]) for a, t in zip(found[::-1], rows, strict=True)])
    return advantages, returns


def by_sequence(stream_T: Tensor, batch: Batch) -> list[list[float]]:
    """A stream's values on the loss tokens of each local sequence."""
    return [
        stream_T[batch.loss_mask_T & (batch.sequence_ids_T == index)].tolist()
        for index in range(batch.num_local_sequences)
    ]


def with_values(batches: list[Batch], split: list[list[int]], values: list[Tensor]) -> list[Batch]:
    """The batches with old_values_T on every row of a completion, masked ones too."""
    found = []
    for part, batch in zip(split, batches, strict=True):
        stream_T = torch.full((len(batch.input_ids_T),), 9.0, dtype=torch.float64)
        for local, index in enumerate(part):
            rows = (batch.sequence_ids_T == local).nonzero().squeeze(1)
            stream_T[rows[-len(values[index]) :]] = values[index]
        found.append(replace(batch, old_values_T=stream_T, advantages_T=None))
    return found


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(
    ("gamma", "lam", "kl_coef"), [(1.0, 0.95, 0.0), (0.97, 0.9, 0.3), (1.0, 1.0, 0.1), (0.9, 0, 0)]
)
def test_advantages_equal_the_textbook(
    gamma: float,
    lam: float,
    kl_coef: float,
    split: list[list[int]],
    make_samples: Any,
    pack: Any,
) -> None:
    samples = make_samples(LENGTHS)
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]
    rewards = torch.randn(len(LENGTHS), generator=generator)
    expected, returns = textbook(
        rewards.tolist(),
        values,
        [s.mask for s in samples],
        [s.old - s.ref for s in samples],
        gamma=gamma,
        lam=lam,
        kl_coef=kl_coef,
    )
    batches = with_values(pack(samples, split), split, values)
    handed = [rewards[part] for part in split]
    plain = gae(batches, handed, gamma=gamma, lam=lam, kl_coef=kl_coef, whiten=False)
    white = gae(batches, handed, gamma=gamma, lam=lam, kl_coef=kl_coef)
    everything = torch.tensor([a for sequence in expected for a in sequence], dtype=torch.float64)
    mean, deviation = float(everything.mean()), float((everything.var() + 1e-8).sqrt())
    for part, batch, whitened in zip(split, plain, white, strict=True):
        assert batch.advantages_T is not None
        assert batch.returns_T is not None
        assert whitened.advantages_T is not None
        assert not batch.advantages_T[~batch.loss_mask_T].any()
        assert not batch.returns_T[~batch.loss_mask_T].any()
        assert torch.equal(batch.returns_T, whitened.returns_T)  # type: ignore[arg-type]
        triples = zip(
            part,
            by_sequence(batch.advantages_T, batch),
            by_sequence(batch.returns_T, batch),
            by_sequence(whitened.advantages_T, batch),
            strict=True,
        )
        for index, found, found_returns, found_white in triples:
            assert found == pytest.approx(expected[index], abs=2e-6)
            assert found_returns == pytest.approx(returns[index], abs=2e-6)
            normal = [(a - mean) / deviation for a in expected[index]]
            assert found_white == pytest.approx(normal, abs=2e-6)


def test_worked_values(make_samples: Any, pack: Any) -> None:
    (sample,) = make_samples([3])
    sample = replace(sample, mask=torch.ones(3, dtype=torch.bool))
    values = [torch.tensor([0.5, 0.6, 0.7], dtype=torch.float64)]
    batches = with_values(pack([sample]), [[0]], values)
    (plain,) = gae(batches, [torch.tensor([1.0])], whiten=False)
    (white,) = gae(batches, [torch.tensor([1.0])])
    assert by_sequence(plain.advantages_T, plain) == [pytest.approx([0.46575, 0.385, 0.3])]  # type: ignore[arg-type]
    assert by_sequence(plain.returns_T, plain) == [pytest.approx([0.96575, 0.985, 1.0])]  # type: ignore[arg-type]
    expected = pytest.approx([0.991344, 0.017092, -1.008436], abs=1e-6)
    assert by_sequence(white.advantages_T, white) == [expected]  # type: ignore[arg-type]


def test_a_single_token_keeps_its_advantage(make_samples: Any, pack: Any) -> None:
    batches = with_values(pack(make_samples([1])), [[0]], [torch.zeros(1).double()])
    (found,) = gae(batches, [torch.tensor([2.0])])
    assert by_sequence(found.advantages_T, found) == [[2.0]]  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [0.2, 0.0])
@pytest.mark.parametrize("split", SPLITS)
def test_value_loss_equals_the_textbook(
    clip: float, split: list[list[int]], make_samples: Any, pack: Any
) -> None:
    samples = make_samples(LENGTHS)
    generator = torch.Generator().manual_seed(8)

    def noise() -> list[Tensor]:
        return [torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]

    old, new, returns = noise(), noise(), noise()
    joined = torch.cat(new).requires_grad_()
    mask = torch.cat([s.mask for s in samples])
    olds, targets = torch.cat(old), torch.cat(returns)
    errors = (joined - targets).square()
    if clip:
        near = (olds + (joined - olds).clamp(-clip, clip) - targets).square()
        errors = torch.maximum(errors, near)
    expected = 0.5 * errors[mask].mean()
    expected.backward()

    ours = [part.clone().requires_grad_() for part in new]
    total, metrics = torch.zeros((), dtype=torch.float64), {"clip_fraction": 0.0, "mean": 0.0}
    batches = with_values(pack(samples, split), split, old)
    targets_of = with_values(pack(samples, split), split, returns)
    for part, batch, target in zip(split, batches, targets_of, strict=True):
        rows = [
            torch.cat([torch.zeros(len(samples[i].prompt_ids) - 1), ours[i]]).double() for i in part
        ]
        values_T = torch.cat(rows)
        scores = TokenScores(
            logprobs_T=torch.zeros_like(values_T),
            entropy_T=torch.zeros_like(values_T),
            values_T=values_T,
        )
        output = clipped(scores, replace(batch, returns_T=target.old_values_T), clip=clip)
        total = total + output.loss
        for name in metrics:
            metrics[name] += output.metrics[name].item()
    total.backward()
    assert total.item() == pytest.approx(expected.item(), abs=1e-12)
    gradient = torch.cat([part.grad for part in ours if part.grad is not None])
    assert joined.grad is not None
    assert torch.allclose(gradient, joined.grad, rtol=0, atol=1e-12)
    assert metrics["mean"] == pytest.approx(joined[mask].mean().item())
    silent = float((joined.grad[mask] == 0).double().mean())
    assert metrics["clip_fraction"] == pytest.approx(silent)
    assert (silent > 0.1) == bool(clip)


def test_the_policy_loss_is_the_clipped_surrogate_of_the_book(make_samples: Any, pack: Any) -> None:
    samples = make_samples(LENGTHS)
    (batch,) = pack(samples)
    generator = torch.Generator().manual_seed(4)
    size = len(batch.input_ids_T)
    advantages_T = torch.randn(size, generator=generator, dtype=torch.float64)
    noise_T = 0.4 * torch.randn(size, generator=generator, dtype=torch.float64)
    batch = replace(batch, advantages_T=advantages_T)
    logprobs_T = batch.old_logprobs_T + noise_T
    ratio = noise_T.exp()
    book = -torch.minimum(ratio * advantages_T, ratio.clamp(0.8, 1.2) * advantages_T)
    loss = build_loss("dapo", {"clip_low": 0.2, "clip_high": 0.2}, max_completion_tokens=9)
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))
    expected = book[batch.loss_mask_T].mean().item()
    assert loss(scores, batch).loss.item() == pytest.approx(expected, abs=1e-12)
    assert loss.func is losses.dapo


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("group", {}, "'group' is not known; known: gae"),
        ("gae", {"lambda": 0.9}, "gae takes no 'lambda'; it takes gamma, kl_coef, lam, whiten"),
        ("gae", {"lam": 1.1}, "lam must be at most 1"),
        ("gae", {"gamma": -0.1}, "gamma must be finite and at least 0"),
        ("gae", {"whiten": 1}, "whiten must be true or false"),
    ],
)
def test_wrong_knobs_are_named(name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_estimator(name, knobs)
