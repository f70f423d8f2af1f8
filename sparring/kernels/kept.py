"""Small tensors that a device keeps as long as the process lives: counters of arrivals, tables.

They are made at their first use, which must not fall where memory is lent to captured steps: there
a tensor would lie in the steps' own pool, on bytes that a step captured before writes at each
replay. So whoever captures makes all of them first (`make_kept`), and none is made while lent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

MAKERS: list[Callable[[torch.device], Tensor]] = []
"""Every function that `kept` decorates."""

_lenders: list[object] = []


def kept(make: Callable[[torch.device], Tensor]) -> Callable[[torch.device], Tensor]:
    """Decorator of a function that makes a tensor for a device: it is made once and stays."""

    @cache
    def made(device: torch.device) -> Tensor:
        assert not _lenders, f"{make.__name__}: `make_kept` comes before captures"
        return make(device)

    MAKERS.append(made)
    return made


def make_kept(device: torch.device) -> None:
    """Makes every kept tensor of a device that is not there yet."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for make in MAKERS:
        make(device)


@contextmanager
def lending() -> Iterator[None]:
    """Inside, memory belongs to captured steps: nothing that is kept is made."""
    lender = object()
    _lenders.append(lender)
    try:
        yield
    finally:
        _lenders.remove(lender)
