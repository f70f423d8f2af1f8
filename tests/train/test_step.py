"""One optimizer step on a tiny decoder: what splits, streams and failures do to it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparring.algorithms import losses
from sparring.algorithms.registry import build_advantage, build_loss
from sparring.data.packing import pack_groups
from sparring.errors import RunError
from sparring.models.transformer import Decoder
from sparring.train.optimizer import Optimizer, build_optimizer
from sparring.train.step import StepMetrics, train_step, with_old_logprobs
from sparring.types import Batch, LossOutput, TokenScores

Loss = Callable[[TokenScores, Batch], LossOutput]


def sgd_like(model: Decoder) -> Optimizer:
    """A learning rate that moves little: what counts here is the gradient."""
    return build_optimizer(model.trainable_parameters(), learning_rate=1e-4, num_steps=10)


def pack(
    golden_run: ModuleType, max_tokens: int, *, reverse: bool = False, share: bool = True
) -> list[Batch]:
    groups = golden_run.build_groups(0)
    groups = groups[::-1] if reverse else groups
    return pack_groups(
        groups,
        build_advantage("group", {})(groups),
        max_tokens=max_tokens,
        temperature=0.9,
        share_prompts=share,
    )


def double(batch: Batch) -> Batch:
    """The batch with float64 streams."""
    names = ("advantages_T", "old_logprobs_T", "sampler_logprobs_T", "ref_logprobs_T")
    streams = {name: getattr(batch, name) for name in names}
    return replace(batch, **{name: s.double() for name, s in streams.items() if s is not None})


def gradients_of(
    model: Decoder, batches: Sequence[Batch], loss: Loss
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as the step's own accumulation makes them, read before the update."""
    seen: dict[str, Tensor] = {}
    optimizer = sgd_like(model)

    def spy(*, gradient_norm: float, max_grad_norm: float) -> None:
        seen.update({name: g.clone() for name, g in optimizer.gradients().items()})

    optimizer.step = spy  # type: ignore[method-assign]
    metrics = train_step(model, [double(batch) for batch in batches], loss, optimizer)
    return metrics.loss, seen


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_micro_batches_packing_and_order_change_nothing(name: str, golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(torch.float64)
    loss = build_loss(name, {}, max_completion_tokens=16)
    whole = pack(golden_run, 1000)
    assert len(whole) == 1
    expected, gradients = gradients_of(model, whole, loss)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
    for batches in (
        pack(golden_run, 48),
        pack(golden_run, 48, reverse=True),
        pack(golden_run, 12),
        pack(golden_run, 60, share=False),
    ):
        assert len(batches) > 1
        found, others = gradients_of(model, batches, loss)
        assert found == pytest.approx(expected, abs=1e-12)
        for key, gradient in gradients.items():
            assert torch.allclose(others[key], gradient, rtol=0, atol=1e-12), key


@pytest.mark.parametrize("lora", [False, True])
def test_a_step_reinforces_what_was_better(lora: bool, golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(lora=lora)
    batches = pack(golden_run, 48)
    loss = build_loss("grpo", {}, max_completion_tokens=16)
    optimizer = build_optimizer(model.trainable_parameters(), learning_rate=1e-3, num_steps=9)

    def gain() -> float:
        """Sum of advantage * logprob: what a policy-gradient step must raise."""
        with torch.no_grad():
            return sum(float((model.score(b).logprobs_T * b.advantages_T).sum()) for b in batches)

    before = gain()
    metrics = [train_step(model, batches, loss, optimizer) for _ in range(3)]
    assert gain() > before + 0.1
    assert optimizer.step_count == 3
    first = metrics[0]
    assert first.loss == pytest.approx(first.values["policy_loss"])
    assert first.values["ratio_mean"] == pytest.approx(1.0)
    assert first.values["ratio_max"] == 1.0
    assert first.num_micro_batches == len(batches) > 1
    assert first.num_tokens == sum(len(batch.input_ids_T) for batch in batches)
    assert first.num_loss_tokens == batches[0].num_loss_tokens
    assert (first.learning_rate, first.gradient_norm > 0) == (1e-3, True)


def test_clip_limits_the_update_but_reports_the_norm(golden_run: ModuleType) -> None:
    def moved(max_grad_norm: float) -> tuple[StepMetrics, float]:
        model = golden_run.build_decoder()
        start = model.embed.weight.detach().clone()
        optimizer = build_optimizer(
            model.trainable_parameters(),
            learning_rate=1e-3,
            num_steps=1,
            betas=(0.0, 0.0),
            epsilon=1.0,
        )
        loss = build_loss("grpo", {}, max_completion_tokens=16)
        metrics = train_step(
            model, pack(golden_run, 48), loss, optimizer, max_grad_norm=max_grad_norm
        )
        return metrics, float((model.embed.weight.detach() - start).abs().max())

    free, free_change = moved(0.0)
    clipped, clipped_change = moved(free.gradient_norm / 100)
    assert clipped.gradient_norm == free.gradient_norm
    assert clipped_change < free_change / 10


def test_mismatch_compares_with_the_sampler_before_the_update(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(torch.float64)
    batches = [double(batch) for batch in pack(golden_run, 48)]
    scored = []
    with torch.no_grad():
        for batch in batches:
            scored.append(model.score(batch).logprobs_T)
    shift = [0.02 * torch.sin(torch.arange(len(lp), dtype=torch.float64)) for lp in scored]
    shifted = [
        replace(b, sampler_logprobs_T=lp - d)
        for b, lp, d in zip(batches, scored, shift, strict=True)
    ]
    differences = torch.cat([d[b.loss_mask_T] for b, d in zip(batches, shift, strict=True)])
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    values = train_step(model, shifted, loss, sgd_like(model)).values
    assert values["mismatch_mean"] == pytest.approx(float(differences.abs().mean()), abs=1e-12)
    assert values["mismatch_max"] == pytest.approx(float(differences.abs().max()), abs=1e-12)
    k3 = differences.exp() - 1 - differences
    assert values["mismatch_kl"] == pytest.approx(float(k3.mean()), abs=1e-12)

    exact = [replace(b, sampler_logprobs_T=lp) for b, lp in zip(batches, scored, strict=True)]
    fresh = golden_run.build_decoder(torch.float64)
    values = train_step(fresh, exact, loss, sgd_like(fresh)).values
    assert (values["mismatch_mean"], values["mismatch_max"], values["mismatch_kl"]) == (0, 0, 0)
    none = [replace(batch, sampler_logprobs_T=None) for batch in batches]
    assert "mismatch_kl" not in train_step(fresh, none, loss, sgd_like(fresh)).values


def test_the_other_figures_of_a_mismatch(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(torch.float64)
    batches = [double(batch) for batch in pack(golden_run, 48)]
    shifted, differences, firsts, sums = [], [], [], []
    with torch.no_grad():
        for batch in batches:
            logprobs_T = model.score(batch).logprobs_T
            d_T = 0.3 * torch.sin(torch.arange(len(logprobs_T), dtype=torch.float64))
            shifted.append(replace(batch, sampler_logprobs_T=logprobs_T - d_T))
            differences.append(d_T[batch.loss_mask_T])
            for sequence in range(batch.num_local_sequences):
                mine = d_T[batch.loss_mask_T & (batch.sequence_ids_T == sequence)]
                firsts.append(float(mine[0].abs()))
                sums.append(float(mine.sum()))
    d = torch.cat(differences)
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    values = train_step(model, shifted, loss, sgd_like(model)).values
    expected = {
        "mismatch_p99": float(d.abs().sort().values[math.ceil(0.99 * len(d)) - 1]),
        "mismatch_first": sum(firsts) / len(firsts),
        "mismatch_ess": float(d.exp().sum() ** 2 / (len(d) * (2 * d).exp().sum())),
    }
    weights = torch.tensor(sums, dtype=torch.float64).exp()
    expected["mismatch_sequence_ess"] = float(weights.sum() ** 2 / (len(sums) * (weights**2).sum()))
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert 0 < values["mismatch_sequence_ess"] < values["mismatch_ess"] < 1


def test_too_large_a_mismatch_stops_before_anything_has_changed(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder()
    batches = pack(golden_run, 48)
    with torch.no_grad():
        batches = [
            replace(batch, sampler_logprobs_T=model.score(batch).logprobs_T - 0.5)
            for batch in batches
        ]
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    optimizer = sgd_like(model)
    start = model.embed.weight.detach().clone()
    kl = math.exp(0.5) - 1.5
    with pytest.raises(RunError, match=r"mismatch_kl is 0.149, more than \[train\]") as caught:
        train_step(model, batches, loss, optimizer, max_mismatch_kl=0.99 * kl)
    assert "Likely causes" in str(caught.value)
    assert "first 0.5" in str(caught.value)
    assert torch.equal(model.embed.weight, start)
    assert (optimizer.step_count, optimizer.gradients()) == (0, {})
    assert train_step(model, batches, loss, optimizer, max_mismatch_kl=1.01 * kl).loss != 0
    broken = [replace(batches[0], sampler_logprobs_T=batches[0].labels_T * math.nan)]
    with pytest.raises(RunError, match="mismatch_kl is nan"):
        train_step(model, broken, loss, optimizer, max_mismatch_kl=1e9)


def test_means_do_not_depend_on_what_packing_leaves_out(golden_run: ModuleType) -> None:
    groups = golden_run.build_groups(0)
    advantages = build_advantage("group", {})(groups)
    advantages[0] = torch.zeros(4)  # a group without signal
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    found = {}
    for drop in (False, True):
        model = golden_run.build_decoder()
        batches = pack_groups(
            groups, advantages, max_tokens=48, temperature=0.9, drop_zero_advantage=drop
        )
        found[drop] = train_step(model, batches, loss, sgd_like(model))
    assert found[True].num_tokens < found[False].num_tokens
    assert found[True].loss == pytest.approx(found[False].loss, abs=1e-6)
    assert found[True].gradient_norm == pytest.approx(found[False].gradient_norm, rel=1e-5)
    assert found[True].values["ratio_mean"] == pytest.approx(1.0)
    assert found[True].values["entropy"] == pytest.approx(found[False].values["entropy"], rel=0.1)


def test_reference_is_asked_without_gradient_and_makes_the_kl_term(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder()
    frozen = copy.deepcopy(model)
    loss = build_loss("grpo", {"kl_coef": 0.5}, max_completion_tokens=16)
    optimizer = build_optimizer(model.trainable_parameters(), learning_rate=1e-3, num_steps=9)
    asked = []

    def reference(batch: Batch) -> Tensor:
        asked.append(torch.is_grad_enabled())
        return frozen.score(batch).logprobs_T

    batches = pack(golden_run, 48)
    first = train_step(model, batches, loss, optimizer, reference=reference)
    second = train_step(model, batches, loss, optimizer, reference=reference)
    assert asked == [False] * (2 * len(batches))
    assert first.values["kl"] == pytest.approx(0, abs=1e-9)
    assert second.values["kl"] > 1e-6
    assert second.loss > second.values["policy_loss"]
    with pytest.raises(AssertionError, match="needs ref_logprobs_T"):
        train_step(model, batches, loss, optimizer)


def test_old_logprobs_freeze_the_policy_before_the_first_pass(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder()
    batches = with_old_logprobs(model, pack(golden_run, 48))
    assert all(b.old_logprobs_T is not None and not b.old_logprobs_T.requires_grad for b in batches)
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    optimizer = build_optimizer(model.trainable_parameters(), learning_rate=1e-3, num_steps=9)
    passes = [train_step(model, batches, loss, optimizer).values for _ in range(3)]
    assert passes[0]["ratio_max"] == 1.0
    assert passes[1]["ratio_max"] > 1.001
    assert passes[2]["clip_high_fraction"] > passes[0]["clip_high_fraction"] == 0


def snapshot(
    model: Decoder, optimizer: Optimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    return weights, state, optimizer.step_count


def assert_unchanged(
    model: Decoder, optimizer: Optimizer, before: tuple[dict[str, Tensor], dict[str, Tensor], float]
) -> None:
    weights, state, step_count = snapshot(model, optimizer)
    assert step_count == before[2]
    assert all(torch.equal(weights[name], tensor) for name, tensor in before[0].items())
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())
    assert not optimizer.gradients()


@pytest.mark.parametrize("stream", ["advantages_T", "old_logprobs_T"])
def test_a_loss_that_is_not_finite_names_its_origin_and_changes_nothing(
    stream: str, golden_run: ModuleType
) -> None:
    model = golden_run.build_decoder()
    optimizer = build_optimizer(model.trainable_parameters(), learning_rate=1e-3, num_steps=9)
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    batches = with_old_logprobs(model, pack(golden_run, 48))
    train_step(model, batches, loss, optimizer)
    before = snapshot(model, optimizer)
    row = int((batches[1].sequence_ids_T == 1).nonzero()[-1])
    poisoned = getattr(batches[1], stream).clone()
    poisoned[row] = math.nan
    broken = [batches[0], replace(batches[1], **{stream: poisoned}), *batches[2:]]
    where = rf"micro-batch 2 of {len(batches)}: {stream} of completion 1 of \d+ in it"
    with pytest.raises(RunError, match=rf"{where} are nan at row {row}"):
        train_step(model, broken, loss, optimizer)
    assert_unchanged(model, optimizer, before)


def test_weights_that_are_not_finite_show_as_log_probabilities(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder()
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    with torch.no_grad():
        model.norm[0] = math.inf
    with pytest.raises(RunError, match="micro-batch 1 of 2: log-probabilities of completion 0"):
        train_step(model, pack(golden_run, 48), loss, sgd_like(model))


class Halting:
    """A model whose loss is finite and whose gradient is not: sqrt has an infinite slope at 0."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(1, 1))
        self.device = torch.device("cpu")
        self.refreshed = 0

    def score(self, batch: Batch) -> TokenScores:
        logprobs_T = -self.weight[0, 0].sqrt() - torch.ones(len(batch.input_ids_T))
        return TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))

    def refresh_shadows(self) -> None:
        self.refreshed += 1


def test_gradients_that_are_not_finite_name_the_parameter_and_change_nothing(
    golden_run: ModuleType,
) -> None:
    model = Halting()
    optimizer = build_optimizer({"a.weight": model.weight}, learning_rate=0.1, num_steps=1)
    with pytest.raises(RunError, match=r"1 of 1 gradients are not finite: a\.weight"):
        train_step(model, pack(golden_run, 48), losses.sft, optimizer)
    assert model.weight.item() == 0
    assert (optimizer.step_count, model.refreshed) == (0, 0)
    assert not optimizer.gradients()


class Overflowing(Halting):
    """Gradients pass through float16, as they do in a float16 model."""

    def score(self, batch: Batch) -> TokenScores:
        logprobs_T = -(self.weight * 4.0).half().float()[0, 0] - torch.ones(len(batch.input_ids_T))
        return TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))


def test_an_overflow_of_the_loss_scale_repeats_the_step_with_a_smaller_one(
    golden_run: ModuleType,
) -> None:
    model = Overflowing()
    optimizer = build_optimizer(
        {"w": model.weight}, learning_rate=0.1, num_steps=1, compute_dtype=torch.float16
    )
    metrics = train_step(model, pack(golden_run, 1000), losses.sft, optimizer)
    assert optimizer.loss_scale == 2.0**12
    assert metrics.gradient_norm == pytest.approx(4.0, rel=1e-3)
    assert model.weight.item() == pytest.approx(-0.1)
    assert (optimizer.step_count, model.refreshed) == (1, 1)


def test_a_step_without_loss_tokens_is_harmless(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder()
    (batch,) = pack(golden_run, 1000)
    empty = torch.zeros_like(batch.loss_mask_T)
    batch = replace(
        batch,
        loss_mask_T=empty,
        labels_T=torch.full_like(batch.labels_T, -100),
        num_loss_tokens=0.0,
    )
    before = model.embed.weight.detach().clone()
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    metrics = train_step(model, [batch], loss, sgd_like(model))
    assert (metrics.loss, metrics.gradient_norm) == (0.0, 0.0)
    assert torch.equal(model.embed.weight, before)


def test_16_bit_shadows_follow_the_adapter(golden_run: ModuleType) -> None:
    model = golden_run.build_decoder(torch.bfloat16, lora=True)
    model.refresh_shadows()
    optimizer = build_optimizer(
        model.trainable_parameters(), learning_rate=1e-2, num_steps=1, compute_dtype=model.dtype
    )
    loss = build_loss("dapo", {}, max_completion_tokens=16)
    train_step(model, pack(golden_run, 48), loss, optimizer)
    adapter = model.adapter_modules("policy")["layers.0.qkv"]
    assert adapter.a_shadow is not None
    assert torch.equal(adapter.a_shadow, adapter.a.detach().bfloat16())
