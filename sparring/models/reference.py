"""The reference policy of a KL term: the policy as it was at step 0, frozen.

The base itself where an adapter starts fresh, a frozen copy of the adapter where training goes on
from one, a frozen copy of the weights for full fine-tuning. It is built only where a KL term needs
it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.models.checkpoint import (
    load_adapter_onto,
    load_model,
    save_adapter,
    save_model,
)
from sparring.models.files import read_json
from sparring.models.transformer import Decoder
from sparring.types import Batch, TokenScores

Kind = Literal["base", "adapter", "weights"]

_FILE = "reference.json"
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

    def save(self, directory: str | Path) -> None:
        """Write what a resumed run needs to have the same reference again."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "adapter":
            save_adapter(self.model, folder, self.model.config.family, name=_ADAPTER)
        elif self.kind == "weights":
            save_model(self.model, folder)
        (folder / _FILE).write_text(json.dumps({"kind": self.kind}) + "\n", encoding="utf-8")


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


def load_reference(model: Decoder, directory: str | Path) -> Reference:
    """The reference that `Reference.save` wrote, for a policy that was resumed."""
    folder = Path(directory)
    kind = read_json(folder / _FILE).get("kind")
    if kind == "base":
        return Reference(model, "base")
    if kind == "adapter":
        load_adapter_onto(model, folder, name=_ADAPTER)
        return Reference(model, "adapter")
    if kind == "weights":
        frozen = load_model(
            folder,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device,
            capability=model.capability,
        )
        frozen.requires_grad_(False)
        return Reference(frozen, "weights")
    raise CheckpointError(f"{folder / _FILE}: kind is {kind!r}; known: base, adapter, weights")
