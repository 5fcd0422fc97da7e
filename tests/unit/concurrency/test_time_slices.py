"""Which runs take part in the time slices, and which one has the slice."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from queue import Queue

import pytest
from support.event_loops import HANG_TIMEOUT

from fitloop import BatchProgress, EpochStarted, Phase
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.time_slices import (
    CHECK_SECONDS,
    MIN_BATCHES,
    SLICE_SECONDS,
    TimeSliceHook,
    TimeSlices,
)


class ObservedQueue(deque[TimeSliceHook]):
    """A queue that reports each hook that joins it."""

    def __init__(self) -> None:
        super().__init__()
        self._joined: Queue[TimeSliceHook] = Queue()

    def append(self, hook: TimeSliceHook) -> None:
        super().append(hook)
        self._joined.put(hook)

    def wait_for(self, run: Run) -> None:
        while self._joined.get(timeout=HANG_TIMEOUT) is not run.hook:
            pass


class Run:
    """A run of batches on a clock of its own."""

    def __init__(self, slices: TimeSlices) -> None:
        self.now = 0.0
        self.used = 0.0
        self.control = RunControl()
        self.waits = 0
        self.hook = TimeSliceHook(
            self.wait,
            self.control,
            slices=slices,
            clock=lambda: self.now,
            thread_clock=lambda: self.used,
        )

    def wait(self, call: Callable[[], None]) -> None:
        self.waits += 1
        call()

    def batches(
        self,
        number: int,
        seconds: float,
        computed: float = 1.0,
        waited: float = 0.0,
    ) -> None:
        for _ in range(number):
            self.now += seconds
            self.used += seconds * computed
            self.control.wait_seconds += seconds * waited
            self.hook.after_batch()


@pytest.fixture
def slices() -> TimeSlices:
    return TimeSlices()


def test_run_when_it_is_the_only_one_then_has_no_slice(slices: TimeSlices) -> None:
    run = Run(slices)
    run.batches(1000, 0.0003)
    assert slices.owner is None
    assert run.waits == 0


def test_run_when_its_steps_are_small_then_takes_part_beside_another(
    slices: TimeSlices,
) -> None:
    run, _other = Run(slices), Run(slices)
    run.batches(MIN_BATCHES, 0.0003)
    assert slices.owner is run.hook
    run.batches(1000, 0.0003)  # no other run waits: it keeps the slice
    assert slices.owner is run.hook
    assert run.waits == 1


def test_run_when_its_steps_are_large_then_takes_no_part(slices: TimeSlices) -> None:
    run, _other = Run(slices), Run(slices)
    run.batches(200, 0.01)
    assert slices.owner is None
    assert run.waits == 0


def test_run_when_it_is_idle_in_its_slice_then_takes_no_part_for_a_while(
    slices: TimeSlices,
) -> None:
    run, _other = Run(slices), Run(slices)
    run.batches(MIN_BATCHES, 0.0003)
    assert slices.owner is run.hook
    run.batches(int(SLICE_SECONDS / 0.005) + 1, 0.005, computed=0.05)
    assert slices.owner is None
    run.batches(int(CHECK_SECONDS / 0.005) - 2, 0.005, computed=0.05)
    assert slices.owner is None


def test_run_when_its_loader_waits_in_the_step_thread_then_it_tries_ever_more_rarely(
    slices: TimeSlices,
) -> None:
    run, _other = Run(slices), Run(slices)
    tries: list[float] = []
    held = 0.0
    while run.now < 60.0:
        had_slice, began = slices.owner is run.hook, run.now
        run.batches(1, 0.02, computed=0.05)  # as of a loader that sleeps between small steps
        held += (run.now - began) * had_slice
        if slices.owner is run.hook:
            tries.append(run.now)
    pauses = [later - one for one, later in itertools.pairwise(tries)]
    assert pauses == pytest.approx([1, 4, *[8] * (len(pauses) - 2)], abs=0.05)
    assert held == pytest.approx(0.02 * len(tries))  # one batch is enough to see it
    run.batches(int(8 / 0.0003), 0.0003)  # it computes from now on
    run.batches(int(1 / 0.0003), 0.0003)
    assert slices.owner is run.hook
    run.batches(6, 0.02, computed=0.05)  # and waits again: a check comes soon
    assert slices.owner is None
    run.batches(int(CHECK_SECONDS / 0.0003) + 2, 0.0003)
    assert slices.owner is run.hook


def test_run_when_it_waits_for_its_loader_then_never_queues(slices: TimeSlices) -> None:
    run, _other = Run(slices), Run(slices)
    run.batches(10_000, 0.002, computed=0.1, waited=0.5)
    assert run.waits == 0


def test_slice_when_it_was_renewed_for_long_then_is_not_taken_in_the_middle() -> None:
    now = 0.0
    slices = TimeSlices(patience=0.1, clock=lambda: now)
    one, two = Run(slices), Run(slices)
    queue = slices.queue = ObservedQueue()
    one.batches(MIN_BATCHES, 0.0003)
    now = 5.0
    one.batches(int(SLICE_SECONDS / 0.0003) + 2, 0.0003)  # no other run waits: another slice
    thread = threading.Thread(target=two.batches, args=(MIN_BATCHES, 0.0003))
    thread.start()
    queue.wait_for(two)
    with slices.lock:
        assert slices.owner is one.hook
    one.hook.close()
    thread.join(HANG_TIMEOUT)
    assert slices.owner is two.hook


def test_slice_when_another_run_waits_then_is_handed_on() -> None:
    slices = TimeSlices(patience=HANG_TIMEOUT)
    queue = slices.queue = ObservedQueue()
    one, two = Run(slices), Run(slices)
    one.batches(MIN_BATCHES, 0.0003)
    thread = threading.Thread(target=two.batches, args=(MIN_BATCHES, 0.0003))
    thread.start()
    queue.wait_for(two)
    back = threading.Thread(target=one.batches, args=(int(SLICE_SECONDS / 0.0003) + 2, 0.0003))
    back.start()
    thread.join(HANG_TIMEOUT)
    assert slices.owner is two.hook
    two.hook.observe(EpochStarted(trainer="", epoch=1, epoch_in_run=1, epochs=1))
    back.join(HANG_TIMEOUT)
    assert slices.owner is one.hook


def test_slice_when_its_run_makes_no_progress_then_is_taken_from_it(slices: TimeSlices) -> None:
    one, two = Run(slices), Run(slices)
    one.batches(MIN_BATCHES, 0.0003)
    two.batches(MIN_BATCHES, 0.0003)  # comes back, though the slice never ends
    assert slices.owner is two.hook
    assert not slices.queue
    one.batches(int(SLICE_SECONDS / 0.0003) + 2, 0.0003)  # queues again, as any other
    assert slices.owner is one.hook
    two.hook.close()
    assert slices.owner is one.hook


def test_slice_when_several_wait_then_patience_is_with_each_holder_anew() -> None:
    now, looked = 0.0, threading.Event()

    def clock() -> float:
        looked.set()
        return now

    slices = TimeSlices(patience=0.1, clock=clock)
    queue = slices.queue = ObservedQueue()
    one, two, three = Run(slices), Run(slices), Run(slices)
    one.batches(MIN_BATCHES, 0.0003)
    threads = []
    for run in (two, three):
        threads.append(threading.Thread(target=run.batches, args=(MIN_BATCHES, 0.0003)))
        threads[-1].start()
        queue.wait_for(run)
    now = 0.09
    one.hook.close()
    threads[0].join(HANG_TIMEOUT)
    assert slices.owner is two.hook
    now = 0.15  # the third has waited longer than that, but not for the second
    looked.clear()
    three.hook.wake()
    assert looked.wait(HANG_TIMEOUT)
    with slices.lock:
        assert slices.owner is two.hook
        now = 0.2
    three.hook.wake()
    threads[1].join(HANG_TIMEOUT)
    assert slices.owner is three.hook


def test_run_when_progress_is_reported_then_it_keeps_its_slice(slices: TimeSlices) -> None:
    run, _other = Run(slices), Run(slices)
    run.batches(MIN_BATCHES, 0.0003)
    run.hook.observe(
        BatchProgress(
            trainer="", epoch=1, phase=Phase.TRAIN, batch=1, batches=2, samples=1, seconds=0.1
        )
    )
    assert slices.owner is run.hook


def test_run_when_an_event_ended_its_slice_then_has_another_after_one_batch(
    slices: TimeSlices,
) -> None:
    run, _other = Run(slices), Run(slices)
    run.batches(MIN_BATCHES, 0.0003)
    run.hook.observe(EpochStarted(trainer="", epoch=1, epoch_in_run=1, epochs=1))
    assert slices.owner is None
    run.batches(1, 0.0003)
    assert slices.owner is run.hook


def test_run_when_it_ends_or_an_event_comes_then_its_slice_is_free(slices: TimeSlices) -> None:
    one, two = Run(slices), Run(slices)
    one.batches(MIN_BATCHES, 0.0003)
    one.hook.observe(EpochStarted(trainer="", epoch=1, epoch_in_run=1, epochs=1))
    assert slices.owner is None
    two.batches(MIN_BATCHES, 0.0003)
    two.hook.close()
    assert slices.owner is None
    assert slices.runs == 1


def test_wait_when_the_run_is_to_end_then_is_over_at_once(slices: TimeSlices) -> None:
    one = Run(slices)
    control = RunControl()
    other = TimeSliceHook(lambda call: call(), control, slices=slices)
    one.batches(MIN_BATCHES, 0.0003)
    assert slices.owner is one.hook
    control.stop()
    slices.acquire(other, lambda: control.halted)
    assert slices.owner is one.hook
    other.wake()
    assert not slices.queue
