"""The metric log: a reader at any moment, and damaged logs."""

from __future__ import annotations

import os
import shutil
import threading
import tracemalloc
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from support.event_loops import HANG_TIMEOUT, plain_asyncio, threadsafe_scheduler
from support.models import batches, sync_trainer, trainer
from support.state_comparison import fingerprint

from fitloop import (
    Checkpoint,
    CheckpointError,
    History,
    Phase,
    PhaseEnded,
    RunStarted,
    Stage,
    read_metrics,
)
from fitloop._storage.durable import LOG_NAME
from fitloop._storage.layout import crc32, pack, unpack
from fitloop._storage.log_records import encode_event, encode_head
from fitloop._storage.metric_log import MetricLog

QUIET: dict[str, Any] = {"verbose": False}


def phase_ended(number: int, phase: Phase = Phase.TRAIN) -> PhaseEnded:
    return PhaseEnded(
        trainer="t",
        epoch=number,
        phase=phase,
        metrics={"loss": number / 3, "größe": float("nan")},
        start_metrics={"begun": -0.0},
        batch_metrics={"loss": array("d", [number, float("inf"), 1e-320])},
        batches=3,
        samples=3,
        seconds=0.1,
    )


EVENTS = [
    *(phase_ended(1), phase_ended(1, Phase.VALID), phase_ended(2), phase_ended(2, Phase.VALID)),
    *(phase_ended(2, Phase.TEST), phase_ended(3)),
]


def new_history() -> History:
    """Return the history of a trainer that has started two runs."""
    history = History()
    for call in ("fit", "test"):
        history.observe(RunStarted(trainer="t", call=call, epochs=1, first_epoch=1))
    return history


def written(directory: Path, events: list[Any]) -> MetricLog:
    log = MetricLog(directory)
    log.start(encode_head("t", new_history()))
    for event in events:
        log.append(encode_event(event) or b"")
    return log


def histories() -> list[Any]:
    """Return what a history is before and after each of the events."""
    history = new_history()
    states = [contents(history)]
    for event in EVENTS:
        history.observe(event)
        states.append(contents(history))
    return states


def contents(history: History) -> Any:
    return fingerprint(history.to_dict())


def test_log_when_read_after_every_event_then_is_the_history(tmp_path: Path) -> None:
    for count, expected in enumerate(histories()):
        written(tmp_path, EVENTS[:count])
        assert contents(read_metrics(tmp_path)) == expected
    assert contents(read_metrics(tmp_path / LOG_NAME)) == histories()[-1]
    assert contents(read_metrics(str(tmp_path))) == histories()[-1]


def test_log_when_begun_with_a_history_then_that_comes_first(tmp_path: Path) -> None:
    history = new_history()
    for event in EVENTS[:5]:
        history.observe(event)
    log = MetricLog(tmp_path)
    log.start(encode_head("t", history))
    for event in EVENTS[5:]:
        log.append(encode_event(event) or b"")
    assert contents(read_metrics(tmp_path)) == histories()[-1]


@pytest.mark.slow
def test_log_when_torn_at_any_byte_then_a_prefix_is_read(tmp_path: Path) -> None:
    log = written(tmp_path, EVENTS)
    data = log.path.read_bytes()
    head = len(encode_head("t", new_history()))
    expected = histories()
    ends = [head]
    for event in EVENTS:
        ends.append(ends[-1] + len(encode_event(event) or b""))
    assert ends[-1] == len(data)
    for length in range(len(data) + 1):
        log.path.write_bytes(data[:length])
        if length < head:
            with pytest.raises(CheckpointError, match="does not begin as a log"):
                read_metrics(tmp_path)
            continue
        number = sum(end <= length for end in ends) - 1
        assert contents(read_metrics(tmp_path)) == expected[number]


@pytest.mark.slow
def test_log_when_any_byte_is_flipped_then_a_prefix_or_an_error_comes(tmp_path: Path) -> None:
    log = written(tmp_path, EVENTS)
    data = log.path.read_bytes()
    prefixes = histories()
    for position in range(0, len(data), 2):
        damaged = bytearray(data)
        damaged[position] ^= 0x81
        log.path.write_bytes(damaged)
        try:
            state = contents(read_metrics(tmp_path))
        except CheckpointError:
            continue
        assert state in prefixes[:-1]


@pytest.mark.slow
@pytest.mark.parametrize("torn", [1, 40])
@pytest.mark.parametrize("resume", [False, True])
def test_log_when_a_dead_process_has_torn_it_then_a_new_one_writes_a_whole_one(
    tmp_path: Path, torn: int, resume: bool
) -> None:
    first = sync_trainer(save_path=tmp_path)
    first.fit(2, checkpoint=Checkpoint(), **QUIET)
    path = tmp_path / LOG_NAME
    path.write_bytes(path.read_bytes()[:-torn])
    second = sync_trainer(save_path=tmp_path)
    # Resumed it is the first fit, which had ended; else it begins a training of its own.
    checkpoint = Checkpoint(overwrite=not resume)
    second.fit(2, checkpoint=checkpoint, resume=resume, **QUIET)
    assert contents(read_metrics(tmp_path)) == contents(second.M)
    second.fit(1, checkpoint=checkpoint, **QUIET)
    second.test(**QUIET)
    assert contents(read_metrics(tmp_path)) == contents(second.M)
    assert second.M.train_runs == 2


def test_log_when_a_write_fails_halfway_then_what_comes_later_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = written(tmp_path, EVENTS[:2])
    write = os.write

    def fail(descriptor: int, data: Any) -> int:
        write(descriptor, bytes(data)[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(CheckpointError, match="cannot be written: No space left"):
            log.append(encode_event(EVENTS[2]) or b"")
    for event in EVENTS[2:]:
        log.append(encode_event(event) or b"")
    assert contents(read_metrics(tmp_path)) == histories()[-1]


def test_log_when_written_byte_by_byte_then_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, bytes(data)[:1]))
    written(tmp_path, EVENTS)
    assert contents(read_metrics(tmp_path)) == histories()[-1]


def test_log_when_read_while_another_thread_appends_then_readers_see_prefixes(
    tmp_path: Path,
) -> None:
    log = written(tmp_path, [])
    done = threading.Event()

    def append() -> None:
        for number in range(200):
            log.append(encode_event(phase_ended(number)) or b"")
        done.set()

    thread = threading.Thread(target=append)
    thread.start()
    counts = [0]
    while not done.is_set():
        values = read_metrics(tmp_path).train.stage(Stage.EPOCH_END)
        counts.append(len(values["loss"][0]) if "loss" in values else 0)
    thread.join()
    assert counts == sorted(counts)
    assert read_metrics(tmp_path).train.epoch_end["loss"][0].tolist() == [n / 3 for n in range(200)]


# -- forged ones -----------------------------------------------------------------------------------


def frame(packed: bytes) -> bytes:
    return pack([crc32(packed), packed])


@pytest.mark.parametrize(
    "tail", [b"\x92\xce\0\0\0\0\xc6\xff\xff\xff\xff", b"\x92\0\xc6\xff\xff\xff"]
)
def test_log_when_a_length_is_forged_then_no_memory_is_taken(tmp_path: Path, tail: bytes) -> None:
    log = written(tmp_path, EVENTS)
    with log.path.open("ab") as file:
        file.write(tail + b"x" * 50)
    tracemalloc.start()
    try:
        assert contents(read_metrics(tmp_path)) == histories()[-1]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "inner", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\x91" * 3000]
)
def test_log_when_a_record_is_forged_then_no_memory_is_taken(tmp_path: Path, inner: bytes) -> None:
    log = written(tmp_path, EVENTS)
    with log.path.open("ab") as file:
        file.write(frame(inner))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="cannot be read: a record is no plain msgpack"):
            read_metrics(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


RECORD: dict[str, Any] = {
    "kind": "phase_ended",
    "phase": "train",
    "epoch": 1,
    "metrics": {"loss": 1.0},
    "start_metrics": {},
    "batch_metrics": {"loss": b"\0" * 16},
}


@pytest.mark.parametrize(
    "record",
    [
        *(None, 1, [], {}, {"kind": "phase_ended"}, {"kind": None}, {"kind": "run_started"}),
        *(
            {**RECORD, "phase": "lunch"},
            {**RECORD, "metrics": 3},
            {**RECORD, "metrics": {"a": "b"}},
        ),
        *({**RECORD, "metrics": {"a": None}}, {**RECORD, "batch_metrics": {"a": b"123"}}),
        *({**RECORD, "batch_metrics": {"a": 5}}, {**RECORD, "batch_metrics": [1]}),
        *({**RECORD, "start_metrics": {"a": [1]}}, {**RECORD, "metrics": None}),
    ],
    ids=lambda record: f"{record!r:.60}",
)
def test_log_when_a_record_is_not_as_written_then_it_is_refused(
    tmp_path: Path, record: Any
) -> None:
    log = written(tmp_path, EVENTS)
    log.append(frame(pack(record)))
    with pytest.raises(CheckpointError, match=LOG_NAME):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.pop("history"),
        lambda head: head.update(version=2),
        lambda head: head.update(version=True),
        lambda head: head.update(kind="weights"),
        lambda head: head.update(format="other"),
        lambda head: head.update(history=[]),
        lambda head: head["history"].pop("valid"),
        lambda head: head["history"]["train"].update(runs="many"),
        lambda head: head["history"]["train"]["values"].update(epoch_end={"a": [[0, b"123"]]}),
        lambda head: head["history"]["train"]["values"].update(epoch_end={"a": [0]}),
    ],
)
def test_log_when_its_head_is_forged_then_it_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    log = MetricLog(tmp_path)
    head = unpack(unpack(encode_head("t", new_history()), "the head")[1], "the head")
    change(head)
    log.start(frame(pack(head)))
    with pytest.raises(CheckpointError, match=LOG_NAME):
        read_metrics(tmp_path)


def test_log_when_its_number_of_runs_is_forged_then_it_can_still_be_looked_at(
    tmp_path: Path,
) -> None:
    """Each run without values costs nothing in the file, and time and memory when it is read."""
    log = MetricLog(tmp_path)
    head = unpack(unpack(encode_head("t", new_history()), "the head")[1], "the head")
    head["history"]["train"].update(runs=2**60)
    log.start(frame(pack(head)))
    with pytest.raises(CheckpointError):
        read_metrics(tmp_path)


@pytest.mark.parametrize("what", ["nothing", "folder", "empty", "text", "snapshot"])
def test_log_when_it_is_none_then_an_error_names_it(tmp_path: Path, what: str) -> None:
    path = tmp_path / LOG_NAME
    if what == "folder":
        path.mkdir()
    elif what == "snapshot":
        sync_trainer(save_path=tmp_path).save("other").rename(path)
    elif what != "nothing":
        path.write_text("" if what == "empty" else "hello")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_metrics(tmp_path)


def test_log_when_it_is_a_pipe_then_it_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    os.mkfifo(path)
    raised: list[BaseException] = []

    def read() -> None:
        try:
            read_metrics(path)
        except CheckpointError as error:
            raised.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(HANG_TIMEOUT)
    waited = thread.is_alive()
    if waited:  # it is let go, with nothing to read
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
        thread.join()
    assert not waited
    assert "no file" in str(raised[0])


# -- of a trainer ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"save_to_disk": True}, {}], ids=["to disk", "checkpoints"])
def test_log_when_runs_follow_each_other_then_is_what_the_trainer_has(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    fitted = sync_trainer(save_path=tmp_path, seed=1, **changes)
    checkpoint = None if changes else Checkpoint()

    def check() -> None:
        assert contents(read_metrics(tmp_path)) == contents(fitted.M)

    fitted.fit(2, checkpoint=checkpoint, **QUIET)
    check()
    fitted.test(**QUIET)
    check()
    fitted.fit(1, checkpoint=checkpoint, valid_dl=batches(20), track_batch_metrics=False, **QUIET)
    check()
    fitted.fit(0, checkpoint=checkpoint, **QUIET)
    check()
    before = (tmp_path / LOG_NAME).read_bytes()
    fitted.run_sanity_check()
    assert (tmp_path / LOG_NAME).read_bytes() == before
    fitted.save("later", overwrite=True)
    fitted.load("later")
    fitted.fit(1, checkpoint=checkpoint, **QUIET)
    check()
    fitted.reset()
    fitted.fit(1, checkpoint=checkpoint, **QUIET)
    check()
    assert fitted.M.train_runs == 1


def failing_preloop(fail: list[bool]) -> Callable[[Any], None]:
    def preloop(_trainer: Any) -> None:
        if fail[0]:
            raise ValueError("on purpose")

    return preloop


def test_log_when_preloop_raises_then_later_runs_have_the_same_numbers(tmp_path: Path) -> None:
    fail = [False]
    fitted = sync_trainer(save_path=tmp_path, save_to_disk=True, preloop=failing_preloop(fail))
    fitted.fit(1, **QUIET)
    fail[0] = True
    with pytest.raises(ValueError, match="on purpose"):
        fitted.fit(1, **QUIET)
    fail[0] = False
    fitted.fit(1, **QUIET)
    assert contents(read_metrics(tmp_path)) == contents(fitted.M)
    assert read_metrics(tmp_path).train_runs == 3


def test_log_when_the_first_preloop_raises_then_the_next_run_begins_it(tmp_path: Path) -> None:
    fail = [True]
    fitted = sync_trainer(save_path=tmp_path, save_to_disk=True, preloop=failing_preloop(fail))
    with pytest.raises(ValueError, match="on purpose"):
        fitted.fit(1, **QUIET)
    fail[0] = False
    fitted.fit(1, **QUIET)
    assert contents(read_metrics(tmp_path)) == contents(fitted.M)


def test_log_when_metrics_are_cleared_between_runs_then_the_next_run_begins_it(
    tmp_path: Path,
) -> None:
    fitted = sync_trainer(save_path=tmp_path, save_to_disk=True)
    fitted.fit(1, **QUIET)
    fitted.M.clear()
    fitted.fit(1, **QUIET)
    assert contents(read_metrics(tmp_path)) == contents(fitted.M)


@plain_asyncio
async def test_log_when_a_run_is_cancelled_then_is_what_the_trainer_has(
    tmp_path: Path, anyio_backend: Any
) -> None:
    scope, call = anyio.CancelScope(), threadsafe_scheduler()

    def callback(event: Any) -> None:
        if event.kind == "phase_ended" and event.epoch == 2:
            call(scope.cancel)

    async def check() -> None:
        history = await anyio.to_thread.run_sync(read_metrics, tmp_path)
        assert contents(history) == contents(fitted.M)

    fitted = trainer(save_path=tmp_path, save_to_disk=True, callbacks=[callback])
    with scope:
        await fitted.fit(500, **QUIET)
    assert scope.cancelled_caught
    await check()
    await fitted.fit(1, **QUIET)
    await check()


def test_log_when_a_phase_ends_then_another_process_can_soon_read_it(tmp_path: Path) -> None:
    """A read during a run returns a prefix of the final values."""
    counts: list[int] = []

    def look(event: Any) -> None:
        if event.kind == "epoch_started" and event.epoch > 1:
            values = read_metrics(tmp_path).train.epoch_end
            counts.append(len(values["loss"][0]) if "loss" in values else 0)

    fitted = sync_trainer(save_path=tmp_path, save_to_disk=True, callbacks=[look])
    fitted.fit(5, **QUIET)
    assert all(count <= number + 1 for number, count in enumerate(counts))
    assert counts == sorted(counts)
    read = read_metrics(tmp_path).train.epoch_end["loss"].values
    assert np.array_equal(read, fitted.M.train.epoch_end["loss"].values)


def test_log_when_the_directory_is_removed_between_runs_then_the_next_run_makes_it(
    tmp_path: Path,
) -> None:
    fitted = sync_trainer(save_path=tmp_path / "s")
    fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
    shutil.rmtree(tmp_path / "s")
    fitted.fit(1, checkpoint=Checkpoint(), **QUIET)
    assert contents(read_metrics(tmp_path / "s")) == contents(fitted.M)
