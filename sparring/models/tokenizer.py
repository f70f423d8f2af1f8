"""Tokenizers in and out, end tokens, and whether a tokenizer and a model belong together.

The tokenizer is what its tokenizer.json says: a class named in tokenizer_config.json may rebuild it
with other rules and give other ids. No code of a checkpoint is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparring.errors import CheckpointError
from sparring.models.files import read_json
from sparring.models.transformer import TransformerConfig


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder; raises CheckpointError where none can be read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_fast = (folder / "tokenizer.json").is_file()
    if not is_fast and not any(
        (folder / name).is_file()
        for name in ("tokenizer.model", "vocab.json", "tokenizer_config.json")
    ):
        raise CheckpointError(
            f"{folder.resolve()} holds no tokenizer; add its tokenizer.json and "
            "tokenizer_config.json"
        )
    try:
        if is_fast:
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (
        Exception
    ) as error:  # tokenizers raises plain Exception for a broken file; reported with its cause
        raise CheckpointError(
            f"the tokenizer in {folder.resolve()} cannot be read: {error}"
        ) from error


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer's files so that older transformers read them too."""
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    settings = read_json(file)
    for key in ("backend", "is_local", "local_files_only"):
        settings.pop(key, None)
    if (directory / "tokenizer.json").is_file():
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def end_token_ids(source: Path | Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion, ascending.

    They are gathered from generation_config.json and config.json of the folder `source` (or from
    one such mapping) and from the tokenizer. Raises CheckpointError where none of them names any.
    """
    found: set[int] = set()
    if isinstance(source, Path):
        files = [source / "generation_config.json", source / "config.json"]
        configs: list[Mapping[str, Any]] = [read_json(file) for file in files if file.is_file()]
    else:
        configs = [source]
    for config in configs:
        ids = config.get("eos_token_id")
        found.update([ids] if isinstance(ids, int) else ids or [])
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    if not found:
        raise CheckpointError(
            "no end token: neither generation_config.json nor config.json has eos_token_id, and "
            "the tokenizer names no "
            "eos_token, so no completion could ever end; set eos_token in tokenizer_config.json"
        )
    return tuple(sorted(found))


def check_vocabulary(tokenizer: Any, config: TransformerConfig) -> None:
    """Raise CheckpointError if the tokenizer knows ids beyond the model's embedding."""
    beyond = sorted(
        (index, token)
        for token, index in tokenizer.get_vocab().items()
        if index >= config.vocab_size
    )
    if beyond:
        shown = ", ".join(f"{token!r} = {index}" for index, token in beyond[:5])
        raise CheckpointError(
            f"the tokenizer has {len(beyond)} ids beyond the model's embedding of "
            f"{config.vocab_size} rows: {shown}"
            f"{', ...' if len(beyond) > 5 else ''}; use the tokenizer that belongs to this model"
        )
