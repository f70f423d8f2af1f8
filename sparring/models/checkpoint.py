"""Models in and out: safetensors under Hugging Face names, split and joined here and nowhere else.

The door to every file of a model: what is passed as a path here may be a folder, a run directory,
an adapter folder or a Hub id. Formats are in files.py, PEFT's adapters in adapter_files.py, names
and shapes in families/.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.kernels import Capability, capability_of
from sparring.models import nf4_files
from sparring.models import tokenizer as tokenizers
from sparring.models.adapter_files import adapter_base, load_adapter, write_adapter
from sparring.models.families import llama, mistral, qwen2, qwen3
from sparring.models.families.family import Family
from sparring.models.files import (
    read_json,
    read_tensors,
    refuse_quantised,
    weight_files,
    write_tensors,
)
from sparring.models.filling import Places, fill
from sparring.models.hub import resolve
from sparring.models.linear import Linear
from sparring.models.memory import check_fits
from sparring.models.quantised import Quantised
from sparring.models.storage import EightBitTable, Storage
from sparring.models.transformer import Decoder

__all__ = [
    "DTYPES",
    "QUANTIZATIONS",
    "FAMILIES",
    "base_folder",
    "build_model",
    "check_vocabulary",
    "end_token_ids",
    "family_of",
    "load_adapter_onto",
    "load_model",
    "load_tokenizer",
    "model_config",
    "module_names",
    "resolve",
    "save_adapter",
    "save_model",
    "save_tokenizer",
    "weight_views",
]

FAMILIES: Mapping[str, Family] = {
    family.architecture: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
}
"""Architecture, as config.json names it -> family."""

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Names that `dtype` may have beside "auto"."""

QUANTIZATIONS = ("none", "nf4")
"""Values that `quantization` may have."""

NF4_BITS = 4127
"""Thousandths of a bit that a weight in NF4 takes, its scales included."""

MAX_SHARD_BYTES = 5_000_000_000

save_tokenizer = tokenizers.save_tokenizer
check_vocabulary = tokenizers.check_vocabulary


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that reads this config.json; raises CheckpointError naming the known ones."""
    architectures = [str(name) for name in config.get("architectures") or []]
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    by_name = {family.name: family for family in FAMILIES.values()}
    if not architectures and config.get("model_type") in by_name:
        return by_name[config["model_type"]]
    named = ", ".join(architectures) or config.get("model_type") or "no architecture"
    known = ", ".join(
        f"{family.name} ({architecture})" for architecture, family in FAMILIES.items()
    )
    raise CheckpointError(
        f"config.json names {named}, a family that is not supported; known families: {known}"
    )


def build_model(
    config: Mapping[str, Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype,
    is_quantised: bool = False,
    capability: Capability | None = None,
    storage: Storage | None = None,
) -> Decoder:
    """A Decoder of a config.json's shape, uninitialised (see Decoder.init_weights)."""
    return Decoder(
        family_of(config).config(config),
        device=device,
        dtype=dtype,
        is_quantised=is_quantised,
        capability=capability,
        storage=storage,
    )


def weight_views(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model by its Hugging Face name, as views of the fused parameters.

    Matrices in NF4 are left out: see `nf4_places`.
    """
    family = _family(model)
    parameters = dict(model.named_parameters())
    for template, hub_names in family.weights.items():
        for layer in range(model.config.num_layers if "{}" in template else 1):
            name = template.format(layer)
            parameter = parameters.get(name)
            if parameter is None:
                continue
            if len(hub_names) == 1:
                yield hub_names[0].format(layer), parameter.detach()
                continue
            linear = model.get_submodule(".".join(name.split(".")[:3]))
            assert isinstance(linear, Linear), "only linear layers are fused from several matrices"
            for hub_name, rows in zip(hub_names, linear.parts.values(), strict=True):
                yield hub_name.format(layer), parameter.detach()[rows]


def nf4_places(model: Decoder) -> dict[str, tuple[Quantised, int]]:
    """Hugging Face name of each matrix of a quantised model -> the weight it is a part of, and
    which part.
    """
    places = {}
    for path, linear in model.linears().items():
        if isinstance(linear.base, Quantised):
            root, layer, rest = path.split(".", 2)
            for index, name in enumerate(_family(model).weights[f"{root}.{{}}.{rest}.base.weight"]):
                places[name.format(layer)] = (linear.base, index)
    return places


def eight_bit_tables(model: Decoder) -> dict[str, EightBitTable]:
    """Hugging Face name of each table in 8 bits -> the table."""
    weights = _family(model).weights
    named = {"embed": model.embed} | ({} if model.head is model.embed else {"head": model.head})
    return {
        weights[f"{name}.weight"][0]: table
        for name, table in named.items()
        if isinstance(table, EightBitTable)
    }


def base_folder(path: str | Path) -> Path:
    """The folder with config.json and weights behind `path`; of an adapter, its base's."""
    folder = resolve(path)
    if (folder / "adapter_config.json").is_file() and not _holds_weights(folder):
        return base_folder(adapter_base(folder))
    return folder


def _holds_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def load_model(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    kv_bytes: int = 0,
    free: int | None = None,
    quantization: str = "none",
    capability: Capability | None = None,
    storage: Storage | None = None,
) -> Decoder:
    """Load a model, and an adapter where `path` is an adapter's folder or `adapter` names one.

    path, adapter: see `resolve`. dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or
    "float16". quantization: "none" or "nf4"; a checkpoint that is stored in NF4 is read as it is,
    whichever is given. kv_bytes: what the caller will need beside the weights; both must fit into
    `free` bytes (by default what is free on the device now). capability: what kernels may use,
    where it is to be less than the device can do; capability_for(75) makes any card compute as a T4
    does. storage: which matrices quantization leaves alone, and how head and embedding are kept. An
    adapter is loaded as "policy", ready for training. Raises CheckpointError for anything that
    cannot be read as it stands, MemoryBudgetError for a model that does not fit.
    """
    device = torch.device(device)
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise CheckpointError(f"quantization is {quantization!r}; known: {known}")
    folder = resolve(path)
    if (folder / "adapter_config.json").is_file() and not _holds_weights(folder):
        if adapter is not None:
            raise CheckpointError(
                f"{folder} is an adapter itself; give its base as the model and one adapter"
            )
        adapter, folder = folder, base_folder(folder)
    if adapter is not None:
        adapter = resolve(adapter, wanted="adapter")
    config = read_json(folder / "config.json")
    is_stored = nf4_files.stored_as_nf4(config)
    if not is_stored:
        refuse_quantised(config, str(folder.resolve()))
    is_quantised = is_stored or quantization == "nf4"
    family_of(config).config(config)
    files = weight_files(folder)
    capability, storage = capability or capability_of(device), storage or Storage()
    chosen = _choose_dtype(dtype, config, capability)
    _check_fits(config, chosen, device, kv_bytes, is_quantised, storage, free)
    model = build_model(
        config,
        device=device,
        dtype=chosen,
        is_quantised=is_quantised,
        capability=capability,
        storage=storage,
    )
    places = Places(dict(weight_views(model)), nf4_places(model), eight_bit_tables(model), storage)
    fill(places, read_tensors(files, with_nf4=is_stored), folder, device, is_stored=is_stored)
    if adapter is not None:
        load_adapter_onto(model, adapter)
    return model


def load_adapter_onto(model: Decoder, folder: str | Path, *, name: str = "policy") -> None:
    """Put the PEFT adapter of a folder on a model, as `name` ("reference" is frozen, others are
    trained).

    Raises CheckpointError, with the model unchanged, where the adapter does not fit or is not
    supported.
    """
    load_adapter(model, Path(folder), module_names(model), name=name)


def module_names(model: Decoder) -> dict[tuple[str, str], str]:
    """(path of a Linear, one of its parts) -> the path of that matrix's module in Hugging Face's
    model.
    """
    weights = _family(model).weights
    names = {}
    for path, linear in model.linears().items():
        root, layer, rest = path.split(".", 2)
        hub_names = weights[f"{root}.{{}}.{rest}.base.weight"]
        for part, hub_name in zip(linear.parts, hub_names, strict=True):
            names[path, part] = hub_name.format(layer).removesuffix(".weight")
    return names


def _family(model: Decoder) -> Family:
    return next(family for family in FAMILIES.values() if family.name == model.config.family)


def _check_fits(
    config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    kv_bytes: int,
    is_quantised: bool,
    storage: Storage,
    free: int | None = None,
) -> None:
    shape = build_model(
        config, device="meta", dtype=dtype, is_quantised=is_quantised, storage=storage
    )
    num_parameters = sum(parameter.numel() for parameter in shape.parameters())
    weight_bytes = num_parameters * dtype.itemsize
    if storage.embedding == "host" and device.type == "cuda":
        weight_bytes -= shape.config.vocab_size * shape.config.width * dtype.itemsize
    places = nf4_places(shape)
    storage.check_names([name.removesuffix(".weight") for name in places])
    for name, (weight, index) in places.items():
        num_weights = weight.part_rows[index] * weight.num_inputs
        num_parameters += num_weights
        is_kept = storage.keeps(name.removesuffix(".weight"))
        bits = 8000 * dtype.itemsize if is_kept else NF4_BITS
        weight_bytes += num_weights * bits // 8000
    for table in eight_bit_tables(shape).values():
        num_parameters += table.shape[0] * table.shape[1]
        weight_bytes += table.shape[0] * (table.shape[1] + 4)
    check_fits(
        num_parameters, dtype, device, kv_bytes=kv_bytes, weight_bytes=weight_bytes, free=free
    )


def _choose_dtype(name: str, config: Mapping[str, Any], capability: Capability) -> torch.dtype:
    if name == "auto":
        name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix(
            "torch."
        )
        name = "float32" if name == "float64" else name
    if name not in DTYPES:
        raise CheckpointError(f"dtype is {name!r}; known: auto, {', '.join(DTYPES)}")
    if DTYPES[name] not in capability.dtypes:
        raise CheckpointError(
            f"a card of compute capability {capability.arch / 10:.1f} has no {name} arithmetic; set"
            " dtype to float16"
        )
    return DTYPES[name]


def save_model(
    model: Decoder,
    directory: str | Path,
    *,
    dtype: str | None = None,
    end_ids: Sequence[int] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write config.json and the base weights (adapters left out) so that transformers loads them.

    dtype: of the files; None keeps the model's. end_ids: written to generation_config.json where
    given.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stored = model.dtype if dtype is None else DTYPES[dtype]
    tensors, packed, is_double = dict(weight_views(model)), set(), True
    tensors |= {name: table.dense() for name, table in eight_bit_tables(model).items()}
    skipped = ["lm_head"]
    for name, (weight, index) in nf4_places(model).items():
        part = weight.parts()[index]
        if isinstance(part, Tensor):
            tensors[name] = part
            skipped.append(name.removesuffix(".weight"))
        else:
            written = nf4_files.stored_tensors(name, part)
            is_double = is_double and part.absmax2 is not None
            packed |= set(written)
            tensors |= written
    write_tensors(
        tensors, folder, dtype=stored, as_they_are=packed, max_shard_bytes=max_shard_bytes
    )
    config = model_config(model)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = str(stored).removeprefix("torch.")
    if model.is_quantised:
        config["quantization_config"] = nf4_files.quantization_config(
            stored, is_double=is_double, plain=skipped
        )
    _write_json(folder / "config.json", config)
    if end_ids is not None:
        _write_json(folder / "generation_config.json", {"eos_token_id": list(end_ids)})


def model_config(model: Decoder) -> dict[str, Any]:
    """The config.json that goes with a model's weights."""
    family = _family(model)
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **model.config.source,
    }


def save_adapter(
    model: Decoder,
    directory: str | Path,
    base_model_name_or_path: str,
    *,
    name: str = "policy",
) -> None:
    """Write one adapter in PEFT's file format, in float32."""
    write_adapter(model, Path(directory), base_model_name_or_path, module_names(model), name=name)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(
        json.dumps(dict(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model, run directory, Hub id or adapter (its base's where it has none).

    A folder with nothing but a tokenizer will do. Raises CheckpointError where there is none.
    """
    folder = Path(path).expanduser()
    if not (folder / "tokenizer.json").is_file():
        folder = resolve(path)
        if not (folder / "tokenizer.json").is_file():
            folder = base_folder(folder)
    return tokenizers.load_tokenizer(folder)


def end_token_ids(source: str | Path | Mapping[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion, ascending: of generation_config.json, config.json and the
    tokenizer.

    source: a path as in `resolve`, or one such config. Raises CheckpointError where none names any.
    """
    if isinstance(source, Mapping):
        return tokenizers.end_token_ids(source, tokenizer)
    return tokenizers.end_token_ids(base_folder(source), tokenizer)
