"""Copies of tensors in memory of their own, taken at one moment and kept for the next time.

Owns the buffers of a run's snapshots: training waits while they are filled, and goes on while
they are written. On CUDA they are pinned.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

from fitloop._storage.layout import Alias, Payload
from fitloop._storage.tensors import as_integers, memory_key, payload_of


class Staging:
    """Buffers by name; they are allocated at the first copy and reused as long as they fit."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor], steady: Container[str]) -> list[Payload | Alias]:
        """Copy ``tensors`` and return what to write; good until the next `copy`.

        Those named in ``steady`` do not change, so that they are written from where they are.

        Raises `LayoutError` for a tensor that cannot be kept.
        """
        found: list[tuple[str, Tensor, Tensor] | Alias] = []
        seen: dict[object, str] = {}
        sources: list[Tensor] = []
        targets: list[Tensor] = []
        for name, tensor in tensors.items():
            first = seen.setdefault(memory_key(tensor) or object(), name)
            if first != name:
                found.append(Alias(name, first))
                continue
            numbers = as_integers(name, tensor)
            if name not in steady:
                sources.append(numbers)
                numbers = self._buffer(name, numbers)
                targets.append(numbers)
            found.append((name, tensor, numbers))
        _copy_all(targets, sources)
        return [item if isinstance(item, Alias) else payload_of(*item) for item in found]

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    with torch.no_grad():
        if targets:
            torch._foreach_copy_(targets, sources, non_blocking=True)
    for device in {source.device for source in sources if source.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
