"""A model with its adapter merged into its matrices, as plain safetensors.

W' = W + scale B A, added in float32 and rounded once to the dtype of the files. A matrix in NF4 is
merged as it is decoded, which is what the adapter was trained beside. Nothing is quantised here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparring.models import checkpoint
from sparring.models.files import LazyTensor, write_tensors
from sparring.models.linear import Linear
from sparring.models.lora import LoraAdapter
from sparring.models.transformer import Decoder


def save_merged(
    model: Decoder,
    directory: str | Path,
    *,
    dtype: str = "bfloat16",
    adapter: str = "policy",
    end_ids: Sequence[int] | None = None,
    max_shard_bytes: int = checkpoint.MAX_SHARD_BYTES,
) -> None:
    """Write config.json and whole weights that transformers, vLLM and llama.cpp's converter read.

    dtype: of the files. adapter: which one; a model without it is written as it stands. end_ids: as
    in `save_model`. One shard of merged matrices is in memory at a time.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stored = checkpoint.DTYPES[dtype]
    names, adapters = checkpoint.module_names(model), model.adapter_modules(adapter)
    tensors: dict[str, Tensor | LazyTensor] = dict(checkpoint.weight_views(model))
    for path, linear in model.linears().items():
        for part, rows in linear.parts.items():
            name = f"{names[path, part]}.weight"
            tensors[name] = LazyTensor(
                shape=(rows.stop - rows.start, linear.base.shape[1]),
                dtype=stored,
                make=_Merge(linear, part, adapters.get(path), stored),
            )
    write_tensors(tensors, folder, dtype=stored, max_shard_bytes=max_shard_bytes)
    config = checkpoint.model_config(model)
    config.pop("quantization_config", None)
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    config[key] = dtype
    _write(folder / "config.json", config)
    if end_ids is not None:
        _write(folder / "generation_config.json", {"eos_token_id": list(end_ids)})


class _Merge:
    """One matrix [O, I], made when it is written."""

    def __init__(
        self, linear: Linear, part: str, adapter: LoraAdapter | None, dtype: torch.dtype
    ) -> None:
        self._linear, self._part, self._adapter, self._dtype = linear, part, adapter, dtype

    @torch.no_grad()
    def __call__(self) -> Tensor:
        linear = self._linear
        weight = linear.base.dense(linear.parts[self._part])
        if self._adapter is not None and self._part in self._adapter.parts:
            a, b = self._adapter.matrices(self._part)
            weight = weight.float() + self._adapter.scale * (b @ a)
        return weight.to(self._dtype)


def _write(file: Path, content: object) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")
