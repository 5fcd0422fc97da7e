"""Memory that two processes share: here both sides are in one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fitloop._data.shared_slots import HAS_SLOTS, SPARE_SLOTS, SlotReader, SlotWriter

pytestmark = pytest.mark.skipif(not HAS_SLOTS, reason="the system has no such memory")


class Pair:
    """A writer and a reader."""

    def __init__(self) -> None:
        self.writer, self.reader = SlotWriter(), SlotReader()
        self.used: set[int] = set()

    def send(self, *values: bytes) -> list[Any]:
        """Return the values as the reader has them."""
        self.writer.release(self.reader.take_released())
        placement = self.writer.write([memoryview(value) for value in values])
        self.used.add(placement.slot)
        if placement.is_new:
            descriptor, self.writer.descriptor = self.writer.descriptor, -1
            self.reader.add(placement.slot, descriptor, placement.size)
        return self.reader.values(placement)


def test_values_when_the_last_is_gone_then_the_slot_is_used_again() -> None:
    pair = Pair()
    for number in range(5):
        first, second = pair.send(bytes([number]) * 100, b"second")
        assert bytes(first) == bytes([number]) * 100
        assert bytes(second) == b"second"
        del first, second
    assert len(pair.used) == 1


def test_values_when_one_is_kept_then_nothing_is_written_over_it() -> None:
    pair = Pair()
    kept = [torch.from_numpy(pair.send(bytes([number]) * 50)[0][10:]) for number in range(20)]
    assert [set(tensor.tolist()) for tensor in kept] == [{number} for number in range(20)]
    assert len(pair.used) == 20
    del kept
    for _ in range(3):
        pair.send(b"next")
    # Only some of the free slots are kept.
    assert len(pair.reader._slots) <= SPARE_SLOTS + 1


def test_slots_when_batches_grow_then_are_replaced_by_larger_ones() -> None:
    pair = Pair()
    for size in (10, 5000, 100_000, 7, 100_000):
        (value,) = pair.send(b"x" * size)
        assert len(value) == size
        del value
    assert len(pair.used) == 3
    assert len(pair.reader._slots) == 1


def test_value_when_written_to_then_changes() -> None:
    (value,) = Pair().send(b"abc")
    torch.from_numpy(value).add_(1)
    assert bytes(np.asarray(value)) == b"bcd"
