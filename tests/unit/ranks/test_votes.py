"""Votes of ranks that are threads here: all of them stop at one batch."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT
from torch import Tensor

from fitloop._ranks.votes import LEAST_SECONDS, SharedControl, Votes
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
        self.size = meeting.barrier.parties

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


class SlowWorld:
    """Ranks whose votes last long, on a clock of their own. A message of a ring takes 0.1 ms."""

    is_first = True

    def __init__(self, ranks: int) -> None:
        self.size, self.seconds, self.latency, self.votes = ranks, 0.0, 2 * (ranks - 1) * 1e-4, 0

    def post(self, _numbers: Tensor) -> SlowWork:
        self.seconds += 2e-5
        self.votes += 1
        return SlowWork(self)


class SlowWork:
    def __init__(self, world: SlowWorld) -> None:
        self._world, self._ends = world, world.seconds + world.latency

    def wait(self) -> None:
        self._world.seconds = max(self._world.seconds, self._ends)


@pytest.mark.parametrize("ranks", [2, 100, 1000])
def test_votes_when_of_many_ranks_then_cost_little_and_ends_come_soon(ranks: int) -> None:
    """Simulate 20,000 batches of 5 ms; then a rank wishes a stop."""
    world, control, batch = SlowWorld(ranks), SharedControl(), 5e-3
    votes = Votes(world, control, lambda: world.seconds)  # type: ignore[arg-type]
    batches = 20_000
    for _ in range(batches):
        world.seconds += batch
        votes.boundary()
    assert world.seconds / (batches * batch) < 1.02
    control.stop()
    batches = 0
    while not control.halted:
        world.seconds += batch
        votes.boundary()
        batches += 1
    assert batches * batch < 2.1 * max(world.latency, LEAST_SECONDS)
