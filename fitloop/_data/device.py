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

import copy
from collections import UserDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fitloop._data.fields import field_names

_SEQUENCES = frozenset((list, tuple))


def map_tensors(item: Any, change: Callable[[Any], Any]) -> Any:
    """Return ``item`` with ``change`` applied to its tensors, and to objects with ``.to``.

    Tuples, lists, mappings, and objects with declared fields, such as dataclasses, keep their
    type. Other objects stay as they are. ``item`` itself is not changed.
    """
    if isinstance(item, (Tensor, PackedSequence)):
        return change(item)
    kind = type(item)
    if kind is tuple or kind is list:
        return kind([map_tensors(element, change) for element in item])
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return kind(*(map_tensors(element, change) for element in item))
    if isinstance(item, (tuple, list)):
        return kind([map_tensors(element, change) for element in item])
    if kind is dict:
        return {key: map_tensors(element, change) for key, element in item.items()}
    if isinstance(item, Mapping):
        return _map_mapping(item, change)
    if callable(getattr(item, "to", None)):
        item = change(item)
    names = field_names(item)
    return _map_fields(item, names, change) if names else item


def _map_mapping(item: Mapping[Any, Any], change: Callable[[Any], Any]) -> Any:
    moved = {key: map_tensors(element, change) for key, element in item.items()}
    if isinstance(item, (dict, UserDict)):
        # A subclass may have any constructor. Its copy has a dict of its own.
        copied = copy.copy(item)
        for key, element in moved.items():
            copied[key] = element
        return copied
    # The copy of another mapping may share its values with the original.
    try:
        twin: Mapping[Any, Any] = type(item)(moved)  # type: ignore[call-arg]
        if twin.keys() == moved.keys():
            return twin
    except Exception:
        pass
    return moved


def _map_fields(item: Any, names: list[str], change: Callable[[Any], Any]) -> Any:
    values = {name: getattr(item, name) for name in names}
    moved = {name: map_tensors(value, change) for name, value in values.items()}
    twin = copy.copy(item)
    for name, value in moved.items():
        if value is not values[name]:
            object.__setattr__(twin, name, value)  # also if the class is frozen
    return twin


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
        self._targets: dict[torch.dtype, torch.dtype] = {}
        """dtype on the device for each dtype seen so far"""
        self._unchanged: set[torch.dtype] = set()
        """dtypes that stay the same"""
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
            moved = self._map(batch, self._move_pinned)
            events = [self._copy_stream.record_event()]
        if self._has_device_tensors:  # this thread made them, or the event loop's (async loaders)
            events.append(torch.cuda.current_stream(self._device).record_event())
            events.append(torch.cuda.default_stream(self._device).record_event())
        return _PendingCopy(moved, events)

    def move(self, batch: Any) -> Any:
        """Return ``batch`` moved and cast, ready at once, as in a hand-written loop."""
        return self._map(batch, self._move)

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

    def _map(self, batch: Any, change: Callable[[Any], Any]) -> Any:
        kind = type(batch)
        if kind is list or kind is tuple:  # the usual (inputs, targets), without recursion
            parts = [change(p) if type(p) is Tensor else map_tensors(p, change) for p in batch]
            return parts if kind is list else tuple(parts)
        return map_tensors(batch, change)

    def _target(self, dtype: torch.dtype) -> torch.dtype:
        if not self._cast or dtype is torch.bool or dtype.is_complex:
            target = dtype
        else:
            target = self._dtype if dtype.is_floating_point else torch.long
        self._targets[dtype] = target
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
        target = self._targets.get(dtype) or self._target(dtype)
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
        target = self._targets.get(item.dtype) or self._target(item.dtype)
        # Cast after the copy, since the narrow dtype has fewer bytes.
        return moved if target is item.dtype else moved.to(target)
