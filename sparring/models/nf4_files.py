"""NF4 matrices in safetensors files, as bitsandbytes and transformers name and store them.

A matrix X is NF4 if and only if `X.weight.quant_state.bitsandbytes__nf4` is there; beside it lie
`X.weight` (packed bytes), `.absmax`, `.quant_map` and, with double quantisation, `.nested_absmax`
and `.nested_quant_map`. The state is a JSON object as bytes; the offset stands only there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparring.errors import CheckpointError
from sparring.kernels.nf4 import BLOCK, CODE, GROUP, NF4Matrix, dynamic_map

STATE = ".quant_state.bitsandbytes__nf4"
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def stored_as_nf4(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that bitsandbytes' NF4 was used."""
    settings = config.get("quantization_config")
    return (
        isinstance(settings, Mapping)
        and settings.get("quant_method") == "bitsandbytes"
        and bool(settings.get("load_in_4bit") or settings.get("_load_in_4bit"))
        and settings.get("bnb_4bit_quant_type") == "nf4"
    )


class Collector:
    """Gathers the tensors of NF4 matrices, which may lie in several files."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._found: dict[str, dict[str, Tensor]] = {}

    def add(self, name: str, tensor: Tensor) -> tuple[str, NF4Matrix] | None:
        """Take a tensor; (name of the weight, matrix) once the last one of a matrix is there."""
        suffix = next((s for s in SUFFIXES if name.endswith(s)), "")
        weight = name.removesuffix(suffix) if suffix else name
        parts = self._found.setdefault(weight, {})
        parts[suffix] = tensor
        if STATE not in parts:
            return None
        state = _state(parts[STATE], weight)
        needed = {"", ".absmax", ".quant_map", STATE}
        if "nested_offset" in state:
            needed |= {".nested_absmax", ".nested_quant_map"}
        if not needed <= set(parts):
            return None
        del self._found[weight]
        return weight, _matrix(weight, parts, state, self.device)

    def missing(self) -> list[str]:
        """Weights of which something did not come."""
        return sorted(self._found)


def _state(stored: Tensor, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(stored.tolist()))
    except ValueError as error:
        raise CheckpointError(f"{name}{STATE} is not JSON: {error}") from error
    known = {"quant_type": "nf4", "blocksize": BLOCK}
    if "nested_offset" in state:
        known |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
    for key, value in known.items():
        if state.get(key) != value:
            raise CheckpointError(f"{name}: {key} is {state.get(key)!r}; only {value!r} is read")
    if state.get("dtype") not in _DTYPES:
        raise CheckpointError(f"{name}: dtype is {state.get('dtype')!r}; known: {list(_DTYPES)}")
    return dict(state)


def _matrix(
    name: str, parts: Mapping[str, Tensor], state: Mapping[str, Any], device: torch.device
) -> NF4Matrix:
    rows, columns = state["shape"]
    packed = parts[""].contiguous().view(torch.uint8).reshape(-1)
    num_blocks = rows * columns // BLOCK
    is_double = "nested_offset" in state
    _expect(name, "packed bytes", packed.numel(), rows * columns // 2)
    _expect(name, "scales", parts[".absmax"].numel(), num_blocks)
    if not torch.equal(parts[".quant_map"], torch.tensor(CODE)):
        raise CheckpointError(f"{name}.quant_map holds other code values than NF4's")
    absmax2 = offset = None
    if is_double:
        absmax2 = parts[".nested_absmax"].float().to(device)
        _expect(name, "scale groups", absmax2.numel(), -(-num_blocks // GROUP))
        if not torch.equal(parts[".nested_quant_map"], dynamic_map()):
            raise CheckpointError(f"{name}.nested_quant_map holds other values than known")
        offset = torch.full_like(absmax2, float(state["nested_offset"]))
    return NF4Matrix(
        packed=packed.to(device),
        absmax=parts[".absmax"].to(device),
        absmax2=absmax2,
        offset=offset,
        shape=(rows, columns),
        dtype=_DTYPES[state["dtype"]],
    )


def _expect(name: str, what: str, got: int, wanted: int) -> None:
    if got != wanted:
        raise CheckpointError(f"{name} has {got} {what}; its shape asks for {wanted}")


def stored_tensors(name: str, matrix: NF4Matrix) -> dict[str, Tensor]:
    """What a file holds for one matrix whose weight is called `name`."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(matrix.dtype).removeprefix("torch."),
        "shape": list(matrix.shape),
    }
    tensors = {
        name: matrix.packed.reshape(-1, 1),
        name + ".absmax": matrix.absmax,
        name + ".quant_map": torch.tensor(CODE),
    }
    if matrix.absmax2 is not None and matrix.offset is not None:
        tensors[name + ".nested_absmax"] = matrix.absmax2
        tensors[name + ".nested_quant_map"] = dynamic_map()
        offset = float(matrix.offset[0])
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
    encoded = json.dumps(state).encode()
    tensors[name + STATE] = torch.tensor(list(encoded), dtype=torch.uint8)
    return tensors


def quantization_config(dtype: torch.dtype, *, is_double: bool, plain: list[str]) -> dict[str, Any]:
    """The entry of config.json; plain: names of modules that are not in NF4."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": is_double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": plain,
    }
