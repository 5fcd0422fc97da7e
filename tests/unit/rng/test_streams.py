from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitloop._concurrency.control import Cancelled
from fitloop._rng.fair_lock import FairSharedLock
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream, fingerprint
from fitloop._rng.trainer_rng import TrainerRng
from fitloop._types import Phase

GUARD = 20.0
"""seconds after which a wait that should have ended long ago fails the test"""

DRAWS: dict[str, Callable[[], object]] = {
    "torch": lambda: torch.rand(3).tolist(),
    "torch normal": lambda: torch.randn(1).item(),  # torch keeps the other of a pair
    "random": lambda: random.random(),  # found at each call: see the gates
    "random gauss": lambda: random.gauss(0, 1),  # so does Python
    "numpy": lambda: np.random.rand(2).tolist(),
    "numpy normal": lambda: float(np.random.randn()),  # and numpy
    "numpy integer": lambda: int(np.random.randint(1000)),
    "numpy shuffle": lambda: np.random.permutation(5).tolist(),
    "nothing": lambda: None,
}
BIT_GENERATORS = [np.random.PCG64, np.random.Philox, np.random.SFC64, np.random.MT19937]

draws = st.lists(st.sampled_from(sorted(DRAWS)), max_size=4)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the process's generators back, numpy's bit generator among them."""
    numpy: Any = np.random
    bits = numpy.get_bit_generator()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        numpy.set_bit_generator(bits)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


@pytest.fixture(autouse=True)
def _generators_kept() -> Iterator[None]:
    with generators_kept():
        yield


def seed_process(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def use_bits(kind: type, seed: int = 3) -> None:
    numpy: Any = np.random
    numpy.set_bit_generator(kind(seed))


def draw(names: list[str]) -> list[object]:
    return [DRAWS[name]() for name in names]


def alone(seed: int, names: list[str]) -> list[object]:
    with generators_kept():
        seed_process(seed)
        return draw(names)


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_stream_when_fresh_then_draws_what_seeding_the_process_gives(seed: int) -> None:
    names = sorted(DRAWS) * 3
    expected = alone(seed, names)
    Stream(seed).enter()
    assert draw(names) == expected


@given(seeds=st.lists(st.integers(0, 3), min_size=2, max_size=3), data=st.data())
@settings(deadline=None, max_examples=120)
def test_turn_when_streams_interleave_then_each_draws_what_it_draws_alone(
    seeds: list[int], data: st.DataObject
) -> None:
    count = len(seeds)
    # -1: outside a turn, which has a sequence of its own.
    plan = data.draw(st.lists(st.tuples(st.integers(-1, count - 1), draws), max_size=20))
    with generators_kept():
        seed_process(99)
        streams, turn = [Stream(seed) for seed in seeds], GeneratorLease(turnstile=FairSharedLock())
        drawn: dict[int, list[object]] = {key: [] for key in range(-1, count)}
        for key, names in plan:
            if key < 0:
                turn.release()
            else:
                turn.acquire(streams[key])
            drawn[key] += draw(names)
        turn.release()
    for key, seed in enumerate([*seeds, 99]):
        who = -1 if key == count else key
        together = [name for owner, names in plan if owner == who for name in names]
        assert drawn[who] == alone(seed, together)


@given(inside=draws, before=draws, pause=st.booleans(), kind=st.sampled_from(BIT_GENERATORS))
@settings(deadline=None, max_examples=80)
def test_turn_when_given_back_then_outside_is_exactly_as_before(
    inside: list[str], before: list[str], pause: bool, kind: type
) -> None:
    with generators_kept():
        use_bits(kind)
        draw(before)
        numpy: Any = np.random
        bits, states = numpy.get_bit_generator(), outside_state()
        turn = GeneratorLease(turnstile=FairSharedLock())
        turn.acquire(Stream(1))
        draw(inside)
        if pause:
            turn.pause()
            assert outside_state() == states
            turn.resume()
            draw(inside)
        turn.release()
        assert outside_state() == states
        assert numpy.get_bit_generator() is bits


def outside_state() -> tuple[object, ...]:
    numpy = repr(np.random.get_state(legacy=False))
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy


@pytest.mark.parametrize("kind", BIT_GENERATORS)
@pytest.mark.parametrize("names", [[], ["numpy normal"], ["numpy integer"], sorted(DRAWS)])
def test_stream_of_process_when_made_then_goes_on_on_copies(kind: type, names: list[str]) -> None:
    use_bits(kind)
    draw(names)
    states = outside_state()
    stream, turn = Stream.of_process(), GeneratorLease(turnstile=FairSharedLock())
    turn.acquire(stream)
    drawn = draw(sorted(DRAWS))
    turn.release()
    turn.acquire(stream)
    drawn += draw(sorted(DRAWS))
    turn.release()
    assert outside_state() == states
    assert draw(sorted(DRAWS) * 2) == drawn


@given(first=draws, then=draws)
@settings(deadline=None, max_examples=60)
def test_stream_when_copied_then_both_draw_the_same(first: list[str], then: list[str]) -> None:
    with generators_kept():
        stream, turn = Stream(5), GeneratorLease(turnstile=FairSharedLock())
        turn.acquire(stream)
        draw(first)
        turn.release()
        twin = stream.copy()
        results = []
        for each in (stream, twin):
            turn.acquire(each)
            results.append(draw(then))
            turn.release()
        assert results[0] == results[1]
        assert results[0] == alone(5, [*first, *then])[len(first) :]


def test_streams_when_phases_differ_then_numbers_differ_and_training_has_the_seed() -> None:
    rng, turn = TrainerRng(7), GeneratorLease(turnstile=FairSharedLock())
    first = []
    for phase in Phase:
        for stream in (rng.steps(phase), rng.loader(phase)):
            turn.acquire(stream)
            first.append(repr(draw(["torch", "random", "numpy"])))
    turn.release()
    assert len(set(first)) == len(first)
    assert first[0] == repr(alone(7, ["torch", "random", "numpy"]))


@pytest.mark.parametrize("name", [name for name in DRAWS if name != "nothing"])
@pytest.mark.parametrize("kind", BIT_GENERATORS)
def test_fingerprint_when_somebody_draws_then_it_changes(name: str, kind: type) -> None:
    use_bits(kind)
    before = fingerprint()
    assert fingerprint() == before
    DRAWS[name]()
    assert fingerprint() != before


def test_fingerprint_when_cached_half_of_a_pair_is_used_then_it_changes() -> None:
    np.random.randn()
    before = fingerprint()
    np.random.randn()
    assert fingerprint() != before


# -- turns --------------------------------------------------------------------------------------


class Waiter:
    """A thread that takes a turn, notes its name and gives it back."""

    def __init__(self, turnstile: FairSharedLock, name: str, log: list[str]) -> None:
        self.cancelled = False
        self.turn = GeneratorLease(self._is_cancelled, (), turnstile)
        self.error: BaseException | None = None
        self._name, self._log = name, log
        self._in_line = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _is_cancelled(self) -> bool:
        self._in_line.set()  # who is in line is asked whether it was cancelled
        return self.cancelled

    def queue(self) -> Waiter:
        """Start, and return when it is in line."""
        self._thread.start()
        assert self._in_line.wait(GUARD)
        return self

    def _run(self) -> None:
        try:
            self.turn.acquire(Stream(1))
            self._log.append(self._name)
            self.turn.release()
        except BaseException as error:
            self.error = error

    def join(self) -> None:
        self._thread.join(GUARD)
        assert not self._thread.is_alive()


def test_turnstile_when_several_wait_then_first_come_first_served() -> None:
    turnstile, log = FairSharedLock(), list[str]()
    holder = GeneratorLease(turnstile=turnstile)
    holder.acquire(Stream(0))
    waiters = [Waiter(turnstile, name, log).queue() for name in "abcd"]
    assert turnstile.contended
    log.append("holder")
    holder.release()
    for waiter in waiters:
        waiter.join()
    assert log == ["holder", "a", "b", "c", "d"]


def test_turnstile_when_a_callback_draws_then_it_joins_another_past_the_line() -> None:
    """The other may hold a lock that this one waits for, or this one a lock that the other does."""
    turnstile, log = FairSharedLock(), list[str]()
    one, two, late = (GeneratorLease(turnstile=turnstile) for _ in range(3))
    turnstile.acquire(one, lambda: False, shared=True)
    waiter = Waiter(turnstile, "a", log).queue()
    turnstile.acquire(two, lambda: False, shared=True, joins=True)
    turnstile.release(one)
    turnstile.acquire(late, lambda: False, shared=True, joins=True)
    turnstile.release(late)
    assert log == []
    turnstile.release(two)
    waiter.join()
    assert log == ["a"]


def test_turn_when_it_breathes_then_those_in_line_go_first() -> None:
    turnstile, log = FairSharedLock(), list[str]()
    holder, stream = GeneratorLease(turnstile=turnstile), Stream(3)
    holder.acquire(stream)
    first = draw(["torch", "numpy normal"])
    waiters = [Waiter(turnstile, name, log).queue() for name in "ab"]
    holder.yield_to_waiters()
    log.append("holder")
    rest = draw(["torch", "numpy normal"])
    holder.release()
    for waiter in waiters:
        waiter.join()
    assert log == ["a", "b", "holder"]
    holder.close()
    assert first + rest == alone(3, ["torch", "numpy normal"] * 2)


def test_turn_when_nobody_waits_then_breathing_keeps_it() -> None:
    turnstile = FairSharedLock()
    turn, stream = GeneratorLease(turnstile=turnstile), Stream(3)
    turn.acquire(stream)
    turn.yield_to_waiters()
    assert turn.stream is stream
    turn.release()
    assert turn.stream is None
    turn.yield_to_waiters()
    assert turn.stream is None


def test_turn_when_cancelled_in_line_then_raises_and_others_keep_their_places() -> None:
    turnstile, log = FairSharedLock(), list[str]()
    holder = GeneratorLease(turnstile=turnstile)
    holder.acquire(Stream(0))
    waiters = [Waiter(turnstile, name, log).queue() for name in "abc"]
    waiters[0].cancelled = True
    waiters[0].turn.notify_cancelled()
    waiters[0].join()
    assert isinstance(waiters[0].error, Cancelled)
    assert log == []
    holder.release()
    for waiter in waiters[1:]:
        waiter.join()
    assert log == ["b", "c"]


def test_turn_when_revoked_then_others_go_on_and_outside_is_back() -> None:
    turnstile, log = FairSharedLock(), list[str]()
    states = outside_state()
    lost = GeneratorLease(turnstile=turnstile)
    lost.acquire(Stream(0))
    draw(sorted(DRAWS))
    waiter = Waiter(turnstile, "a", log).queue()
    lost.close()
    waiter.join()
    assert log == ["a"]
    assert outside_state() == states
    lost.release()  # the thread that comes back too late ends nothing
    again = GeneratorLease(turnstile=turnstile)
    again.acquire(Stream(1))
    lost.release()
    other = Waiter(turnstile, "b", log).queue()
    assert log == ["a"]
    again.release()
    other.join()


def test_turn_when_none_is_taken_then_nothing_is_asked_for() -> None:
    turnstile = FairSharedLock()
    turn = GeneratorLease(turnstile=turnstile)
    turn.acquire(None)
    turn.release()
    turn.pause()
    turn.resume()
    other = GeneratorLease(turnstile=turnstile)
    other.acquire(Stream(1))
    turn.acquire(None)
    other.release()


def test_turn_when_two_threads_share_the_generators_then_each_draws_what_it_draws_alone() -> None:
    turnstile, names = FairSharedLock(), sorted(DRAWS) * 4
    drawn: dict[int, list[object]] = {}

    def run(seed: int) -> None:
        turn, mine = GeneratorLease(turnstile=turnstile), list[object]()
        turn.acquire(Stream(seed))
        for name in names:
            mine.append(DRAWS[name]())
            turn.yield_to_waiters()
        turn.close()
        drawn[seed] = mine

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    for seed in (1, 2, 3):
        assert drawn[seed] == alone(seed, names)
