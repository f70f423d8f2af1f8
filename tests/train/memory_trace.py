"""The memory of a training pass, traced on tensors without data: what a GPU would allocate.

The real model code runs on "meta" tensors of real shapes that pass for a GPU's; kernels are not
launched. A tape of (number, bytes) comes out: bytes > 0 where an allocation is made, 0 where it is
given back. What library calls take inside themselves is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sparring.kernels import Capability

META = torch.device("meta")
CARD = Capability(arch=90, tensor_dots=True)
"""What the traced model is told that it runs on."""


class Tape(TorchDispatchMode):
    """Records every storage that an operation makes while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.names: dict[int, str] = {}
        self._known: dict[int, Any] = {}
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_iter((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._ignore(value)
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.device.type == "meta":
                self._meet(value, str(func))
        return out

    def _ignore(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _: self._known.pop(key, None))

    def _meet(self, tensor: torch.Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or not storage.nbytes():
            return
        number, self._next = self._next, self._next + 1
        self.events.append((number, storage.nbytes()))
        self.names[number] = f"{name} {tuple(tensor.shape)} {tensor.dtype}"

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.events.append((number, 0))

        self._known[key] = weakref.ref(storage, gone)

    def peak(self) -> tuple[int, dict[str, int]]:
        """Most bytes alive at once, and by name what was alive then."""
        sizes: dict[int, int] = {}
        total = most = 0
        alive: dict[int, int] = {}
        for number, size in self.events:
            if size:
                sizes[number] = size
                total += size
                if total > most:
                    most, alive = total, dict(sizes)
            else:
                total -= sizes.pop(number, 0)
        names: dict[str, int] = {}
        for number, size in alive.items():
            names[self.names[number]] = names.get(self.names[number], 0) + size
        return most, dict(sorted(names.items(), key=lambda item: -item[1]))


class Launches(TorchDispatchMode):
    """Counts what the host launches while it is entered: kernels, and library calls on data."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        is_made_up = any(word in name for word in ("view", "detach", "empty", "promote_types"))
        self.operations += not (func.is_view or is_made_up)
        return func(*args, **(kwargs or {}))

    def kernel(self, *_: Any, **__: Any) -> None:
        """Stands for a launch of a kernel."""
        self.kernels += 1


@contextmanager
def pretending(
    num_loss_rows: int, launch: Callable[..., None] = lambda *_, **__: None
) -> Iterator[None]:
    """While it lasts meta tensors are a GPU's, `launch` is called in a kernel's place, and masks
    have that many rows set.
    """
    from triton.runtime.jit import JITFunction

    from sparring.kernels import lora_rows
    from sparring.models.attention_shared import KernelPlan

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    patch.setattr(JITFunction, "run", launch)
    patch.setattr(KernelPlan, "serves", staticmethod(lambda *_: True))
    plain = torch.Tensor.nonzero
    patch.setattr(
        torch.Tensor,
        "nonzero",
        lambda x: x.new_empty((num_loss_rows, 1), dtype=torch.int64) if x.is_meta else plain(x),
    )
    wide = lora_rows._product

    def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if not left.is_meta:
            return wide(left, right, dtype)
        return left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)

    patch.setattr(lora_rows, "_product", product)
    try:
        yield
    finally:
        patch.undo()
