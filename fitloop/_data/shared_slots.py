"""Memory that two processes share, for the values of the batches that one sends to the other.

A *slot* is a block of memory that both have mapped. The sender writes the values of one batch into
a free slot. The arrays and tensors of the receiver lie in the slot itself, without a copy; when the
last of them is gone, the slot is free again. If the receiver keeps its batches, the sender makes
more slots.

The memory has no name (``memfd_create``): the system frees it with the last process that uses it,
however that ends. Where the system has no such memory, values go over the pipe.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

HAS_SLOTS = hasattr(os, "memfd_create") and os.path.exists("/proc/self/fd")
ALIGNMENT = 64
"""bytes; as in torch's own allocator on the CPU"""
SPARE_SLOTS = 4
"""free slots that are kept; more are there only after the receiver has kept batches"""


class Placement(NamedTuple):
    """Where the values of a batch are."""

    slot: int
    size: int
    """bytes of the slot"""
    is_new: bool
    """the slot is new to the receiver, and its file descriptor follows the message"""
    ranges: list[tuple[int, int]]
    """first and last byte (exclusive) of each value"""
    dropped: list[int]
    """slots that the sender has given up"""


def _map(descriptor: int, size: int) -> Tensor:
    # `mmap.mmap` would keep a descriptor open for each slot.
    path = f"/proc/self/fd/{descriptor}"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class SlotWriter:
    """The sender's side."""

    def __init__(self) -> None:
        self._slots: dict[int, Tensor] = {}
        self._free: list[int] = []
        self._last = 0
        self.descriptor = -1
        """file descriptor of the new slot of the last `write`, until `close_descriptor`"""

    def release(self, slots: Iterable[int]) -> None:
        """Note that the receiver has no value in these slots any more."""
        self._free += slots

    def close_descriptor(self) -> None:
        """Close the descriptor of a new slot, after it was sent."""
        os.close(self.descriptor)
        self.descriptor = -1

    def write(self, values: Sequence[Any]) -> Placement:
        """Write the values of a batch into a free slot, or into a new one.

        Raises OSError if there is no memory for it.
        """
        ranges, end = list[tuple[int, int]](), 0
        for value in values:
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            end = begin + value.nbytes
            ranges.append((begin, end))
        slot, dropped = self._free_slot(end)
        is_new = slot is None
        if slot is None:
            slot = self._new_slot(end)
        memory = self._slots[slot].numpy()
        for value, (begin, end) in zip(values, ranges, strict=True):
            memory[begin:end] = np.frombuffer(value, np.uint8)
        return Placement(slot, len(memory), is_new, ranges, dropped)

    def _free_slot(self, size: int) -> tuple[int | None, list[int]]:
        """Take a free slot of at least this size; also give up slots that are not needed."""
        slots, free, dropped = self._slots, self._free, list[int]()
        fitting = [slot for slot in free if len(slots[slot]) >= size]
        chosen = fitting[0] if fitting else None
        if chosen is not None:
            free.remove(chosen)
        elif free:
            dropped.append(free.pop(0))  # a larger one takes its place
        while len(free) > SPARE_SLOTS:
            dropped.append(free.pop())
        for slot in dropped:
            del slots[slot]
        return chosen, dropped

    def _new_slot(self, size: int) -> int:
        # Somewhat larger, since the next batch may be; and not empty, if all arrays are.
        size = -(-max(size + size // 8, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.descriptor = os.memfd_create("fitloop batches")
        try:
            os.posix_fallocate(self.descriptor, 0, size)  # an error now, instead of SIGBUS later
            memory = _map(self.descriptor, size)
        except BaseException:
            os.close(self.descriptor)
            raise
        self._last += 1
        self._slots[self._last] = memory
        return self._last


class SlotReader:
    """The receiver's side."""

    def __init__(self) -> None:
        self._slots: dict[int, Tensor] = {}
        self._uses: dict[int, Any] = {}
        """slot -> weak reference to the array under all values in it"""
        self._released: deque[int] = deque()

    def add(self, slot: int, descriptor: int, size: int) -> None:
        """Map a new slot, and close the descriptor."""
        try:
            self._slots[slot] = _map(descriptor, size)
        finally:
            os.close(descriptor)

    def values(self, placement: Placement) -> list[Any]:
        """Return the values of a batch as arrays of bytes, which lie in its slot."""
        for slot in placement.dropped:
            del self._slots[slot], self._uses[slot]
        slot, released = placement.slot, self._released
        memory = self._slots[slot].numpy()  # a new array, which lives as long as the values
        # Any thread, or the garbage collector, may drop the last value: no lock, no message.
        self._uses[slot] = weakref.ref(memory, lambda _: released.append(slot))
        return [memory[begin:end] for begin, end in placement.ranges]

    def take_released(self) -> list[int]:
        """Return the slots that have become free since the last call."""
        released = self._released
        return [released.popleft() for _ in range(len(released))]
