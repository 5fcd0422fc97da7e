"""The queue, thread and failures of loggers, told of made-up trainings."""

from __future__ import annotations

import importlib
import pickle
import re
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from support.event_loops import HANG_TIMEOUT
from support.logged_events import Training, brief

from fitloop import ConfigurationError, LoggerWarning, Phase, RunEnded
from fitloop.loggers import CSV, JSONLines, LoggedRun, Logger, Row, RowKey
from fitloop.loggers.logger import check_installed

module: Any = importlib.import_module("fitloop.loggers.logger")


class Recorder(Logger):
    """Keeps what it is called with, and fails as long as `error` is set."""

    def __init__(self, known: Iterable[RowKey] = (), **options: Any) -> None:
        super().__init__(**options)
        self.known = list(known)
        self.cuts_rows = True
        self.calls: list[str] = []
        self.rows: list[Row] = []
        self.runs: dict[str, LoggedRun] = {}
        self.error: BaseException | None = None
        self.may_write = threading.Event()
        self.may_write.set()
        self.is_writing = threading.Event()
        self.threads: set[threading.Thread] = set()

    def start(self, run: LoggedRun) -> None:
        self.runs[run.id] = run
        self.calls.append("start")

    def written(self, run: LoggedRun) -> Iterable[RowKey]:
        self.calls.append("written")
        return self.known

    def cut(self, run: LoggedRun, step: int) -> bool:
        self.calls.append(f"cut {step}")
        self.rows = [row for row in self.rows if row.step <= step]
        return self.cuts_rows

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        self.threads.add(threading.current_thread())
        self.is_writing.set()
        assert self.may_write.wait(HANG_TIMEOUT)
        if self.error is not None:
            raise self.error
        self.rows += rows

    def sync(self, run: LoggedRun) -> None:
        self.calls.append(f"sync {len(self.rows)}")

    def end(self, run: LoggedRun, event: RunEnded) -> None:
        self.calls.append(f"end {event.stop_reason}")

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        return [brief(row) for row in self.rows]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)


def test_rows_when_a_training_is_told_then_have_the_names_of_phases_and_steps() -> None:
    logger = Recorder()
    Training(logger).start(sweep="runs", parameters={"lr": 0.1}).steps(2, loss=0.5).phase(
        4, phase=Phase.TRAIN, loss=0.25, accuracy=1.0
    ).phase(4, loss=0.5).end()
    assert [row.named() for row in logger.rows] == [
        {"train/loss_step": 0.5, "lr": 0.1},
        {"train/loss": 0.25, "train/accuracy": 1.0},
        {"valid/loss": 0.5},
    ]
    assert logger.keys == [("steps", "train", 2), ("phase", "train", 4), ("phase", "valid", 4)]
    assert logger.runs["0a1b2c3d4e"].parameters == {"lr": 0.1}
    assert logger.calls == ["start", "written", "end completed"]
    assert threading.current_thread() not in logger.threads
    assert not any(thread.is_alive() for thread in logger.threads)


def test_run_when_it_has_no_row_then_nothing_is_begun() -> None:
    logger = Recorder()
    Training(logger).start(4).end()
    assert logger.calls == []


def test_fits_when_one_follows_another_then_go_on_with_the_run() -> None:
    logger = Recorder(known=[RowKey("phase", "valid", 4)])
    logger.known = []
    training = Training(logger).start().phase(4).end()
    training.start(4, call="test").phase(4, phase=Phase.TEST).end()
    training.start(4).phase(8).end()
    assert [row.step for row in logger.rows] == [4, 4, 8]
    assert logger.calls.count("written") == 1
    assert not any(call.startswith("cut") for call in logger.calls)


def test_logger_when_it_is_slow_then_drops_rows_of_steps_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "QUEUE_LIMIT", 3)
    logger = Recorder()
    logger.may_write.clear()
    training = Training(logger).start().steps(1)
    assert logger.is_writing.wait(HANG_TIMEOUT)
    training.steps(2)
    for step in range(3, 10):
        training.steps(step).phase(step)
    opener = threading.Timer(0.0, logger.may_write.set)
    opener.start()
    with pytest.warns(LoggerWarning, match=r"too slow for 'net': \d rows of optimizer") as warned:
        training.end()
    opener.join()
    assert [key for key in logger.keys if key[0] == "phase"] == [
        ("phase", "valid", step) for step in range(3, 10)
    ]
    assert logger.keys[-2:] == [("steps", "train", 9), ("phase", "valid", 9)]
    steps = [key[2] for key in logger.keys if key[0] == "steps"]
    assert len(steps) < 9
    assert steps == sorted(set(steps))
    assert f" {9 - len(steps)} rows " in str(warned[0].message)


def test_logger_when_it_hangs_then_the_run_ends_with_a_warning() -> None:
    logger = Recorder(end_seconds=0.0)
    logger.may_write.clear()
    training = Training(logger).start().phase(4)
    assert logger.is_writing.wait(HANG_TIMEOUT)
    with pytest.warns(LoggerWarning, match="has not written the last rows of 'net' 0 s after"):
        training.end()
    logger.may_write.set()
    for thread in logger.threads:
        thread.join(HANG_TIMEOUT)
    assert logger.calls[-1] == "end completed"


def test_logger_when_it_fails_then_warns_once_and_tells_what_is_missing() -> None:
    logger = Recorder()
    logger.error = OSError(28, "No space left on device")
    training = Training(logger).start().phase(4)
    assert logger.is_writing.wait(HANG_TIMEOUT)
    with pytest.warns(LoggerWarning) as told:
        training.phase(8).end()
    messages = [str(one.message) for one in told]
    assert [m for m in messages if "it tries again" in m] == [
        "the logger Recorder cannot log 'net': OSError: [Errno 28] No space left on device; the "
        "training goes on, and it tries again"
    ]
    assert [m for m in messages if "could not write" in m] == [
        "the logger Recorder could not write the last 2 rows of 'net': OSError: [Errno 28] "
        "No space left on device"
    ]
    assert len(messages) == 2
    assert logger.calls[-1] == "end completed"


def test_logger_when_it_recovers_then_every_row_is_written_once() -> None:
    logger = Recorder()
    logger.error = ConnectionError("no server")
    training = Training(logger).start().phase(4)
    assert logger.is_writing.wait(HANG_TIMEOUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoggerWarning)
        logger.error = None
        training.phase(8).end()
    assert [row.step for row in logger.rows] == [4, 8]


def test_error_when_the_logger_is_to_raise_then_ends_the_training_at_an_event() -> None:
    logger = Recorder(on_error="raise")
    logger.error = OSError("no disk")
    training = Training(logger).start().phase(4)
    with pytest.raises(OSError, match="no disk") as caught:
        training.end()
    assert caught.value is logger.error
    assert caught.value.__notes__ == ["in the logger Recorder, for 'net'"]


def test_error_when_it_cannot_go_away_then_nothing_is_tried_again() -> None:
    logger = Recorder()
    logger.error = ConfigurationError("another path")
    training = Training(logger).start().phase(4)
    with pytest.warns(LoggerWarning, match=r"another path; .* nothing more is logged") as told:
        training.end()
    assert len(told) == 1


def test_exit_when_a_method_raises_it_then_is_a_failure() -> None:
    logger = Recorder()
    logger.error = SystemExit(3)
    training = Training(logger).start().phase(4)
    with pytest.warns(LoggerWarning, match="SystemExit: 3"):
        training.end()


def test_rows_when_a_run_is_resumed_then_come_once_and_later_ones_are_cut() -> None:
    known = [RowKey("steps", "train", 3), RowKey("phase", "valid", 4), RowKey("steps", "train", 6)]
    logger = Recorder(known)
    Training(logger).start(4, resumed=True).phase(4).steps(6).phase(8).end()
    assert logger.calls == ["start", "written", "cut 4", "end completed"]
    assert [row.step for row in logger.rows] == [6, 8]


def test_rows_when_they_cannot_be_cut_then_are_left_out_when_they_come_again() -> None:
    known = [RowKey("phase", "valid", 4), RowKey("steps", "train", 6)]
    logger = Recorder(known)
    logger.cuts_rows = False
    Training(logger).start(4, resumed=True).phase(4).steps(6).phase(8).end()
    assert [row.step for row in logger.rows] == [8]


def test_test_when_a_training_was_killed_later_then_cuts_nothing() -> None:
    logger = Recorder([RowKey("phase", "valid", 8)])
    Training(logger).start(4, call="test").phase(4, phase=Phase.TEST).end()
    assert "cut 4" not in logger.calls


def test_rows_when_training_is_undone_then_are_removed() -> None:
    logger = Recorder()
    training = Training(logger).start().phase(4).steps(6)
    logger.before_snapshot()
    training.go_back(4).end().start(4).steps(5).end()
    assert [row.step for row in logger.rows] == [4, 5]


def test_before_snapshot_when_it_returns_then_rows_are_written_and_durable() -> None:
    logger = Recorder()
    training = Training(logger).start().steps(1).steps(2)
    logger.before_snapshot()
    assert logger.calls[-1] == "sync 2"
    training.end()


def test_before_snapshot_when_the_logger_hangs_then_waits_once() -> None:
    logger = Recorder(end_seconds=0.0)
    logger.may_write.clear()
    training = Training(logger).start().steps(1)
    logger.before_snapshot()
    logger._end_seconds = 1e6  # the test would time out
    logger.before_snapshot()
    logger.may_write.set()
    training.end()
    assert logger.keys == [("steps", "train", 1)]


def test_before_snapshot_when_the_logger_fails_then_does_not_wait() -> None:
    logger = Recorder()
    logger.error = OSError("no disk")
    training = Training(logger).start().steps(1)
    logger.before_snapshot()
    with pytest.warns(LoggerWarning):
        training.end()


def test_runs_when_several_share_a_logger_then_each_has_its_own() -> None:
    logger = Recorder()
    first, second = Training(logger, "a", "aaaaaaaaaa"), Training(logger, "b", "bbbbbbbbbb")
    first.start().phase(4)
    second.start().phase(3).end()
    first.phase(8).end()
    assert {run.name for run in logger.runs.values()} == {"a", "b"}
    assert sorted(row.step for row in logger.rows) == [3, 4, 8]
    assert not any(thread.is_alive() for thread in logger.threads)


def test_runs_when_two_have_one_name_then_the_second_is_told_and_not_logged() -> None:
    logger = Recorder()
    first = Training(logger, "a", "aaaaaaaaaa").start()
    with pytest.warns(LoggerWarning, match="two trainers named 'a' at once"):
        Training(logger, "a", "bbbbbbbbbb").start()
    first.phase(4).end()
    assert list(logger.runs) == ["aaaaaaaaaa"]


def test_logger_when_pickled_then_its_copy_has_its_arguments_and_no_runs() -> None:
    logger = Plain(end_seconds=3.0, parameters={"a": 1})
    training = Training(logger).start().phase(4)
    copy: Plain = pickle.loads(pickle.dumps(logger))
    Training(copy).start().phase(8).end()
    training.end()
    assert copy._end_seconds == 3.0


class Plain(Logger):
    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (Plain, {"on_error": "ignore"}, "on_error is 'ignore'; expected 'warn' or 'raise'"),
        (Plain, {"end_seconds": -1}, "end_seconds is -1; expected 0 or more"),
        (Plain, {"end_seconds": True}, "end_seconds is True; expected a number"),
        (Plain, {"parameters": 3}, "parameters is 3; expected a dict of values by name, or None"),
        (JSONLines, {"parameters": {1: 2}}, "parameters is {1: 2}; expected a dict"),
        (JSONLines, {"path": 3}, "path is 3; expected a path, or None"),
        (CSV, {"path": b"logs"}, "path is b'logs'; expected a path, or None"),
    ],
)
def test_option_when_it_cannot_work_then_is_refused(
    kind: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        kind(**options)


@pytest.mark.parametrize(
    ("kind", "option", "said"),
    [
        (CSV, "pth", "CSV() has no argument 'pth'; did you mean 'path'?"),
        (JSONLines, "on_eror", "JSONLines() has no argument 'on_eror'; did you mean 'on_error'?"),
        (Plain, "on_eror", "Plain() has no argument 'on_eror'; did you mean 'on_error'?"),
        (CSV, "zzz", "CSV() has no argument 'zzz'; expected one of path, on_error, end_seconds"),
    ],
)
def test_option_when_unknown_then_the_error_names_the_one_that_is_meant(
    kind: Any, option: str, said: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        kind(**{option: 1})


def test_library_when_missing_then_the_error_says_what_to_type() -> None:
    with pytest.raises(ConfigurationError, match="with `pip install no_such`"):
        check_installed("no_such")
