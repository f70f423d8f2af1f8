"""The reference policy of a KL term: the policy as it was at step 0, frozen.

The base itself where an adapter starts fresh, a frozen copy of the adapter where training goes on
from one, a frozen copy of the weights for full fine-tuning. It is built only where a KL term needs
it, from the start model on resume too, before a checkpoint is loaded.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor

from sparring.models.transformer import Decoder
from sparring.types import Batch, TokenScores

Kind = Literal["base", "adapter", "weights"]

_ADAPTER = "reference"


class Reference:
    """Scores batches as the policy did at step 0, without gradient.

    kind: "base" = the model with its adapter off, "adapter" = the model with the frozen adapter
    that lies beside the trained one, "weights" = a model of its own.
    """

    def __init__(self, model: Decoder, kind: Kind) -> None:
        self.model = model
        self.kind: Kind = kind

    @torch.no_grad()
    def score(self, batch: Batch) -> TokenScores:
        """Scores of the batch's labels under the reference, without gradient."""
        return self.model.score(batch, adapter=_ADAPTER if self.kind == "adapter" else None)

    def logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities [T] of the batch's labels, as a step takes them for a KL term."""
        return self.score(batch).logprobs_T


def build_reference(model: Decoder) -> Reference:
    """The reference of a policy: call it before the first optimizer step."""
    if model.has_adapter(_ADAPTER):
        return Reference(model, "adapter")
    if not model.has_adapter("policy"):
        frozen = copy.deepcopy(model)
        frozen.requires_grad_(False)
        return Reference(frozen, "weights")
    if not any(bool(adapter.b.any()) for adapter in model.adapter_modules("policy").values()):
        return Reference(model, "base")
    model.add_adapter(model.lora["policy"], name=_ADAPTER)
    frozen_parts = model.adapter_modules(_ADAPTER)
    for path, adapter in model.adapter_modules("policy").items():
        frozen_parts[path].copy_from(adapter)
    return Reference(model, "adapter")
