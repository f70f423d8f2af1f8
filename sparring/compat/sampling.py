"""vLLM's words for sampling: SamplingParams, and what a request gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparring.compat.arguments import with_defaults
from sparring.compat.unsloth_table import SAMPLING
from sparring.errors import UserError
from sparring.rollout.sampler import Sampling


class SamplingParams:
    """How completions are sampled, in vLLM's names and with its defaults (max_tokens is 16)."""

    n: int
    max_tokens: int | None
    stop_token_ids: list[int] | None

    def __init__(self, **given: Any) -> None:
        self.values = with_defaults("SamplingParams", SAMPLING, given)
        for name, value in self.values.items():
            setattr(self, name, value)

    def __repr__(self) -> str:
        changed = {
            name: value
            for name, value in vars(self).items()
            if name in SAMPLING and value != SAMPLING[name].default
        }
        return (
            f"SamplingParams({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion. finish_reason: "stop" or "length"."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: str
    stop_reason: str | None = None
    logprobs: None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt with its completions."""

    request_id: str
    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


def native_sampling(params: SamplingParams, *, room: int, seed: int) -> Sampling:
    """The native form. room: tokens left behind the longest prompt; seed: where none is given."""
    values = with_defaults(
        "SamplingParams", SAMPLING, {name: getattr(params, name) for name in SAMPLING}
    )
    if room < 1:
        raise UserError("a prompt fills max_seq_length: no token is left for its completion")
    limit = room if values["max_tokens"] is None else int(values["max_tokens"])
    stop = values["stop"] or ()
    return Sampling(
        temperature=float(values["temperature"]),
        top_p=float(values["top_p"]),
        top_k=max(0, int(values["top_k"])),
        min_p=float(values["min_p"] or 0.0),
        max_completion_tokens=limit,
        min_completion_tokens=int(values["min_tokens"]),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        seed=seed if values["seed"] is None else int(values["seed"]),
    )
