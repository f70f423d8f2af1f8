"""Every key of a recipe, its type and its default: the one list that there is.

Nothing is read from files here, and values that do not go together are found in checks.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Command = Literal["sft", "grpo", "dpo", "ppo", "eval", "advise", "plan"]

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}


def parse_size(value: object) -> int:
    """Bytes of 512MiB, 8GiB, 8GB (decimal) or a number of bytes; ValueError for anything else."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    text = str(value) if is_number or isinstance(value, str) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found.group(2).lower() not in _UNITS or float(found.group(1)) == 0:
        raise ValueError("a size is written 512MiB, 8GiB, 8GB (decimal) or as a number of bytes")
    size = int(float(found.group(1)) * _UNITS[found.group(2).lower()])
    if not found.group(2) and size < 4096:
        raise ValueError(f"{size} would be bytes: a size is written 512MiB, 8GiB, 8GB (decimal)")
    return size


def _size_or_auto(value: object) -> object:
    return value if value == "auto" else parse_size(value)


def _names(value: object) -> object:
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise ValueError('a list of texts is wanted, for example ["one", "two"]')


def _modules(value: object) -> object:
    return value if value == "all-linear" else _names(value)


def _pair(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


Size = Annotated[int | Literal["auto"], BeforeValidator(_size_or_auto)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Modules = Annotated[tuple[str, ...] | Literal["all-linear"], BeforeValidator(_modules)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
CountOrNone = Annotated[int, Field(ge=0)]
CountOrAuto = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(lambda value: 0 if value == "auto" else value),
    PlainSerializer(lambda value: value or "auto", return_type=int | str),
]
"""A count, or "auto", which is 0 in the code."""


class ModelSection(BaseModel):
    """[model]: a folder, run directory or Hub id; max_tokens 0 is the checkpoint's own limit.

    keep_16bit: matrices that quantization leaves alone, by kind ("down_proj") or Hugging Face
    module path. head: "8bit" for trainer and sampler alike. embedding: "host" frees its bytes on a
    GPU.
    """

    model_config = _FROZEN
    path: str = ""
    adapter: str = ""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4"] = "none"
    keep_16bit: Names = ()
    head: Literal["16bit", "8bit"] = "16bit"
    embedding: Literal["device", "host"] = "device"
    max_tokens: CountOrNone = 0


class LoraSection(BaseModel):
    """[lora]: train an adapter; without this section all weights are trained."""

    model_config = _FROZEN
    rank: Count = 16
    alpha: Annotated[float, Field(gt=0.0)] = 16.0
    rslora: bool = False
    target_modules: Modules = "all-linear"


class DataSection(BaseModel):
    """[data]: a file, a datasets folder or a Hub id for training and for evaluation.

    sft's alone: weight (a column with each row's weight), general (other conversations, of which
    general_ratio for each row of train are mixed in) and placeholders (what identity data leave
    open: {name = "Ada"}, or by language {name = {zh = "...", en = "..."}}).
    """

    model_config = _FROZEN
    train: str = ""
    eval: str = ""
    split: str = "train"
    eval_split: str = "test"
    prompt: str = "prompt"
    reference: str = "reference"
    system_prompt: str = ""
    template: str = "auto"
    bad_rows: Literal["error", "skip"] = "error"
    weight: str = ""
    general: str = ""
    general_ratio: Annotated[float, Field(gt=0.0)] = 1.0
    placeholders: dict[str, str | dict[str, str]] = Field(default_factory=dict)


class RewardSection(BaseModel):
    """One [[reward]]; knobs are all its other keys and go to the function's own parameters."""

    model_config = _FROZEN
    name: Annotated[str, Field(min_length=1)]
    weight: float = 1.0
    required: bool = False
    gate: str = ""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 30.0
    isolate: bool = False
    knobs: dict[str, Any] = Field(default_factory=dict)


class RolloutSection(BaseModel):
    """[rollout]: how completions are sampled, and how many.

    top_p, top_k and min_p are for evaluations; grpo, ppo and advise refuse them.
    cache_weights: four-bit weights are kept decoded while sampling ("auto": where they fit).
    kv_dtype: keys and values in the model's dtype, or in 8 bits with scales, on a GPU.
    enough_groups: grpo's alone; sampling ends once so many complete groups have a signal (0: off).
    """

    model_config = _FROZEN
    group_size: Count = 8
    prompts_per_step: Count = 16
    enough_groups: CountOrNone = 0
    max_completion_tokens: Count = 512
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: CountOrNone = 0
    min_p: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    stop: Names = ()
    kv_memory: Size = "auto"
    kv_dtype: Literal["auto", "int8", "fp8"] = "auto"
    cache_weights: bool | Literal["auto"] = "auto"
    cuda_graphs: bool = True


class AdvantageSection(BaseModel):
    """[advantage]: a name of algorithms/advantages.py (ppo: gae.py) and that function's knobs."""

    model_config = _FROZEN
    name: str = "group"
    knobs: dict[str, Any] = Field(default_factory=dict)


class LossSection(BaseModel):
    """[loss]: a name of algorithms/losses.py (dpo: preference.py) and that function's knobs.

    Left out it is "sft" for sft, "sigmoid" for dpo, and for ppo "dapo" with clips of 0.2.
    """

    model_config = _FROZEN
    name: str = "dapo"
    knobs: dict[str, Any] = Field(default_factory=dict)


class ValueSection(BaseModel):
    """[value]: ppo's critic, on the policy's trunk (path = "") or on a model of its own.

    rank: of its adapter; 0: the head alone on the policy's trunk, all weights of its own model.
    learning_rate 0: the policy's. clip: how far a value moves in a step (0: no limit).
    """

    model_config = _FROZEN
    path: str = ""
    rank: CountOrNone = 16
    learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    clip: Annotated[float, Field(ge=0.0)] = 0.2


class OptimizerSection(BaseModel):
    """[optimizer]: AdamW and its learning-rate schedule; warmup_steps count optimizer steps.

    name: "adamw_8bit" keeps the moments in 8 bits, by bitsandbytes; made for training all weights.
    """

    model_config = _FROZEN
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Share, Share], BeforeValidator(_pair)] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: CountOrNone = 0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0


class TrainSection(BaseModel):
    """[train]: optimizer steps and the packed tokens of one micro-batch.

    conversations_per_step is sft's alone and pairs_per_step dpo's; grpo and ppo take
    rollout.prompts_per_step prompts a step. Of both: passes over a step's rollouts (left out: 4 for
    ppo), and in each of them mini_steps updates, on as many parts of the rollouts. grpo's alone:
    learn_truncated false leaves completions that the limit cut out of the loss.

    Memory: checkpointing keeps all activations ("none"), each layer's input ("layers"), or that and
    attention's output ("selective"), and computes the rest again; offload keeps them in host memory
    (on a GPU); with checkpointing the feed-forward takes mlp_tile_tokens tokens at a time (0: all).
    micro_batch_tokens and checkpointing may be "auto": the fastest that fits into run.memory.
    max_mismatch_kl: stop where trainer and sampler differ by more (0: never); see mismatch_kl.
    """

    model_config = _FROZEN
    steps: Count = 1
    micro_batch_tokens: CountOrAuto = 8192
    conversations_per_step: Count = 32
    pairs_per_step: Count = 32
    passes: Count = 1
    mini_steps: Count = 1
    learn_truncated: bool = True
    checkpointing: Literal["none", "layers", "selective", "auto"] = "none"
    offload: bool = False
    mlp_tile_tokens: CountOrNone = 8192
    max_mismatch_kl: Annotated[float, Field(ge=0.0)] = 0.0


class EvalSection(BaseModel):
    """[eval]: every N steps (0: only before and after) on the first `limit` rows (0: all).

    num_samples: completions of each prompt; for sft, how many conversations are answered and shown
    beside the held-out loss (0: none).
    """

    model_config = _FROZEN
    every: CountOrNone = 0
    num_samples: CountOrNone = 1
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    limit: CountOrNone = 0


class RunSection(BaseModel):
    """[run]: where the run lives, its seed, and the one number for how much memory it may use."""

    model_config = _FROZEN
    dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    memory: Size = "auto"
    bitwise: bool = False
    checkpoint_every: CountOrNone = 100
    keep_checkpoints: Count = 3
    track: Names = ()


class Recipe(BaseModel):
    """Everything a run is told. `lora` is None for full fine-tuning, `value` for all but ppo."""

    model_config = _FROZEN
    model: ModelSection = ModelSection()
    lora: LoraSection | None = None
    data: DataSection = DataSection()
    reward: tuple[RewardSection, ...] = ()
    rollout: RolloutSection = RolloutSection()
    advantage: AdvantageSection = AdvantageSection()
    loss: LossSection = LossSection()
    value: ValueSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    run: RunSection = RunSection()


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "lora": LoraSection,
    "data": DataSection,
    "reward": RewardSection,
    "rollout": RolloutSection,
    "advantage": AdvantageSection,
    "loss": LossSection,
    "value": ValueSection,
    "optimizer": OptimizerSection,
    "train": TrainSection,
    "eval": EvalSection,
    "run": RunSection,
}

_TRAINING = ("model.path", "data.train", "optimizer.learning_rate", "train.steps", "run.dir")
REQUIRED: dict[Command, tuple[str, ...]] = {
    "sft": _TRAINING,
    "grpo": (*_TRAINING, "reward.name"),
    "dpo": _TRAINING,
    "ppo": (*_TRAINING, "reward.name"),
    "eval": ("model.path", "data.eval", "reward.name"),
    "advise": ("data.train",),
    "plan": ("model.path",),
}
"""Keys without a default, by command."""


def listed(names: Mapping[str, Any]) -> str:
    """The names of sections or keys, for an error that lists what is known."""
    return ", ".join(name for name in names if name != "knobs")
