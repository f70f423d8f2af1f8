"""Losses on pairs: worked values, parity with TRL 1.16.0, the same however a step is split."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.algorithms import preference
from sparring.algorithms.registry import build_preference_loss
from sparring.errors import RecipeError
from sparring.types import Batch, TokenScores

LENGTHS = [2, 7, 1, 12, 5, 3]  # three pairs: chosen, rejected, chosen, ...
SPLITS = [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]]]


def as_pairs(batches: list[Batch]) -> list[Batch]:
    """Sequences 2k and 2k + 1 as a pair: weights 1 on what was chosen."""
    chosen = [batch.loss_mask_T & (batch.sequence_ids_T % 2 == 0) for batch in batches]
    total = float(sum(int(mask_T.sum()) for mask_T in chosen))
    return [
        replace(batch, weights_T=mask_T.double(), num_loss_tokens=total, advantages_T=None)
        for batch, mask_T in zip(batches, chosen, strict=True)
    ]


def made(batch: Batch, parts: list[Tensor], samples: list[Any]) -> TokenScores:
    """Scores whose completion rows are `parts`, one [R] a sequence."""
    rows = [
        torch.cat([torch.zeros(len(sample.prompt_ids) - 1), part])
        for part, sample in zip(parts, samples, strict=True)
    ]
    logprobs_T = torch.cat(rows)
    return TokenScores(logprobs_T=logprobs_T, entropy_T=torch.ones_like(logprobs_T))


def whole_masks(samples: list[Any]) -> list[Any]:
    """TRL's labels leave out no token inside a completion."""
    return [replace(sample, mask=torch.ones_like(sample.mask)) for sample in samples]


@pytest.fixture
def one_pair(make_samples: Any, pack: Any) -> tuple[Batch, TokenScores]:
    """Log-ratios 2 (over 4 tokens) and -1 (over 5): h = 3."""
    samples = whole_masks(make_samples([4, 5]))
    samples = [replace(s, ref=torch.full_like(s.ref, -2.0)) for s in samples]
    (batch,) = as_pairs(pack(samples))
    parts = [torch.full((4,), -1.5).double(), torch.full((5,), -2.2).double()]
    return batch, made(batch, parts, samples)


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        ("sigmoid", {}, 0.554355),
        ("sigmoid", {"label_smoothing": 0.1}, 0.584355),
        ("robust", {"label_smoothing": 0.1}, 0.516855),
        ("hinge", {}, 0.7),
        ("ipo", {"per_token": False}, 4.0),
        ("ipo", {}, 18.49),
    ],
)
def test_worked_values(
    name: str, knobs: dict[str, Any], expected: float, one_pair: tuple[Batch, TokenScores]
) -> None:
    batch, scores = one_pair
    output = build_preference_loss(name, knobs)(scores, batch)
    assert output.loss.item() == pytest.approx(expected, abs=1e-6)
    found = {key: value.item() for key, value in output.metrics.items()}
    assert found["rewards/chosen"] == pytest.approx(0.2)
    assert found["rewards/rejected"] == pytest.approx(-0.1)
    assert found["rewards/margins"] == pytest.approx(0.3)
    assert found["rewards/accuracies"] == 1.0
    assert found["logprobs/chosen"] == pytest.approx(-6.0)
    assert found["logprobs/rejected"] == pytest.approx(-11.0)
    assert found["sft_loss"] == pytest.approx(1.5)
    assert found["entropy"] == pytest.approx(1.0)


def trl_loss(
    kinds: list[str],
    weights: list[float],
    samples: list[Any],
    logprobs: Tensor,
    *,
    label_smoothing: float,
    reference_free: bool,
) -> tuple[Tensor, dict[str, float]]:
    """Loss and metrics of the whole step by DPOTrainer's own code, built bare."""
    from trl import DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.model = SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer.aux_loss_enabled = False
    trainer.ld_alpha = None
    trainer.precompute_ref_logps = True
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_types, trainer.loss_weights = kinds, weights
    trainer.beta, trainer.label_smoothing = 0.3, label_smoothing
    trainer.use_weighting = False
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    order = [*range(0, len(samples), 2), *range(1, len(samples), 2)]  # all chosen, all rejected
    lengths = torch.tensor([len(samples[i].token_ids) for i in order])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    shown = torch.where(mask, logprobs[order], 0.0)

    def model(**_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(shown)
        return SimpleNamespace(log_probs=shown, entropy=zeros, mean_logits=zeros, is_top1=mask)

    refs = torch.stack([s.ref.sum() for s in samples])[order]
    refs = torch.zeros_like(refs) if reference_free else refs
    padded = torch.cat([torch.zeros(len(samples), 1, dtype=torch.long), mask.long()], dim=1)
    inputs = {
        "input_ids": torch.ones_like(padded),
        "attention_mask": torch.ones_like(padded),
        "completion_mask": padded,
        "ref_chosen_logps": refs[: len(refs) // 2],
        "ref_rejected_logps": refs[len(refs) // 2 :],
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {key: values[0] for key, values in trainer._metrics["train"].items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("sft_coef", [0.0, 0.7])
@pytest.mark.parametrize("reference_free", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo"])
def test_loss_and_gradient_equal_trl(
    name: str,
    reference_free: bool,
    sft_coef: float,
    split: list[list[int]],
    make_samples: Any,
    pack: Any,
) -> None:
    pytest.importorskip("trl")
    samples = whole_masks(make_samples(LENGTHS))
    generator = torch.Generator().manual_seed(3)
    start = -2.0 + torch.randn(len(samples), 12, generator=generator, dtype=torch.float64)

    theirs_in = start.clone().requires_grad_()
    smoothing = 0.2 if name == "robust" else 0.0
    theirs, their_metrics = trl_loss(
        [name, "sft"],
        [1.0, sft_coef],
        samples,
        theirs_in,
        label_smoothing=smoothing,
        reference_free=reference_free,
    )
    theirs.backward()

    ours_in = start.clone().requires_grad_()
    knobs: dict[str, Any] = {"kl_coef": 0.3, "sft_coef": sft_coef, "reference_free": reference_free}
    loss = build_preference_loss(name, knobs | ({"label_smoothing": 0.2} if smoothing else {}))
    ours, metrics = torch.zeros((), dtype=torch.float64), defaultdict(float)
    for part, batch in zip(split, as_pairs(pack(samples, split)), strict=True):
        chosen = [samples[i] for i in part]
        if reference_free:
            batch = replace(batch, ref_logprobs_T=None)
        output = loss(made(batch, [ours_in[i, : LENGTHS[i]] for i in part], chosen), batch)
        ours = ours + output.loss
        for key, value in output.metrics.items():
            metrics[key] += value.item()
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    assert ours_in.grad is not None
    assert theirs_in.grad is not None
    assert float(theirs_in.grad.abs().max()) > 1e-3
    assert torch.allclose(ours_in.grad, theirs_in.grad, rtol=0, atol=1e-12)
    for key in ("chosen", "rejected", "margins", "accuracies"):
        assert metrics[f"rewards/{key}"] == pytest.approx(their_metrics[f"rewards/{key}"])
    for key in ("chosen", "rejected"):
        assert metrics[f"logprobs/{key}"] == pytest.approx(their_metrics[f"logps/{key}"])


@pytest.mark.parametrize("name", preference.__all__)
def test_micro_batches_change_nothing_and_masked_tokens_are_silent(
    name: str, make_samples: Any, pack: Any
) -> None:
    samples = make_samples(LENGTHS)
    generator = torch.Generator().manual_seed(5)
    start = -2.0 + torch.randn(len(samples), 12, generator=generator, dtype=torch.float64)
    loss = build_preference_loss(name, {"sft_coef": 0.5})
    found = []
    for split in SPLITS:
        logprobs = start.clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for part, batch in zip(split, as_pairs(pack(samples, split)), strict=True):
            parts = [logprobs[i, : LENGTHS[i]] for i in part]
            total = total + loss(made(batch, parts, [samples[i] for i in part]), batch).loss
        total.backward()
        assert logprobs.grad is not None
        for index, sample in enumerate(samples):
            assert not logprobs.grad[index, : LENGTHS[index]][~sample.mask].any()
        found.append((total.item(), logprobs.grad))
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], abs=1e-12)
        assert torch.allclose(gradient, found[0][1], rtol=0, atol=1e-12)


def test_label_smoothing_is_the_conservative_form(one_pair: tuple[Batch, TokenScores]) -> None:
    batch, scores = one_pair

    def value(name: str, **knobs: Any) -> float:
        return build_preference_loss(name, knobs)(scores, batch).loss.item()

    flipped = TokenScores(logprobs_T=-scores.logprobs_T, entropy_T=scores.entropy_T)
    swapped = replace(batch, ref_logprobs_T=-batch.ref_logprobs_T)  # type: ignore[operator]
    against = build_preference_loss("sigmoid", {})(flipped, swapped).loss.item()
    expected = 0.9 * value("sigmoid") + 0.1 * against
    assert value("sigmoid", label_smoothing=0.1) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("dpo", {}, "'dpo' is not known; known: hinge, ipo, robust, sigmoid"),
        ("sigmoid", {"beta": 0.1}, "sigmoid takes no 'beta'; it takes kl_coef"),
        ("sigmoid", {"kl_coef": 0}, "kl_coef must be above 0, got 0.*beta in the papers"),
        ("sigmoid", {"kl_coef": -0.1}, "kl_coef must be finite and at least 0"),
        ("robust", {"label_smoothing": 0.5}, "label_smoothing must be at most 0.49"),
        ("sigmoid", {"reference_free": 1}, "reference_free must be true or false"),
        ("ipo", {"label_smoothing": 0.1}, "ipo takes no 'label_smoothing'"),
    ],
)
def test_wrong_knobs_are_named(name: str, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_preference_loss(name, knobs)
