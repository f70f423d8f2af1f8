"""The critic: what a value may know, whose parameters learn, and what fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparring.algorithms.value import clipped
from sparring.data.packing import pack_rewarded
from sparring.errors import CheckpointError, MemoryBudgetError
from sparring.models import checkpoint
from sparring.models.lora import LoraConfig
from sparring.models.value import Critic, adapter_size, load_critic, share_trunk
from sparring.train.optimizer import build_optimizer
from sparring.train.step import train_step
from sparring.types import Batch
from tests.train.golden_run import CONFIG, build_decoder, build_groups

PLENTY = 10**9
CPU = torch.device("cpu")


def batches(*, max_tokens: int = 1000, wide: bool = False) -> list[Batch]:
    """The golden run's rollouts with returns that depend on the tokens before."""
    found = []
    for batch, _ in pack_rewarded(build_groups(0), max_tokens=max_tokens, temperature=0.9):
        returns_T = torch.sin(batch.input_ids_T.to(torch.float64 if wide else torch.float32))
        found.append(replace(batch, returns_T=returns_T, old_values_T=torch.zeros_like(returns_T)))
    return found


def learned(critic: Critic, *, steps: int = 60) -> list[float]:
    """Losses of some updates of the critic."""
    optimizer = build_optimizer(critic.trainable_parameters(), learning_rate=0.01, num_steps=steps)

    def loss(scores, batch):
        return clipped(scores, batch, clip=0.0)

    found = []
    for _ in range(steps):
        with critic.alone():
            found.append(train_step(critic, batches(), loss, optimizer).loss)
    return found


def randomised(critic: Critic) -> Critic:
    """A critic that is no longer 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in critic.trainable_parameters().values():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    critic.refresh_shadows()
    return critic


def save_decoder(folder: Path) -> Path:
    model = build_decoder()
    checkpoint.save_model(model, folder)
    return folder


def snapshot(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named.items()}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_values_start_at_0_and_a_shared_trunk_says_the_same_as_before(
    lora: bool, rank: int
) -> None:
    policy = build_decoder(lora=lora)
    (batch,) = batches()
    before = policy.score(batch).logprobs_T
    trained = set(policy.trainable_parameters())
    critic = share_trunk(policy, rank=rank, seed=1, free=PLENTY)
    values_T = critic.score(batch).values_T
    assert values_T is not None
    assert not values_T.any()
    randomised(critic)
    values_T = critic.score(batch).values_T
    assert values_T is not None
    assert values_T[batch.loss_mask_T].abs().min() > 0
    assert not values_T[~batch.loss_mask_T].any()
    assert torch.equal(policy.score(batch).logprobs_T, before)
    own = set(critic.trainable_parameters())
    assert {"value_head.weight", "value_head.bias"} <= own
    assert not own & trained
    assert trained <= set(policy.trainable_parameters())


def test_a_value_knows_nothing_of_its_own_token() -> None:
    critic = randomised(share_trunk(build_decoder(), rank=4, seed=1, free=PLENTY))
    groups = build_groups(0)
    rollout = groups[0].rollouts[3]
    cut = len(rollout.token_ids) // 2
    ids = rollout.token_ids.clone()
    ids[cut:] = (ids[cut:] + 1) % 64
    values = []
    for token_ids in (rollout.token_ids, ids):
        group = replace(
            groups[0],
            rollouts=(replace(rollout, token_ids=token_ids),),
            rewards_G=torch.ones(1),
        )
        ((batch, rewards_S),) = pack_rewarded([group], max_tokens=1000, temperature=0.9)
        assert rewards_S.tolist() == [1.0]
        scored = critic.score(batch).values_T
        assert scored is not None
        values.append(scored[batch.loss_mask_T])
    assert torch.equal(values[0][: cut + 1], values[1][: cut + 1])
    assert not torch.equal(values[0][cut + 1], values[1][cut + 1])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_critic_learns_and_leaves_the_policy_alone(dtype: torch.dtype, lora: bool) -> None:
    policy = build_decoder(dtype, lora=lora)
    policy.refresh_shadows()
    kept = policy.trainable_parameters()
    optimizer = build_optimizer(kept, learning_rate=0.01, num_steps=9)
    before = snapshot(dict(policy.named_parameters()))
    critic = share_trunk(policy, rank=4, seed=1, free=PLENTY)
    losses = learned(critic)
    assert losses[-1] < 0.5 * losses[0]
    assert not optimizer.gradients()
    assert all(parameter.grad is None for parameter in kept.values())
    now = dict(policy.named_parameters())
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in kept.values())
    (batch,) = batches()
    torch.autograd.backward(policy.score(batch).logprobs_T.sum())
    assert set(optimizer.gradients()) == set(kept), "the policy still takes gradients"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_critic_of_its_own_learns(rank: int, tmp_path: Path) -> None:
    path = save_decoder(tmp_path)
    critic = load_critic(path, rank=rank, seed=1, dtype="float32", device=CPU, free=PLENTY)
    assert any(".adapters." in name for name in critic.trainable_parameters()) == bool(rank)
    assert len(critic.trainable_parameters()) > 10
    losses = learned(critic)
    assert losses[-1] < 0.5 * losses[0]


def test_an_untied_output_head_is_not_kept(tmp_path: Path) -> None:
    model = checkpoint.build_model({**CONFIG, "tie_word_embeddings": False}, dtype=torch.float32)
    model.init_weights(0)
    checkpoint.save_model(model, tmp_path)
    critic = load_critic(tmp_path, rank=0, seed=1, dtype="float32", device=CPU, free=PLENTY)
    kept = sum(p.numel() for p in critic.trunk.parameters())
    assert kept == sum(p.numel() for p in model.parameters()) - model.head.weight.numel()


def test_micro_batches_change_nothing() -> None:
    found = []
    for max_tokens in (1000, 48, 12):
        critic = randomised(share_trunk(build_decoder(torch.float64), rank=4, seed=1, free=PLENTY))
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(max_tokens=max_tokens, wide=True):
            output = clipped(critic.score(batch), batch, clip=0.3)
            torch.autograd.backward(output.loss)
            total += output.loss.detach()
        gradients = [p.grad for p in critic.trainable_parameters().values()]
        found.append((total, gradients))
    for total, gradients in found[1:]:
        assert total.item() == pytest.approx(found[0][0].item(), abs=1e-12)
        for one, other in zip(gradients, found[0][1], strict=True):
            assert one is not None
            assert other is not None
            assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_a_critic_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    policy = build_decoder()
    trained = 33 + adapter_size(policy, LoraConfig(rank=4))
    with pytest.raises(MemoryBudgetError, match=rf"{trained:,} trained.*lower \[value\] rank = 4"):
        share_trunk(policy, rank=4, seed=1, free=16 * trained - 1)
    assert not policy.has_adapter("value")
    share_trunk(policy, rank=4, seed=1, free=16 * trained)
    path = save_decoder(tmp_path)
    size = sum(p.numel() for p in build_decoder().parameters())
    with pytest.raises(MemoryBudgetError, match=r"\[value\] path empty .* set \[value\] rank"):
        load_critic(path, rank=0, seed=1, dtype="float32", device=CPU, free=16 * size - 1)
    load_critic(path, rank=0, seed=1, dtype="float32", device=CPU, free=16 * size)
    with pytest.raises(MemoryBudgetError, match="does not fit"):
        load_critic(path, rank=0, seed=1, dtype="bfloat16", device=CPU, free=18 * size - 1)


def test_an_adapter_is_no_trunk(tmp_path: Path) -> None:
    path = save_decoder(tmp_path / "base")
    policy = build_decoder()
    policy.add_adapter(LoraConfig(rank=2))
    checkpoint.save_adapter(policy, tmp_path / "adapter", str(path))
    with pytest.raises(CheckpointError, match="holds an adapter; a critic's trunk is a whole"):
        load_critic(tmp_path / "adapter", rank=4, seed=1, dtype="float32", device=CPU, free=PLENTY)
