"""Votes of ranks that are threads here: all of them stop at one batch."""

from __future__ import annotations

import threading
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT
from torch import Tensor

from fitloop._ranks.control import SharedControl
from fitloop._ranks.votes import Votes
from fitloop._types import StopReason


class Meeting:
    """Largest values over some threads, without a network."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.rounds: dict[int, list[Tensor]] = {}
        self.lock = threading.Lock()


class FakeWorld:
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.is_first, self._meeting, self._round = rank, rank == 0, meeting, 0

    def post(self, numbers: Tensor) -> Any:
        with self._meeting.lock:
            self._meeting.rounds.setdefault(self._round, []).append(numbers.clone())
        number, self._round = self._round, self._round + 1
        return Work(self._meeting, number, numbers)


class Work:
    def __init__(self, meeting: Meeting, number: int, numbers: Tensor) -> None:
        self._meeting, self._number, self._numbers = meeting, number, numbers

    def wait(self) -> None:
        self._meeting.barrier.wait(HANG_TIMEOUT)
        self._numbers.copy_(torch.stack(self._meeting.rounds[self._number]).amax(dim=0))


wishes = st.dictionaries(st.integers(0, 2), st.integers(1, 12), min_size=1)


@given(wishes, wishes, st.floats(0.0, 0.1))
def test_wishes_when_at_any_batches_of_any_ranks_then_all_end_at_one_batch(
    stops: dict[int, int], cancels: dict[int, int], seconds: float
) -> None:
    meeting, ends = Meeting(3), {}

    def train(rank: int) -> None:
        control = SharedControl()
        ticks = iter(range(10**6))
        votes = Votes(FakeWorld(rank, meeting), control, lambda: next(ticks) * seconds)  # type: ignore[arg-type]
        batch = 0
        while not control.halted:
            batch += 1
            if stops.get(rank) == batch:
                control.stop(StopReason.STOPPED)
            if cancels.get(rank) == batch:
                control.cancel()
            votes.boundary()
            if batch % 40 == 0:
                votes.agree()
        ends[rank] = batch, control.stop_reason, control.cancelled

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_TIMEOUT)
    assert len(set(ends.values())) == 1
    batch, reason, cancelled = ends[0]
    assert batch > min(*stops.values(), *cancels.values())
    assert reason == ("cancelled" if cancelled else "stopped")
