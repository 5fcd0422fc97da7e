"""The runs that are logged in a directory, followed from another process as they go.

Owns how far a log was read. Gives the events of the runs, the same as in the process that trains
(but those of best scores and snapshots), each once, in order. Waits for nothing and prints nothing.
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
from fitloop._storage.durable import reason
from fitloop._storage.log_records import (
    RunInfo,
    check_head,
    decode_event,
    decode_progress,
    decode_run,
    iter_records,
)
from fitloop._storage.metric_log import LOG_NAME, read_progress, unreadable
from fitloop._types import Phase

_HEAD_BYTES = 16
"""enough to tell one log from the next: they begin with a checksum that covers the time"""


class TimedEvent(NamedTuple):
    """An event, and when it happened: seconds since 1970, by the clock of who trained."""

    event: Event
    at: float


class LogFollower:
    """The events of the runs in one directory; `poll` gives the new ones.

    The file is kept open while a run goes on, so that its last records are read although the next
    run has put another file in its place. On Windows, where that would keep it from doing so, it is
    opened anew each time.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME
        self.has_ended = True
        """no run is going on, as far as the log tells"""
        self._file: FileIO | None = None
        self._identity: tuple[int, ...] = ()
        self._head = b""
        self._offset = 0
        self.run: RunInfo | None = None
        """the run that was last told of"""
        self._status: os.stat_result | None = None
        """of the file, before it was read last"""
        self._trainer = ""
        self._ended: dict[str, Any] = {}
        """what the phases of the epoch have returned"""
        self._open_phase: tuple[int, Phase] | None = None
        """epoch and phase that go on, as far as the log was read"""
        self._progress: tuple[BatchProgress, float] | None = None
        """the progress that was returned last, and its time"""

    def poll(self) -> list[TimedEvent]:
        """Return what happened since the last call; nothing while there is no log.

        Raises:
            CheckpointError: the file is no log, or cannot be read.
        """
        try:
            # Asked first: nothing is added to a file once another is in its place.
            another = self._is_another()
            told = [] if self._file is None else self._read()
            if another and self._open():
                told += self._read()
            told += self._read_progress()
            if self.has_ended or os.name == "nt":
                self.close()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {reason(error)}") from error
        except Exception as error:  # whatever a forged record makes of it
            raise unreadable(self.path, error) from error
        return told

    def close(self) -> None:
        """Let go of the file; `poll` opens it again when it has changed."""
        if self._file is not None:
            if self._status is not None:
                self._identity = _identity(self._status, closed=True)
            self._file.close()
            self._file = None

    def _is_another(self) -> bool:
        """Return whether there is another log than was read, or more of one that was closed."""
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if _identity(status, closed=self._file is None) == self._identity:
            return False
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{self.path} cannot be read: it is no file")
        return True

    def _open(self) -> bool:
        kept_open = self._file is not None
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            self._file = FileIO(self.path)
        except FileNotFoundError:  # just now
            return False
        self._identity = _identity(os.fstat(self._file.fileno()), closed=False)
        head = self._file.read(_HEAD_BYTES)
        if kept_open or head != self._head:
            self._head, self._offset = head, 0
        return True

    def _read(self) -> list[TimedEvent]:
        assert self._file is not None
        self._status = os.fstat(self._file.fileno())
        self._file.seek(self._offset)
        data = self._file.readall()
        told: list[TimedEvent] = []
        start = self._offset
        for record, end in iter_records(data):
            told += [self._take(record)] if self._offset else self._begin(record)
            self._offset = start + end
        if self._offset == 0:
            check_head(None)
        return told

    def _read_progress(self) -> list[TimedEvent]:
        """Return the last progress of the phase that is going on, unless it was returned before."""
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

    def _begin(self, head: Any) -> list[TimedEvent]:
        check_head(head)
        self._ended, self._open_phase = {}, None
        run, started = decode_run(head)
        if self.run is not None and run.began == self.run.began and not self.has_ended:
            return []  # it went back to an earlier epoch, and logs on from there
        self._trainer, self.run, self.has_ended = started.trainer, run, False
        return [TimedEvent(started, run.began)]

    def _take(self, record: Any) -> TimedEvent:
        event, at = decode_event(record, self._trainer, self._ended)
        if isinstance(event, PhaseStarted):
            self._open_phase = event.epoch, event.phase
        elif isinstance(event, PhaseEnded | WentBack | RunEnded):
            self._open_phase = None
        if isinstance(event, EpochStarted):
            self._ended = {}
        elif isinstance(event, PhaseEnded):
            self._ended[str(event.phase)] = event.metrics
        elif isinstance(event, RunEnded):
            self.has_ended = True
        return TimedEvent(event, at)


def _identity(status: os.stat_result, *, closed: bool) -> tuple[int, ...]:
    """Return what a file that is another one, or was written to while it was closed, differs in.

    The number of a file that was removed may be given to the next one, unless it is kept open.
    """
    own = (status.st_dev, status.st_ino)
    return (*own, status.st_size, status.st_mtime_ns) if closed else own
