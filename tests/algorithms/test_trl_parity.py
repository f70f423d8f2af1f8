"""Parity with TRL 1.16.0: the same numbers through GRPOTrainer's own loss and through ours.

TRL's trainer is built bare (no model, no data): its loss reads log-probabilities from one method,
which hands out fixed ones here. Every knob is given on both sides; kl_unbiased here is
use_bias_correction_kl there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.algorithms.registry import build_loss
from sparring.types import Batch, TokenScores

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = [2, 7, 1, 12, 5, 3]
MAX_COMPLETION = 16

CASES = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2},
    "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "constant": MAX_COMPLETION},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28},
    "gspo": {"clip_low": 0.03, "clip_high": 0.04},
    "cispo": {"clip_high": 1.3},
}


def bare_trainer(
    name: str,
    knobs: dict[str, float],
    kl_coef: float,
    micro_batches: int,
    *,
    kl_unbiased: bool = False,
) -> Any:
    """GRPOTrainer with the attributes that its loss reads, and nothing else."""
    from trl import GRPOTrainer

    class Accelerator:
        num_processes = 1
        sync_gradients = True

        def reduce(self, value: Tensor, reduction: str) -> Tensor:
            return value

        def gather(self, value: Tensor) -> Tensor:
            return value

    trainer = GRPOTrainer.__new__(GRPOTrainer)
    trainer.args = SimpleNamespace(
        use_bias_correction_kl=kl_unbiased,
        delta=None,
        steps_per_generation=micro_batches,
        report_to=[],
    )
    trainer.accelerator = Accelerator()
    trainer.model = SimpleNamespace(training=True)
    trainer.state = SimpleNamespace(global_step=0)
    trainer.loss_type = "grpo" if name == "gspo" else name
    trainer.importance_sampling_level = "sequence" if name == "gspo" else "token"
    trainer.beta = kl_coef
    trainer.epsilon_low = knobs.get("clip_low", 0.0)
    trainer.epsilon_high = knobs["clip_high"]
    trainer.max_completion_length = MAX_COMPLETION
    trainer.current_gradient_accumulation_steps = micro_batches
    trainer.top_entropy_quantile = 1.0
    trainer.off_policy_mask_threshold = None
    trainer.use_vllm = False
    trainer.aux_loss_enabled = False
    trainer._entropy_bonus_enabled = False
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


def padded(rows: list[Tensor], fill: float = 0.0) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def trl_loss(
    name: str,
    samples: list[Any],
    logprobs: Tensor,
    split: list[list[int]],
    kl_coef: float,
    old: bool,
    kl_unbiased: bool,
) -> Tensor:
    """The step's loss by TRL: the sum over its micro-batches, as accumulation adds gradients up."""
    trainer = bare_trainer(name, CASES[name], kl_coef, len(split), kl_unbiased=kl_unbiased)
    num_tokens = sum(int(sample.mask.sum()) for sample in samples)
    total = torch.zeros((), dtype=torch.float64)
    for part in split:
        chosen = [samples[index] for index in part]
        scores = logprobs[part]

        def scored(*_: Any, scores: Tensor = scores, **__: Any) -> tuple[Tensor, Tensor, None]:
            return scores, torch.zeros_like(scores), None

        trainer._get_per_token_logps_and_entropies = scored
        width = logprobs.shape[1]
        inputs: dict[str, Any] = {
            "prompt_ids": torch.ones(len(part), 1, dtype=torch.long),
            "prompt_mask": torch.ones(len(part), 1, dtype=torch.long),
            "completion_ids": torch.ones(len(part), width, dtype=torch.long),
            "completion_mask": padded([s.mask.double() for s in samples])[part],
            "advantages": torch.tensor([s.advantage for s in chosen], dtype=torch.float64),
            "ref_per_token_logps": padded([s.ref for s in samples])[part],
            "num_items_in_batch": torch.tensor(num_tokens),
        }
        if old:
            inputs["old_per_token_logps"] = padded([s.old for s in samples])[part]
        total = total + trainer._compute_loss(trainer.model, inputs)
    return total


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("kl_coef", "kl_unbiased"), [(0.0, False), (0.25, False), (0.25, True)])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]]])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_equal_trl(
    name: str,
    split: list[list[int]],
    kl_coef: float,
    kl_unbiased: bool,
    old: bool,
    make_samples: Callable[..., list[Any]],
    pack: Callable[..., list[Batch]],
) -> None:
    samples = make_samples(LENGTHS)
    generator = torch.Generator().manual_seed(4)
    noise = 0.3 * torch.randn(len(samples), 12, generator=generator, dtype=torch.float64)
    start = padded([s.old for s in samples]) + noise

    theirs_in = start.clone().requires_grad_()
    theirs = trl_loss(name, samples, theirs_in, split, kl_coef, old, kl_unbiased)
    theirs.backward()

    ours_in = start.clone().requires_grad_()
    knobs = CASES[name] | {"kl_coef": kl_coef, "kl_unbiased": kl_unbiased}
    loss = build_loss(name, knobs, max_completion_tokens=99)
    ours = torch.zeros((), dtype=torch.float64)
    for part, batch in zip(split, pack(samples, split, old=old), strict=True):
        rows = [
            torch.cat([torch.zeros(len(samples[i].prompt_ids) - 1), ours_in[i, : LENGTHS[i]]])
            for i in part
        ]
        logprobs_T = torch.where(batch.loss_mask_T, torch.cat(rows), 0.0)
        scores = TokenScores(logprobs_T=logprobs_T, entropy_T=torch.zeros_like(logprobs_T))
        ours = ours + loss(scores, batch).loss
    ours.backward()

    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    assert theirs_in.grad is not None
    assert ours_in.grad is not None
    assert float(theirs_in.grad.abs().max()) > 1e-3
    assert torch.allclose(ours_in.grad, theirs_in.grad, rtol=0, atol=1e-12)


def test_clip_fractions_equal_trl(
    make_samples: Callable[..., list[Any]], pack: Callable[..., list[Batch]]
) -> None:
    samples = make_samples(LENGTHS)
    generator = torch.Generator().manual_seed(4)
    noise = 1.5 * torch.randn(len(samples), 12, generator=generator, dtype=torch.float64)
    logprobs = padded([s.old for s in samples]) + noise
    trainer = bare_trainer("dapo", CASES["dapo"], 0.25, 1)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logprobs, logprobs.abs(), None)
    ones = torch.ones(len(samples), 12, dtype=torch.long)
    inputs = {
        "prompt_ids": ones[:, :1],
        "prompt_mask": ones[:, :1],
        "completion_ids": ones,
        "completion_mask": padded([s.mask.double() for s in samples]),
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float64),
        "old_per_token_logps": padded([s.old for s in samples]),
        "ref_per_token_logps": padded([s.ref for s in samples]),
        "num_items_in_batch": torch.tensor(sum(int(s.mask.sum()) for s in samples)),
    }
    trainer._compute_loss(trainer.model, inputs)
    theirs = {key: values[0] for key, values in trainer._metrics["train"].items()}

    (batch,) = pack(samples)
    rows = [
        torch.cat([torch.zeros(len(s.prompt_ids) - 1), logprobs[i, : LENGTHS[i]]])
        for i, s in enumerate(samples)
    ]
    logprobs_T = torch.cat(rows)
    scores = TokenScores(logprobs_T=logprobs_T, entropy_T=logprobs_T.abs())
    knobs = CASES["dapo"] | {"kl_coef": 0.25}
    ours = build_loss("dapo", knobs, max_completion_tokens=99)(scores, batch).metrics
    assert ours["clip_low_fraction"].item() == pytest.approx(theirs["clip_ratio/low_mean"])
    assert ours["clip_high_fraction"].item() == pytest.approx(theirs["clip_ratio/high_mean"])
    assert theirs["clip_ratio/low_mean"] > 0
    assert theirs["clip_ratio/high_mean"] > 0
    assert ours["kl"].item() == pytest.approx(theirs["kl"])
    assert ours["entropy"].item() == pytest.approx(theirs["entropy"])
