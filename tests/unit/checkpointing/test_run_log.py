"""What a run writes into its log, in which order and how often, and what a broken disk does."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.made_up_runs import (
    IN_FIT,
    FakeRun,
    epoch_ended,
    epoch_events,
    epoch_started,
    phase_ended,
    phase_started,
    progress,
    run_ended,
    run_started,
)

from fitloop import (
    BestImproved,
    CheckpointError,
    EarlyStopped,
    Event,
    History,
    PromptAnswered,
    PromptAsked,
    SnapshotFailed,
    WentBack,
    read_metrics,
)
from fitloop._checkpointing.run_log import PROGRESS_SECONDS
from fitloop._storage.durable import LOG_NAME
from fitloop._storage.log_follower import LogFollower, TimedEvent
from fitloop._storage.metric_log import PROGRESS_NAME

ASKED = PromptAsked(
    **IN_FIT, epoch=1, epoch_in_run=1, epochs=3, question="go on?", timeout=None, trains_on=True
)
ANSWERED = PromptAnswered(**IN_FIT, epoch=1, go_on=False)
WENT_BACK = WentBack(**IN_FIT, epoch=1, epoch_in_run=1)


class Clock:
    """Stands still."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def written(directory: Path) -> list[TimedEvent]:
    follower = LogFollower(directory)
    try:
        return follower.poll()
    finally:
        follower.close()


def events(directory: Path) -> list[Event]:
    return [told.event for told in written(directory)]


def contents(history: History) -> str:
    return repr(history.to_dict())


def test_log_when_a_run_goes_then_has_its_events_in_their_order(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    happened = [
        *epoch_events(1),
        ASKED,
        ANSWERED,
        *epoch_events(2),
        run_ended(2, stop_reason="prompt"),
    ]
    run.observe(*happened)
    assert events(tmp_path) == [run_started(), *happened]
    assert contents(read_metrics(tmp_path)) == contents(run.history)


def test_log_when_many_records_wait_for_the_disk_then_are_in_their_order(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.begin(50)
    happened = [event for number in range(1, 51) for event in epoch_events(number, 50)]
    for event in happened:  # not waiting for the writer
        run.log.observe(event)
    run.log.observe(run_ended(50))
    assert events(tmp_path) == [run_started(50), *happened, run_ended(50)]


def test_log_when_an_event_has_no_record_then_is_not_written(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    before = (tmp_path / LOG_NAME).read_bytes()
    run.observe(SnapshotFailed(**IN_FIT, epoch=1, batch=0, path="a", error="no space"))
    assert (tmp_path / LOG_NAME).read_bytes() == before


def test_log_when_an_epoch_is_the_best_or_the_last_then_says_so(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    told = [
        BestImproved(**IN_FIT, epoch=1, criteria="score", score=-0.5),
        EarlyStopped(**IN_FIT, epoch=1, metric="score", message="no better score"),
    ]
    for event in told:
        run.observe(event)
    run.observe(run_ended(1))
    assert events(tmp_path)[1:-1] == told


def test_log_when_a_run_ends_before_it_is_begun_then_is_left_alone(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    run.observe(*epoch_events(1), run_ended(1))
    before = (tmp_path / LOG_NAME).read_bytes()
    run.log = run._new()
    run.observe(run_started(), run_ended(0, stop_reason="failed", error="ValueError: mine"))
    assert (tmp_path / LOG_NAME).read_bytes() == before


def test_log_when_read_then_tells_when_things_happened(tmp_path: Path) -> None:
    clock = Clock()
    run = FakeRun(tmp_path, clock=clock)
    run.begin()
    clock.now += 10
    run.observe(epoch_started(1))
    clock.now += 5
    run.observe(run_ended(0))
    assert [told.at - 1_000_000 for told in written(tmp_path)] == [0, 10, 15]


# -- progress --------------------------------------------------------------------------------------


def test_progress_when_reported_often_then_is_written_at_most_once_a_second(
    tmp_path: Path,
) -> None:
    clock = Clock()
    run = FakeRun(tmp_path, clock=clock)
    run.begin()
    run.observe(epoch_started(1), phase_started(1))
    size = (tmp_path / LOG_NAME).stat().st_size
    batches: list[int] = []
    for batch in range(1, 101):  # ten in a second
        clock.now += PROGRESS_SECONDS / 10
        run.observe(progress(1, batch))
        last: Any = events(tmp_path)[-1]
        if last.kind == "batch_progress" and last.batch not in batches:
            batches.append(last.batch)
    assert 9 <= len(batches) <= 11
    assert batches[0] >= 10, "the start of the phase was written just before"
    assert min(b - a for a, b in itertools.pairwise(batches)) >= 10
    assert (tmp_path / LOG_NAME).stat().st_size == size
    run.observe(phase_ended(1), epoch_ended(1), run_ended(1))
    assert "batch_progress" not in {event.kind for event in events(tmp_path)}
    assert not (tmp_path / PROGRESS_NAME).exists()


def test_progress_when_the_clock_is_set_back_then_is_written_soon(tmp_path: Path) -> None:
    clock = Clock()
    run = FakeRun(tmp_path, clock=clock)
    run.begin()
    run.observe(epoch_started(1), phase_started(1))
    clock.now -= 3600
    run.observe(progress(1, 7))
    assert events(tmp_path)[-1] == progress(1, 7)


# -- going back ------------------------------------------------------------------------------------


def test_log_when_the_run_goes_back_then_is_begun_anew_with_what_is_left(tmp_path: Path) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    run.observe(*epoch_events(1), ASKED)
    kept = run.history.to_dict()
    run.observe(*epoch_events(2), ANSWERED)
    left = History()
    for event in (run_started(), *epoch_events(1)):
        left.observe(event)
    run.core.history = left
    run.log.observe(WENT_BACK)
    run.log.observe(run_ended(1, stop_reason="prompt"))
    assert repr(read_metrics(tmp_path).to_dict()) == repr(kept)
    assert events(tmp_path) == [run_started(), WENT_BACK, run_ended(1, stop_reason="prompt")]


# -- a disk that fails -----------------------------------------------------------------------------


class Disk:
    """Fails while it is broken."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.broken = False
        real = os.write

        def write(descriptor: int, data: Any) -> int:
            if self.broken:
                real(descriptor, bytes(data)[:7])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data)

        patch.setattr(os, "write", write)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


MESSAGE = "metrics.msgpack cannot be written: No space left on device"


def test_error_when_it_is_to_raise_then_the_next_event_does(tmp_path: Path, disk: Disk) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    run.observe(*epoch_events(1))
    disk.broken = True
    run.observe(epoch_started(2))
    with pytest.raises(CheckpointError, match=MESSAGE):
        run.observe(phase_started(2))
    run.observe(run_ended(1, stop_reason="failed"))  # which is not to hide the error
    assert events(tmp_path) == [run_started(), *epoch_events(1)]


def test_error_when_it_is_to_warn_then_is_told_once_and_the_next_run_has_a_log(
    tmp_path: Path, disk: Disk
) -> None:
    run = FakeRun(tmp_path, raises=False)
    run.begin()
    run.observe(*epoch_events(1))
    disk.broken = True
    run.observe(*epoch_events(2), *epoch_events(3))
    disk.broken = False
    run.observe(run_ended())
    failed = [event for event in run.told if isinstance(event, SnapshotFailed)]
    assert [event.path for event in failed] == [str(tmp_path / LOG_NAME)]
    assert MESSAGE in failed[0].error
    assert events(tmp_path) == [run_started(), *epoch_events(1)], "no gap, and nothing after one"
    run.begin()
    run.observe(*epoch_events(1))
    assert events(tmp_path) == [run_started(), *epoch_events(1)]
    assert contents(read_metrics(tmp_path)) == contents(run.history)


def test_error_when_only_the_end_cannot_be_written_then_the_run_does_not_fail(
    tmp_path: Path, disk: Disk
) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    run.observe(*epoch_events(1))
    disk.broken = True
    run.observe(run_ended(1))
    assert run.core.metric_log is None
    assert run.told == []
    assert events(tmp_path) == [run_started(), *epoch_events(1)]


def test_error_when_the_log_cannot_be_begun_then_is_raised(tmp_path: Path, disk: Disk) -> None:
    run = FakeRun(tmp_path)
    disk.broken = True
    with pytest.raises(CheckpointError, match=MESSAGE):
        run.begin()


def test_error_when_the_last_record_before_going_back_failed_then_is_raised(
    tmp_path: Path, disk: Disk
) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    disk.broken = True
    run.log.observe(ANSWERED)
    with pytest.raises(CheckpointError, match=MESSAGE):
        run.log.observe(WENT_BACK)


def test_end_when_there_can_be_no_more_threads_then_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FakeRun(tmp_path)
    run.begin()
    run.observe(*epoch_events(1))

    def refuse(_job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(run.writer, "submit", refuse)
    run.observe(run_ended(1))
    assert events(tmp_path)[-1] == run_ended(1)
