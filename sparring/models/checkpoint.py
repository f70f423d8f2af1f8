"""Model files in and out: safetensors under Hugging Face names, split and joined here and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.models.families import llama, mistral, qwen2, qwen3
from sparring.models.families.family import Family
from sparring.models.transformer import Decoder, TransformerConfig

FAMILIES: Mapping[str, Family] = {
    family.architecture: family for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}
"""Architecture, as config.json names it -> family."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds {type(loaded).__name__}, not a JSON object")
    return loaded


def family_of(hf: Mapping[str, Any]) -> Family:
    """The family that reads this config.json; raises CheckpointError naming the known ones."""
    architectures = list(hf.get("architectures") or [])
    by_type = {family.name: family for family in FAMILIES.values()}
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    if not architectures and hf.get("model_type") in by_type:
        return by_type[hf["model_type"]]
    named = ", ".join(architectures) or hf.get("model_type") or "nothing"
    known = ", ".join(f"{family.name} ({name})" for name, family in FAMILIES.items())
    raise CheckpointError(f"config.json names {named}, a family that is not supported; known: {known}")


def build_model(hf: Mapping[str, Any], *, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """A Decoder of a config.json's shape; its weights are not initialised."""
    return Decoder(family_of(hf).config(hf), device=device, dtype=dtype)


def weight_views(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model by its Hugging Face name, as views of the fused parameters."""
    family = {f.name: f for f in FAMILIES.values()}[model.config.family]
    parameters = dict(model.named_parameters())
    for template, names in family.weights.items():
        layers = range(model.config.num_layers) if "{}" in template else range(1)
        for layer in layers:
            parameter = parameters.get(template.format(layer))
            if parameter is None:
                continue
            pieces = _split(model, template.format(layer), parameter.detach(), len(names))
            for name, piece in zip(names, pieces, strict=True):
                yield name.format(layer), piece


def _split(model: Decoder, name: str, tensor: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [tensor]
    linear = model.get_submodule(".".join(name.split(".")[:3]))
    return [tensor[rows] for rows in linear.parts.values()]  # type: ignore[union-attr,operator]


def load_model(
    path: str | Path, *, dtype: str = "auto", device: torch.device | str = "cpu"
) -> Decoder:
    """Load a folder of safetensors."""
    from safetensors import safe_open

    folder = Path(path)
    hf = read_json(folder / "config.json")
    name = dtype if dtype != "auto" else str(hf.get("dtype") or hf.get("torch_dtype") or "float32")
    model = build_model(hf, device=device, dtype=DTYPES[name])
    index = folder / "model.safetensors.index.json"
    files = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    views = dict(weight_views(model))
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for key in tensors.keys():
                name = "model.embed_tokens.weight" if key == "lm_head.weight" and key not in views else key
                if name in views:
                    views.pop(name).copy_(tensors.get_tensor(key))
    if views:
        raise CheckpointError(f"{folder}: missing tensors: {', '.join(sorted(views))}")
    return model


def save_model(model: Decoder, directory: str | Path, *, dtype: str | None = None) -> None:
    """Write config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in weight_views(model)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(dict(model.config.source), indent=2))


__all__ = ["FAMILIES", "TransformerConfig", "build_model", "load_model", "save_model", "weight_views"]
