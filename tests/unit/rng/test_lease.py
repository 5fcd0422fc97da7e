"""Leases: streams in the global generators, and who waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT
from support.global_generators import (
    BIT_GENERATORS,
    USES,
    global_states,
    install_bits,
    numbers_of,
    restored_generators,
    use,
)
from support.models import seed_process

from fitloop._concurrency.control import Cancelled
from fitloop._rng import global_lock
from fitloop._rng.global_lock import FairSharedLock
from fitloop._rng.interception import current_listener
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream

uses = st.lists(st.sampled_from(sorted(USES)), max_size=4)


@pytest.fixture(autouse=True)
def _restored_generators() -> Iterator[None]:
    with restored_generators():
        yield


@given(seeds=st.lists(st.integers(0, 3), min_size=2, max_size=3), data=st.data())
@settings(deadline=None, max_examples=120)
def test_lease_when_streams_interleave_then_each_has_its_numbers(
    seeds: list[int], data: st.DataObject
) -> None:
    count = len(seeds)
    # -1: outside a lease, which has a sequence of its own.
    plan = data.draw(st.lists(st.tuples(st.integers(-1, count - 1), uses), max_size=20))
    with restored_generators():
        seed_process(99)
        streams, lease = [Stream(seed) for seed in seeds], GeneratorLease(lock=FairSharedLock())
        drawn: dict[int, list[object]] = {key: [] for key in range(-1, count)}
        for key, names in plan:
            if key < 0:
                lease.release()
            else:
                lease.acquire(streams[key])
            drawn[key] += use(names)
        lease.release()
    for key, seed in enumerate([*seeds, 99]):
        owner = -1 if key == count else key
        together = [name for user, names in plan if user == owner for name in names]
        assert drawn[owner] == numbers_of(seed, together)


@given(inside=uses, before=uses, pause=st.booleans(), kind=st.sampled_from(BIT_GENERATORS))
@settings(deadline=None, max_examples=80)
def test_lease_when_released_then_global_state_is_exactly_as_before(
    inside: list[str], before: list[str], pause: bool, kind: type
) -> None:
    with restored_generators():
        install_bits(kind)
        use(before)
        numpy: Any = np.random
        bits, states = numpy.get_bit_generator(), global_states()
        lease = GeneratorLease(lock=FairSharedLock())
        lease.acquire(Stream(1))
        use(inside)
        if pause:
            lease.uninstall()
            assert global_states() == states
            lease.install()
            use(inside)
        lease.release()
        assert global_states() == states
        assert numpy.get_bit_generator() is bits


class Waiter:
    """A thread that acquires a lease, notes its name and releases it."""

    def __init__(self, lock: FairSharedLock, name: str, log: list[str]) -> None:
        self.cancelled = False
        self.lease = GeneratorLease(self._is_cancelled, (), lock)
        self.error: BaseException | None = None
        self._name, self._log = name, log
        self._waits = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _is_cancelled(self) -> bool:
        self._waits.set()  # is asked while it waits
        return self.cancelled

    def queue(self) -> Waiter:
        """Start, and return when it waits."""
        self._thread.start()
        assert self._waits.wait(HANG_TIMEOUT)
        return self

    def _run(self) -> None:
        try:
            self.lease.acquire(Stream(1))
            self._log.append(self._name)
            self.lease.release()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(HANG_TIMEOUT)
        assert not self._thread.is_alive()


def test_lock_when_nothing_changes_for_long_then_the_thread_that_waits_warns_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told, has_told = list[str](), threading.Event()

    def warn(message: str, _category: type[Warning]) -> None:
        told.append(message)
        has_told.set()

    monkeypatch.setattr(global_lock, "PATIENCE", 0.01)
    monkeypatch.setattr(global_lock, "warn_user", warn)
    lock, log = FairSharedLock(), list[str]()
    holder = GeneratorLease(lock=lock)
    holder.acquire(Stream(0))
    waiter = Waiter(lock, "waits", log).queue()
    assert has_told.wait(HANG_TIMEOUT)
    holder.release()
    waiter.join()
    (message,) = told
    assert f"which a step in the thread {threading.current_thread().name!r} uses" in message
    assert log == ["waits"]


def test_lock_when_several_threads_wait_then_first_come_first_served() -> None:
    lock, log = FairSharedLock(), list[str]()
    holder = GeneratorLease(lock=lock)
    holder.acquire(Stream(0))
    waiters = [Waiter(lock, name, log).queue() for name in "abcd"]
    assert lock.has_waiters
    log.append("holder")
    holder.release()
    for waiter in waiters:
        waiter.join()
    assert log == ["holder", "a", "b", "c", "d"]


def test_lock_when_a_shared_holder_overtakes_then_it_does_not_wait_for_the_queue() -> None:
    """The other may hold a lock that this one waits for, or this one a lock that the other does."""
    lock, log = FairSharedLock(), list[str]()
    one, two, late = (GeneratorLease(lock=lock) for _ in range(3))
    lock.acquire(one, lambda: False, shared=True)
    waiter = Waiter(lock, "a", log).queue()
    lock.acquire(two, lambda: False, shared=True, overtakes=True)
    lock.release(one)
    lock.acquire(late, lambda: False, shared=True, overtakes=True)
    lock.release(late)
    assert log == []
    lock.release(two)
    waiter.join()
    assert log == ["a"]


def test_lease_when_it_yields_then_waiting_threads_go_first() -> None:
    lock, log = FairSharedLock(), list[str]()
    holder, stream = GeneratorLease(lock=lock), Stream(3)
    holder.acquire(stream)
    first = use(["torch", "numpy normal"])
    waiters = [Waiter(lock, name, log).queue() for name in "ab"]
    holder.yield_to_waiters()
    log.append("holder")
    rest = use(["torch", "numpy normal"])
    holder.release()
    for waiter in waiters:
        waiter.join()
    assert log == ["a", "b", "holder"]
    holder.close()
    assert first + rest == numbers_of(3, ["torch", "numpy normal"] * 2)


def test_lease_when_no_thread_waits_then_yielding_keeps_it() -> None:
    lock = FairSharedLock()
    lease, stream = GeneratorLease(lock=lock), Stream(3)
    lease.acquire(stream)
    lease.yield_to_waiters()
    assert lease.stream is stream
    lease.release()
    assert lease.stream is None
    lease.yield_to_waiters()
    assert lease.stream is None


def test_lease_when_cancelled_while_waiting_then_raises_and_the_queue_stays() -> None:
    lock, log = FairSharedLock(), list[str]()
    holder = GeneratorLease(lock=lock)
    holder.acquire(Stream(0))
    waiters = [Waiter(lock, name, log).queue() for name in "abc"]
    waiters[0].cancelled = True
    waiters[0].lease.notify_cancelled()
    waiters[0].join()
    assert isinstance(waiters[0].error, Cancelled)
    assert log == []
    holder.release()
    for waiter in waiters[1:]:
        waiter.join()
    assert log == ["b", "c"]


def test_lease_when_closed_by_another_thread_then_others_go_on_and_global_state_is_back() -> None:
    lock, log = FairSharedLock(), list[str]()
    states = global_states()
    lost = GeneratorLease(lock=lock)
    lost.acquire(Stream(0))
    use(sorted(USES))
    waiter = Waiter(lock, "a", log).queue()
    lost.close()
    waiter.join()
    assert log == ["a"]
    assert global_states() == states
    lost.release()  # the thread that comes back too late ends nothing
    again = GeneratorLease(lock=lock)
    again.acquire(Stream(1))
    lost.release()
    other = Waiter(lock, "b", log).queue()
    assert log == ["a"]
    again.release()
    other.join()


def test_lease_when_it_was_never_acquired_then_releasing_does_nothing() -> None:
    lock = FairSharedLock()
    lease = GeneratorLease(lock=lock)
    lease.release()
    lease.uninstall()
    lease.install()
    assert lease.stream is None
    other = GeneratorLease(lock=lock)
    other.acquire(Stream(1))
    other.release()


def test_lease_when_threads_share_the_generators_then_each_has_its_numbers() -> None:
    lock, names = FairSharedLock(), sorted(USES) * 4
    drawn: dict[int, list[object]] = {}

    def run(seed: int) -> None:
        lease, numbers = GeneratorLease(lock=lock), list[object]()
        lease.acquire(Stream(seed))
        for name in names:
            numbers.append(USES[name]())
            lease.yield_to_waiters()
        lease.close()
        drawn[seed] = numbers

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_TIMEOUT)
    for seed in (1, 2, 3):
        assert drawn[seed] == numbers_of(seed, names)


def test_lease_when_a_thread_of_autograd_used_its_numbers_then_it_watches_only_its_own() -> None:
    # torch keeps these threads, and uses them for the backward passes of all trainers.
    lease, watched = GeneratorLease(lock=FairSharedLock()), list[object]()
    lease._observe(Stream(1))

    def run_hook() -> None:
        lease.pin_until_step_end()
        watched.append(current_listener())

    thread = threading.Thread(target=run_hook)
    thread.start()
    thread.join(HANG_TIMEOUT)
    assert watched == [None]
    assert current_listener() is lease
    lease.close()
