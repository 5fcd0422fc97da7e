"""`LogFollower`: the events of runs in another process, read from their log as it grows.

Owns the position up to which a log was read. Returns the same events as in the process that trains,
but those of best scores and snapshots, each once and in order. Never waits, and prints nothing.
"""

from __future__ import annotations

import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from fitloop._errors import CheckpointError
from fitloop._events import (
    BatchProgress,
    EpochStarted,
    Event,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    WentBack,
)
from fitloop._storage.durable import LOG_NAME, open_regular
from fitloop._storage.log_records import (
    RunInfo,
    check_head,
    decode_event,
    decode_progress,
    decode_run,
    iter_file_records,
)
from fitloop._storage.metric_log import read_progress, unreadable
from fitloop._types import Phase

_HEAD_BYTES = 16
"""first bytes that identify a log: they begin with a checksum that covers the time of the start"""


class TimedEvent(NamedTuple):
    """An event and its time, in seconds since 1970 by the clock of the process that trains."""

    event: Event
    at: float


class LogFollower:
    """Reads the events of the runs in one directory; `poll` returns the new ones.

    The log stays open while a run goes on, so that the last records can be read after the next run
    has replaced the file. On Windows an open file cannot be replaced: there it is opened at every
    `poll`.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME
        self.has_ended = True
        """whether no run goes on, according to the log"""
        self._file: FileIO | None = None
        self._identity: tuple[int, ...] = ()
        self._head = b""
        self._offset = 0
        self.run: RunInfo | None = None
        """the newest run whose start was returned"""
        self._status: os.stat_result | None = None
        """status of the file before it was last read"""
        self._trainer = ""
        self._epoch_metrics: dict[str, Any] = {}
        """metrics of the phases of the current epoch that have ended"""
        self._open_phase: tuple[int, Phase] | None = None
        """epoch number and phase that go on, up to the position in the log"""
        self._progress: tuple[BatchProgress, float] | None = None
        """the progress that was last returned, and its time"""

    def poll(self) -> list[TimedEvent]:
        """Return the events since the last call; none if there is no log.

        Raises:
            CheckpointError: the file is no log, or cannot be read.
        """
        try:
            # Before the read: a file that was replaced does not grow any more.
            has_changed = self._has_changed()
            events = [] if self._file is None else self._read()
            if has_changed and self._open():
                events += self._read()
            events += self._read_progress()
            if self.has_ended or os.name == "nt":
                self.close()
        except CheckpointError:
            raise
        except Exception as error:  # a forged record may raise anything
            raise unreadable(self.path, error) from error
        return events

    def close(self) -> None:
        """Close the file; `poll` opens it again when it has changed."""
        if self._file is not None:
            if self._status is not None:
                self._identity = _identity(self._status, closed=True)
            self._file.close()
            self._file = None

    def _has_changed(self) -> bool:
        """Return whether the log was replaced, or has changed since it was closed."""
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if _identity(status, closed=self._file is None) == self._identity:
            return False
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
            raise CheckpointError(f"{self.path} cannot be read: it is no file")
        return True

    def _open(self) -> bool:
        was_open = self._file is not None
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            self._file = FileIO(open_regular(self.path))
        except FileNotFoundError:  # it was removed just now
            return False
        self._identity = _identity(os.fstat(self._file.fileno()), closed=False)
        head = self._file.read(_HEAD_BYTES)
        if was_open or head != self._head:
            self._head, self._offset = head, 0
        return True

    def _read(self) -> list[TimedEvent]:
        assert self._file is not None
        self._status = os.fstat(self._file.fileno())
        self._file.seek(self._offset)
        events: list[TimedEvent] = []
        start = self._offset
        for record, end in iter_file_records(self._file.read):
            events += [self._decode(record)] if self._offset else self._start_run(record)
            self._offset = start + end
        if self._offset == 0:
            check_head(None)
        return events

    def _read_progress(self) -> list[TimedEvent]:
        """Return the newest progress of the current phase, unless it was returned before."""
        if self._open_phase is None or self.run is None:
            return []
        progress = decode_progress(read_progress(self.path.parent), self._trainer, self.run)
        if progress is None or progress == self._progress:
            return []
        event, _at = progress
        if (event.epoch, event.phase) != self._open_phase:
            return []  # the log was read up to another phase
        self._progress = progress
        return [TimedEvent(*progress)]

    def _start_run(self, head: Any) -> list[TimedEvent]:
        check_head(head)
        self._epoch_metrics, self._open_phase = {}, None
        run, started = decode_run(head)
        if self.run is not None and run.began == self.run.began and not self.has_ended:
            return []  # the run went back to an earlier epoch, and has a new log
        self._trainer, self.run, self.has_ended = started.trainer, run, False
        return [TimedEvent(started, run.began)]

    def _decode(self, record: Any) -> TimedEvent:
        call = "" if self.run is None else self.run.call
        event, at = decode_event(record, self._trainer, call, self._epoch_metrics)
        if isinstance(event, PhaseStarted):
            self._open_phase = event.epoch, event.phase
        elif isinstance(event, PhaseEnded | WentBack | RunEnded):
            self._open_phase = None
        if isinstance(event, EpochStarted):
            self._epoch_metrics = {}
        elif isinstance(event, PhaseEnded):
            self._epoch_metrics[str(event.phase)] = event.metrics
        elif isinstance(event, RunEnded):
            self.has_ended = True
        return TimedEvent(event, at)


def _identity(status: os.stat_result, *, closed: bool) -> tuple[int, ...]:
    """Return values that differ between two files, or two states of a file that was closed.

    For a closed file these include size and time: a new file may have the inode of a removed one.
    """
    inode = (status.st_dev, status.st_ino)
    return (*inode, status.st_size, status.st_mtime_ns) if closed else inode
