"""The policy of a run: one model with tokenizer, end tokens and reference, read and written here.

The same object trains and generates. Nothing here loops, samples or optimises.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparring.data.chat import ChatTemplate
from sparring.errors import RecipeError
from sparring.kernels import Capability
from sparring.models import checkpoint
from sparring.models.lora import LoraConfig
from sparring.models.reference import Reference, build_reference
from sparring.models.storage import Storage
from sparring.models.transformer import Decoder, kv_bytes_per_token
from sparring.rollout.engine import Engine, find_kv_dtype, has_kernels
from sparring.train.kv_budget import kv_budget
from sparring.train.memory import take_workspaces
from sparring.train.plan_job import Work
from sparring.train.plan_rollout import rows_at_once

if TYPE_CHECKING:
    from sparring.recipe import Recipe
    from sparring.recipe.sections import ModelSection, RolloutSection

SETTINGS_FILE = "sparring.json"
"""Beside the weights in `final/`: template, system prompt and limit that it was trained with."""

MAX_RUNNING = 512
ASSUMED_PROMPT_TOKENS = 256
"""Of a prompt, where neither the recipe's limits nor the user say less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A model with what it needs to speak.

    source: the folder or Hub id its base came from. max_tokens: prompt and completion together.
    template: the conversation format that it is trained with, once data is loaded.
    """

    model: Decoder
    tokenizer: Any
    stop_ids: tuple[int, ...]
    source: str
    max_tokens: int
    template: ChatTemplate | None = None

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the ids without special tokens, exactly as the tokens spell it."""
        text: str = self.tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def speaking(self, template: ChatTemplate) -> Policy:
        """The policy with this conversation format, whose end of a turn ends a completion too."""
        stop_ids = tuple(sorted({*self.stop_ids, *template.end_ids}))
        return replace(self, template=template, stop_ids=stop_ids)


def pick_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def storage_of(section: ModelSection) -> Storage:
    """What [model] says of how weights are kept, beside quantization."""
    return Storage(keep_16bit=section.keep_16bit, head=section.head, embedding=section.embedding)


def build_policy(recipe: Recipe, *, capability: Capability | None = None) -> Policy:
    """Load the model that the recipe names and make trainable what it trains.

    capability: what kernels may use, where it is to be less than the device can do.

    With a [lora] section the base is frozen and an adapter trained, the one of model.adapter where
    it is given; without, every weight. Raises RecipeError, CheckpointError or MemoryBudgetError.
    """
    section, device = recipe.model, pick_device()
    if section.adapter and recipe.lora is None:
        raise RecipeError(
            f"[model] adapter = '{section.adapter}' needs a [lora] section: full fine-tuning cannot"
            " train through an adapter; add [lora], or merge the adapter into its base first"
        )
    if section.quantization != "none" and recipe.lora is None:
        raise RecipeError(
            f"[model] quantization = '{section.quantization}' needs a [lora] section: weights of"
            " four bits cannot be trained themselves; add [lora], or remove quantization"
        )
    for key, plain in (("head", "16bit"), ("embedding", "device")):
        if getattr(section, key) != plain and recipe.lora is None:
            raise RecipeError(
                f"[model] {key} = '{getattr(section, key)}' needs a [lora] section: weights kept so"
                f" are frozen; add [lora], or remove {key}"
            )
    dtype = "float32" if section.dtype == "auto" and device.type == "cpu" else section.dtype
    kv_memory, has_budget = recipe.rollout.kv_memory, recipe.run.memory != "auto"
    model = checkpoint.load_model(
        section.path,
        adapter=section.adapter or None,
        dtype=dtype,
        device=device,
        kv_bytes=0 if kv_memory == "auto" else int(kv_memory),
        free=int(recipe.run.memory) if device.type == "cuda" and has_budget else None,
        quantization=section.quantization,
        capability=capability,
        storage=storage_of(section),
    )
    tokenizer = checkpoint.load_tokenizer(section.path)
    checkpoint.check_vocabulary(tokenizer, model.config)
    if recipe.lora is not None:
        _make_adapter(model, recipe)
    elif model.has_adapter():
        raise RecipeError(
            f"[model] path = '{section.path}' holds an adapter; add a [lora] section"
            " to go on training it"
        )
    elif model.is_quantised:
        raise RecipeError(
            f"[model] path = '{section.path}' is stored in four bits, which cannot be trained"
            " themselves; add a [lora] section, or give the checkpoint it was made from"
        )
    else:
        model.requires_grad_(True)
    set_memory_saving(model, recipe)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        stop_ids=checkpoint.end_token_ids(section.path, tokenizer),
        source=section.path,
        max_tokens=section.max_tokens or model.config.max_tokens,
    )


def take_policy(
    recipe: Recipe, policy: Policy | None, *, capability: Capability | None = None
) -> Policy:
    """The policy that the caller holds, keeping in training what [train] says; None: build one."""
    if policy is None:
        return build_policy(recipe, capability=capability)
    set_memory_saving(policy.model, recipe)
    return policy


def set_memory_saving(model: Decoder, recipe: Recipe) -> None:
    """Make a model keep in its training forward what [train] says, where it says."""
    section = recipe.train
    if recipe.run.bitwise and not has_kernels(model):
        raise RecipeError(
            "[run] bitwise = true needs a GPU with tensor cores and a dtype of 16 bits; this model"
            f" is in {model.dtype} on {model.device}. Leave bitwise out: rows do not depend on each"
            " other on a CPU but for rounding"
        )
    model.set_bitwise(recipe.run.bitwise)
    model.set_checkpointing(
        section.checkpointing, offload=section.offload, mlp_tile_tokens=section.mlp_tile_tokens
    )


def _make_adapter(model: Decoder, recipe: Recipe) -> None:
    assert recipe.lora is not None, "called for recipes with a [lora] section"
    section = recipe.lora
    wanted = LoraConfig(
        rank=section.rank,
        alpha=section.alpha,
        rslora=section.rslora,
        target_modules=section.target_modules,
        seed=recipe.run.seed,
    )
    if not model.has_adapter():
        model.add_adapter(wanted)
        return
    have = model.lora["policy"]
    if (have.rank, float(have.alpha), have.rslora) != (
        wanted.rank,
        float(wanted.alpha),
        wanted.rslora,
    ):
        raise RecipeError(
            f"[lora] says rank {wanted.rank}, alpha {wanted.alpha:g}, rslora {wanted.rslora}, but"
            f" the adapter to go on from has rank {have.rank}, alpha {have.alpha:g}, rslora"
            f" {have.rslora}; set [lora] to the adapter's values"
        )


def build_reference_policy(policy: Policy, kl_coef: float) -> Reference | None:
    """The policy as it stands, frozen, for the KL term; None, and nothing kept, if kl_coef is 0.

    Call it before a checkpoint is loaded on resume: the reference is the policy at step 0.
    """
    return build_reference(policy.model) if kl_coef else None


def work_of(section: RolloutSection, max_tokens: int, prompt_tokens: int = 0) -> Work:
    """A step of [rollout] at full length; prompt_tokens 0: an assumption within max_tokens."""
    room = max(1, max_tokens - section.max_completion_tokens)
    return Work(
        prompts=section.prompts_per_step,
        group_size=section.group_size,
        prompt_tokens=prompt_tokens or min(room, ASSUMED_PROMPT_TOKENS),
        completion_tokens=section.max_completion_tokens,
    )


def build_engine(recipe: Recipe, policy: Policy, *, most_rollouts: int) -> Engine:
    """The rollout engine on the policy's own weights, inside rollout.kv_memory bytes.

    On a GPU the plan has decided these (see `fit_memory`). Where it has not, "auto" is what
    `most_rollouts` sequences of full length could use, at most what is left (see `kv_budget`).
    """
    section, model = recipe.rollout, policy.model
    kv_bytes = section.kv_memory
    if kv_bytes == "auto":
        kv_bytes, _ = kv_budget(
            model,
            num_rollouts=min(most_rollouts, MAX_RUNNING),
            prompt_tokens=work_of(section, policy.max_tokens).prompt_tokens,
            max_tokens=policy.max_tokens,
            memory=recipe.run.memory,
            kv_dtype=section.kv_dtype,
        )
    running = MAX_RUNNING
    if model.device.type == "cuda":  # more rows have larger graphs: as many as the plan counts
        take_workspaces(model.device, model.dtype)
        each = kv_bytes_per_token(model.config, find_kv_dtype(model, section.kv_dtype))
        work = work_of(section, policy.max_tokens)
        running = rows_at_once(work, int(kv_bytes), each, MAX_RUNNING)
    return Engine(
        model,
        kv_bytes=int(kv_bytes),
        stop_ids=policy.stop_ids,
        decode=policy.decode,
        max_tokens=policy.max_tokens,
        max_running=running,
        cuda_graphs=section.cuda_graphs,
        caches_weights=section.cache_weights is True and model.is_quantised,
        kv_dtype=section.kv_dtype,
    )


def save_policy(recipe: Recipe, policy: Policy, directory: Path) -> None:
    """Write the policy so that transformers or PEFT reads it: an adapter, or the whole model."""
    directory.mkdir(parents=True, exist_ok=True)
    if policy.model.has_adapter():
        base = str(checkpoint.base_folder(policy.source))
        source = policy.source if not Path(policy.source).exists() else base
        checkpoint.save_adapter(policy.model, directory, source)
    else:
        checkpoint.save_model(policy.model, directory, end_ids=policy.stop_ids)
    template = policy.template
    tokenizer = policy.tokenizer
    if template is not None and template.source != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template.source
    checkpoint.save_tokenizer(tokenizer, directory)
    write_settings(policy, directory, system_prompt=recipe.data.system_prompt)


def write_settings(policy: Policy, directory: Path, *, system_prompt: str = "") -> None:
    """Write beside the weights what Sparring needs to speak to them; see SETTINGS_FILE.

    system_prompt: of a policy that has no template yet.
    """
    template = policy.template
    settings = {
        "template": _template_name(template),
        "system_prompt": system_prompt if template is None else template.system_prompt,
        "max_tokens": policy.max_tokens,
        "stop_ids": list(policy.stop_ids),
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _template_name(template: ChatTemplate | None) -> str:
    """What a reload builds the same format from: ours by name, any other out of the tokenizer."""
    if template is None:
        return "auto"
    if template.is_own:
        return template.name
    return "none" if template.source is None else "auto"
