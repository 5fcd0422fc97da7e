from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fitloop._concurrency.control import RunControl
from fitloop._data.prefetch_tuner import AdaptiveSource, PrefetchTuner
from fitloop._data.sources import END, LoadContext

TRIVIAL, SLOW, STEP = 5e-6, 5e-3, 4e-3
"""seconds"""


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Loader:
    """Takes its time on the clock where it is read in line; beside the steps it takes none."""

    def __init__(self, clock: Clock, seconds: float, count: int = 100) -> None:
        self.clock, self.seconds, self.count = clock, seconds, count
        self.inline: list[int] = []
        self.ahead: list[int] = []
        self._home = threading.current_thread()

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            if threading.current_thread() is self._home:
                self.clock.now += self.seconds
                self.inline.append(number)
            else:
                self.ahead.append(number)
            yield number


class SwitchingTuner(PrefetchTuner):
    """Reads ahead and inline again after given numbers of batches."""

    def __init__(self, ahead_after: int, inline_after: int) -> None:
        super().__init__()
        self._left = [ahead_after, inline_after]

    def add(self, load: float, total: float, cpu: float) -> None:
        self._left[0] -= 1
        if self._left[0] <= 0:
            del self._left[0]
            self.ahead = not self.ahead
            self.decided = not self._left


def run_pass(
    loader: Any,
    tuner: PrefetchTuner,
    clock: Clock,
    *,
    step: Callable[[], float] = lambda: STEP,
    watch_rng: bool = False,
) -> list[Any]:
    """Fetch all batches, with a step of so many seconds after each."""
    context = LoadContext(label="train_dl", control=RunControl())
    source = AdaptiveSource(
        context, iter(loader).__next__, 2, tuner, watch_rng=watch_rng, clock=clock, cpu_clock=clock
    )
    fetched = []
    for batch in iter(source.fetch, END):
        fetched.append(batch)
        clock.now += step()
    assert source.close() == []
    return fetched


def measured(
    tuner: PrefetchTuner,
    load: float,
    total: float,
    count: int = PrefetchTuner.SAMPLES,
    cpu: float | None = None,
) -> PrefetchTuner:
    for _ in range(count):
        tuner.add(load, total, load if cpu is None else cpu)
    return tuner


def test_tuner_when_loads_are_shorter_than_a_hand_off_then_inline_for_good() -> None:
    tuner = measured(PrefetchTuner(), load=TRIVIAL, total=6e-6)
    assert (tuner.ahead, tuner.decided) == (False, True)


def test_tuner_when_loading_is_a_small_share_then_inline_for_good() -> None:
    tuner = measured(PrefetchTuner(), load=1e-3, total=1.0)
    assert (tuner.ahead, tuner.decided) == (False, True)


def test_tuner_when_loads_are_long_then_tries_ahead_before_it_decides() -> None:
    tuner = measured(PrefetchTuner(), load=SLOW, total=SLOW + STEP, count=PrefetchTuner.SAMPLES - 1)
    assert (tuner.ahead, tuner.decided) == (False, False)
    tuner.add(SLOW, SLOW + STEP, SLOW)
    assert (tuner.ahead, tuner.decided) == (True, False)


def test_tuner_when_loads_only_wait_then_ahead_for_good() -> None:
    tuner = measured(PrefetchTuner(), load=SLOW, total=SLOW + STEP, cpu=0.2 * SLOW)
    assert (tuner.ahead, tuner.decided) == (True, True)
    tuner = measured(PrefetchTuner(), load=SLOW, total=SLOW + STEP, cpu=0.21 * SLOW)
    assert (tuner.ahead, tuner.decided) == (True, False)


@pytest.mark.parametrize("cpu", [0.0, TRIVIAL])
def test_tuner_when_loads_only_wait_and_are_short_then_inline_for_good(cpu: float) -> None:
    tuner = measured(PrefetchTuner(), load=TRIVIAL, total=TRIVIAL + STEP, cpu=cpu)
    assert (tuner.ahead, tuner.decided) == (False, True)


@pytest.mark.parametrize(
    ("total", "ahead"),
    [
        pytest.param(SLOW, True, id="faster"),
        pytest.param(0.94 * (SLOW + STEP), True, id="just-enough"),
        pytest.param(0.96 * (SLOW + STEP), False, id="hardly-faster"),
        pytest.param(SLOW + STEP, False, id="same"),
        pytest.param(2 * (SLOW + STEP), False, id="slower"),
    ],
)
def test_tuner_when_ahead_was_measured_then_the_faster_way_wins(total: float, ahead: bool) -> None:
    tuner = measured(PrefetchTuner(), load=SLOW, total=SLOW + STEP)
    measured(tuner, load=0.0, total=total)
    assert (tuner.ahead, tuner.decided) == (ahead, True)


def tried(tuner: PrefetchTuner, ratio: float) -> tuple[bool, bool]:
    """Start a pass with the given times; return whether there was a new try, and its decision."""
    tuner.begin_pass()
    is_new_try = not tuner.decided
    if is_new_try:
        measured(tuner, load=SLOW, total=SLOW + STEP)
        measured(tuner, load=0.0, total=ratio * (SLOW + STEP))
    return is_new_try, tuner.ahead


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        pytest.param([0.6, 2.0], [(True, True), (False, True)], id="clearly-ahead"),
        pytest.param([1.2, 0.5], [(True, False), (False, False)], id="clearly-inline"),
        pytest.param([1.0, 0.6, 2.0], [(True, False), (True, True), (False, True)], id="mistaken"),
        pytest.param(
            [0.9, 1.1, 1.1, 0.5],
            [(True, True), (True, True), (True, False), (False, False)],
            id="median-of-three",
        ),
    ],
)
def test_tuner_when_it_was_not_clear_then_later_passes_try_again(
    ratios: list[float], expected: list[tuple[bool, bool]]
) -> None:
    tuner = PrefetchTuner()
    assert [tried(tuner, ratio) for ratio in ratios] == expected


def test_tuner_when_it_never_came_to_ahead_then_later_passes_do_not_try_again() -> None:
    tuner = measured(PrefetchTuner(), load=TRIVIAL, total=6e-6)
    tuner.begin_pass()
    assert tuner.decided
    tuner = measured(PrefetchTuner(), load=SLOW, total=SLOW + STEP, cpu=0.0)
    tuner.begin_pass()
    assert (tuner.ahead, tuner.decided) == (True, True)


def test_tuner_when_one_load_is_an_outlier_then_it_does_not_decide() -> None:
    tuner = PrefetchTuner()
    tuner.add(10.0, 10.0, 10.0)
    measured(tuner, load=TRIVIAL, total=STEP, count=PrefetchTuner.SAMPLES - 1)
    assert (tuner.ahead, tuner.decided) == (False, True)


def test_tuner_when_all_times_are_zero_then_inline() -> None:
    tuner = measured(PrefetchTuner(), load=0.0, total=0.0)
    assert (tuner.ahead, tuner.decided) == (False, True)


def test_tuner_when_loader_drew_then_inline_for_good_and_says_why() -> None:
    tuner = measured(PrefetchTuner(), load=SLOW, total=SLOW, count=2)
    tuner.mark_uses_rng()
    assert (tuner.ahead, tuner.decided, tuner.uses_rng) == (False, True, True)


def test_adaptive_when_loader_is_trivial_then_all_is_read_inline() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    loader = Loader(clock, TRIVIAL)
    assert run_pass(loader, tuner, clock) == list(range(100))
    assert loader.ahead == []
    assert (tuner.ahead, tuner.decided) == (False, True)


def test_adaptive_when_loader_is_slow_then_goes_ahead_and_stays() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    loader = Loader(clock, SLOW)
    assert run_pass(loader, tuner, clock) == list(range(100))
    assert (tuner.ahead, tuner.decided) == (True, True)
    # The first batch of a pass does not count.
    assert loader.inline == list(range(PrefetchTuner.SAMPLES + 1))
    assert loader.ahead == list(range(PrefetchTuner.SAMPLES + 1, 100))


def test_adaptive_when_ahead_does_not_pay_then_goes_back_inline() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    loader = Loader(clock, SLOW)
    # The steps beside the loading thread take as much longer as loading took.
    steps = iter([STEP] * (PrefetchTuner.SAMPLES + 1) + [SLOW + STEP] * 1000)
    assert run_pass(loader, tuner, clock, step=lambda: next(steps)) == list(range(100))
    assert (tuner.ahead, tuner.decided) == (False, True)
    assert sorted(loader.inline + loader.ahead) == list(range(100))
    assert loader.inline[-1] == 99
    assert loader.ahead


def test_adaptive_when_decided_then_next_passes_keep_to_it() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    run_pass(Loader(clock, SLOW), tuner, clock)
    second = Loader(clock, SLOW)
    assert run_pass(second, tuner, clock) == list(range(100))
    assert second.inline == []


def test_adaptive_when_passes_are_short_then_measures_over_several() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    passes = 0
    while not tuner.decided:
        passes += 1
        assert passes < 50, "it never decides"
        assert run_pass(Loader(clock, SLOW, count=5), tuner, clock) == list(range(5))
    assert tuner.ahead
    assert passes > 1


@pytest.mark.parametrize("count", [2, 3])
def test_adaptive_when_passes_are_very_short_then_still_decides(count: int) -> None:
    clock, tuner = Clock(), PrefetchTuner()
    for _ in range(100):
        run_pass(Loader(clock, SLOW, count=count), tuner, clock)
    assert tuner.decided


@pytest.mark.parametrize("count", [0, 1])
def test_adaptive_when_there_is_nothing_to_measure_then_undecided_and_inline(count: int) -> None:
    clock, tuner = Clock(), PrefetchTuner()
    for _ in range(10):
        assert run_pass(Loader(clock, SLOW, count=count), tuner, clock) == list(range(count))
    assert (tuner.ahead, tuner.decided) == (False, False)


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: torch.rand(()), id="torch"),
        pytest.param(random.random, id="random"),
        pytest.param(lambda: __import__("numpy").random.rand(), id="numpy"),
    ],
)
def test_adaptive_when_loader_draws_then_stays_inline(draw: Callable[[], object]) -> None:
    clock, tuner = Clock(), PrefetchTuner()
    loader = Loader(clock, SLOW)

    def drawing() -> Iterator[int]:
        for number in loader:
            draw()
            yield number

    assert run_pass(drawing(), tuner, clock, watch_rng=True) == list(range(100))
    assert tuner.uses_rng
    assert loader.ahead == []


def test_adaptive_when_only_steps_draw_then_may_go_ahead() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    loader = Loader(clock, SLOW)

    def step() -> float:
        torch.rand(())
        return STEP

    run_pass(loader, tuner, clock, step=step, watch_rng=True)
    assert not tuner.uses_rng
    assert tuner.ahead


def test_adaptive_when_loader_draws_only_to_begin_then_may_go_ahead() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    loader = Loader(clock, SLOW)

    def shuffled() -> Iterator[int]:
        torch.randperm(100)
        yield from loader

    run_pass(shuffled(), tuner, clock, watch_rng=True)
    assert not tuner.uses_rng
    assert tuner.ahead


def test_adaptive_when_loader_raises_ahead_then_good_batches_come_first() -> None:
    clock, tuner = Clock(), PrefetchTuner()
    measured(tuner, load=SLOW, total=SLOW + STEP)
    error = ValueError("broken")

    def broken() -> Iterator[int]:
        yield from range(4)
        raise error

    context = LoadContext(label="train_dl", control=RunControl())
    source = AdaptiveSource(context, broken().__next__, 2, tuner, watch_rng=False, clock=clock)
    assert [source.fetch() for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="broken") as caught:
        source.fetch()
    assert caught.value is error
    source.close()


class AutoReset:
    """Begins again when it has ended, as DALI's iterators do with ``auto_reset``."""

    def __init__(self, count: int) -> None:
        self._count, self._next = count, 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._next == self._count:
            self._next = 0
            raise StopIteration
        self._next += 1
        return self._next - 1


@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=4),
    ahead_after=st.integers(1, 9),
    inline_after=st.integers(1, 9),
    make=st.sampled_from([range, AutoReset]),
)
@settings(deadline=None, max_examples=150)
def test_adaptive_when_it_switches_anywhere_then_no_batch_is_lost_doubled_or_moved(
    lengths: list[int], ahead_after: int, inline_after: int, make: Callable[[int], Any]
) -> None:
    clock, tuner = Clock(), SwitchingTuner(ahead_after, inline_after)
    for length in lengths:
        assert run_pass(make(length), tuner, clock) == list(range(length))


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    fetches=st.integers(0, 20),
    ahead_after=st.integers(1, 9),
    inline_after=st.integers(1, 9),
)
@settings(deadline=None, max_examples=100)
def test_adaptive_when_closed_anywhere_then_unread_ones_are_what_comes_next(
    lengths: list[int], fetches: int, ahead_after: int, inline_after: int
) -> None:
    clock, tuner = Clock(), SwitchingTuner(ahead_after, inline_after)
    for length in lengths:
        loader = iter(range(length))
        context = LoadContext(label="train_dl", control=RunControl())
        source = AdaptiveSource(context, loader.__next__, 2, tuner, watch_rng=False, clock=clock)
        fetched = [source.fetch() for _ in range(min(fetches, length))]
        unread = source.close()
        assert [*fetched, *unread, *loader] == list(range(length))


@given(
    seconds=st.lists(st.tuples(st.floats(0, 0.01), st.floats(0, 0.01)), min_size=1, max_size=60),
    passes=st.integers(1, 3),
)
@settings(deadline=None, max_examples=80)
def test_adaptive_when_times_are_any_then_batches_stay_whole(
    seconds: list[tuple[float, float]], passes: int
) -> None:
    clock, tuner = Clock(), PrefetchTuner()
    for _ in range(passes):
        steps = iter([step for _load, step in seconds])
        loader = Loader(clock, seconds[0][0], count=len(seconds))
        assert run_pass(loader, tuner, clock, step=lambda: next(steps)) == list(  # noqa: B023
            range(len(seconds))
        )
