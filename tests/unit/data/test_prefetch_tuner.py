from __future__ import annotations

import pytest

from fitloop._concurrency.control import RunControl
from fitloop._data.prefetch_tuner import MeasuredSource, PrefetchTuner
from fitloop._data.sources import END, InlineSource, LoadContext

TRIVIAL, SLOW, STEP = 5e-6, 5e-3, 4e-3
"""seconds"""


def measured(
    tuner: PrefetchTuner,
    load: float,
    total: float,
    count: int = PrefetchTuner.SAMPLES,
    cpu: float | None = None,
) -> PrefetchTuner:
    """Give the tuner a pass of equal batches, and begin the next one."""
    for _ in range(count):
        tuner.add(load, total, load if cpu is None else cpu)
    tuner.begin_pass()
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
    measured(tuner, load=SLOW, total=SLOW + STEP, count=1)
    assert (tuner.ahead, tuner.decided) == (True, False)


def test_tuner_when_a_pass_goes_on_then_it_never_changes_the_way() -> None:
    tuner = PrefetchTuner()
    for _ in range(10 * PrefetchTuner.MOST_SAMPLES):
        tuner.add(SLOW, SLOW + STEP, 0.0)
        assert (tuner.ahead, tuner.decided) == (False, False)
    tuner.begin_pass()
    assert (tuner.ahead, tuner.decided) == (True, True)


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
    """Begin a pass; return whether there is a new try, and its decision for the given times."""
    tuner.begin_pass()
    is_new_try = not tuner.decided
    if is_new_try:
        measured(tuner, load=SLOW, total=SLOW + STEP)
        measured(tuner, load=0.0, total=ratio * (SLOW + STEP))
    assert tuner.decided
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


class Clock:
    """A clock that moves by a second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


class RecordingTuner(PrefetchTuner):
    def __init__(self) -> None:
        super().__init__()
        self.added: list[tuple[float, float, float]] = []

    def add(self, load: float, total: float, cpu: float) -> None:
        self.added.append((load, total, cpu))


def test_measured_source_when_drained_then_tuner_has_all_but_the_first_batch() -> None:
    tuner, numbers = RecordingTuner(), iter(range(5))
    context = LoadContext(label="train_dl", control=RunControl())
    source = MeasuredSource(
        InlineSource(context, numbers.__next__), tuner, clock=Clock(), cpu_clock=lambda: 0.0
    )
    assert list(iter(source.fetch, END)) == list(range(5))
    assert tuner.added == [(1.0, 2.0, 0.0)] * 4
    assert source.close() == []
