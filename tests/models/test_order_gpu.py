"""Rows in the NF4 product's order of columns, on a GPU: the same bits, and they are so ordered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparring.kernels import lora as lora_kernels
from sparring.kernels.matmul import launch_beside_next
from sparring.models.quantised import Quantised
from sparring.rollout.sampler import Sampling
from tests.models.test_bitwise_gpu import bitwise_model, engine, prompts

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("lora", [False, True])
def test_the_order_of_columns_changes_no_bit(lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bitwise_model("qwen3", "nf4", lora)
    model.set_bitwise(False)
    asked, sampling = prompts(40, 130), Sampling(max_completion_tokens=40)
    calls: list[tuple[int, ...]] = []
    product = Quantised.ordered_product

    def counted(self: Quantised, *given: Any) -> torch.Tensor:
        calls.append(self.shape)
        return product(self, *given)

    monkeypatch.setattr(Quantised, "ordered_product", counted)
    ordered = engine(model).generate(asked, sampling, num_samples=8)
    assert len(set(calls)) == 4, "q, k and v; o, both adapted or not; gate and up; down"
    monkeypatch.setattr(Quantised, "reads_order", lambda _self, _rows: False)
    plain = engine(model).generate(asked, sampling, num_samples=8)
    for one, two in zip(sum(ordered, []), sum(plain, []), strict=True):  # noqa: RUF017
        assert torch.equal(one.token_ids, two.token_ids)
        assert torch.equal(one.logprobs, two.logprobs)


@pytest.mark.parametrize("name", ["qwen3", "7b"])
def test_a_shrink_that_is_launched_early_changes_no_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a captured graph, where launches follow each other as fast as a card can."""
    model = bitwise_model(name, "nf4", lora=True)
    model.set_bitwise(False)
    asked, sampling = prompts(40, 130), Sampling(max_completion_tokens=60)
    calls: list[bool] = []

    def launched(*given: Any, is_early: bool, **options: Any) -> Any:
        calls.append(is_early)
        return launch_beside_next(*given, is_early=is_early, **options)

    monkeypatch.setattr(lora_kernels, "launch_beside_next", launched)
    early = engine(model).generate(asked, sampling, num_samples=8)
    assert calls
    assert all(calls)
    monkeypatch.setattr(
        lora_kernels,
        "launch_beside_next",
        lambda *given, is_early, **options: launch_beside_next(*given, **options),
    )
    late = engine(model).generate(asked, sampling, num_samples=8)
    for one, two in zip(sum(early, []), sum(late, []), strict=True):  # noqa: RUF017
        assert torch.equal(one.token_ids, two.token_ids)
        assert torch.equal(one.logprobs, two.logprobs)
