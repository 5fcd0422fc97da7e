"""The metric log: a file that grows while a trainer runs, for readers in any process.

Owns two files. The log is append-only: a head with the history so far, then a record for each event
(see `log_records`). Readers stop before a torn record. Every run replaces the log atomically, so
that nothing is appended to a torn record. The progress file holds one record, which is overwritten
about once a second, so that the log does not grow with the time that an epoch takes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fitloop._errors import CheckpointError
from fitloop._events import EpochEnded, PhaseEnded, RunEnded, WentBack
from fitloop._metrics.history import History, restore_history
from fitloop._public import public
from fitloop._storage.durable import LOG_NAME, open_regular, reason, write_all, write_bytes
from fitloop._storage.layout import LayoutError
from fitloop._storage.log_records import (
    RunInfo,
    check_head,
    decode_batch_metrics,
    decode_event,
    decode_run,
    event_kind,
    iter_file_records,
)
from fitloop._types import Phase

PROGRESS_NAME = ".fitloop.progress"

_LARGEST_PROGRESS = 2**20  # bytes; a record takes 300, and some for each metric and rate
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
    with suppress(OSError), open(open_regular(directory / PROGRESS_NAME), "rb") as file:
        return file.read(_LARGEST_PROGRESS)
    return b""


def _unwritten(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be written: {reason(error)}")


@public
def read_metrics(path: str | os.PathLike[str]) -> History:
    """Read the metrics that a trainer has logged: a copy of its ``M`` at this moment.

    ``path`` is a log file, or the ``save_path`` of a trainer. Any process may read while the
    trainer runs: the result has every phase that has ended. A torn record at the end, from a write
    that is going on or from a killed process, is ignored.

    Raises:
        CheckpointError: there is no log, or the file is no log.
    """
    return read_log(path).history


@dataclass
class LogContents:
    """The contents of a metric log: the history of the trainer, and the state of its last run."""

    trainer: str
    history: History
    run: RunInfo | None
    """None in a log of an early version of fitloop"""
    epochs_done: int
    """completed epochs of the run"""
    seconds: float = 0.0
    """time from the start of the run in its process to the last record"""
    end: RunEnded | None = None
    """the end of the run; None if it goes on or its process died"""


def read_log(path: str | os.PathLike[str]) -> LogContents:
    """Read a metric log, or that in a directory; as `read_metrics`."""
    path = Path(path)
    path = path / LOG_NAME if path.is_dir() else path
    try:
        with open(open_regular(path), "rb") as file:
            return _read(file)
    except Exception as error:  # a forged record may raise anything
        raise unreadable(path, error) from error


def _read(file: BinaryIO) -> LogContents:
    records = iter_file_records(file.read)
    head: Any = next(records, (None, 0))[0]
    check_head(head)
    run = decode_run(head)[0] if head.get("run") is not None else None
    log = LogContents(head["trainer"], History(), run, 0 if run is None else run.epochs_done)
    restore_history(log.history, head["history"])
    for record, _end in records:
        kind = event_kind(record)
        if kind == PhaseEnded.kind:
            log.history.observe(_phase_ended(record))
        elif kind == EpochEnded.kind:
            log.epochs_done += record["complete"] is True
        elif kind == WentBack.kind:
            log.epochs_done = record["epoch_in_run"]
        elif kind == RunEnded.kind:
            event, _at = decode_event(record, "", "fit", {})
            log.end = event if isinstance(event, RunEnded) else None
        if run is not None:
            log.seconds = max(log.seconds, record["at"] - run.began)
    return log


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the `CheckpointError` for a log that could not be read because of ``error``."""
    if isinstance(error, (OSError, LayoutError)):
        return CheckpointError(f"{path} cannot be read: {reason(error)}")
    return CheckpointError(f"{path} is not as fitloop writes it: {type(error).__name__}: {error}")


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
