"""`Logger`: the base of all loggers, with its queue, its thread, and the handling of failures.

Owns the work that all loggers share: events become rows, rows wait in a bounded queue, and a thread
of the logger passes them to `Logger.write`. A subclass owns the place where rows are written.
"""

from __future__ import annotations

import contextvars
import importlib.util
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from fitloop._arguments import checked_arguments, expect, is_number
from fitloop._errors import ConfigurationError, LoggerWarning, add_note_safely, one_line, warn_user
from fitloop._events import (
    EpochStarted,
    Event,
    MetricsLogged,
    PhaseEnded,
    RunEnded,
    RunStarted,
    WentBack,
)

QUEUE_LIMIT = 10_000
"""rows of `MetricsLogged` of a run that wait at most; more push out the oldest"""
PAUSE = 0.2
"""seconds after a write in which rows are collected for the next one"""
FIRST_RETRY, LONGEST_RETRY = 1.0, 60.0
"""seconds after a write that failed; doubled each time"""

RowKind = Literal["steps", "phase"]


class RowKey(NamedTuple):
    """The kind, phase and step of a row: they identify it in its run."""

    kind: str
    phase: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Metrics of a moment of a training.

    A ``"phase"`` row has the metrics of a phase that has ended; a ``"steps"`` row has the means of
    the last optimizer steps, as in `MetricsLogged`.
    """

    kind: RowKind
    phase: str
    """``"train"``, ``"valid"`` or ``"test"``"""
    epoch: int
    """number of the epoch over all runs, counted from 1"""
    step: int
    """optimizer steps that the trainer had made; the x axis of curves"""
    time: float
    """seconds since 1970"""
    metrics: Mapping[str, float]
    learning_rates: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> RowKey:
        """The key that identifies the row in its run."""
        return RowKey(self.kind, self.phase, self.step)

    def named(self) -> dict[str, float]:
        """Return all numbers by the names that loggers show.

        ``train/loss`` and ``valid/loss`` are of phases, ``train/loss_step`` of the last steps;
        ``lr`` is the learning rate, ``lr/<name>`` that of one of several groups.
        """
        suffix = "_step" if self.kind == "steps" else ""
        named = {f"{self.phase}/{name}{suffix}": value for name, value in self.metrics.items()}
        return {**named, **self.learning_rates}


def key_of_name(name: str, step: int) -> RowKey | None:
    """Return the key of the row with a number of this name; None for a name without a phase."""
    phase, _, metric = name.partition("/")
    if phase not in ("train", "valid", "test"):
        return None
    return RowKey("steps" if metric.endswith("_step") else "phase", phase, step)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """A training as loggers see it: all fits and tests of a trainer, also after a resumption."""

    id: str
    """stays the same when a killed training is resumed"""
    name: str
    """name of the trainer; in a `Runner` that of the job"""
    save_path: Path
    """directory of the trainer's files"""
    sweep: str | None
    """name that the jobs of a `Runner` have in common; None without one"""
    parameters: Mapping[str, Any]
    """settings of the training as plain values, by name"""


class LoggerOptions(TypedDict, total=False):
    """The arguments of `Logger`."""

    on_error: Literal["warn", "raise"]
    end_seconds: float
    parameters: Mapping[str, Any] | None


@dataclass(eq=False)
class _OpenRun:
    """A run between its `RunStarted` and the moment when its end is written."""

    info: LoggedRun
    rows: deque[Row] = field(default_factory=deque)
    steps_rows: int = 0
    """number of ``rows`` that may be dropped"""
    dropped: int = 0
    cut: int | None = None
    """rows with a larger step are to be removed; None if none are"""
    written: Counter[RowKey] = field(default_factory=Counter)
    """number of rows, by key, of an earlier process; without those that have come again"""
    end: RunEnded | None = None
    cut_at_epoch: bool = False
    """`cut` is not known before the first `EpochStarted`, which has the step"""
    was_resumed: bool = False
    is_open: bool = False
    """`Logger.start` has returned"""
    is_given_up: bool = False
    """an error will not go away; nothing more is written"""
    flushes: int = 0
    """number of calls of `Logger.before_snapshot` that wait"""
    is_closed: bool = False
    error: BaseException | None = None
    """error of the last attempt; None after a success"""
    attempts: int = 0
    """attempts that have failed since the last success"""
    not_before: float = 0.0
    """time of the next write"""


class Logger:
    """The base class of loggers: a callback that writes the metrics of trainings somewhere.

    A subclass has a `write`, and usually no more. This one prints every epoch::

        from fitloop.loggers import Logger

        class PrintLogger(Logger):
            def write(self, run, rows):
                for row in rows:
                    print(run.name, row.epoch, row.step, row.named())

        FitLoop(..., callbacks=[PrintLogger()])

    The methods of a subclass are called on a thread of the logger, one at a time. The thread starts
    with the first run and ends with the last. Training never waits for it: rows wait in a queue. If
    there are more than 10,000 rows of `MetricsLogged`, the oldest of these are dropped, and a
    `LoggerWarning` tells how many; rows of phases are never dropped.

    A method that raises is called again with the same rows, after a pause that grows from 1 to 60
    seconds, and once more at the end of the run. The first failure of a run causes a
    `LoggerWarning`, and rows that could not be written until the end cause another one. The
    training goes on. A ConfigurationError is not tried again.

    A logger can be given to several trainers at once, and to a `Runner`; each trainer has a run.

    Args:
        on_error: ``"raise"`` ends the training with the error of a method, at the next event;
            ``"warn"`` does as described.
        end_seconds: the longest wait of a run at its end for rows that are not written yet. Then a
            `LoggerWarning` says that the logger hangs, and its thread is left behind.
        parameters: settings to show with the run, besides those that fitloop knows.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    @checked_arguments()
    def __init__(
        self,
        *,
        on_error: Literal["warn", "raise"] = "warn",
        end_seconds: float = 30.0,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        expect(on_error in ("warn", "raise"), "on_error", on_error, "'warn' or 'raise'")
        expect(is_number(end_seconds), "end_seconds", end_seconds, "a number")
        expect(0 <= end_seconds < math.inf, "end_seconds", end_seconds, "0 or more seconds")
        self._on_error = on_error
        self._end_seconds = min(float(end_seconds), threading.TIMEOUT_MAX)
        is_mapping = isinstance(parameters, Mapping) and all(isinstance(n, str) for n in parameters)
        fits = parameters is None or is_mapping
        expect(fits, "parameters", parameters, "a dict of values by name, or None")
        self._parameters = dict(parameters or {})
        self.opened: dict[str, Any] = {}
        """for a subclass: an open file or connection for each run, by the id of the run"""
        self._queue = _Queue(self)

    # -- for subclasses ---------------------------------------------------------------------------

    def start(self, run: LoggedRun) -> None:
        """Prepare for the rows of a fit or test; called before the first one."""

    def written(self, run: LoggedRun) -> Iterable[RowKey]:
        """Return the keys of the rows of a run that an earlier process has written.

        It is called after `start`, unless this process has begun the run. A row that comes again
        after a resumption is left out if its key is among them. The default returns none.
        """
        return ()

    def cut(self, run: LoggedRun, step: int) -> bool:
        """Remove the rows of a run with a larger step: the training goes on from this one.

        It is called only if there are such rows: the training was killed after its last snapshot,
        or a part of it was undone. Returns whether the rows are gone. If not, as in the default,
        the rows whose keys `written` returns are left out when they come again.
        """
        return False

    def write(self, run: LoggedRun, rows: Sequence[Row]) -> None:
        """Write rows, in their order. If it raises, it is called again with the same rows."""
        raise NotImplementedError(f"{type(self).__name__} has no write()")

    def sync(self, run: LoggedRun) -> None:
        """Make the written rows durable; called before a snapshot of the training is written."""

    def end(self, run: LoggedRun, event: RunEnded) -> None:
        """Close everything of a run; called after its last row. The run may start again."""

    # -- a callback -------------------------------------------------------------------------------

    def __call__(self, event: Event) -> None:
        """Put the row of an event into the queue; at the end of a run, wait until all are written.

        Raises the error of a method, with ``on_error="raise"``.
        """
        self._queue.observe(event)

    def before_snapshot(self) -> None:
        """Return when the rows so far are written and durable, or after ``end_seconds``.

        A run calls it on another thread before it writes a snapshot, so that a resumed training
        misses no row. For a logger that fails it does not wait, and for one that hangs only once.
        """
        self._queue.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments: a copy, such as that of a worker process, has no runs."""
        return {name: value for name, value in vars(self).items() if name != "_queue"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, opened={})
        self._queue = _Queue(self)


class _Queue:
    """The runs of a logger with their waiting rows, and the thread that passes them on."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._changed = threading.Condition()
        self._runs: dict[str, _OpenRun] = {}
        """the runs that go on, by name of the trainer"""
        self._ending: deque[_OpenRun] = deque()
        """runs whose end is not written yet"""
        self._written: dict[str, int] = {}
        """id of each run -> its largest step that was written in this process"""
        self._warnings: deque[str] = deque()
        self._warned: set[str] = set()
        """ids of the runs with a failure that was warned of"""
        self._error: BaseException | None = None
        self._is_behind = False
        """`flush` has waited in vain, and nothing was written since then"""
        self._thread: threading.Thread | None = None

    # -- on the threads of runs -------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        match event:
            case MetricsLogged() | PhaseEnded():
                self._add(event)
            case RunStarted():
                self._begin(event)
            case EpochStarted() | WentBack():
                self._go_on_from(event)
            case RunEnded():
                self._end(event)
        self._report()

    def _report(self) -> None:
        """Warn, or raise, on the thread of a run: a warning may be an error there."""
        error, self._error = self._error, None
        if error is not None:
            raise error
        while self._warnings:
            warn_user(self._warnings.popleft(), LoggerWarning)

    def _begin(self, event: RunStarted) -> None:
        logger = self._logger
        info = LoggedRun(
            id=event.run_id,
            name=event.trainer,
            save_path=Path(event.save_path),
            sweep=event.sweep,
            parameters={**event.parameters, **logger._parameters},
        )
        with self._changed:
            other = self._runs.get(event.trainer)
            if other is not None and other.info.id != info.id:
                self._warnings.append(
                    f"{self._label} got two trainers named {event.trainer!r} at once, and "
                    "logs only the first; give each a name= of its own, or a logger of its own"
                )
                return
            run = self._runs[event.trainer] = _OpenRun(info)
            run.cut_at_epoch, run.was_resumed = event.call == "fit", event.resumed
            try:
                self._start_thread()
            except RuntimeError as error:  # the interpreter is ending
                del self._runs[event.trainer]
                self._warnings.append(f"{self._label} logs nothing: {error}")

    def _add(self, event: MetricsLogged | PhaseEnded) -> None:
        row = _row(event)
        with self._changed:
            run = self._runs.get(event.trainer)
            if run is None or run.is_given_up:
                return
            if _was_written(row, run.written):
                return
            run.rows.append(row)
            if row.kind == "steps":
                run.steps_rows += 1
                if run.steps_rows > QUEUE_LIMIT:
                    self._drop_oldest(run)
            if len(run.rows) == 1:  # else the thread writes, or waits for the time to do so
                self._changed.notify_all()

    def _drop_oldest(self, run: _OpenRun) -> None:
        for index, row in enumerate(run.rows):
            if row.kind == "steps":
                del run.rows[index]
                run.steps_rows -= 1
                run.dropped += 1
                return

    def _go_on_from(self, event: EpochStarted | WentBack) -> None:
        """Forget the rows beyond the step at which a run goes on."""
        with self._changed:
            run = self._runs.get(event.trainer)
            if run is None or not (run.cut_at_epoch or isinstance(event, WentBack)):
                return
            run.cut_at_epoch = False
            run.cut = event.step
            self._set_rows(run, [row for row in run.rows if row.step <= event.step])
            self._changed.notify_all()

    def _end(self, event: RunEnded) -> None:
        """Wait until the run is closed; warn of missing rows."""
        with self._changed:
            run = self._runs.pop(event.trainer, None)
            if run is None:
                return
            run.end = event
            self._ending.append(run)
            self._changed.notify_all()
            limit, thread = self._logger._end_seconds, self._thread
            self._changed.wait_for(lambda: run.is_closed, limit)
            if not run.is_closed:
                run.is_closed = True  # the thread drops it when it returns
                self._ending.remove(run)
                self._warnings.append(
                    f"{self._label} has not written the last rows of {run.info.name!r} "
                    f"{limit:g} s after the end of the run, and is left behind; "
                    "end_seconds= gives it more time"
                )
            else:  # the thread ends after the last run
                self._changed.wait_for(lambda: self._thread is not thread or bool(self._runs))
            has_ended = self._thread is not thread
        if has_ended and thread is not None:
            thread.join()
        self._tell_missing(run)

    def _tell_missing(self, run: _OpenRun) -> None:
        if run.rows and run.error is not None:
            rows = "row" if len(run.rows) == 1 else f"{len(run.rows)} rows"
            self._warnings.append(
                f"{self._label} could not write the last {rows} "
                f"of {run.info.name!r}: {one_line(run.error)}"
            )
        if run.dropped:
            self._warnings.append(
                f"{self._label} was too slow for {run.info.name!r}: {run.dropped} rows of "
                "optimizer steps are missing; a larger log_every= makes fewer"
            )

    def flush(self) -> None:
        with self._changed:
            runs = [run for run in self._runs.values() if run.is_open or run.rows]
            if not runs or self._is_behind:
                return
            for run in runs:
                run.flushes += 1
            self._changed.notify_all()
            self._is_behind = not self._changed.wait_for(
                lambda: all(run.flushes == 0 or run.error is not None for run in runs),
                self._logger._end_seconds,
            )

    @property
    def _label(self) -> str:
        return f"the logger {type(self._logger).__name__}"

    # -- the thread -------------------------------------------------------------------------------

    def _start_thread(self) -> None:
        """Start the thread if there is none. The caller holds the lock."""
        if self._thread is None:
            context = contextvars.copy_context()  # a warning names the user's line
            thread = threading.Thread(
                target=context.run,
                args=(self._work,),
                name=f"fitloop {type(self._logger).__name__}",
                daemon=True,
            )
            thread.start()  # it waits for the lock
            self._thread = thread

    def _work(self) -> None:
        while (run := self._next()) is not None:
            is_last_attempt = run.end is not None
            try:
                self._serve(run)
            except BaseException as error:  # also an exit, which would only end this thread
                self._fail(run, error, is_last_attempt or run.is_closed)
            del run

    def _next(self) -> _OpenRun | None:
        """Wait for a run that has something to do; None if all runs are over."""
        with self._changed:
            while self._runs or self._ending:
                if self._ending:
                    return self._ending[0]
                now = time.monotonic()
                busy = [run for run in self._runs.values() if _has_work(run)]
                for run in busy:
                    if run.not_before <= now or (run.flushes and run.error is None):
                        return run
                self._changed.wait(min((run.not_before - now for run in busy), default=None))
            self._thread = None
            self._changed.notify_all()
            return None

    def _serve(self, run: _OpenRun) -> None:
        """Do all waiting work of a run. Raises the error of a method of the logger."""
        logger, info = self._logger, run.info
        if not run.is_open and run.rows:  # a run that has nothing to tell is not begun
            self._open(run)
        if run.is_open and run.cut is not None:
            self._cut(run, run.cut)
        with self._changed:
            rows, flushes = list(run.rows), run.flushes
            self._set_rows(run, ())
        if rows:
            try:
                logger.write(info, rows)
            except BaseException:
                with self._changed:
                    limit = math.inf if run.cut is None else run.cut  # set meanwhile
                    again = [row for row in rows if row.step <= limit]
                    self._set_rows(run, [*again, *run.rows])
                raise
            last = max(row.step for row in rows)
            self._written[info.id] = max(last, self._written.get(info.id, -1))
        if flushes and run.is_open:
            logger.sync(info)
        with self._changed:  # a run that is closed already did not wait for more
            end = run.end if run.is_closed or not run.rows else None
        if end is not None and run.is_open:
            run.is_open = False
            logger.end(info, end)
        with self._changed:
            run.error, run.attempts, run.not_before = None, 0, time.monotonic() + PAUSE
            run.flushes -= flushes
            self._is_behind = False
            if end is not None:
                self._close(run)
            self._changed.notify_all()

    def _open(self, run: _OpenRun) -> None:
        """Begin a run; leave out the rows that an earlier process has written."""
        logger, info = self._logger, run.info
        logger.start(info)
        run.is_open = True
        if info.id in self._written and not run.was_resumed:  # the rows so far do not come again
            return
        written = Counter(logger.written(info))
        last, cut = max((key.step for key in written), default=-1), run.cut
        if cut is not None and last > cut and logger.cut(info, cut):
            last = cut
            written = Counter({key: count for key, count in written.items() if key.step <= cut})
        with self._changed:
            self._written[info.id] = last
            run.written, rows = written, list(run.rows)
            if run.cut == cut:
                run.cut = None
            self._set_rows(run, [row for row in rows if not _was_written(row, written)])

    def _cut(self, run: _OpenRun, step: int) -> None:
        """Remove the rows of the undone part of a training, those beyond ``step``."""
        if self._written.get(run.info.id, -1) > step and self._logger.cut(run.info, step):
            self._written[run.info.id] = step
        with self._changed:
            if run.cut == step:
                run.cut = None

    def _set_rows(self, run: _OpenRun, rows: Iterable[Row]) -> None:
        """Replace the waiting rows. The caller holds the lock."""
        run.rows = deque(rows)
        run.steps_rows = sum(row.kind == "steps" for row in run.rows)

    def _fail(self, run: _OpenRun, error: BaseException, is_last_attempt: bool) -> None:
        """Note a failure; try again later, unless the run has ended."""
        if is_last_attempt and run.end is not None and run.is_open:
            with suppress(Exception):
                self._logger.end(run.info, run.end)
        with self._changed:
            run.error = error
            run.attempts += 1
            delay = min(LONGEST_RETRY, FIRST_RETRY * 2 ** min(run.attempts - 1, 10))
            is_final = isinstance(error, ConfigurationError)
            run.not_before = time.monotonic() + delay
            if is_final:
                run.is_given_up = True
                run.rows.clear()
            if self._logger._on_error == "raise":
                if self._error is None:
                    add_note_safely(error, f"in {self._label}, for {run.info.name!r}")
                    self._error = error
            elif run.info.id not in self._warned:
                self._warned.add(run.info.id)
                later = "nothing more is logged" if is_final else "it tries again"
                self._warnings.append(
                    f"{self._label} cannot log {run.info.name!r}: {one_line(error)}; the training "
                    f"goes on, and {later}"
                )
            if is_last_attempt:
                self._close(run)
            self._changed.notify_all()

    def _close(self, run: _OpenRun) -> None:
        """Let the end of a run return. The caller holds the lock."""
        if not run.is_closed:
            run.is_closed = True
            self._ending.remove(run)


def _row(event: MetricsLogged | PhaseEnded) -> Row:
    common: dict[str, Any] = {
        "phase": str(event.phase),
        "epoch": event.epoch,
        "step": event.step,
        "time": time.time(),
    }
    if isinstance(event, PhaseEnded):
        metrics = {**event.start_metrics, **event.metrics}
        return Row(kind="phase", metrics=metrics, **common)
    rates = event.learning_rates
    return Row(kind="steps", metrics=event.metrics, learning_rates=rates, **common)


def check_installed(library: str) -> None:
    """Raise ConfigurationError if the library of a logger is not installed."""
    spec = importlib.util.find_spec(library)
    # A folder of this name, such as the one that wandb makes, is found too, without an origin.
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f"this logger needs the package {library}; install it with `pip install {library}`"
        )


def _was_written(row: Row, written: Counter[RowKey]) -> bool:
    """Return whether an earlier process has written a row; remove one such row from ``written``."""
    if written[row.key] <= 0:
        return False
    written[row.key] -= 1
    return True


def _has_work(run: _OpenRun) -> bool:
    return not run.is_given_up and bool(run.rows or run.flushes)
