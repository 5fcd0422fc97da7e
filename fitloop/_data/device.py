"""Moves batches to the device and casts them, in the structure that the loader gave.

A transfer has two halves, because one thread may move a batch that another thread uses:
`DeviceTransfer.start` starts the copies, `DeviceTransfer.finish` makes them safe to use.

On CUDA the copies run on a separate stream, from pinned memory, without blocking either thread.
The step's stream waits for the copy on the device, and each tensor is recorded on the step's
stream, so that the allocator does not give its memory to the next copy while the step still reads
it (see ``torch.Tensor.record_stream``). Tensors that the loader made on the device are cast by the
step's stream, after the stream that made them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fitloop._data.structure import map_tensors

_SEQUENCES = frozenset((list, tuple))


def _moved_object(item: Any, device: torch.device) -> Any:
    """Return an object that its own ``.to`` has moved.

    An object whose ``.to`` raises an error stays as it is if it holds no tensors: the method may
    have another meaning, such as a conversion of units.
    """
    try:
        moved = item.to(device)
    except Exception:
        if _holds_tensors(item):
            raise
        return item
    return item if moved is None else moved  # it may move in place


def _holds_tensors(item: Any) -> bool:
    slots = (name for kind in type(item).__mro__ for name in getattr(kind, "__slots__", ()))
    values = [*getattr(item, "__dict__", {}).values(), *(getattr(item, n, None) for n in slots)]
    for value in values:
        inner = value.values() if isinstance(value, Mapping) else value
        elements = inner if isinstance(inner, Collection) and not isinstance(inner, Tensor) else ()
        if isinstance(value, Tensor) or any(isinstance(each, Tensor) for each in elements):
            return True
    return False


class _PendingCopy(NamedTuple):
    """A batch that is being copied, and the events that end its copies."""

    batch: Any
    events: list[torch.cuda.Event]


class DeviceTransfer:
    """Moves batches to a device; floating tensors become ``dtype``, integer ones long.

    Bool and complex tensors keep their dtype. With ``cast=False`` tensors are only moved.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, *, cast: bool = True) -> None:
        self._device = device
        self._dtype = dtype
        self._cast = cast
        self._unchanged: set[torch.dtype] = set()
        """dtypes seen so far that stay the same"""
        self._has_device_tensors = False
        """whether the batch may have tensors that another stream made on the device"""
        on_cuda = device.type == "cuda"
        self._on_cpu = device.type == "cpu"
        self._copy_stream = torch.cuda.Stream(device) if on_cuda else None  # type: ignore[no-untyped-call]

    @property
    def is_async(self) -> bool:
        """Whether `start` only starts the copies, so that `finish` is needed."""
        return self._copy_stream is not None

    def start(self, batch: Any) -> Any:
        """Start moving ``batch``; any thread, one at a time."""
        kind = type(batch)
        if self._on_cpu and kind in _SEQUENCES:
            # A fast path for the usual (inputs, targets), since most batches need no change.
            unchanged = self._unchanged
            for tensor in batch:
                if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype not in unchanged:
                    break
            else:
                return batch if kind is tuple else batch.copy()  # the step may change a list
        if self._copy_stream is None:
            return self.move(batch)
        self._has_device_tensors = False
        with torch.cuda.stream(self._copy_stream):
            moved = map_tensors(batch, self._move_pinned)
            events = [self._copy_stream.record_event()]
        if self._has_device_tensors:  # this thread made them, or the event loop's (async loaders)
            events.append(torch.cuda.current_stream(self._device).record_event())
            events.append(torch.cuda.default_stream(self._device).record_event())
        return _PendingCopy(moved, events)

    def move(self, batch: Any) -> Any:
        """Return ``batch`` moved and cast, ready at once, as in a hand-written loop."""
        return map_tensors(batch, self._move)

    def finish(self, pending: Any) -> Any:
        """Return the batch of a result of `start`, ready for the calling thread's stream."""
        if self._copy_stream is None:
            return pending
        consumer = torch.cuda.current_stream(self._device)
        for event in pending.events:
            consumer.wait_event(event)

        def record(item: Any) -> Any:
            data = item.data if isinstance(item, PackedSequence) else item
            if not isinstance(data, Tensor):
                return item
            if data.is_cuda and data.get_device() == consumer.device_index:
                data.record_stream(consumer)
            return self._move(item)  # moves and casts tensors that the loader made on a device

        return map_tensors(pending.batch, record)

    def _target(self, dtype: torch.dtype) -> torch.dtype:
        if not self._cast or dtype is torch.bool or dtype.is_complex:
            target = dtype
        else:
            target = self._dtype if dtype.is_floating_point else torch.long
        if target is dtype:
            self._unchanged.add(dtype)
        return target

    def _move(self, item: Any) -> Any:
        if isinstance(item, PackedSequence):
            target = self._target(item.data.dtype)
            return item.to(device=self._device, dtype=target)  # type: ignore[call-arg]
        if not isinstance(item, Tensor):
            return _moved_object(item, self._device)
        dtype = item.dtype
        target = self._target(dtype)
        # is_cpu is a flag; comparing devices makes objects.
        if target is dtype and (item.is_cpu if self._on_cpu else item.device == self._device):
            return item
        if item.is_cpu and not self._on_cpu and dtype is torch.float64:
            item = item.to(target)  # some devices, such as MPS, have no float64
        return item.to(device=self._device, dtype=target)

    def _move_pinned(self, item: Any) -> Any:
        data = item.data if isinstance(item, PackedSequence) else item
        if not isinstance(data, Tensor) or not data.is_cpu:
            self._has_device_tensors = True
            return item if isinstance(data, Tensor) else self._move(item)
        if data is not item:
            return self._move(item)
        pinned = item if item.is_pinned() else item.pin_memory()
        moved = pinned.to(self._device, non_blocking=True)
        target = self._target(item.dtype)
        # Cast after the copy, since the narrow dtype has fewer bytes.
        return moved if target is item.dtype else moved.to(target)
