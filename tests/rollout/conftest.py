"""Tiny models and prompts for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from sparring.layout import KVPool, Layout
from sparring.models.rope import RopeConfig
from sparring.models.transformer import Decoder, TransformerConfig
from sparring.rollout.engine import Engine
from sparring.types import Prompt

VOCAB_SIZE = 61


def tiny_config(num_layers: int = 2, width: int = 32, window: int = 0) -> TransformerConfig:
    """A Llama shape with grouped key/value heads and a vocabulary that is no multiple of four."""
    return TransformerConfig(
        family="llama",
        vocab_size=VOCAB_SIZE,
        width=width,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_size=width // 4,
        ffn_width=2 * width,
        norm_eps=1e-6,
        rope=RopeConfig(),
        windows=(window,) * num_layers,
        max_tokens=1024,
        tied_head=True,
        initializer_range=0.3,
    )


def tiny_model(num_layers: int = 2, window: int = 0, seed: int = 0) -> Decoder:
    """A decoder with random weights, large enough that its choices depend on the context.

    In float64: what the tests compare to 1e-5 must not depend on how a machine adds up.
    """
    model = Decoder(tiny_config(num_layers, window=window), dtype=torch.float64)
    model.init_weights(seed)
    return model


class ScriptedModel:
    """Stands in for a Decoder: after position p it wants token script[p] and nothing else."""

    def __init__(self, script: Sequence[int]) -> None:
        self.config = tiny_config(num_layers=1)
        self.script = torch.tensor(script, dtype=torch.float32)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def __call__(
        self,
        input_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        layout: Layout,
        kv_pool: KVPool,
        *,
        adapter: str | None,
    ) -> torch.Tensor:
        return self.script[positions_T][:, None]

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        one_hot = torch.nn.functional.one_hot(hidden_TD[:, 0].long(), VOCAB_SIZE)
        return one_hot.float() * 100


@pytest.fixture(scope="session")
def model() -> Decoder:
    return tiny_model()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Decoder]:
    return tiny_model


@pytest.fixture(scope="session")
def scripted() -> type[ScriptedModel]:
    return ScriptedModel


@pytest.fixture(scope="session")
def build_engine() -> Callable[..., Engine]:
    """Engine(model, **changes) with small blocks, end token 7 and ample memory."""

    def build(model: Decoder, **changes: object) -> Engine:
        arguments: dict[str, object] = {
            "kv_bytes": 1 << 24,
            "stop_ids": (7,),
            "decode": lambda ids: " ".join(map(str, ids)),
            "max_tokens": 256,
            "block_size": 4,
        }
        return Engine(model, **{**arguments, **changes})  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="session")
def build_prompts() -> Callable[..., list[Prompt]]:
    """One random prompt for each length, with ids from `first_id` up."""

    def build(lengths: Sequence[int], first_id: int = 0) -> list[Prompt]:
        prompts = []
        for i, length in enumerate(lengths):
            generator = torch.Generator().manual_seed(1000 + first_id + i)
            ids = torch.randint(8, VOCAB_SIZE, (length,), generator=generator).tolist()
            prompts.append(Prompt(id=first_id + i, token_ids=tuple(ids), text=""))
        return prompts

    return build
