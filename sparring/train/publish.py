"""`sparring export`: a policy written out for other programs, its system prompt along with it.

What a run recorded beside its weights (template, system prompt, end tokens) goes into the folder:
into sparring.json for Sparring's own commands, and the system prompt as the chat template's default
for every other program that reads the tokenizer. Weights are merged in export/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from sparring.data.chat import ChatTemplate
from sparring.errors import UserError
from sparring.export.merged import save_merged
from sparring.models import checkpoint
from sparring.models.files import read_json
from sparring.train.inference import open_policy, system_prompt_note, template_of
from sparring.train.policy import Policy, write_settings

Format = Literal["merged", "adapter"]

NOT_BUILT = {
    "gguf": "export --format merged, then run llama.cpp's convert_hf_to_gguf.py on that folder",
}
"""Formats that people ask for and that are not there, with the way to them."""


def export(
    path: str,
    output: str,
    *,
    format_name: str,
    adapter: str = "",
    dtype: str = "auto",
    system_prompt: str = "",
    say: Callable[[str], None],
) -> Path:
    """Write a model or a run's final policy into a new folder; returns it.

    format_name: "merged" (whole weights, an adapter added in) or "adapter" (PEFT's). dtype: of
    merged files; "auto" is the checkpoint's own. system_prompt: in place of the recorded one, which
    is then named. Raises UserError or CheckpointError.
    """
    if format_name in NOT_BUILT:
        raise UserError(f"--format {format_name} is not built: {NOT_BUILT[format_name]}")
    if format_name not in ("merged", "adapter"):
        raise UserError(f"--format is '{format_name}'; known: merged, adapter")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder.absolute()} is there already; name a new folder by --output")
    stored = _dtype(dtype, adapter or path)
    policy = open_policy(path, adapter=adapter or None, device="cpu", dtype=stored)
    if format_name == "adapter" and not policy.model.has_adapter():
        raise UserError(f"{path} has no adapter; export it by --format merged")
    if note := system_prompt_note(policy.tokenizer, system_prompt):
        say(note)
    template = template_of(policy.tokenizer, system_prompt=system_prompt)
    policy = policy.speaking(template)
    if format_name == "adapter":
        checkpoint.save_adapter(policy.model, folder, _base(policy))
    else:
        save_merged(policy.model, folder, dtype=stored, end_ids=policy.stop_ids)
    checkpoint.save_tokenizer(_tokenizer(policy, template), folder)
    write_settings(policy, folder)
    if template.system_prompt:
        say("the system prompt goes along, as the chat template's default")
    return folder


def _dtype(name: str, path: str) -> str:
    """The dtype of the files: what is asked for, else what the base's config.json says."""
    if name != "auto" and name not in checkpoint.DTYPES:
        raise UserError(f"--dtype is '{name}'; known: auto, {', '.join(checkpoint.DTYPES)}")
    if name != "auto":
        return name
    config = read_json(checkpoint.base_folder(path) / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    found = found.removeprefix("torch.")
    return found if found in checkpoint.DTYPES else "float32"


def _base(policy: Policy) -> str:
    base = str(checkpoint.base_folder(policy.source))
    return policy.source if not Path(policy.source).exists() else base


def _tokenizer(policy: Policy, template: ChatTemplate) -> Any:
    """A tokenizer whose chat template puts the system prompt first where there is none."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.init_kwargs.pop("sparring", None)
    if template.source is None:
        return tokenizer
    source = template.source
    if template.system_prompt:
        said = json.dumps(template.system_prompt, ensure_ascii=False)
        source = (
            "{%- if not messages or messages[0]['role'] != 'system' %}"
            "{%- set messages = [{'role': 'system', 'content': " + said + "}] + messages %}"
            "{%- endif %}" + source
        )
    tokenizer.chat_template = source
    return tokenizer
