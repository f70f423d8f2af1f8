"""How many launches a captured graph holds, asked of the driver."""

from __future__ import annotations

import ctypes

import torch

from sparring.rollout.cuda_graph import context_bucket, row_bucket
from sparring.rollout.engine import Engine


class EdgeData(ctypes.Structure):
    """CUgraphEdgeData: `kind` 1 is a programmatic edge."""

    _fields_ = (
        ("from_port", ctypes.c_ubyte),
        ("to_port", ctypes.c_ubyte),
        ("kind", ctypes.c_ubyte),
        ("reserved", ctypes.c_ubyte * 5),
    )


def counted(graph: torch.cuda.CUDAGraph) -> dict[str, int]:
    """Nodes of a graph that was kept, and edges along which a launch may begin early."""
    cuda = ctypes.CDLL("libcuda.so.1")
    handle, number = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
    assert cuda.cuGraphGetNodes(handle, None, ctypes.byref(number)) == 0
    nodes = number.value
    edges = cuda.cuGraphGetEdges_v2
    assert edges(handle, None, None, None, ctypes.byref(number)) == 0
    first, second = (ctypes.c_void_p * number.value)(), (ctypes.c_void_p * number.value)()
    data = (EdgeData * number.value)()
    assert edges(handle, first, second, data, ctypes.byref(number)) == 0
    return {"nodes": nodes, "edges": number.value, "early edges": sum(e.kind == 1 for e in data)}


def launches_a_step(engine: Engine, num_rows: int, num_tokens: int) -> dict[str, int]:
    """What a decode step of an engine that has run and is awake launches, captured once more."""
    steps = engine._graph_steps
    assert steps is not None, "it has run"
    rows = row_bucket(num_rows, steps._max_rows)
    context = context_bucket(num_tokens, steps._max_tokens)
    steps.rows.idle()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.no_grad(), torch.cuda.graph(graph):
        steps._compute(rows, context)
    return counted(graph)
