"""The records that a run writes into its metric log, and the handling of writes that fail.

Called on the run's step thread; the records are written on the writer thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._errors import CheckpointError
from fitloop._events import (
    BatchProgress,
    Event,
    PhaseStarted,
    RunEnded,
    RunStarted,
    SnapshotFailed,
    WentBack,
)
from fitloop._storage.log_records import RunInfo, encode_event, encode_head, encode_progress
from fitloop._storage.metric_log import MetricLog
from fitloop._training.trainer_state import TrainerState

PROGRESS_SECONDS = 1.0
"""least time between two records of the progress in a phase"""


class RunLog:
    """The metric log of one run, which observes its events.

    ``raises`` says whether a write that fails ends the run; otherwise it causes a
    `SnapshotFailed` event.
    """

    def __init__(
        self,
        trainer: TrainerState,
        writer: BackgroundWriter,
        *,
        raises: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._trainer = trainer
        self._writer = writer
        self._raises = raises
        self._clock = clock
        self._facts: RunInfo | None = None
        """data of the run in the head of the log; None before `begin`"""
        self._progress_at = 0.0
        """time of the last progress, or of the start of the phase"""
        self._error: tuple[MetricLog, CheckpointError] | None = None
        """the first write that failed, and was not reported yet"""

    def begin(self, started: RunStarted, epochs_before: int) -> None:
        """Start the log with the present history.

        ``epochs_before`` is the number of epochs that the run completed before it was resumed.
        """
        criteria = self._trainer.criteria
        self._facts = RunInfo(
            call=started.call,
            epochs=started.epochs,
            first_epoch=started.first_epoch,
            epochs_done=epochs_before,
            began=self._clock(),
            step=started.step,
            resumed=started.resumed,
            criteria=None
            if criteria is None
            else (criteria.name, criteria.direction, criteria.is_default),
        )
        self._write_head()

    def _write_head(self) -> None:
        # A new file for each run, since the old one need not agree with the history any more.
        trainer = self._trainer
        log = MetricLog(trainer.config.save_path)
        try:
            log.start(encode_head(trainer.config.name, trainer.history, self._facts))
        except CheckpointError as error:
            self._fail(log, error)
        else:
            trainer.metric_log = log

    def observe(self, event: Event) -> None:
        """Record the event; raise `CheckpointError` if an earlier record could not be written."""
        self.raise_error()
        if isinstance(event, RunEnded):
            self._end(event)
        elif isinstance(event, BatchProgress):
            self._report_progress(event)
        else:
            if isinstance(event, WentBack):
                self._restart()
            log, record = self._record(event)
            if log is not None:
                self._writer.submit(lambda: self._write(log, record))

    def _report_progress(self, event: BatchProgress) -> None:
        """Write the progress file, at most once in `PROGRESS_SECONDS`."""
        log, facts, now = self._trainer.metric_log, self._facts, self._clock()
        # The difference may be negative, since the system clock may be set back.
        if log is None or facts is None or abs(now - self._progress_at) < PROGRESS_SECONDS:
            return
        self._progress_at = now
        record = encode_progress(event, now, facts)
        self._writer.submit(lambda: log.write_progress(record))

    def _record(self, event: Event) -> tuple[MetricLog | None, bytes]:
        """Return the record of an event, and the log; None if there is nothing to write."""
        log, now = self._trainer.metric_log, self._clock()
        record = encode_event(event, now)
        if log is None or self._facts is None or record is None:
            return None, b""
        if isinstance(event, PhaseStarted):
            self._progress_at = now
        return log, record

    def _write(self, log: MetricLog, record: bytes) -> None:
        if self._error is not None or self._trainer.metric_log is not log:
            return  # a record after a gap would belong to another epoch
        try:
            log.append(record)
        except CheckpointError as error:  # raised on the step thread, at the next event
            self._error = (log, error)

    def _restart(self) -> None:
        """Start the log again with the history after a rollback."""
        self._writer.close()
        self.raise_error()
        self._write_head()

    def _end(self, event: RunEnded) -> None:
        """Record the end of the run.

        Everything else is durable by now, so an error here is ignored: readers of the log also
        see from the lock of the directory that the run is over.
        """
        self._writer.close()
        log, record = self._record(event)
        if log is not None:  # on this thread: at interpreter exit no thread can be started
            self._write(log, record)
            log.remove_progress()
        if self._error is not None:
            self._trainer.metric_log, self._error = None, None  # the next run starts a new log

    def raise_error(self) -> None:
        """Report a write that failed: raise `CheckpointError`, or emit `SnapshotFailed`."""
        if self._error is not None:
            self._fail(*self._error)

    def _fail(self, log: MetricLog, error: CheckpointError) -> None:
        self._trainer.metric_log = None  # the next run starts a new log
        self._error = None
        if self._raises:
            raise error
        self._trainer.event_bus.emit(
            SnapshotFailed(
                trainer=self._trainer.config.name,
                epoch=self._trainer.epoch_num,
                batch=0,
                path=str(log.path),
                error=str(error),
            )
        )
