"""Safetensors files: which ones make up a checkpoint, streaming them in, and writing them in
shards.

Formats that are not plain safetensors weights are refused here by name. No model shape is known
here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.models import nf4_files

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LazyTensor:
    """A tensor that is made when its shard is written, and let go with it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    def detach(self) -> Tensor:
        """The tensor itself."""
        return self.make().detach()


_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_QUANTISED_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or another compressed format",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes 4-bit",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    "_blocks": "MXFP4",
}
_QUANTISED_REMEDY = "give the unquantised model (float32, bfloat16 or float16)"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError where there is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.resolve()} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.resolve()} cannot be read as JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path.resolve()} holds a {type(loaded).__name__}, not a JSON object"
        )
    return loaded


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError if config.json says that the weights are stored quantised."""
    settings = config.get("quantization_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        named = {
            "awq": "AWQ",
            "gptq": "GPTQ",
            "fp8": "FP8",
            "bitsandbytes": "bitsandbytes",
            "mxfp4": "MXFP4",
        }.get(str(method), str(method or "an unnamed quantisation"))
        raise CheckpointError(
            f"{where} is quantised ({named}), which cannot be read; {_QUANTISED_REMEDY}"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint; raises CheckpointError if any is missing."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if not names or not all(
            isinstance(name, str) and Path(name).name == name for name in names
        ):
            raise CheckpointError(f"{index.resolve()} has no usable weight_map; download it again")
    else:
        names = _unindexed_names(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder.resolve()}: {len(missing)} of {len(names)} shards are missing: "
            f"{_listing(missing)}; download them again"
        )
    return [folder / name for name in names]


def _unindexed_names(folder: Path) -> list[str]:
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    shards = [match for file in sorted(folder.iterdir()) if (match := _SHARD.fullmatch(file.name))]
    if shards:
        digits, total = len(shards[0][2]), shards[0][2]
        return [
            f"model-{number:0{digits}d}-of-{total}.safetensors"
            for number in range(1, int(total) + 1)
        ]
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder.resolve()} holds GGUF files, which are for llama.cpp; give the model they "
            "were made from, in safetensors"
        )
    pickled = sorted(
        file.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt")
        for file in folder.glob(pattern)
    )
    if pickled:
        raise CheckpointError(
            f"{folder.resolve()} holds pickled weights ({_listing(pickled)}): reading them can run "
            "code, so they are "
            "refused; convert them in a safe place with transformers' from_pretrained and "
            "save_pretrained"
        )
    raise CheckpointError(f"{folder.resolve()} holds no model.safetensors and no {INDEX}")


def read_tensors(files: Iterable[Path], *, with_nf4: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, one by one; CheckpointError for a broken or quantised one.

    with_nf4: the tensors of NF4 matrices are handed out as they are stored.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                for name in names:
                    dtype = str(tensors.get_slice(name).get_dtype())
                    if not (with_nf4 and (dtype == "U8" or name.endswith(nf4_files.SUFFIXES))):
                        refuse_quantised_tensor(name, dtype, file)
                for name in names:
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.resolve()} is cut off or not a safetensors file ({error}); download it "
                "again"
            ) from error


def refuse_quantised_tensor(name: str, dtype: str, file: Path) -> None:
    """Raise CheckpointError if a tensor's name or type shows a quantised weight."""
    for suffix, kind in _QUANTISED_SUFFIXES.items():
        if name.endswith(suffix):
            raise CheckpointError(
                f"{file.resolve()}: {name} shows a {kind} checkpoint, which cannot be read; "
                f"{_QUANTISED_REMEDY}"
            )
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise CheckpointError(
            f"{file.resolve()}: {name} is stored as {dtype}; F64, F32, F16 and BF16 are read; "
            f"{_QUANTISED_REMEDY}"
        )


def write_tensors(
    tensors: Mapping[str, Tensor | LazyTensor],
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    as_they_are: Collection[str] = (),
    max_shard_bytes: int,
) -> None:
    """Write model.safetensors, or shards of at most `max_shard_bytes` with their index, in `dtype`
    or as it is.

    as_they_are: names whose tensors keep their own dtype. A tensor is copied (to the CPU, in the
    dtype asked for) only while its own shard is written.
    """
    from safetensors.torch import save_file

    def stored(name: str) -> torch.dtype:
        return tensors[name].dtype if dtype is None or name in as_they_are else dtype

    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * stored(name).itemsize
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        contents = {
            name: tensors[name].detach().to("cpu", stored(name), copy=True) for name in names
        }
        save_file(contents, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _listing(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (
        f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    )
