"""The Python interface: load a model, sample from it, score token ids with it.

`sparring.load`, `sparring.generate` and `sparring.score` are these functions. Nothing trains here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sparring.data.chat import ChatTemplate
from sparring.data.packing import pack_sequences, unpack
from sparring.errors import UserError
from sparring.models import checkpoint
from sparring.models.storage import Storage
from sparring.models.transformer import Decoder
from sparring.recipe import locate_model
from sparring.rollout.sampler import Sampling
from sparring.train.inference import (
    build_prompt,
    open_policy,
    sampling_engine,
    template_of,
    tokenizer_settings,
)
from sparring.train.policy import Policy
from sparring.train.step import to_device
from sparring.types import Message, Rollout

SCORE_TOKENS = 8192
"""Tokens that `score` packs into one forward pass."""


def load(
    path: str,
    *,
    adapter: str | None = None,
    quantization: str = "none",
    dtype: str = "auto",
    device: str = "auto",
    keep_16bit: Sequence[str] = (),
    head: str = "16bit",
    embedding: str = "device",
) -> tuple[Decoder, Any]:
    """Load a model with its tokenizer.

    path: a folder, a Hub id, a run directory, or "quickstart" for the policy that ships with
    Sparring. A run directory gives base, adapter, template and system prompt of its `final/`.
    adapter: a folder or Hub id of a PEFT adapter. dtype: "auto" (the checkpoint's on a GPU, float32
    on a CPU), "float32", "bfloat16" or "float16". quantization: "none" or "nf4" (linear layers in
    four bits). device: "auto", "cpu", "cuda" or "cuda:N". keep_16bit: matrices that "nf4" leaves
    alone, by kind ("down_proj") or Hugging Face module path. head: "16bit" or "8bit". embedding:
    "device" or "host" (page-locked memory, of which a GPU reads the rows it needs). Raises
    UserError (a ValueError) for anything that cannot be loaded as it stands.
    """
    policy = open_policy(
        locate_model(path),
        adapter=adapter,
        dtype=dtype,
        device=device,
        quantization=quantization,
        storage=Storage(keep_16bit=tuple(keep_16bit), head=head, embedding=embedding),
    )
    return policy.model, policy.tokenizer


def generate(
    model: Decoder,
    tokenizer: Any,
    prompts: Sequence[str | Sequence[Message]],
    *,
    num_samples: int = 1,
    max_completion_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    min_completion_tokens: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
    system_prompt: str = "",
    memory: int | Literal["auto"] = "auto",
    on_progress: Callable[[int, int, int], None] | None = None,
) -> list[list[Rollout]]:
    """Sample completions: a list over prompts of lists over samples.

    prompts: a text is continued as it stands; a list of messages goes through the chat template.
    temperature 0 is greedy; top_p, top_k and min_p cut the distribution; no completion ends before
    min_completion_tokens. A prompt and its completion share the model's limit of tokens. What is
    sampled depends on seed, a prompt's place in the list and the sample's index alone. memory:
    bytes that the process may take; "auto": what is free. Raises UserError (a ValueError) for
    prompts or settings that cannot be used.
    """
    if isinstance(prompts, str):
        raise UserError('prompts is a list of prompts; for one prompt write ["..."]')
    if not prompts:
        return []
    sampling = Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        min_completion_tokens=min_completion_tokens,
        max_completion_tokens=max_completion_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=seed,
    )
    template = template_of(tokenizer, system_prompt=system_prompt)
    asked = [build_prompt(index, prompt, template) for index, prompt in enumerate(prompts)]
    policy = _policy(model, tokenizer, template)
    engine = sampling_engine(
        policy,
        asked,
        num_samples=max(1, num_samples),
        max_completion_tokens=max_completion_tokens,
        memory=memory,
    )
    return engine.generate(asked, sampling, num_samples=num_samples, on_progress=on_progress)


def score(
    model: Decoder, sequences: Sequence[Sequence[int]], *, temperature: float = 1.0
) -> list[Tensor]:
    """Log-probabilities of token ids: per sequence a CPU float32 tensor [len - 1], no gradient.

    Entry t is log p(token t + 1 | tokens up to t), of the logits divided by temperature. Raises
    UserError (a ValueError) for an empty sequence, an unknown id or a temperature that is not
    positive.
    """
    if not 0.0 < temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; score needs a positive, finite number")
    vocab_size = model.config.vocab_size
    for index, sequence in enumerate(sequences):
        if len(sequence) and not 0 <= min(sequence) <= max(sequence) < vocab_size:
            raise UserError(
                f"sequence {index} holds token ids from {min(sequence)} to {max(sequence)}; this"
                f" model knows 0 to {vocab_size - 1}"
            )
    packed = pack_sequences(sequences, max_tokens=SCORE_TOKENS, temperature=temperature)
    with torch.no_grad():
        moved = [to_device(batch, model.device) for batch, _ in packed]
        scores = [model.score(batch).logprobs_T.float().cpu() for batch in moved]
    return unpack(packed, scores, len(sequences))


def _policy(model: Decoder, tokenizer: Any, template: ChatTemplate) -> Policy:
    settings = tokenizer_settings(tokenizer)
    stop_ids: set[int] = set(settings.get("stop_ids") or checkpoint.end_token_ids({}, tokenizer))
    return Policy(
        model=model,
        tokenizer=tokenizer,
        stop_ids=tuple(sorted(stop_ids | set(template.end_ids))),
        source="",
        max_tokens=int(settings.get("max_tokens") or model.config.max_tokens),
    )
