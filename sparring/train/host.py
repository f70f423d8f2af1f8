"""How fast this machine launches work: small models wait for the host, not for the card.

A fixed piece of work that no card has a part in stands for it: chains of autograd nodes on four
numbers of the CPU, forward and backward, which are Python, dispatch and autograd as the layers of a
model are. A processor's core that shares its units with a busy neighbour takes 1.6 times as long
for it, and for anything else, for seconds on end: so several threads try, which the system puts on
other cores, and the best counts. What neighbours cost on the average is in the plan's constants.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparring.errors import UserError
from sparring.train.cards import Card, find_card

NODES, CHAINS, TRIES, THREADS = 20, 10, 4, 6
REFERENCE_MICROSECONDS = 15.5
"""A node on the machines that the plan's seconds were measured on (benchmarks/plan_accuracy.py)."""


class _Scaled(torch.autograd.Function):
    """x y, with its gradient by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return x.mul(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return gradients[0].mul(y), None


def node_microseconds() -> float:
    """Microseconds of one autograd node there and back, the best of some tries; 0.1 s in all."""
    found: list[float] = []
    for _ in range(THREADS):  # one after the other
        thread = threading.Thread(target=lambda: found.append(_best_try()))
        thread.start()
        thread.join()
    return min(found) / CHAINS / NODES * 1e6


def _best_try() -> float:
    """Seconds of the chains, the best of some tries on the core where this thread is."""
    start, y = torch.ones(4, requires_grad=True), torch.ones(4)
    best = float("inf")
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(CHAINS):
            x = start
            for _ in range(NODES):
                x = _Scaled.apply(x, y)  # type: ignore[no-untyped-call]
            x.sum().backward()
        best = min(best, time.perf_counter() - began)
    return best


def own_card() -> Card | None:
    """This machine's card where the table has it, with this host's speed beside it."""
    if not torch.cuda.is_available():
        return None
    try:
        card = find_card(torch.cuda.get_device_name())
    except UserError:
        return None
    return replace(card, host=node_microseconds() / REFERENCE_MICROSECONDS)
