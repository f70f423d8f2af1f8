"""What tests of chained launches share: products of some layers, and replays in turn or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WIDTH, INNER, QKV, LAYERS = 1536, 8960, 2048, 4
"""The 1.5B's products, four layers of them."""


def layers_and_rows(num_rows: int) -> tuple[list[tuple[Tensor, ...]], Tensor]:
    """([qkv, o, gate and up, down, the norm's weight] of each layer, x [T, WIDTH]) on the card."""
    torch.manual_seed(0)

    def filled(*shape: int, scale: float) -> Tensor:
        return (torch.randn(shape, device="cuda") * scale).to(torch.bfloat16)

    layers = [
        (
            filled(QKV, WIDTH, scale=0.03),
            filled(WIDTH, QKV, scale=0.03),
            filled(2 * INNER, WIDTH, scale=0.03),
            filled(WIDTH, INNER, scale=0.02),
            filled(WIDTH, scale=0.1) + 1,
        )
        for _ in range(LAYERS)
    ]
    return layers, filled(num_rows, WIDTH, scale=1.0)


def replays_that_differ(chain: Callable[..., Tensor], x: Tensor, replays: int = 1000) -> int:
    """How many replays of `chain(x, overlaps=...)` give other bits where its launches overlap, each
    with other numbers in x.
    """
    for overlaps in (False, True):
        chain(x, overlaps=overlaps)
    torch.cuda.synchronize()
    graphs, outs = [], []
    for overlaps in (False, True):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outs.append(chain(x, overlaps=overlaps))
    wrong = torch.zeros((), dtype=torch.int64, device=x.device)
    for _ in range(replays):
        x.normal_()
        for graph, out in zip(graphs, outs, strict=True):
            out.fill_(float("nan"))
            graph.replay()
        wrong += (outs[0] != outs[1]).any()
    return int(wrong)
