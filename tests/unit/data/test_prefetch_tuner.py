from __future__ import annotations

import pytest

from fitloop._concurrency.control import RunControl
from fitloop._data.prefetch_tuner import PrefetchTuner
from fitloop._data.sources import END, InlineSource, LoadContext
from fitloop._rng.global_lock import FairSharedLock
from fitloop._rng.guard import LoaderRng
from fitloop._rng.lease import GeneratorLease

INLINE = 9e-3
"""seconds of a batch"""


def measured(tuner: PrefetchTuner, seconds: float, count: int = PrefetchTuner.SAMPLES) -> None:
    """Give the tuner a pass of equal batches, and begin the next one."""
    for _ in range(count):
        tuner.add(seconds)
    tuner.begin_pass()


def test_tuner_when_few_batches_are_measured_then_passes_go_on_inline() -> None:
    tuner = PrefetchTuner()
    measured(tuner, INLINE, PrefetchTuner.SAMPLES - 1)
    assert (tuner.ahead, tuner.decided) == (False, False)
    measured(tuner, INLINE, 1)
    assert (tuner.ahead, tuner.decided) == (True, False)


def test_tuner_when_a_pass_goes_on_then_it_never_changes_the_way() -> None:
    tuner = PrefetchTuner()
    for _ in range(10 * PrefetchTuner.MOST_SAMPLES):
        tuner.add(INLINE)
        assert (tuner.ahead, tuner.decided) == (False, False)
    tuner.begin_pass()
    assert (tuner.ahead, tuner.decided) == (True, False)


@pytest.mark.parametrize(
    ("ahead", "is_chosen"),
    [
        pytest.param(0.5 * INLINE, True, id="faster"),
        pytest.param(0.89 * INLINE, True, id="just-enough"),
        pytest.param(0.91 * INLINE, False, id="hardly-faster"),
        pytest.param(2 * INLINE, False, id="slower"),
    ],
)
def test_tuner_when_both_ways_were_measured_then_the_faster_one_stays(
    ahead: float, is_chosen: bool
) -> None:
    tuner = PrefetchTuner()
    measured(tuner, INLINE)
    measured(tuner, ahead)
    assert (tuner.ahead, tuner.decided) == (is_chosen, True)
    measured(tuner, 10 * INLINE if is_chosen else 0.0)
    assert (tuner.ahead, tuner.decided) == (is_chosen, True)


def test_tuner_when_one_batch_is_an_outlier_then_it_does_not_decide() -> None:
    tuner = PrefetchTuner()
    tuner.add(10.0)
    measured(tuner, INLINE, PrefetchTuner.SAMPLES - 1)
    measured(tuner, INLINE)
    assert (tuner.ahead, tuner.decided) == (False, True)


class RecordingTuner(PrefetchTuner):
    def __init__(self) -> None:
        super().__init__()
        self.added: list[float] = []

    def add(self, seconds: float) -> None:
        self.added.append(seconds)


def test_tuner_when_a_pass_is_timed_then_has_all_but_the_first_batch() -> None:
    tuner, numbers, clock = RecordingTuner(), iter(range(5)), iter([0.0, 1.0, 3.0, 6.0, 10.0])
    finish = tuner.timed(None, clock.__next__)
    rng = LoaderRng(GeneratorLease(lock=FairSharedLock()))
    context = LoadContext(label="train_dl", control=RunControl(), rng=rng, finish_transfer=finish)
    source = InlineSource(context, numbers.__next__)
    assert list(iter(source.fetch, END)) == list(range(5))
    assert tuner.added == [1.0, 2.0, 3.0, 4.0]
    assert source.close() == []
