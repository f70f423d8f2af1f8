"""Adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

What this project does not compute (DoRA, ranks per module, other PEFT methods ...) is refused by
name, never dropped. lora_dropout of a foreign file is a setting of its training, not of the
adapter, and has no counterpart here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.models.files import read_json
from sparring.models.linear import sample_of
from sparring.models.lora import PROJECTIONS, LoraConfig
from sparring.models.transformer import Decoder

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

ModuleNames = Mapping[tuple[str, str], str]
"""(path of a Linear in the Decoder, one of its parts) -> that matrix's module path in Hugging
Face's model.
"""

_PREFIX = "base_model.model."
_UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "peft_type",
    "peft_version",
    "task_type",
    "revision",
    "inference_mode",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "init_lora_weights",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    "eva_config",
    "ensure_weight_tying",
}
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def adapter_base(folder: Path) -> str:
    """What the adapter in a folder calls its base model: a Hub id or a folder."""
    base = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise CheckpointError(
            f"{folder / CONFIG_FILE} names no base_model_name_or_path; give the base model "
            "explicitly"
        )
    beside = folder / base
    return str(beside) if beside.is_dir() and not Path(base).is_dir() else base


def read_adapter_config(folder: Path) -> LoraConfig:
    """Rank, alpha and rslora of a PEFT adapter; CheckpointError for features not computed here."""
    file = folder / CONFIG_FILE
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {config.get('peft_type')!r}; only LORA adapters are read"
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"{file}: task_type is {config['task_type']!r}; only CAUSAL_LM adapters are read"
        )
    init = config.get("init_lora_weights")
    refused = [f"init_lora_weights={init!r}"] if init not in _HARMLESS_INITS else []
    for key, value in config.items():
        if key not in _UNDERSTOOD and value not in (None, False, "none", [], {}):
            refused.append(f"{key}={value!r}")
    if refused:
        raise CheckpointError(
            f"{file}: this adapter uses {', '.join(refused)}, which is not supported; supported: "
            "plain LoRA with r, lora_alpha, use_rslora and target_modules"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not isinstance(alpha, int | float):
        raise CheckpointError(
            f"{file}: r is {rank!r} and lora_alpha is {alpha!r}; both must be numbers"
        )
    return LoraConfig(rank=rank, alpha=float(alpha), rslora=bool(config.get("use_rslora", False)))


def load_adapter(
    model: Decoder, folder: Path, module_names: ModuleNames, *, name: str = "policy"
) -> None:
    """Put the adapter of a folder on the model, as `name`; the base is frozen.

    Raises CheckpointError where the adapter was made for another base, has other shapes, or uses
    what is not supported; the model is unchanged then.
    """
    config = read_adapter_config(folder)
    tensors, metadata = _read_tensors(folder)
    _check_base(model, metadata, folder)
    found = _targets(tensors, folder)
    config = LoraConfig(
        rank=config.rank, alpha=config.alpha, rslora=config.rslora, target_modules=found
    )
    expected = _expected_shapes(model, config, module_names)
    problems = [f"{key} is missing" for key in expected if key not in tensors]
    problems += [f"{key} is unexpected" for key in tensors if key not in expected]
    problems += [
        f"{key} is {list(tensors[key].shape)}, the base needs {list(shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (
            f"; ... ({len(problems)} in all)" if len(problems) > 4 else ""
        )
        raise CheckpointError(
            f"the adapter in {folder} does not fit this base ({model.config.family}, "
            f"{model.config.num_layers} layers, "
            f"width {model.config.width}): {shown}; give the base it was made for"
        )
    model.add_adapter(config, name=name)
    with torch.no_grad():
        for key, target in _adapter_views(model, name, module_names).items():
            target.copy_(tensors[key])
    model.refresh_shadows()


def write_adapter(
    model: Decoder,
    folder: Path,
    base_model_name_or_path: str,
    module_names: ModuleNames,
    *,
    name: str = "policy",
) -> None:
    """Write the adapter called `name` to a folder, in float32, so that PEFT loads it."""
    from safetensors.torch import save_file

    config = model.lora[name]
    folder.mkdir(parents=True, exist_ok=True)
    views = _adapter_views(model, name, module_names)
    tensors = {key: view.to("cpu", torch.float32, copy=True) for key, view in sorted(views.items())}
    metadata = {"format": "pt", "base_sample": json.dumps(_base_sample(model))}
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    targets = config.targets()
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": config.rank,
        "lora_alpha": alpha,
        "use_rslora": config.rslora,
        "target_modules": [target for target in PROJECTIONS if target in targets],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{folder} holds adapter_model.bin: pickled weights can run code while they are "
                "read and are refused; "
                "save the adapter again with PEFT's save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}")
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is cut off or not a safetensors file ({error}); copy it again"
        ) from error


def _targets(tensors: Mapping[str, Tensor], folder: Path) -> tuple[str, ...]:
    """Names of the adapted matrices, read off the tensors' names."""
    found = set()
    for key in tensors:
        module, _, kind = key.removeprefix(_PREFIX).rpartition(".lora_")
        last = module.rpartition(".")[2]
        if (
            not key.startswith(_PREFIX)
            or kind not in ("A.weight", "B.weight")
            or last not in PROJECTIONS
        ):
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: {key} belongs to no matrix that can be adapted here; "
                f"those are {', '.join(PROJECTIONS)} "
                "(embeddings and the output head carry no adapter)"
            )
        found.add(last)
    if not found:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} holds no tensors")
    return tuple(target for target in PROJECTIONS if target in found)


def _expected_shapes(
    model: Decoder, config: LoraConfig, module_names: ModuleNames
) -> dict[str, tuple[int, int]]:
    expected = {}
    targets = config.targets()
    for path, linear in model.linears().items():
        for part, rows in linear.parts.items():
            if part in targets:
                module = _PREFIX + module_names[path, part]
                expected[f"{module}.lora_A.weight"] = (
                    config.rank,
                    linear.base.shape[1],
                )
                expected[f"{module}.lora_B.weight"] = (
                    rows.stop - rows.start,
                    config.rank,
                )
    return expected


def _adapter_views(model: Decoder, name: str, module_names: ModuleNames) -> dict[str, Tensor]:
    """Every matrix of an adapter by its name in PEFT's files, as views of the parameters."""
    views = {}
    for path, adapter in model.adapter_modules(name).items():
        for part in adapter.parts:
            module = _PREFIX + module_names[path, part]
            views[f"{module}.lora_A.weight"], views[f"{module}.lora_B.weight"] = adapter.matrices(
                part
            )
    return views


@torch.no_grad()
def _base_sample(model: Decoder) -> list[float]:
    """A few of the base's numbers, by which another base of the same shape is told apart."""
    return [float(value) for value in torch.cat([model.embed.sample(), sample_of(model.norm)])]


def _check_base(model: Decoder, metadata: Mapping[str, str], folder: Path) -> None:
    """Compare the sample of the base that was stored with the adapter, if there is one."""
    if "base_sample" not in metadata:
        return
    theirs: Any = torch.tensor(json.loads(metadata["base_sample"]))
    ours = torch.tensor(_base_sample(model))
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=2**-6, atol=1e-5):
        raise CheckpointError(
            f"the adapter in {folder} was trained on a base with other weights "
            f"({adapter_base(folder)}); give that base"
        )
