"""Names of transformers and PEFT that scripts for TRL import beside its own."""

from __future__ import annotations

from typing import Any

from sparring.compat.arguments import say_once
from sparring.compat.loading import add_peft, load_by_name
from sparring.compat.model import FastModel
from sparring.errors import UserError


class AutoModelForCausalLM:
    """Loads a model as a trainer would by its name; no object is made of it."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: Any, *names: Any, **given: Any) -> FastModel:
        """A model whose weights are all trained, unless an adapter is put on it.

        dtype: that of the checkpoint on a card, float32 on a CPU. Raises UserError,
        CheckpointError or MemoryBudgetError.
        """
        if names:
            raise UserError("from_pretrained takes the model by position; name the rest")
        settings = {"model_init_kwargs": given, "max_tokens": 0}
        return load_by_name(str(pretrained_model_name_or_path), None, settings, None)


def get_peft_model(model: FastModel, peft_config: Any, *_: Any, **__: Any) -> FastModel:
    """The model with the fresh adapter that a peft.LoraConfig describes. Raises UserError."""
    add_peft(model, peft_config, seed=0)
    model.trains_all = False
    return model


def prepare_model_for_kbit_training(model: FastModel, *_: Any, **__: Any) -> FastModel:
    """The model itself: what is trained beside four bits is in float32 already."""
    say_once(
        "prepare_model_for_kbit_training is accepted and does nothing: adapters are in float32"
    )
    return model
