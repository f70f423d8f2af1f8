"""The reward `model`: a sequence-classification reward model, run in batches of bounded size.

The conversation is rebuilt and rendered by the reward model's own template and tokenizer; the
policy's tokens are never fed to it. The thinking is dropped, as DeepSeek-R1 did (arXiv 2501.12948).
Raw scores have an offset and a scale of their own, so they are standardised and clipped by default;
even so such a model is easily fooled: watch length, and keep rules where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparring.errors import RewardError
from sparring.rewards.texts import after_thinking, full_texts

_NO_LIMIT = 1_000_000
"""Tokenizers that know no longest input say a number far above this."""


class ModelReward:
    """The score of a reward model, one number per completion; None for nobody."""

    def __init__(
        self,
        *,
        path: str,
        device: str = "auto",
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        max_tokens: int = 0,
        micro_batch_tokens: int = 8192,
        thinking: Literal["drop", "keep"] = "drop",
        standardise: Literal["batch", "none"] = "batch",
        clip: float = 5.0,
    ) -> None:
        """Load the model. Raises RewardError where it cannot be read or has more than one output.

        path: a folder or a name on the Hub; safetensors alone, no code of the repository is run.
        device "auto": the first CUDA device, else the CPU. dtype "auto": float32 on a CPU, bfloat16
        on a GPU; the head is float32 in any case. max_tokens: longer inputs lose the start of their
        prompt, never the end of the answer; 0: the model's own limit. micro_batch_tokens: padded
        tokens of one forward pass. standardise "batch": minus the batch's mean, over its deviation,
        clipped to +-clip.
        """
        if micro_batch_tokens < 1 or max_tokens < 0 or clip <= 0:
            raise RewardError(
                f"reward 'model': micro_batch_tokens = {micro_batch_tokens}, max_tokens = "
                f"{max_tokens} and clip = {clip} must be positive (max_tokens 0: the model's own)"
            )
        self._device = _device(device)
        if dtype == "auto":
            dtype = "float32" if self._device.type == "cpu" else "bfloat16"
        self._tokenizer, self._model = _load(path, getattr(torch, dtype))
        self._model.to(self._device)
        self._max_tokens = max_tokens or self._own_limit()
        self._micro_batch_tokens = micro_batch_tokens
        self._drops_thinking = thinking == "drop"
        self._standardises = standardise == "batch"
        self._clip = clip

    @property
    def num_bytes(self) -> int:
        """Memory of the weights, for a plan."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prefills: Sequence[str] | None = None,
        log_extra: Callable[..., None] | None = None,
        log_metric: Callable[..., None] | None = None,
    ) -> list[float | None]:
        """Score a batch of completions, each with its prompt (a string, or a conversation)."""
        texts = full_texts(completions, prefills)
        pairs = [
            (_messages(prompt), _answer(text, drops_thinking=self._drops_thinking))
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        ids = [self._encode(messages, answer) for messages, answer in pairs]
        num_cut = sum(is_cut for _, is_cut in ids)
        scores = self.score([tokens for tokens, _ in ids])
        values = self._standardised(scores) if self._standardises else scores
        if log_extra is not None:
            log_extra("score", [round(score, 6) for score in scores])
            log_extra("reason", [f"score {score:.4g}" for score in scores])
        if log_metric is not None and scores:
            log_metric("score_mean", sum(scores) / len(scores))
            log_metric("share_cut", num_cut / len(scores))
            lengths = [float(len(answer)) for _, answer in pairs]
            log_metric("correlation_with_length", correlation(scores, lengths))
        return list(values)

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """Raw scores of texts as they stand, without a template or special tokens of their own."""
        ids = [list(self._tokenizer(one, add_special_tokens=False)["input_ids"]) for one in texts]
        return self.score([tokens[-self._max_tokens :] for tokens in ids])

    def score(self, ids: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores of token sequences, in float32, whatever the batch they stand in."""
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        scores = [0.0] * len(ids)
        start = 0
        while start < len(order):
            end = start + 1
            while end < len(order):
                longest = len(ids[order[end]])
                if longest * (end + 1 - start) > self._micro_batch_tokens:
                    break
                end += 1
            chosen = order[start:end]
            for index, value in zip(chosen, self._forward([ids[i] for i in chosen]), strict=True):
                scores[index] = value
            start = end
        return scores

    def _forward(self, batch: Sequence[Sequence[int]]) -> list[float]:
        """One forward pass over sequences padded on the right, with an explicit mask."""
        pad = self._pad_id(batch)
        if pad is None and len(batch) > 1:  # every id of the vocabulary stands in these texts
            return [score for tokens in batch for score in self._forward([tokens])]
        self._model.config.get_text_config().pad_token_id = pad
        self._model.config.pad_token_id = pad
        width = max(1, max(len(tokens) for tokens in batch))
        input_ids = torch.full((len(batch), width), pad or 0, dtype=torch.long)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for row, tokens in enumerate(batch):
            input_ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            mask[row, : len(tokens)] = 1
        with torch.inference_mode():
            logits: Tensor = self._model(
                input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device)
            ).logits
        return [float(value) for value in logits.float().reshape(len(batch)).cpu()]

    def _pad_id(self, batch: Sequence[Sequence[int]]) -> int | None:
        """A padding token that the model cannot take for the end of a text.

        Decoders find the last token of a text by the padding's id: where that is the end token too,
        they would read the score too early. Such a model gets an id that no text here holds; None
        where there is no such id.
        """
        own = self._tokenizer.pad_token_id
        used = {token for tokens in batch for token in tokens}
        if own is not None and own not in used:
            return int(own)
        size = int(self._model.config.get_text_config().vocab_size)
        return next((token for token in range(size) if token not in used), None)

    def _encode(self, messages: list[dict[str, str]], answer: str) -> tuple[list[int], bool]:
        """Token ids of a conversation with its answer, and whether the prompt's start was cut."""
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(
                [*messages, {"role": "assistant", "content": answer}], tokenize=False
            )
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            first = 1 if ids and ids[0] == self._tokenizer.bos_token_id else 0
        else:
            question = "\n\n".join(message["content"] for message in messages)
            ids = self._tokenizer(question, answer)["input_ids"]
            first = 1 if ids and ids[0] in set(self._tokenizer.all_special_ids) else 0
        if len(ids) <= self._max_tokens:
            return list(ids), False
        return [*ids[:first], *ids[len(ids) - self._max_tokens + first :]], True

    def _standardised(self, scores: list[float]) -> list[float]:
        if not scores:
            return []
        mean = sum(scores) / len(scores)
        deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
        if not deviation > 1e-6 * max(1.0, abs(mean)):  # all alike, or NaN
            return [score - mean for score in scores]
        return [max(-self._clip, min(self._clip, (one - mean) / deviation)) for one in scores]

    def _own_limit(self) -> int:
        limits = [
            getattr(self._model.config, "max_position_embeddings", None),
            self._tokenizer.model_max_length,
        ]
        known = [int(limit) for limit in limits if limit and limit < _NO_LIMIT]
        return min(known, default=_NO_LIMIT)


class _FloatHead(nn.Module):
    """A linear head in float32 on top of a body in another type."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.float()

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] in any type -> [..., outputs] in float32."""
        output: Tensor = self.linear(hidden.float())
        return output


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation of two lists; 0 where one of them does not vary."""
    pair = torch.tensor([list(first), list(second)], dtype=torch.float64)
    centred = pair - pair.mean(1, keepdim=True)
    scale = float(centred.norm(dim=1).prod())
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else 0.0


def _load(path: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise RewardError(
            f"reward 'model': path = {path!r} cannot be loaded as a sequence-classification model "
            f"with its tokenizer: {error}"
        ) from error
    num_labels = int(model.config.num_labels)
    if num_labels != 1:
        raise RewardError(
            f"reward 'model': {path!r} has {num_labels} outputs; a reward model has one"
        )
    model.requires_grad_(False)
    model.eval()
    head = getattr(model, "score", None)
    if isinstance(head, nn.Linear) and dtype != torch.float32:
        model.score = _FloatHead(head)
    return tokenizer, model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RewardError(
            f"reward 'model': device = {name!r} is not known; known: auto, cpu, cuda, cuda:N"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RewardError(f"reward 'model': device = {name!r}, but there is no CUDA device")
    return device


def _messages(prompt: Any) -> list[dict[str, str]]:
    """A prompt as a conversation; plain text is one user turn."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [
        {"role": str(turn.get("role")), "content": str(turn.get("content") or "")}
        for turn in prompt
    ]


def _answer(text: str, *, drops_thinking: bool) -> str:
    """What the model is shown: all, or what follows the thinking ("" if that never ends)."""
    return (after_thinking(text) or "").strip() if drops_thinking else text
