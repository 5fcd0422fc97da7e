"""The metrics of a trainer in a file that grows while it trains, for readers in any process.

Owns the file: a head with the history so far, then the records of what happened since, as
`_logrecords` makes them. A record that was not written to its end is no record: readers stop
before it. Every run begins the log anew, whole or not at all, so that nothing torn is ever
appended to.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fitloop._errors import CheckpointError
from fitloop._events import PhaseEnded
from fitloop._metrics.history import History, restore_history
from fitloop._public import public
from fitloop._storage.durable import reason, write_all, write_bytes
from fitloop._storage.layout import LayoutError
from fitloop._storage.log_records import check_head, decode_batch_metrics, event_kind, iter_records
from fitloop._types import Phase

LOG_NAME = "metrics.msgpack"
PROGRESS_NAME = ".fitloop.progress"

_LARGEST_PROGRESS = 4096  # bytes; a record takes less than 300
_BINARY = getattr(os, "O_BINARY", 0)


class MetricLog:
    """The log of one trainer, and the progress file beside it; keeps neither of them open."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOG_NAME
        self._progress_path = directory / PROGRESS_NAME

    def start(self, head: bytes) -> None:
        """Replace the log by one that has only a head. Raises `CheckpointError`."""
        self.remove_progress()
        try:
            write_bytes(self.path, head)
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def append(self, records: bytes) -> None:
        """Add records. If that fails, cut off a torn one and raise `CheckpointError`."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | _BINARY)
            try:
                size = os.lseek(descriptor, 0, os.SEEK_END)
                try:
                    write_all(descriptor, records)
                except OSError:
                    os.ftruncate(descriptor, size)  # a reader would stop at the torn record
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unwritten(self.path, error) from error

    def write_progress(self, record: bytes) -> None:
        """Overwrite the progress file with ``record``; an OSError is ignored.

        The file is written in place, without fsync. A reader recognizes a torn record by its
        checksum and tries again.
        """
        with suppress(OSError):
            descriptor = os.open(self._progress_path, os.O_RDWR | os.O_CREAT | _BINARY, 0o666)
            try:
                write_all(descriptor, record)
                os.ftruncate(descriptor, len(record))
            finally:
                os.close(descriptor)

    def remove_progress(self) -> None:
        """Remove the progress file; an OSError is ignored."""
        with suppress(OSError):
            self._progress_path.unlink()


def read_progress(directory: Path) -> bytes:
    """Return the content of the progress file; empty if there is none, or it cannot be read."""
    with suppress(OSError):
        # Not blocking: the file may be a pipe.
        flags = os.O_RDONLY | _BINARY | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(directory / PROGRESS_NAME, flags)
        try:
            return os.read(descriptor, _LARGEST_PROGRESS)
        finally:
            os.close(descriptor)
    return b""


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {reason(error)}")


def log_path(path: str | os.PathLike[str]) -> Path:
    """Return the log that ``path`` is, or is the ``save_path`` of."""
    path = Path(path)
    return path / LOG_NAME if path.is_dir() else path


@public
def read_metrics(path: str | os.PathLike[str]) -> History:
    """Read the metrics that a trainer has logged: what its ``M`` is, at this moment.

    ``path`` is a log file, or the ``save_path`` of a trainer. Any process may read while the
    trainer runs: it sees every phase that has ended. A record that is being written, or that a
    dying process left unfinished, is left out.

    Raises:
        CheckpointError: there is no log, or the file is none.
    """
    path = log_path(path)
    if os.path.lexists(path) and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path} cannot be read: it is no file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from error
    history = History()
    try:
        records = iter_records(data)
        head: Any = next(records, (None, 0))[0]
        check_head(head)
        restore_history(history, _with_arrays(head["history"]))
        for record, _end in records:
            if event_kind(record) == PhaseEnded.kind:  # the others are for who follows the run
                history.observe(_phase_ended(record))
    except Exception as error:  # whatever a forged record makes of it
        raise unreadable(path, error) from error
    return history


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return what to raise when reading a log raised ``error``."""
    if isinstance(error, LayoutError):
        return CheckpointError(f"{path} cannot be read: {error}")
    return CheckpointError(f"{path} is not as fitloop writes it: {type(error).__name__}: {error}")


def _with_arrays(value: Any) -> Any:
    if isinstance(value, bytes):
        return np.frombuffer(value, dtype="<f8")
    if isinstance(value, dict):
        return {key: _with_arrays(item) for key, item in value.items()}
    return [_with_arrays(item) for item in value] if isinstance(value, list) else value


def _phase_ended(record: Any) -> PhaseEnded:
    return PhaseEnded(
        trainer="",
        epoch=record["epoch"],
        phase=Phase(record["phase"]),
        metrics=record["metrics"],
        start_metrics=record["start_metrics"],
        batch_metrics=decode_batch_metrics(record),
        batches=0,
        samples=0,
        seconds=0.0,
    )
