"""Packed batches of made-up completions, cut into micro-batches in any way a test asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sparring.layout import PackedLayout
from sparring.types import Batch


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion: streams [R], ids of prompt and completion for models that read them."""

    prompt_ids: Tensor
    token_ids: Tensor
    mask: Tensor
    advantage: float
    old: Tensor
    ref: Tensor
    weights: Tensor


def _samples(lengths: Sequence[int], *, seed: int = 0, vocabulary: int = 11) -> list[Sample]:
    generator = torch.Generator().manual_seed(seed)

    def noise(size: int, scale: float) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    samples = []
    for index, length in enumerate(lengths):
        mask = torch.rand(length, generator=generator) > 0.25
        mask[0] = True
        samples.append(
            Sample(
                prompt_ids=torch.randint(vocabulary, (2 + index % 3,), generator=generator),
                token_ids=torch.randint(vocabulary, (length,), generator=generator),
                mask=mask,
                advantage=float(noise(1, 1.0)),
                old=-2.0 + noise(length, 0.5),
                ref=-2.0 + noise(length, 0.5),
                weights=0.5 + torch.rand(length, generator=generator, dtype=torch.float64),
            )
        )
    return samples


def _pack(
    samples: Sequence[Sample],
    split: Sequence[Sequence[int]] | None = None,
    *,
    old: bool = True,
    ref: bool = True,
    weights: bool = False,
    temperature: float = 1.0,
) -> list[Batch]:
    """One batch for each list of sample indices in `split` (None: all in one)."""
    split = [range(len(samples))] if split is None else split
    masks = [sample.mask for sample in samples]
    num_loss_tokens = float(sum(int(mask.sum()) for mask in masks))
    if weights:
        num_loss_tokens = sum(float(sample.weights[sample.mask].sum()) for sample in samples)
    return [
        _pack_one(
            [samples[index] for index in part],
            num_loss_tokens=num_loss_tokens,
            num_sequences=float(len(samples)),
            streams={"old": old, "ref": ref, "weights": weights},
            temperature=temperature,
        )
        for part in split
    ]


def _pack_one(
    samples: Sequence[Sample],
    *,
    num_loss_tokens: float,
    num_sequences: float,
    streams: dict[str, bool],
    temperature: float,
) -> Batch:
    cu_seqlens, ids, labels, positions, masks, sequence_ids = [0], [], [], [], [], []
    for index, sample in enumerate(samples):
        whole = torch.cat([sample.prompt_ids, sample.token_ids])
        ids.append(whole[:-1])
        labels.append(whole[1:])
        positions.append(torch.arange(len(whole) - 1))
        masks.append(torch.cat([torch.zeros(len(sample.prompt_ids) - 1).bool(), sample.mask]))
        sequence_ids.append(torch.full((len(whole) - 1,), index))
        cu_seqlens.append(cu_seqlens[-1] + len(whole) - 1)
    mask_T = torch.cat(masks)

    def stream(pick: Callable[[Sample], Tensor], fill: float) -> Tensor:
        """Values of the completions on their rows, `fill` on every row outside the loss mask."""
        rows = [torch.cat([s.prompt_ids[:-1].double(), pick(s).double()]) for s in samples]
        return torch.where(mask_T, torch.cat(rows), fill)

    return Batch(
        input_ids_T=torch.cat(ids),
        labels_T=torch.where(mask_T, torch.cat(labels), -100),
        positions_T=torch.cat(positions),
        layout=PackedLayout(cu_seqlens=tuple(cu_seqlens), parents=(-1,) * len(samples)),
        loss_mask_T=mask_T,
        sequence_ids_T=torch.cat(sequence_ids),
        num_local_sequences=len(samples),
        num_loss_tokens=num_loss_tokens,
        num_sequences=num_sequences,
        temperature=temperature,
        advantages_T=stream(lambda s: torch.full_like(s.old, s.advantage), 0.0),
        old_logprobs_T=stream(lambda s: s.old, 0.0) if streams["old"] else None,
        ref_logprobs_T=stream(lambda s: s.ref, 0.0) if streams["ref"] else None,
        weights_T=stream(lambda s: s.weights, 0.0) if streams["weights"] else None,
    )


@pytest.fixture
def make_samples() -> Callable[..., list[Sample]]:
    return _samples


@pytest.fixture
def pack() -> Callable[..., list[Batch]]:
    return _pack
