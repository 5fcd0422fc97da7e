"""The runs that are logged in a directory, followed from another process as they go.

Owns how far a log was read. Gives the events of the runs, the same as in the process that trains
(but those of best scores and snapshots), each once, in order. Waits for nothing and prints nothing.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from fitloop._durable import reason
from fitloop._errors import CheckpointError
from fitloop._events import BatchProgress, EpochStarted, Event, PhaseEnded, RunEnded
from fitloop._logrecords import check_head, event_in, records_in, run_in
from fitloop._metriclog import LOG_NAME, unreadable

_HEAD_BYTES = 16
"""enough to tell one log from the next: they begin with a checksum that covers the time"""


class Told(NamedTuple):
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
        self._passing = b""
        """the record at the offset, which another may have taken the place of by now"""
        self._trainer = ""
        self._began = 0.0
        self._ended: dict[str, Any] = {}
        """what the phases of the epoch have returned"""

    def poll(self) -> list[Told]:
        """Return what happened since the last call; nothing while there is no log.

        Raises:
            CheckpointError: the file is no log, or cannot be read.
        """
        try:
            told = [] if self._file is None else self._read()
            if self._reopen():
                told += self._read()
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {reason(error)}") from error
        except Exception as error:  # whatever a forged record makes of it
            raise unreadable(self.path, error) from error
        if self.has_ended or os.name == "nt":
            self.close()
        return told

    def close(self) -> None:
        """Let go of the file; `poll` opens it again when it has changed."""
        if self._file is not None:
            self._identity = _identity(os.fstat(self._file.fileno()), closed=True)
            self._file.close()
            self._file = None

    def _reopen(self) -> bool:
        """Open the log if there is another one than was read, or more of one that was closed."""
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        if _identity(status, closed=self._file is None) == self._identity:
            return False
        if not self.path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{self.path} cannot be read: it is no file")
        if self._file is not None:
            self._file.close()
            self._file = None
        try:
            self._file = FileIO(self.path)
        except FileNotFoundError:  # just now
            return False
        self._identity = _identity(os.fstat(self._file.fileno()), closed=False)
        head = self._file.read(_HEAD_BYTES)
        if head != self._head:
            self._head, self._offset, self._passing = head, 0, b""
        return True

    def _read(self) -> list[Told]:
        assert self._file is not None
        self._file.seek(self._offset)
        data = self._file.readall()
        told: list[Told] = []
        start = 0
        for record, end in records_in(data):
            raw = data[start:end]
            passes = False
            if self._offset + start == 0:
                told += self._begin(record)
            elif raw != self._passing:
                new = self._take(record)
                passes = isinstance(new.event, BatchProgress)
                told.append(new)
            else:
                passes = True
            self._passing = raw if passes else b""
            start = end
        if self._offset + start == 0 and data:
            check_head(None)
        # One that passes is looked at again: the next one may be in its place.
        self._offset += start - len(self._passing)
        return told

    def _begin(self, head: Any) -> list[Told]:
        check_head(head)
        self._ended = {}
        found = run_in(head)
        if found is None:
            return []
        run, started = found
        if run.began == self._began and not self.has_ended:
            return []  # it went back to an earlier epoch, and logs on from there
        self._trainer, self._began, self.has_ended = started.trainer, run.began, False
        return [Told(started, run.began)]

    def _take(self, record: Any) -> Told:
        event, at = event_in(record, self._trainer, self._ended)
        if isinstance(event, EpochStarted):
            self._ended = {}
        elif isinstance(event, PhaseEnded):
            self._ended[str(event.phase)] = event.metrics
        elif isinstance(event, RunEnded):
            self.has_ended = True
        return Told(event, at)


def _identity(status: os.stat_result, *, closed: bool) -> tuple[int, ...]:
    """Return what a file that is another one, or was written to while it was closed, differs in.

    The number of a file that was removed may be given to the next one, unless it is kept open.
    """
    own = (status.st_dev, status.st_ino)
    return (*own, status.st_size, status.st_mtime_ns) if closed else own
