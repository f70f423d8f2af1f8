"""The nouns of Sparring: what passes from one stage to the next.

Every type is frozen: a stage returns a new value and overwrites nothing. No behaviour lives here.

Shape letters, used as suffixes everywhere:
    T packed tokens      S sequences          G completions of a group   P prompts
    R completion tokens  V vocabulary         D model width              F feed-forward width
    H query heads        K key/value heads    E head size                L layers
    N blocks             B block size         X experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

if TYPE_CHECKING:
    from sparring.layout import PackedLayout

Message = dict[str, Any]
"""One turn of a conversation: {"role": ..., "content": ...}."""

FinishReason = Literal["stop", "length"]
"""stop: an end token or stop string was sampled; length: the limit of completion tokens was met."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What the model is asked, tokenised once.

    id: the row's index in its data set (0-based, before any row was dropped): it keys the sampling
    noise. token_ids: what the model reads. text: the string that was tokenised. messages: the
    conversation that was rendered, None where the row held plain text. columns: every other column
    of the row, handed to the rewards. prefill: what the chat template already wrote on the
    assistant's behalf at the end of `text`, for example an opened think tag.
    """

    id: int
    token_ids: tuple[int, ...]
    text: str
    messages: tuple[Message, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    prefill: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled completion of a prompt.

    token_ids [R] int64 and logprobs [R] float32, both on the CPU: the ids that were sampled (an end
    token included) and log softmax(logits / temperature) at them, under the policy that sampled
    (greedy: temperature 1), before top-p and top-k. loss_mask [R] bool: True where the policy chose
    the token. text: decoded without special tokens, cut before a stop string. temperature: the one
    that logprobs speak of.
    """

    prompt: Prompt
    sample_index: int
    token_ids: Tensor
    logprobs: Tensor
    loss_mask: Tensor
    text: str
    finish_reason: FinishReason
    policy_version: int
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """The rollouts of one prompt with their rewards.

    rewards_G [G] float32: the weighted sum; NaN where a sample was not judged. reward_parts: each
    reward's own value [G] before its weight, NaN where it gave None.
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rewards_G: Tensor
    reward_parts: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """One micro-batch of packed tokens, ready for the model and the loss.

    input_ids_T, labels_T, positions_T [T] int64; loss_mask_T [T] bool. Row t of every stream speaks
    of labels_T[t], the token that follows input_ids_T[t] (-100 where there is none: labels are
    shifted in data/packing.py and nowhere else). sequence_ids_T [T] int64: which completion of this
    micro-batch (0 .. num_local_sequences - 1) row t belongs to, -1 for rows of a shared prompt. A
    completion is never split over micro-batches.

    num_loss_tokens and num_sequences count the WHOLE optimizer step: all micro-batches, all ranks.
    num_sequences counts every judged completion, also those whose advantage is 0. temperature: what
    logits are divided by before log-softmax.

    Optional streams, float32 [T], 0 outside the loss mask: advantages_T, old_logprobs_T (policy
    before the step; None: the update is on-policy), sampler_logprobs_T (what the rollout engine
    recorded; it feeds the mismatch metrics, never a loss), ref_logprobs_T (None: no KL term),
    weights_T (per-token loss weights of SFT; num_loss_tokens then is their sum), returns_T and
    old_values_T (PPO).
    """

    input_ids_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    layout: PackedLayout
    loss_mask_T: Tensor
    sequence_ids_T: Tensor
    num_local_sequences: int
    num_loss_tokens: float
    num_sequences: float
    temperature: float = 1.0
    advantages_T: Tensor | None = None
    old_logprobs_T: Tensor | None = None
    sampler_logprobs_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    weights_T: Tensor | None = None
    returns_T: Tensor | None = None
    old_values_T: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenScores:
    """What the model says of a batch's labels: float32 [T], 0 where a row carries no loss.

    logprobs_T: log softmax(logits / temperature) at the label. entropy_T: entropy of the same
    distribution, without gradient. values_T: the critic's values, or None.
    """

    logprobs_T: Tensor
    entropy_T: Tensor
    values_T: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOutput:
    """A loss and what to log beside it.

    loss (): this micro-batch's part; parts of all micro-batches add up to the step's loss. metrics
    {name: ()}: without gradient, each likewise a part that adds up over micro-batches; a name that
    ends in "_max" is combined by maximum instead.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]
