"""How finely and where a model's weights are kept, beside their quantisation: a value.

Tables of V rows in other forms than `Dense` are here too: the embedding on the host, and the output
head (with a tied embedding) in 8 bits. Formats of 8 bits are in kernels/int8.py.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparring.errors import CheckpointError
from sparring.kernels.embedding import host_rows
from sparring.kernels.int8 import Int8Matrix, dequantize_int8, quantize_int8
from sparring.models.linear import sample_of

HEADS = ("16bit", "8bit")
EMBEDDINGS = ("device", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """keep_16bit: matrices that quantization leaves as they are, each by the name of its kind
    ("down_proj") or by a Hugging Face module path, a layer's too ("model.layers.0",
    "model.layers.3.mlp.down_proj"). head: "16bit" or "8bit"; embedding: "device" or "host".

    Raises CheckpointError for another value.
    """

    keep_16bit: tuple[str, ...] = ()
    head: str = "16bit"
    embedding: str = "device"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("head", self.head, HEADS),
            ("embedding", self.embedding, EMBEDDINGS),
        ):
            if value not in known:
                raise CheckpointError(f"{name} is {value!r}; known: {', '.join(known)}")

    def keeps(self, module: str) -> bool:
        """Whether keep_16bit names this module (a Hugging Face path) or one that holds it."""
        return any(
            module == name or module.startswith(name + ".") or module.rsplit(".", 1)[-1] == name
            for name in self.keep_16bit
        )

    def check_names(self, modules: list[str]) -> None:
        """Raise CheckpointError for a name in keep_16bit that none of the modules answers to."""
        for name in self.keep_16bit:
            if not any(Storage(keep_16bit=(name,)).keeps(module) for module in modules):
                kinds = sorted({module.rsplit(".", 1)[-1] for module in modules})
                raise CheckpointError(
                    f"keep_16bit names {name!r}, which no matrix of this model answers to; known:"
                    f" {', '.join(kinds)}, or a path such as {modules[0] if modules else 'none'!r}"
                )


class HostTable(nn.Module):
    """The embedding [V, D] in page-locked host memory; frozen, and only its rows travel.

    Decoding inside CUDA graphs works too: see kernels/embedding.py.
    """

    def __init__(self, num_rows: int, width: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.empty(num_rows, width, dtype=dtype)
        _lock_pages(weight, self)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows [T, D] on the ids' device."""
        return host_rows(self.weight, ids_T)

    def sample(self) -> Tensor:
        """See `sample_of`."""
        return sample_of(self.weight)


def _lock_pages(tensor: Tensor, owner: nn.Module) -> None:
    """Page-lock a tensor's memory where it is, for the life of its owner (memory that torch itself
    page-locks is rounded up to a power of two).
    """
    runtime = torch.cuda.cudart()
    address = tensor.data_ptr()
    status = runtime.cudaHostRegister(address, tensor.numel() * tensor.element_size(), 0)
    if int(status):
        raise CheckpointError(
            f"the host memory of the embedding cannot be page-locked ({status}); raise the limit of"
            " locked memory (ulimit -l), or keep the embedding on the device"
        )
    ending = weakref.finalize(owner, runtime.cudaHostUnregister, address)
    ending.atexit = False


class EightBitTable(nn.Module):
    """A frozen table [V, D] in 8 bits by rows: the output head, and the embedding tied to it."""

    def __init__(
        self, num_rows: int, width: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.device, self.dtype = device, dtype
        self.shape = (num_rows, width)
        self._matrix: Int8Matrix | None = None
        self._sample: Tensor | None = None

    @property
    def table(self) -> Int8Matrix:
        """What products read."""
        assert self._matrix is not None, "the table is empty: fill it"
        return self._matrix

    def fill(self, weight: Tensor) -> None:
        """Quantise the rows [V, D], which may lie on the host, and keep them."""
        assert tuple(weight.shape) == self.shape, f"{tuple(weight.shape)}, not {self.shape}"
        self._matrix = quantize_int8(weight, device=self.device, dtype=self.dtype)
        self._sample = sample_of(weight)

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows [T, D] in the compute dtype."""
        table = self.table
        chosen = table.values.index_select(0, ids_T).float()
        return chosen.mul_(table.scale.index_select(0, ids_T)[:, None]).to(table.dtype)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """Decoded rows (all by default), newly made."""
        return dequantize_int8(self.table, rows=rows)

    def sample(self) -> Tensor:
        """See `sample_of`: numbers of the table as it was before."""
        assert self._sample is not None, "the table is empty: fill it"
        return self._sample
