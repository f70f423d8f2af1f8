"""A policy opened for use instead of training: loaded from anywhere, sized for a few completions.

What a run recorded beside its weights (template, system prompt, end tokens) travels with the
tokenizer, in its own settings, and is taken from there when text is rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sparring.data.chat import ChatTemplate, build_template, parse_messages
from sparring.errors import UserError
from sparring.models import checkpoint
from sparring.models.storage import Storage
from sparring.rollout.engine import Engine
from sparring.train.kv_budget import Memory, kv_budget
from sparring.train.policy import MAX_RUNNING, SETTINGS_FILE, Policy, pick_device
from sparring.types import Prompt

if TYPE_CHECKING:
    from sparring.recipe import Recipe

SETTINGS_KEY = "sparring"
"""Under this key of a tokenizer's init_kwargs lies what `open_policy` found of a run's settings."""


def open_policy(
    path: str,
    *,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str = "none",
    storage: Storage | None = None,
) -> Policy:
    """Load a model and its tokenizer for sampling and scoring; nothing is trainable.

    path: a folder, a run directory, an adapter's folder or a Hub id. dtype "auto": the checkpoint's
    on a GPU, float32 on a CPU. quantization: "none" or "nf4". storage: how else weights
    are kept. Raises UserError, CheckpointError or MemoryBudgetError.
    """
    where = _device(device)
    wanted = "float32" if dtype == "auto" and where.type == "cpu" else dtype
    model = checkpoint.load_model(
        path,
        adapter=adapter,
        dtype=wanted,
        device=where,
        quantization=quantization,
        storage=storage,
    )
    model.requires_grad_(False)
    tokenizer = checkpoint.load_tokenizer(path)
    checkpoint.check_vocabulary(tokenizer, model.config)
    stop_ids = checkpoint.end_token_ids(path, tokenizer)
    settings = saved_settings(adapter) if adapter else {}
    settings = settings or saved_settings(path)
    stop_ids = tuple(sorted({*stop_ids, *settings.get("stop_ids", ())}))
    tokenizer.init_kwargs[SETTINGS_KEY] = {**settings, "stop_ids": list(stop_ids)}
    return Policy(
        model=model,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        source=path,
        max_tokens=int(settings.get("max_tokens") or model.config.max_tokens),
    )


def saved_settings(path: str) -> dict[str, Any]:
    """Template, system prompt and limit that a run recorded beside its final weights, or {}."""
    file = checkpoint.resolve(path) / SETTINGS_FILE
    if not file.is_file():
        return {}
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def template_of(tokenizer: Any, *, template: str = "auto", system_prompt: str = "") -> ChatTemplate:
    """The conversation format to use: what is asked for here, else what the run recorded."""
    settings = tokenizer_settings(tokenizer)
    if template == "auto":
        template = str(settings.get("template", "auto"))
    return build_template(
        tokenizer, template, system_prompt or str(settings.get("system_prompt", ""))
    )


def model_template(path: str) -> ChatTemplate:
    """The conversation format of a model, its weights unread."""
    name = str(saved_settings(path).get("template", "auto"))
    return build_template(checkpoint.load_tokenizer(path), name)


def system_prompt_note(tokenizer: Any, system_prompt: str) -> str:
    """What to say where a system prompt given by hand replaces the recorded one; else ""."""
    recorded = str(tokenizer_settings(tokenizer).get("system_prompt", ""))
    if not recorded or system_prompt in ("", recorded):
        return ""
    return (
        f"the system prompt given here, {_shown(system_prompt)}, replaces the one that the model"
        f" was trained with, {_shown(recorded)}"
    )


def training_template(recipe: Recipe, tokenizer: Any) -> tuple[ChatTemplate, list[str]]:
    """The conversation format to train the recipe's model in, and lines for people about it.

    What the recipe leaves open is taken from the run that wrote the model, where one did; a system
    prompt that the recipe gives wins, and a line names both.
    """
    data = recipe.data
    settings = saved_settings(recipe.model.adapter) if recipe.model.adapter else {}
    settings = settings or saved_settings(recipe.model.path)
    recorded = str(settings.get("system_prompt", ""))
    name = data.template
    if name == "auto":
        name = str(settings.get("template", "auto"))
    lines = []
    if recorded and not data.system_prompt:
        lines = [f"the model's own system prompt is kept: {_shown(recorded)}"]
    elif recorded and data.system_prompt != recorded:
        lines = [
            f"data.system_prompt, {_shown(data.system_prompt)}, replaces the system prompt that the"
            f" model was trained with, {_shown(recorded)}"
        ]
    return build_template(tokenizer, name, data.system_prompt or recorded), lines


def _shown(text: str, limit: int = 120) -> str:
    line = " ".join(text.split())
    return f"'{line if len(line) <= limit else line[: limit - 3] + '...'}'"


def tokenizer_settings(tokenizer: Any) -> Mapping[str, Any]:
    """What travels with a tokenizer that `open_policy` loaded; empty for any other."""
    found = getattr(tokenizer, "init_kwargs", {}).get(SETTINGS_KEY, {})
    return found if isinstance(found, Mapping) else {}


def build_prompt(
    index: int, prompt: str | Sequence[Mapping[str, Any]], template: ChatTemplate
) -> Prompt:
    """A text as it stands, or messages through the template. Raises DataError."""
    if isinstance(prompt, str):
        return Prompt(id=index, token_ids=tuple(template.encode_plain(prompt)), text=prompt)
    messages = parse_messages(prompt)
    rendered = template.render(messages, add_generation_prompt=True)
    return Prompt(
        id=index,
        token_ids=tuple(template.encode(rendered.text)),
        text=rendered.text,
        messages=messages,
        prefill=rendered.prefill,
    )


def sampling_engine(
    policy: Policy,
    prompts: Sequence[Prompt],
    *,
    max_completion_tokens: int,
    num_samples: int = 1,
    adapter: str | None = "policy",
    memory: Memory = "auto",
) -> Engine:
    """An engine for `num_samples` completions of each prompt; without prompts for any one prompt.

    adapter None: the base alone. memory: the budget of the whole process, see `kv_budget`; keys and
    values take what these completions can use, at most what it leaves. Raises MemoryBudgetError.
    """
    lengths = [len(prompt.token_ids) for prompt in prompts] or [policy.max_tokens]
    max_tokens = max(2, min(policy.max_tokens, max(lengths) + max_completion_tokens))
    kv_bytes, running = kv_budget(
        policy.model,
        num_rollouts=max(1, min(len(lengths) * num_samples, MAX_RUNNING)),
        prompt_tokens=sum(lengths) // len(lengths),
        max_tokens=max_tokens,
        memory=memory,
    )
    return Engine(
        policy.model,
        kv_bytes=kv_bytes,
        stop_ids=policy.stop_ids,
        decode=policy.decode,
        max_tokens=max_tokens,
        max_running=running,
        adapter=adapter,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return pick_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device '{name}' is not known; known: auto, cpu, cuda, cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device '{name}' asked for, but there is no CUDA device; take auto or cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; supported: auto, cpu, cuda, cuda:N")
    return device
