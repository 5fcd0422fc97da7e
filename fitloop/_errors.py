"""The exceptions and warnings of fitloop.

    FitLoopError
    ├── BusyError            (RuntimeError)  a call that needs an idle trainer or model
    ├── ConfigurationError   (ValueError)    a constructor or call argument that cannot work
    │   ├── MissingLoaderError               a required phase has no loader
    │   └── StageSignatureError (TypeError)  a function that cannot take its argument
    ├── MetricError          (ValueError)    a stage function returned a value that is no metric
    │   └── MissingCriteriaError             no stage returned the criteria
    ├── NonFiniteError       (ArithmeticError)  a loss or gradient is NaN or infinite
    ├── UnknownMetricError   (KeyError)      no metric of this name was recorded
    ├── CheckpointError      (RuntimeError)  a file that cannot be written or read
    ├── RestoreError         (RuntimeError)  a state that cannot be put back
    ├── RemoteError          (RuntimeError)  stands for a worker's error that cannot be pickled
    ├── SyncInAsyncError     (RuntimeError)  a blocking call inside a running event loop
    └── WorkerDiedError      (RuntimeError)  the worker process of a training has died

    CompileWarning           (RuntimeWarning) a model is compiled too often, or not at all
    LoaderHungWarning        (RuntimeWarning) a run ended although its loader had not returned
    LockWarning              (RuntimeWarning) the file system of a save_path has no locks
    LoggerWarning            (RuntimeWarning) a logger failed, or was too slow
    NonFiniteWarning         (RuntimeWarning) weights or gradients are NaN or infinite
    OptimizerWarning         (RuntimeWarning) a part of the model is probably not trained
    OutputWarning            (RuntimeWarning) nothing can be printed any more
    RestoreWarning           (RuntimeWarning) an object changed in a dry run and stays changed
    ResumeWarning            (RuntimeWarning) a resumed run is not exactly as expected
    ScheduleWarning          (RuntimeWarning) a learning-rate schedule is probably not as meant
    ThreadModeWarning        (RuntimeWarning) a mode around a run has no effect in the run
    UnknownMetricWarning     (RuntimeWarning) no phase has returned a metric that is to be shown
    WeightsWarning           (RuntimeWarning) not all weights were loaded
    WorkerDiedWarning        (RuntimeWarning) a worker process died or was killed

An exception of a stage function, loader, dataset or callback is never wrapped: the same object
reaches the caller, with a note of trainer, phase, epoch and batch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from contextlib import suppress
from contextvars import ContextVar
from types import FrameType
from typing import Any

from fitloop._public import public


def quoted_list(names: Iterable[object]) -> str:
    """Join names for a message: ``'a', 'b'``, or ``none``."""
    return ", ".join(repr(str(name)) for name in names) or "none"


def add_note_safely(error: BaseException, text: str) -> None:
    """Add a note to an exception; do nothing if it does not accept notes."""
    with suppress(Exception):
        error.add_note(text)


def one_line(error: BaseException) -> str:
    """Return type and message of an exception in one line, also if its ``__str__`` fails."""
    message = ""
    with suppress(Exception):
        message = str(error)
    return f"{type(error).__name__}: {message}".rstrip(": ")


_INTERNAL_MODULES = ("fitloop", "asyncio", "anyio", "uvloop", "trio", "threading", "contextlib")
_ARGUMENTS_MODULE = "fitloop._arguments"
"""raises errors about the arguments of calls"""
_registries: dict[str, dict[Any, Any]] = {}
_call_site: ContextVar[tuple[str, int] | None] = ContextVar("fitloop call site", default=None)


def note_call_site() -> None:
    """Note the user's line that called a verb, for the warnings of its run on other threads."""
    _call_site.set(_user_line())


def warn_user(message: str, category: type[Warning], *, of_run: bool = False) -> None:
    """Warn at the user's line that called into fitloop; any thread of a run.

    ``of_run`` is for code of a run in a task of its own: the line is that of the call.
    """
    site = _call_site.get()
    file, line = (site if of_run else None) or _user_line() or site or ("fitloop", 0)
    registry = _registries.setdefault(file, {})  # the default filter warns once for each line
    warnings.warn_explicit(message, category, file, line, registry=registry)


def leave_user_frames(error: BaseException) -> None:
    """Remove the frames of fitloop before the user's code from the traceback of an error.

    Then a bare ``raise`` in the ``except`` block adds no frame, while ``raise error`` adds one. A
    cancellation or an error of fitloop without code of the user has no traceback then, nor has one
    about the arguments of a call. Another error keeps its traceback, since it is of interest where
    it was raised.
    """
    entry, module = error.__traceback__, ""
    while entry is not None and is_internal(entry.tb_frame):
        module = entry.tb_frame.f_globals["__name__"]
        entry = entry.tb_next
    is_of_call = isinstance(error, FitLoopError) or module == _ARGUMENTS_MODULE
    if entry is not None or is_of_call or not isinstance(error, Exception):
        error.with_traceback(entry)


def is_internal(frame: FrameType) -> bool:
    """Return whether the code of a frame is of fitloop, an event loop or their helpers."""
    return frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL_MODULES


def _user_line() -> tuple[str, int] | None:
    """Return file and line of the innermost frame that is not fitloop's or an event loop's."""
    frame = sys._getframe(1)
    while frame is not None:
        if not is_internal(frame):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None


@public
class FitLoopError(Exception):
    """The base class of all errors of fitloop."""


@public
class BusyError(FitLoopError, RuntimeError):
    """The trainer or its model is busy. The call has changed nothing."""

    def __init__(self, trainer: str, call: str, holder: str) -> None:
        self.trainer, self.call, self.holder = trainer, call, holder
        super().__init__(
            f"{trainer}.{call}() was called while {holder}; await that first, or use another "
            "trainer with a model of its own"
        )


@public
class ConfigurationError(FitLoopError, ValueError):
    """An argument of a constructor or call cannot work. Nothing has run."""


@public
class MissingLoaderError(ConfigurationError):
    """A required phase of ``fit``, ``test`` or a dry run has no loader."""

    def __init__(self, phase: str, call: str) -> None:
        self.phase, self.call = phase, call
        super().__init__(
            f"{call}() needs {phase}_dl, which is None; give {phase}_dl= to the constructor "
            f"or to {call}()"
        )


@public
class StageSignatureError(ConfigurationError, TypeError):
    """A function cannot be called with the arguments of the run."""

    def __init__(self, name: str, given: object, expected: str) -> None:
        self.name, self.given, self.expected = name, given, expected
        super().__init__(f"{name} is {given!r}; expected {expected}")


@public
class MetricError(FitLoopError, ValueError):
    """A stage function returned a value that is no metric."""


@public
class MissingCriteriaError(MetricError):
    """The first validation of ``fit`` did not return the criteria."""

    def __init__(self, criteria: str, known: Iterable[str]) -> None:
        self.criteria, self.known = criteria, tuple(known)
        super().__init__(
            f"criteria is {criteria!r}, which valid_epoch_end did not return; it returned "
            f"{quoted_list(self.known)}. Give criteria= one of these (and criteria_direction=-1 "
            "where less is better), or return it from valid_epoch_end"
        )


@public
class NonFiniteError(FitLoopError, ArithmeticError):
    """A loss or a gradient is NaN or infinite, and ``nonfinite="raise"``.

    On the CPU the step was not made: the weights are as before it. On another device it is known
    only later; until then the weights are neither in a snapshot nor among the best.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: str = "train",
        epoch: int = 0,
        batch: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        self.phase, self.epoch, self.batch = phase, epoch, batch
        self.names = names
        """the parameters whose gradients were not finite; empty if it was the loss, or on a device
        """
        super().__init__(message)


@public
class UnknownMetricError(FitLoopError, KeyError):
    """No metric of this name was recorded. The message lists the recorded names."""

    def __init__(self, name: str, known: Iterable[str], where: str) -> None:
        self.name, self.known, self.where = name, tuple(known), where
        super().__init__(f"no metric {name!r} in {where}; there are: {quoted_list(self.known)}")

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


@public
class CheckpointError(FitLoopError, RuntimeError):
    """A file cannot be written or read. A failed load has changed nothing."""


@public
class RestoreError(FitLoopError, RuntimeError):
    """A part of a training's state cannot be put back, by a dry run, ``reset`` or a "no".

    The message lists all such parts. If it says "was refused", nothing has run or changed.
    """


@public
class SyncInAsyncError(FitLoopError, RuntimeError):
    """A blocking call of ``SyncFitLoop`` inside a running event loop."""

    def __init__(self, call: str) -> None:
        self.call = call
        super().__init__(
            f"SyncFitLoop.{call}() blocks, and an event loop is running in this thread, as in a "
            f"notebook or an async function. Here write `await trainer.loop.{call}(...)`, or use "
            f"`from fitloop import FitLoop` and `await FitLoop(...).{call}(...)`"
        )


@public
class RanksError(FitLoopError, RuntimeError):
    """The ranks of one training are not alike any more, or not connected."""


@public
class RemoteError(FitLoopError, RuntimeError):
    """Stands for an exception of a worker process that cannot be pickled or unpickled.

    It has the type and message of that exception as its message, and the traceback as a note.
    """


@public
class WorkerDiedError(FitLoopError, RuntimeError):
    """The worker process of a job died. The message ends with the last lines of its output."""

    def __init__(self, message: str, exitcode: int | None = None) -> None:
        self.exitcode = exitcode
        """exit code of the process; for a killed one, minus the number of the signal"""
        super().__init__(message)


@public
class CompileWarning(RuntimeWarning):
    """A compiled model is compiled more often than needed, or not at all."""


@public
class LoaderHungWarning(RuntimeWarning):
    """A run ended although its loader had not returned within ``loader_grace`` seconds.

    The thread inside the loader is left behind. It ends when the loader returns.
    """


@public
class LockWarning(RuntimeWarning):
    """The file system of a ``save_path`` has no locks, so that two trainers may both use it.

    The training goes on. There is one warning for each file system.
    """


@public
class LoggerWarning(RuntimeWarning):
    """A logger of `fitloop.loggers` could not write rows, or was too slow for all of them.

    The training goes on. The message says what is missing.
    """


@public
class LossWarning(RuntimeWarning):
    """The outputs of the model are not what the loss function takes.

    For example, the model ends in a softmax, which CrossEntropyLoss applies itself. The default
    steps look at the first batch of the first epoch. The training goes on.
    """


@public
class NonFiniteWarning(RuntimeWarning):
    """Weights, or the gradients of a step, are NaN or infinite.

    Such weights are never kept as the best, and never in a snapshot. Such steps were left out, with
    ``nonfinite="skip"``.
    """


@public
class OptimizerWarning(RuntimeWarning):
    """The optimizer steps of a training are probably not as meant.

    No optimizer holds some parameters of the model, and one holds parameters of no model: a layer
    that is replaced after the optimizer was built is not trained. Or ``train_step`` changed no
    weight in the first epoch, or ``accumulate`` is larger than an epoch.
    """


@public
class OutputWarning(RuntimeWarning):
    """Nothing can be printed any more, for example since the terminal was closed.

    The training goes on. There is one warning for each stream.
    """


@public
class RanksWarning(RuntimeWarning):
    """Several processes that were started together, as by ``torchrun``, train on the same data.

    Each trains a model of its own, since ``parallel`` is not given; or they train one model, and
    are given the same batches.
    """


@public
class RestoreWarning(RuntimeWarning):
    """An object of the model, optimizer or scheduler changed and was not put back.

    A dry run or ``reset`` puts back numbers, tensors and containers of them. It does not copy other
    objects, and names those that changed. The end of a fit warns if the best weights do not fit
    the model any more.
    """


@public
class ResumeWarning(RuntimeWarning):
    """A resumed run is not exactly as expected.

    A damaged snapshot was ignored, batches are read again, the snapshot overrules settings of the
    script, does not hold a state, or is of another loader; or the last bits of results may differ,
    because torch has another version or another number of threads.
    """


@public
class ScheduleWarning(RuntimeWarning):
    """A learning-rate schedule is probably not as it was meant.

    Nothing steps the scheduler, or both the trainer and your code do, or its length fits neither
    the epochs nor the batches of the fit.
    """


@public
class ThreadModeWarning(RuntimeWarning):
    """A mode that holds around a run has no effect in the run, or may be another task's.

    A run has a thread of its own. Most modes of torch are taken over; for example the profiler of
    torch is not.
    """


@public
class UnknownMetricWarning(RuntimeWarning):
    """No phase of the first epoch returned a metric that ``display_metrics`` names."""


@public
class WeightsWarning(RuntimeWarning):
    """``load_model(strict="shapes")`` did not load all weights. The message names them."""


@public
class WorkerDiedWarning(RuntimeWarning):
    """A worker process died and its job is tried again, or the worker was killed.

    A worker is killed if its training does not end in time after a cancellation.
    """
