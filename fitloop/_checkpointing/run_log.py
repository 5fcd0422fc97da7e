"""What a run writes into its metric log, when, and what becomes of it when that fails.

Owns the order of the records of one run and how often those are written that pass. Called on the
run's step thread; the file is written on the writer's.
"""

from __future__ import annotations

import time
from collections import deque
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
from fitloop._storage.log_records import RunInfo, encode_event, encode_head
from fitloop._storage.metric_log import MetricLog
from fitloop._training.trainer_state import TrainerState

PROGRESS_SECONDS = 1.0
"""least time between two records of how far a phase is"""


class RunLog:
    """The log of one run: an observer. ``raises`` is whether a failed write ends the run."""

    def __init__(
        self,
        core: TrainerState,
        writer: BackgroundWriter,
        *,
        raises: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._core = core
        self._writer = writer
        self._raises = raises
        self._clock = clock
        self._started: RunStarted | None = None
        self._run: RunInfo | None = None
        """once the log is of this run"""
        self._told_at = 0.0
        """when the last record was made that says how far a phase is"""
        self._to_write: deque[tuple[bytes, bool]] = deque()
        """records, and whether they pass"""
        self._error: tuple[MetricLog, CheckpointError] | None = None

    def begin(self, epochs_done: int) -> None:
        """Begin the log with the history as it is; ``epochs_done`` before it was resumed."""
        started = self._started
        assert started is not None
        self._run = RunInfo(
            started.call, started.epochs, started.first_epoch, epochs_done, self._clock()
        )
        self._begin()

    def _begin(self) -> None:
        # Anew for each run: whatever happened to file or history meanwhile, they are the same.
        core = self._core
        log = MetricLog(core.config.save_path)
        try:
            log.start(encode_head(core.config.name, core.history, self._run))
        except CheckpointError as error:
            self._failed(log, error)
        else:
            core.metric_log = log

    def observe(self, event: Event) -> None:
        """Write what the event adds to the history, and what others are to see of the run."""
        self.tell_error()
        if isinstance(event, RunStarted):
            self._started = event
        elif isinstance(event, RunEnded):
            self._end(event)
        elif isinstance(event, WentBack):
            self._go_back(event)
        elif isinstance(event, BatchProgress):
            # Whichever way: the clock of the day may be set back.
            if abs(self._clock() - self._told_at) >= PROGRESS_SECONDS:
                self._append(event)
        else:
            self._append(event)

    def _append(self, event: Event) -> None:
        log = self._keep(event)
        if log is not None and len(self._to_write) == 1:  # or a job waits that takes it along
            self._writer.submit(lambda: self._write(log))

    def _keep(self, event: Event) -> MetricLog | None:
        """Have a record of the event among those to be written; return the log if it has one."""
        log = self._core.metric_log
        if log is None or self._run is None:
            return None
        now = self._clock()
        record = encode_event(event, now)
        if record is None:
            return None
        if isinstance(event, BatchProgress | PhaseStarted):
            self._told_at = now
        self._to_write.append((record, isinstance(event, BatchProgress)))
        return log

    def _write(self, log: MetricLog) -> None:
        if self._error is not None:
            return  # a gap would make later records those of other epochs
        joined: list[bytes] = []
        try:
            while self._to_write:
                record, passing = self._to_write.popleft()
                if not passing:
                    joined.append(record)
                    continue
                self._write_joined(log, joined)
                log.append(record, passing=True)
            self._write_joined(log, joined)
        except CheckpointError as error:  # told on the step thread, at the next event
            self._error = (log, error)

    def _write_joined(self, log: MetricLog, records: list[bytes]) -> None:
        if records:
            log.append(b"".join(records))
            records.clear()

    def _go_back(self, event: WentBack) -> None:
        """Log the history as it is now that a part of the run was undone."""
        self._writer.close()
        self.tell_error()
        self._begin()
        self._append(event)

    def _end(self, event: RunEnded) -> None:
        """Write that the run is over, while its directory is still its own.

        All that was recorded is durable by now, and the run kept as ended. So it does not fail for
        want of this: who follows it learns from the directory's lock that it is no longer running.
        """
        self._writer.close()
        log = self._keep(event)
        if log is not None:  # here: at the end of a program there may be no more threads
            self._write(log)
        if self._error is not None:
            self._core.metric_log, self._error = None, None  # the next run begins it anew

    def tell_error(self) -> None:
        """Tell of a write that failed; raises `CheckpointError` if that is to end the run."""
        failure, self._error = self._error, None
        if failure is not None:
            self._failed(*failure)

    def _failed(self, log: MetricLog, error: CheckpointError) -> None:
        """Raise, or tell it while training goes on, as the user wishes."""
        self._core.metric_log = None  # the next run begins it anew
        self._to_write.clear()
        if self._raises:
            raise error
        self._core.event_bus.emit(
            SnapshotFailed(
                trainer=self._core.config.name,
                epoch=self._core.epoch_num,
                batch=0,
                path=str(log.path),
                error=str(error),
            )
        )
