"""Pinned host memory that a forward pass leaves tensors in and its backward pass takes them from.

Copies run on a stream of their own: out while later layers compute, back one layer ahead of the one
that is wanted. So at most two layers' tensors are on the card on their way out and two on their way
back; the last layer's never leave. The host's buffers are kept and used again.

PCIe and layer times: a copy is hidden where 2 D bytes a token and tensor move faster than a layer
computes, on all cards that train such models at some thousand tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


class HostMemory:
    """The buffers and the stream; one a model."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._free: list[Tensor] = []

    def begin(self, num_layers: int) -> Trip:
        """What one forward pass and its backward pass share."""
        return Trip(self, num_layers)

    def borrow(self, num_bytes: int) -> Tensor:
        """A pinned buffer of at least num_bytes: the smallest that fits, or a new one in place of
        one that is too small.
        """
        fitting = [buffer for buffer in self._free if len(buffer) >= num_bytes]
        chosen = min(fitting, key=len) if fitting else max(self._free, key=len, default=None)
        self._free = [buffer for buffer in self._free if buffer is not chosen]
        if chosen is None or not fitting:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return chosen

    def give_back(self, buffer: Tensor) -> None:
        """For later use; copies from it that were begun before are on the same stream."""
        self._free.append(buffer)


class Trip:
    """Tensors of one forward pass by layer; taken once each, last layer first."""

    def __init__(self, host: HostMemory, num_layers: int) -> None:
        self._host, self._last = host, num_layers - 1
        self._here: dict[int, Tensors] = {}
        self._there: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._leaving: list[tuple[Tensors, torch.cuda.Event]] = []
        self._arriving: dict[int, torch.cuda.Event] = {}

    def put(self, layer: int, tensors: Tensors) -> None:
        """Keep a layer's tensors; they must not be written to afterwards."""
        if layer == self._last:
            self._here[layer] = tensors
            return
        stream = self._host.stream
        here = torch.cuda.current_stream()
        while len(self._leaving) > 1:  # two on their way; an earlier one may die once it has left
            here.wait_event(self._leaving.pop(0)[1])
        stream.wait_stream(here)
        pairs = []
        with torch.cuda.stream(stream):
            for tensor in tensors:
                assert tensor.is_contiguous(), "layers keep whole tensors"
                num_bytes = tensor.numel() * tensor.element_size()
                buffer = self._host.borrow(num_bytes)
                copy = buffer[:num_bytes].view(tensor.dtype).view(tensor.shape)
                copy.copy_(tensor, non_blocking=True)
                pairs.append((buffer, copy))
            self._leaving.append((tensors, stream.record_event()))
        self._there[layer] = pairs

    def take(self, layer: int) -> Tensors:
        """A layer's tensors, and the layer before it sent for."""
        if self._leaving:
            here = torch.cuda.current_stream()
            for _, event in self._leaving:
                here.wait_event(event)
            self._leaving.clear()
        self._send_for(layer)
        if layer in self._arriving:
            torch.cuda.current_stream().wait_event(self._arriving.pop(layer))
        found = self._here.pop(layer)
        self._send_for(layer - 1)
        return found

    def _send_for(self, layer: int) -> None:
        pairs = self._there.pop(layer, None)
        if pairs is None:
            return
        stream = self._host.stream
        arrived = tuple(torch.empty_like(copy, device=stream.device) for _, copy in pairs)
        # the room may have been another tensor's until now
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for tensor, (buffer, copy) in zip(arrived, pairs, strict=True):
                tensor.copy_(copy, non_blocking=True)
                self._host.give_back(buffer)
            self._arriving[layer] = stream.record_event()
        self._here[layer] = arrived
