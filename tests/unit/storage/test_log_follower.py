"""Following a log from another process: each event once and in order, whenever it is looked at."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.event_loops import HANG_TIMEOUT
from support.made_up_runs import (
    IN_FIT,
    epoch_ended,
    epoch_events,
    epoch_started,
    phase_ended,
    phase_started,
    progress,
    run_ended,
    run_started,
)

from fitloop import BatchProgress, CheckpointError, Event, History, Phase, PromptAsked, WentBack
from fitloop._storage.durable import LOG_NAME
from fitloop._storage.layout import crc32, pack, unpack
from fitloop._storage.log_follower import LogFollower, TimedEvent
from fitloop._storage.log_records import RunInfo, encode_event, encode_head, encode_progress
from fitloop._storage.metric_log import PROGRESS_NAME, MetricLog

ASKED = PromptAsked(**IN_FIT, epoch=1, epoch_in_run=1, epochs=3, question="go on?")
WENT_BACK = WentBack(**IN_FIT, epoch=1, epoch_in_run=1)


def run_info(began: float) -> RunInfo:
    return RunInfo("fit", 3, 1, 0, began)


def head(began: float) -> bytes:
    return encode_head("t", History(), run_info(began))


def record(event: Event, at: float = 2.0) -> bytes:
    encoded = encode_event(event, at)
    assert encoded is not None
    return encoded


def frame(contents: Any) -> bytes:
    packed = pack(contents)
    return pack([crc32(packed), packed])


class Log:
    """The log of a run, with a follower."""

    def __init__(self, directory: Path) -> None:
        self.log = MetricLog(directory)
        self.path = self.log.path
        self.follower = LogFollower(directory)

    def begin(self, began: float = 1.0) -> None:
        self.run = run_info(began)
        self.log.start(head(began))

    def append(self, *events: Event) -> None:
        for event in events:
            if isinstance(event, BatchProgress):
                self.log.write_progress(encode_progress(event, 2.0, self.run))
            else:
                self.log.append(record(event))

    def poll(self) -> list[Event]:
        return [item.event for item in self.follower.poll()]


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    log.follower.close()


# -- a run -----------------------------------------------------------------------------------------


def test_follower_when_there_is_no_log_then_tells_nothing_until_there_is(log: Log) -> None:
    assert log.poll() == []
    log.begin()
    assert log.poll() == [run_started()]
    assert log.poll() == []


def test_follower_when_the_directory_is_a_file_then_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert LogFollower(tmp_path / "file").poll() == []


def test_follower_when_a_run_goes_then_tells_each_event_once_with_its_time(log: Log) -> None:
    log.begin(1.5)
    assert log.follower.poll() == [TimedEvent(run_started(), 1.5)]
    for event in (*epoch_events(1), *epoch_events(2), run_ended(2)):
        log.append(event)
        assert log.follower.poll() == [TimedEvent(event, 2.0)]
        assert log.follower.poll() == []
    assert log.follower.has_ended


def test_follower_when_a_phase_has_ended_then_has_its_batch_values(log: Log) -> None:
    log.begin()
    log.append(phase_ended(3))
    event: Any = log.poll()[-1]
    assert event.batch_metrics == phase_ended(3).batch_metrics


def test_follower_when_a_record_is_written_byte_by_byte_then_tells_it_when_whole(log: Log) -> None:
    log.begin()
    log.poll()
    data = record(phase_ended(1))
    for index in range(len(data)):
        with log.path.open("ab") as file:
            file.write(data[index : index + 1])
        assert log.poll() == ([phase_ended(1)] if index == len(data) - 1 else [])


# -- progress --------------------------------------------------------------------------------------


def test_follower_when_the_progress_file_is_replaced_then_returns_each_content_once(
    log: Log,
) -> None:
    log.begin()
    log.append(epoch_started(1), phase_started(1))
    log.poll()
    size = log.path.stat().st_size
    for batch in (10, 11, 120):
        log.append(progress(1, batch))
        assert log.poll() == [progress(1, batch)]
        assert log.poll() == []
    assert log.path.stat().st_size == size
    log.append(progress(1, 121), progress(1, 122), phase_ended(1))
    assert log.poll() == [phase_ended(1)]


@pytest.mark.parametrize("stale", [progress(1, 5), progress(2, 5, Phase.VALID), progress(3, 5)])
def test_follower_when_progress_is_not_of_the_current_phase_then_ignores_it(
    log: Log, stale: BatchProgress
) -> None:
    log.begin()
    log.append(stale, epoch_started(2), phase_started(2))
    assert log.poll() == [run_started(), epoch_started(2), phase_started(2)]
    log.append(progress(2, 5))
    assert log.poll() == [progress(2, 5)]


def test_follower_when_progress_is_of_another_run_then_ignores_it(log: Log) -> None:
    log.begin(1.0)
    log.append(epoch_started(1), phase_started(1))
    log.poll()
    log.log.write_progress(encode_progress(progress(1, 5), 2.0, run_info(9.0)))
    assert log.poll() == []


def test_follower_when_a_question_is_asked_within_a_phase_then_still_returns_progress(
    log: Log,
) -> None:
    log.begin()
    log.append(epoch_started(2), phase_started(2), ASKED)
    log.poll()
    log.append(progress(2, 5))
    assert log.poll() == [progress(2, 5)]


def test_log_when_started_then_the_progress_of_the_run_before_is_removed(log: Log) -> None:
    log.begin()
    log.append(progress(1, 5))
    log.begin()
    assert not (log.path.parent / PROGRESS_NAME).exists()


def test_follower_when_the_progress_file_is_torn_then_waits_for_a_whole_one(log: Log) -> None:
    log.begin()
    log.append(epoch_started(1), phase_started(1))
    log.poll()
    old, new = (encode_progress(progress(1, batch), 2.0, run_info(1.0)) for batch in (10, 11))
    path = log.path.parent / PROGRESS_NAME
    for end in range(1, len(new)):
        torn = new[:end] + old[end:]
        path.write_bytes(torn)
        if torn not in (old, new):
            assert log.poll() == []
    path.write_bytes(new)
    assert log.poll() == [progress(1, 11)]


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"hello", b"\x92" * 100, os.urandom(10_000), b"\x92\x01\xc4\x00"),
        frame(None),
        frame({"kind": "batch_progress"}),
        frame({"kind": "batch_progress", "began": 1.0}),
        frame({"kind": ["batch_progress"], "began": 1.0}),
        record(progress(1, 10)),
    ],
    ids=len,
)
def test_follower_when_the_progress_file_is_forged_then_ignores_it(log: Log, data: bytes) -> None:
    log.begin()
    log.append(epoch_started(1), phase_started(1))
    log.poll()
    (log.path.parent / PROGRESS_NAME).write_bytes(data)
    assert log.poll() == []


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_follower_when_the_progress_file_is_no_file_then_ignores_it_and_does_not_wait(
    log: Log, make: Callable[[Path], None]
) -> None:
    log.begin()
    log.append(epoch_started(1), phase_started(1))
    make(log.path.parent / PROGRESS_NAME)
    assert log.poll() == [run_started(), epoch_started(1), phase_started(1)]


def test_follower_when_an_earlier_fitloop_logs_progress_then_returns_it(log: Log) -> None:
    """Earlier versions appended progress to the log, and overwrote it if it was the last record."""
    log.begin()
    log.append(epoch_started(1), phase_started(1))
    log.log.append(record(progress(1, 10)))
    log.poll()
    data = log.path.read_bytes()
    replaced = data.removesuffix(record(progress(1, 10))) + record(progress(1, 11))
    log.path.write_bytes(replaced)
    assert log.poll() == []
    log.append(phase_ended(1))
    assert log.poll() == [phase_ended(1)]
    assert [event.kind for event in read_at_end(replaced)][-1] == "batch_progress"


# -- one file after the other ----------------------------------------------------------------------


def test_follower_when_the_next_run_has_its_place_then_tells_the_end_of_the_one_before(
    log: Log,
) -> None:
    log.begin(1.0)
    log.append(*epoch_events(1))
    log.poll()
    log.append(*epoch_events(2), run_ended(2))
    log.begin(9.0)
    log.append(epoch_started(1))
    assert log.poll() == [*epoch_events(2), run_ended(2), run_started(), epoch_started(1)]


def test_follower_when_the_file_is_replaced_while_it_looks_then_loses_nothing(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.begin(1.0)
    log.poll()
    read = log.follower._read
    late: list[Callable[[], None]] = [
        lambda: log.append(run_ended(0)),
        lambda: log.begin(9.0),
    ]

    def reads() -> list[TimedEvent]:
        received = read()
        while late:
            late.pop(0)()
        return received

    monkeypatch.setattr(log.follower, "_read", reads)
    received = log.poll()
    while more := log.poll():
        received += more
    assert received == [run_ended(0), run_started()]


def test_follower_when_more_is_written_just_before_it_lets_go_then_reads_it_later(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows the follower opens the file for every read."""
    log.begin(1.0)
    log.poll()
    log.append(epoch_started(1))
    log.follower.close()
    assert log.poll() == [epoch_started(1)]
    log.follower.close()
    assert log.poll() == []


def test_follower_when_a_run_has_ended_then_keeps_no_file_open_and_tells_the_next(log: Log) -> None:
    log.begin(1.0)
    log.append(run_ended(0))
    assert log.poll() == [run_started(), run_ended(0)]
    if Path("/proc/self/fd").exists():
        files = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        assert str(log.path.resolve()) not in files
    assert log.poll() == []
    log.begin(2.0)
    assert log.poll() == [run_started()]
    assert not log.follower.has_ended


def test_follower_when_a_run_died_then_tells_of_the_one_that_goes_on(log: Log) -> None:
    log.begin(1.0)
    log.append(*epoch_events(1))
    log.poll()
    log.log.start(encode_head("t", History(), RunInfo("fit", 3, 2, 1, 5.0)))
    [started] = log.follower.poll()
    assert (started.at, started.event.kind) == (5.0, "run_started")
    assert log.follower.run == RunInfo("fit", 3, 2, 1, 5.0)


def test_follower_when_the_run_goes_back_then_it_is_not_told_to_begin_again(log: Log) -> None:
    log.begin(1.0)
    log.append(*epoch_events(1), *epoch_events(2))
    log.poll()
    log.append(epoch_started(3))
    log.begin(1.0)
    log.append(WENT_BACK, run_ended(1))
    assert log.poll() == [epoch_started(3), WENT_BACK, run_ended(1)]


def test_follower_when_the_log_is_removed_then_reads_on_and_tells_of_the_next(log: Log) -> None:
    log.begin(1.0)
    log.poll()
    log.path.unlink()
    assert log.poll() == []
    log.begin(2.0)
    assert log.poll() == [run_started()]


# -- whenever it looks -----------------------------------------------------------------------------


@st.composite
def files(draw: st.DrawFn) -> list[tuple[float, list[Event]]]:
    """Return successive logs of one directory: the start of each run, and its events."""
    logs: list[tuple[float, list[Event]]] = []
    began = 1.0
    for _ in range(draw(st.integers(1, 4))):
        goes_on = bool(logs) and draw(st.booleans()) and logs[-1][1][-1:] != [run_ended()]
        began += 0.0 if goes_on else 1.0
        events: list[Event] = [WENT_BACK] if goes_on else []
        for number in range(1, draw(st.integers(1, 3)) + 1):
            batches = draw(st.lists(st.integers(1, 199), max_size=4, unique=True).map(sorted))
            events += epoch_events(number, batches=tuple(batches))
        if draw(st.booleans()):
            events.append(run_ended())
        else:
            events = events[: draw(st.integers(len(events) - 3, len(events)))]
        logs.append((began, events))
    return logs


@contextmanager
def in_pieces(look: Callable[[], None], draw: Callable[[int], int]) -> Iterator[None]:
    """Split every write in two, and call ``look`` between the two."""
    with pytest.MonkeyPatch.context() as patch:
        write = os.write

        def some(descriptor: int, data: Any) -> int:
            count = write(descriptor, bytes(data)[: 1 + draw(len(data) - 1)])
            look()
            return count

        patch.setattr(os, "write", some)
        yield


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(files(), st.integers(0, 2**32), st.sampled_from([0.02, 0.2, 0.7]))
def test_follower_when_it_looks_at_any_moments_then_tells_what_a_reader_at_the_end_would(
    story: list[tuple[float, list[Event]]], seed: int, often: float
) -> None:
    random = Random(seed)
    received: list[Event] = []
    expected: list[Event] = []
    written: list[Event] = []
    with TemporaryDirectory() as directory:
        log = Log(Path(directory))
        looked: set[int] = set()
        logs: list[bytes] = []

        def look(always: bool = False) -> None:
            if always or random.random() < often:
                looked.add(len(logs))
                received.extend(log.poll())

        with in_pieces(look, lambda most: random.randint(0, most)):
            for began, events in story:
                log.begin(began)
                logs.append(log.path.read_bytes())
                for event in events:
                    log.append(event)
                    look()
                logs[-1] = log.path.read_bytes()
        look(always=True)
        last = 0.0
        for number, (began, events) in enumerate(story):
            written += events
            if number + 1 in looked:  # else nobody can know of it
                at_end = read_at_end(logs[number])
                expected += at_end[1 if began == last else 0 :]
                last = began
        log.follower.close()
    assert lasting(received) == lasting(expected)
    passed = [event for event in received if isinstance(event, BatchProgress)]
    remaining = iter(written)
    assert all(event in remaining for event in passed), "in their order, and none twice"


def lasting(events: list[Event]) -> list[Event]:
    return [event for event in events if not isinstance(event, BatchProgress)]


def read_at_end(data: bytes) -> list[Event]:
    with TemporaryDirectory() as directory:
        Path(directory, LOG_NAME).write_bytes(data)
        follower = LogFollower(Path(directory))
        try:
            return [item.event for item in follower.poll()]
        finally:
            follower.close()


# -- forged ones -----------------------------------------------------------------------------------


def plain(data: bytes) -> dict[str, Any]:
    contents: dict[str, Any] = unpack(unpack(data, "it")[1], "it")
    return contents


def refused(log: Log) -> None:
    for _ in range(2):  # and it stays so
        with pytest.raises(CheckpointError, match=LOG_NAME):
            log.poll()


@pytest.mark.parametrize(
    ("event", "change"),
    [
        (epoch_started(1), {"epoch": -1}),
        (epoch_started(1), {"epoch_in_run": "1"}),
        (epoch_started(1), {"epochs": None}),
        (epoch_started(1), {"at": None}),
        (epoch_started(1), {"at": float("nan")}),
        (epoch_started(1), {"at": float("-inf")}),
        (epoch_started(1), {"at": 1e300}),
        (phase_started(1), {"phase": "lunch"}),
        (phase_started(1), {"batches": 1.5}),
        (progress(1, 2), {"seconds": float("inf")}),
        (progress(1, 2), {"seconds": -1.0}),
        (progress(1, 2), {"batch": True}),
        (phase_ended(1), {"metrics": {"loss": "much"}}),
        (phase_ended(1), {"metrics": [1]}),
        (phase_ended(1), {"batch_metrics": {"loss": b"123"}}),
        (epoch_ended(1), {"complete": 1}),
        (ASKED, {"question": 3}),
        (run_ended(), {"error": 3}),
        (run_ended(), {"stop_reason": None}),
        (run_ended(), {"kind": "run_started"}),
        (run_ended(), {"kind": ["run_ended"]}),
    ],
    ids=lambda value: value.kind if isinstance(value, Event) else f"{value!r:.40}",
)
def test_follower_when_a_record_is_forged_then_refuses_it(
    log: Log, event: Event, change: dict[str, Any]
) -> None:
    log.begin()
    log.poll()
    log.log.append(frame({**plain(record(event)), **change}))
    refused(log)


NEWER_FIELDS = {"call", "step", "error", "restored_epoch"}
"""fields that have a default, since records of earlier versions lack them"""


def test_follower_when_records_are_of_an_earlier_version_then_reads_them(log: Log) -> None:
    log.begin()
    for event in (progress(1, 3), run_ended()):
        contents = plain(record(event))
        for name in (*NEWER_FIELDS, "metrics", "learning_rates"):
            contents.pop(name, None)
        log.log.append(frame(contents))
    _started, batches, ended = (event for event, _at in log.follower.poll())
    assert isinstance(batches, BatchProgress)
    assert (batches.call, batches.step, batches.metrics) == ("fit", 0, {})
    assert ended == replace(run_ended(), step=0)


@pytest.mark.parametrize("missing", sorted(plain(record(run_ended())).keys() - NEWER_FIELDS))
def test_follower_when_a_record_lacks_something_then_refuses_it(log: Log, missing: str) -> None:
    log.begin()
    contents = plain(record(run_ended()))
    del contents[missing]
    log.log.append(frame(contents))
    refused(log)


@pytest.mark.parametrize("contents", [None, 1, [], {}, "text", {"at": 1.0}], ids=repr)
def test_follower_when_a_record_is_none_then_refuses_it(log: Log, contents: Any) -> None:
    log.begin()
    log.log.append(frame(contents))
    refused(log)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.pop("run"),
        lambda head: head.pop("trainer"),
        lambda head: head.update(version=2),
        lambda head: head.update(format="other"),
        lambda head: head.update(run=[]),
        lambda head: head["run"].pop("call"),
        lambda head: head["run"].update(epochs=-1),
        lambda head: head["run"].update(epochs=True),
        lambda head: head["run"].update(began=float("inf")),
        lambda head: head["run"].update(began="today"),
    ],
)
def test_follower_when_the_head_is_forged_then_refuses_it(
    log: Log, change: Callable[[dict[str, Any]], object]
) -> None:
    contents = plain(head(1.0))
    change(contents)
    log.log.start(frame(contents))
    refused(log)


@pytest.mark.parametrize("data", [b"", b"hello", head(1.0)[:-1], b"\x92" * 100], ids=len)
def test_follower_when_the_file_is_no_log_then_refuses_it(log: Log, data: bytes) -> None:
    log.path.write_bytes(data)
    refused(log)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_follower_when_the_log_is_no_file_then_refuses_it_and_does_not_wait(
    log: Log, make: Callable[[Path], None]
) -> None:
    make(log.path)
    raised: list[BaseException] = []

    def poll() -> None:
        try:
            log.poll()
        except CheckpointError as error:
            raised.append(error)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    thread.join(HANG_TIMEOUT)
    assert not thread.is_alive()
    assert "it is no file" in str(raised[0])


def test_follower_when_text_would_command_a_terminal_then_it_is_taken_out(log: Log) -> None:
    log.begin()
    log.append(run_ended(0, stop_reason="failed", error="ValueError: \x1b[2Jtwo\nlines\x07"))
    event: Any = log.poll()[-1]
    assert event.error == "ValueError:  [2Jtwo lines "
