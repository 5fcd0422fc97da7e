"""The sizes of the batches of a phase, which are stored as changes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import arguments

from fitloop import FitLoop, Phase
from fitloop._engine.loop_state import StateWriter

SIZES = st.lists(st.integers(0, 3), max_size=30)


def new_writer() -> StateWriter:
    return StateWriter(FitLoop(**arguments())._state.config, Phase.TRAIN, 1, lambda: None)


def write_batches(writer: StateWriter, sizes: list[int]) -> None:
    for size in sizes:
        writer.next_batch([torch.empty(size, 1)])
        writer.values.put(None)


@settings(deadline=None)  # the first trainer of a process takes long
@given(before=SIZES, after=SIZES)
def test_batch_sizes_when_exported_and_restored_in_the_middle_are_those_of_all_batches(
    before: list[int], after: list[int]
) -> None:
    first = new_writer()
    write_batches(first, before)
    assert first.state.batch_sizes == before
    assert first.samples == sum(before)
    exported: Any = first.export()
    assert exported["sizes"].tolist() == before
    second = new_writer()
    second.restore(exported)
    write_batches(second, after)
    assert second.state.batch_sizes == before + after
    assert second.state.batch_num == len(before + after)
    assert second.state.size == sum(before + after)


def test_batch_sizes_when_most_are_equal_then_take_little_memory() -> None:
    writer = new_writer()
    write_batches(writer, [3] * 1000 + [2])
    assert writer.state.batch_sizes == [3] * 1000 + [2]
    assert len(writer.state._sizes._sizes) == 2
