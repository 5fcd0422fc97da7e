"""The sizes of the batches of a phase, which are kept where they change."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import arguments

from fitloop import FitLoop, LoopState
from fitloop._types import Phase

SIZES = st.lists(st.integers(0, 3), max_size=30)


def new_state() -> LoopState:
    return LoopState(FitLoop(**arguments())._state.config, Phase.TRAIN, 1, lambda: None)


def stepped(state: LoopState, sizes: list[int]) -> LoopState:
    for size in sizes:
        state._next([torch.empty(size, 1)])
        state._values.put(None)
    return state


@settings(deadline=None)  # the first trainer of a process takes long
@given(before=SIZES, after=SIZES)
def test_batch_sizes_when_exported_and_restored_in_the_middle_are_those_of_all_batches(
    before: list[int], after: list[int]
) -> None:
    first = stepped(new_state(), before)
    assert first.batch_sizes == before
    exported: Any = first._export()
    assert exported["sizes"].tolist() == before
    second = new_state()
    second._restore(exported)
    stepped(second, after)
    assert second.batch_sizes == before + after
    assert second.batch_num == len(before + after)
    assert second.size == sum(before + after)


def test_batch_sizes_when_most_are_alike_take_no_memory_of_their_own() -> None:
    state = stepped(new_state(), [3] * 1000 + [2])
    assert state.batch_sizes == [3] * 1000 + [2]
    assert len(state._sizes._values) == 2
