"""FastLanguageModel: models loaded and given adapters under Unsloth's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from sparring.compat.arguments import check, say_once, with_defaults
from sparring.compat.model import FastModel
from sparring.compat.unsloth_table import LOAD, LORA, MODEL_INIT, PEFT
from sparring.errors import UserError
from sparring.models import checkpoint
from sparring.models.lora import LoraConfig
from sparring.recipe import locate_model
from sparring.train.inference import open_policy

PEFT_DEFAULT_TARGETS = ("q_proj", "v_proj")
"""What PEFT adapts in the families known here where target_modules is None."""

_SPREAD = (None, "auto", "sequential", "balanced", "balanced_low_0", "unsloth")


LOAD_ORDER = ("max_seq_length", "dtype", "load_in_4bit", "load_in_8bit")
LORA_ORDER = ("r", "target_modules", "lora_alpha", "lora_dropout", "bias")
"""What may be given by position, in Unsloth's order."""


def by_position(
    order: Sequence[str], values: Sequence[Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by name, those by position named. Raises UserError for too many, or one twice."""
    if len(values) > len(order):
        raise UserError(f"{len(values)} arguments by position; name those after {order[-1]}")
    named = dict(zip(order, values, strict=False))
    twice = sorted(named.keys() & given.keys())
    if twice:
        raise UserError(f"'{twice[0]}' is given by position and by name")
    return {**named, **given}


class FastLanguageModel:
    """Loads models and puts adapters on them; nothing is patched, no object is made of it."""

    @staticmethod
    def from_pretrained(model_name: str = "", *names: Any, **given: Any) -> tuple[FastModel, Any]:
        """A model with its tokenizer. Every argument of Unsloth's is honoured or refused.

        Raises UserError, CheckpointError or MemoryBudgetError.
        """
        given = {"model_name": model_name, **by_position(LOAD_ORDER, names, given)}
        values = with_defaults("FastLanguageModel.from_pretrained", LOAD, given)
        is_four_bit = bool(values["load_in_4bit"]) and not values["load_in_16bit"]
        if values["full_finetuning"] and is_four_bit:
            is_four_bit = False
            say_once("full_finetuning = True: weights are loaded in 16 bits, not 4")
        model = load(
            str(values["model_name"]),
            max_tokens=int(values["max_seq_length"] or 0),
            dtype=dtype_name(values["dtype"]),
            device=device_name(values["device_map"]),
            quantization="nf4" if is_four_bit else "none",
        )
        model = FastModel(
            model.policy,
            seed=int(values["random_state"]),
            kv_share=float(values["gpu_memory_utilization"]) if values["fast_inference"] else None,
            max_rank=int(values["max_lora_rank"]) if values["fast_inference"] else None,
            trains_all=bool(values["full_finetuning"]),
        )
        set_checkpointing(model, values["use_gradient_checkpointing"])
        return model, model.policy.tokenizer

    @staticmethod
    def get_peft_model(model: FastModel, *names: Any, **given: Any) -> FastModel:
        """The model with a fresh adapter on it, ready to be trained. Raises UserError."""
        given = by_position(LORA_ORDER, names, given)
        values = with_defaults("FastLanguageModel.get_peft_model", LORA, given)
        if model.trains_all:
            say_once(
                "full_finetuning = True: get_peft_model has no effect, all weights are trained"
            )
            return model
        add_adapter(
            model,
            rank=int(values["r"]),
            alpha=float(values["lora_alpha"]),
            rslora=bool(values["use_rslora"]),
            targets=values["target_modules"] or "all-linear",
            seed=int(values["random_state"]),
        )
        set_checkpointing(model, values["use_gradient_checkpointing"])
        return model

    @staticmethod
    def for_inference(model: FastModel) -> FastModel:
        """The model itself: there is no mode to switch."""
        return model

    @staticmethod
    def for_training(model: FastModel, use_gradient_checkpointing: Any = "unsloth") -> FastModel:
        """The model itself, with checkpointing of layers as asked for."""
        set_checkpointing(model, use_gradient_checkpointing)
        return model


def load(
    path: str,
    *,
    max_tokens: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
) -> FastModel:
    """A model by its native settings; max_tokens over the checkpoint's own is said and cut."""
    if not path:
        raise UserError("model_name is empty; give a folder, a run directory or a Hub id")
    policy = open_policy(locate_model(path), dtype=dtype, device=device, quantization=quantization)
    if max_tokens > policy.model.config.max_tokens:
        say_once(
            f"max_seq_length = {max_tokens} is more than the {policy.model.config.max_tokens}"
            f" tokens that {path} was made for: that many are used"
        )
        max_tokens = policy.model.config.max_tokens
    return FastModel(replace(policy, max_tokens=max_tokens or policy.max_tokens))


def add_adapter(
    model: FastModel, *, rank: int, alpha: float, rslora: bool, targets: Any, seed: int
) -> None:
    """Put a fresh adapter on a model that has none. Raises UserError or CheckpointError."""
    decoder = model.policy.model
    if decoder.has_adapter():
        raise UserError(
            "the model has an adapter already, and one is trained at a time; go on with it, or load"
            " the base again"
        )
    if model.max_rank is not None and rank > model.max_rank:
        raise UserError(
            f"r = {rank} is above max_lora_rank = {model.max_rank}; raise it in from_pretrained"
        )
    config = LoraConfig(
        rank=rank,
        alpha=alpha,
        rslora=rslora,
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
        seed=seed,
    )
    for name in [name for name in decoder.lora if name != "policy"]:
        decoder.remove_adapter(name)
    decoder.add_adapter(config)


def add_peft(model: FastModel, peft_config: Any, *, seed: int) -> None:
    """The adapter that a peft.LoraConfig describes. Raises UserError for what is not computed."""
    if not is_dataclass(peft_config):
        raise UserError(f"peft_config is a {type(peft_config).__name__}; give peft.LoraConfig(...)")
    title = type(peft_config).__name__
    values = {one.name: getattr(peft_config, one.name) for one in fields(peft_config)}
    values = {name: getattr(value, "value", value) for name, value in values.items()}
    if not getattr(values.get("runtime_config"), "ephemeral_gpu_offload", False):
        values["runtime_config"] = None
    check(title, PEFT, values)
    add_adapter(
        model,
        rank=int(values["r"]),
        alpha=float(values["lora_alpha"]),
        rslora=bool(values.get("use_rslora", False)),
        targets=values["target_modules"] or PEFT_DEFAULT_TARGETS,
        seed=seed,
    )


def take_model(
    given: Any,
    *,
    peft_config: Any,
    tokenizer: Any,
    settings: Mapping[str, Any],
    quantization_config: Any,
    seed: int,
) -> FastModel:
    """The model of a trainer: one of FastLanguageModel's, or one loaded by its name.

    settings: of the configuration: model_init_kwargs, bf16, fp16, use_cpu, max_tokens. Raises
    UserError for anything else.
    """
    if isinstance(given, str):
        given = load_by_name(given, peft_config, settings, quantization_config)
    elif not isinstance(given, FastModel):
        raise UserError(
            f"model is a {type(given).__module__}.{type(given).__name__}: its weights would have to"
            " be held twice, there and here, and drift apart; import AutoModelForCausalLM (or"
            " FastLanguageModel) from sparring.compat, or give the name or folder it came from"
        )
    elif quantization_config is not None:
        raise UserError("quantization_config is for a model given by its name; this one is loaded")
    if peft_config is not None:
        add_peft(given, peft_config, seed=seed)
    if tokenizer is not None and tokenizer is not given.policy.tokenizer:
        checkpoint.check_vocabulary(tokenizer, given.policy.model.config)
        given.policy = replace(given.policy, tokenizer=tokenizer)
    taken: FastModel = given
    return taken


def load_by_name(
    path: str, peft_config: Any, settings: Mapping[str, Any], quantization_config: Any
) -> FastModel:
    """A model by its name with model_init_kwargs and the dtype that the arguments name."""
    init = with_defaults("model_init_kwargs", MODEL_INIT, settings.get("model_init_kwargs") or {})
    dtype = dtype_name(init["dtype"] or init["torch_dtype"])
    if dtype == "auto" and settings.get("fp16"):
        dtype = "float16"
    device = "cpu" if settings.get("use_cpu") else device_name(init["device_map"])
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and dtype != "float32" and (settings.get("fp16") or settings.get("bf16")):
        say_once("bf16, fp16: on a CPU the model computes in float32")
        dtype = "float32"
    model = load(
        path,
        max_tokens=int(settings.get("max_tokens") or 0),
        dtype=dtype,
        device=device,
        quantization=quantization_name(quantization_config or init["quantization_config"]),
    )
    model.trains_all = peft_config is None and not model.policy.model.has_adapter()
    return model


def dtype_name(value: Any) -> str:
    """Our name of a dtype given as None, text or torch.dtype."""
    if value is None:
        return "auto"
    name = str(value).removeprefix("torch.")
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    return short.get(name, name)


def device_name(value: Any) -> str:
    """Our name of a device_map; UserError where it spreads a model over several."""
    if isinstance(value, Mapping):
        devices = set(value.values())
        if len(devices) != 1:
            raise UserError("device_map names several devices; one holds the model")
        value = devices.pop()
    if value in _SPREAD:
        return "auto"
    return f"cuda:{value}" if isinstance(value, int) else str(value)


def quantization_name(config: Any) -> str:
    """Our name of a BitsAndBytesConfig; UserError for what is not NF4."""
    if config is None:
        return "none"
    values = dict(config) if isinstance(config, Mapping) else vars(config)
    found = {name.removeprefix("_"): value for name, value in values.items()}
    if not found.get("load_in_4bit") or found.get("bnb_4bit_quant_type", "nf4") != "nf4":
        raise UserError(
            "quantization_config is refused unless it is load_in_4bit = True with"
            ' bnb_4bit_quant_type = "nf4": no other quantisation is built; native way: [model]'
            ' quantization = "nf4"'
        )
    return "nf4"


def set_checkpointing(model: FastModel, value: Any) -> None:
    """Layers are computed again in backward where it is asked for."""
    model.policy.model.set_checkpointing("layers" if value else "none")
