"""The exceptions and warnings of fitloop; each says which call raises it.

    FitLoopError
    ├── BusyError            (RuntimeError)  a call that needs an idle trainer or model
    ├── ConfigurationError   (ValueError)    a constructor or call argument that cannot work
    │   ├── MissingLoaderError               a phase was asked for and has no loader
    │   └── StageSignatureError (TypeError)  a function that cannot take what it will be given
    ├── MetricError          (ValueError)    a stage function returned what is no metric
    │   └── MissingCriteriaError             no stage returned the criteria
    ├── UnknownMetricError   (KeyError)      a metric was asked for that was never recorded
    ├── CheckpointError      (RuntimeError)  a file that cannot be written or read
    ├── RemoteError          (RuntimeError)  stands for an error of a worker that cannot cross
    ├── SyncInAsyncError     (RuntimeError)  a blocking call inside a running event loop
    └── WorkerDiedError      (RuntimeError)  the worker process of a training is no more

    LoaderHungWarning        (RuntimeWarning) a run ended although its loader had not returned
    ResumeWarning            (RuntimeWarning) a resumed run costs or differs in what it says
    WorkerDiedWarning        (RuntimeWarning) a worker process died or was killed, and what follows

What a stage function, loader, dataset or callback raises is never wrapped in one of these: it
reaches the caller as the same object, with a note that says where in the run it came from.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from fitloop._public import public


def quoted_list(names: Iterable[object]) -> str:
    """Join names for a message: ``'a', 'b'``, or ``none``."""
    return ", ".join(repr(str(name)) for name in names) or "none"


def add_note_safely(error: BaseException, text: str) -> None:
    """Add a note to an exception, unless it takes none: then it is worth more than the note."""
    with suppress(Exception):
        error.add_note(text)


def one_line(error: BaseException) -> str:
    """Return type and message of an exception in a line, whatever its ``__str__`` does."""
    message = ""
    with suppress(Exception):
        message = str(error)
    return f"{type(error).__name__}: {message}".rstrip(": ")


@public
class FitLoopError(Exception):
    """Base of every error that fitloop itself raises."""


@public
class BusyError(FitLoopError, RuntimeError):
    """Raised at once by a coroutine of a trainer that is busy, or whose model is.

    Nothing has been changed when it is raised.
    """

    def __init__(self, trainer: str, call: str, holder: str) -> None:
        self.trainer, self.call, self.holder = trainer, call, holder
        super().__init__(
            f"{trainer}.{call}() was called while {holder}; await that first, or use another "
            "trainer with a model of its own"
        )


@public
class ConfigurationError(FitLoopError, ValueError):
    """Raised by a constructor or a call whose arguments cannot work, before anything runs."""


@public
class MissingLoaderError(ConfigurationError):
    """Raised by ``fit``, ``test`` and the checks when a phase they need has no loader."""

    def __init__(self, phase: str, call: str) -> None:
        self.phase, self.call = phase, call
        super().__init__(
            f"{call}() needs {phase}_dl, which is None; give {phase}_dl= to the constructor "
            f"or to {call}()"
        )


@public
class StageSignatureError(ConfigurationError, TypeError):
    """Raised by the constructor for a function that cannot be called as the run will call it."""

    def __init__(self, name: str, given: object, expected: str) -> None:
        self.name, self.given, self.expected = name, given, expected
        super().__init__(f"{name} is {given!r}; expected {expected}")


@public
class MetricError(FitLoopError, ValueError):
    """Raised by ``fit`` and the like when a stage function returns what is no metric."""


@public
class MissingCriteriaError(MetricError):
    """Raised by ``fit`` at the end of its first validation without the criteria in it."""

    def __init__(self, criteria: str, known: Iterable[str]) -> None:
        self.criteria, self.known = criteria, tuple(known)
        super().__init__(
            f"criteria is {criteria!r}, which valid_epoch_end did not return; it returned "
            f"{quoted_list(self.known)}. Give criteria= one of these (and criteria_direction=-1 "
            "where less is better), or return it from valid_epoch_end"
        )


@public
class UnknownMetricError(FitLoopError, KeyError):
    """Raised when a metric is asked for that was never recorded; lists those there are."""

    def __init__(self, name: str, known: Iterable[str], where: str) -> None:
        self.name, self.known, self.where = name, tuple(known), where
        super().__init__(f"no metric {name!r} in {where}; there are: {quoted_list(self.known)}")

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0])


@public
class CheckpointError(FitLoopError, RuntimeError):
    """Raised when a weights or snapshot file cannot be written or read; says what is wrong.

    A failed load has changed nothing.
    """


@public
class SyncInAsyncError(FitLoopError, RuntimeError):
    """Raised by every blocking call of ``SyncFitLoop`` inside a running event loop."""

    def __init__(self, call: str) -> None:
        self.call = call
        super().__init__(
            f"SyncFitLoop.{call}() blocks, and an event loop is running in this thread; use "
            f"`from fitloop import FitLoop` and `await FitLoop(...).{call}(...)` here instead"
        )


@public
class RemoteError(FitLoopError, RuntimeError):
    """Stands for an exception of a worker process that cannot be pickled, or not unpickled here.

    Its message has the type and the message of that one, its notes where it was raised.
    """


@public
class WorkerDiedError(FitLoopError, RuntimeError):
    """The error of a job whose worker process was killed or crashed; ends with its last lines."""

    def __init__(self, message: str, exitcode: int | None = None) -> None:
        self.exitcode = exitcode
        """of the process; minus the number of the signal that killed it"""
        super().__init__(message)


@public
class LoaderHungWarning(RuntimeWarning):
    """Issued when a run ended although its loader had not returned within ``loader_grace``.

    The thread inside the loader is left behind; it ends, touching nothing, when the loader
    returns.
    """


@public
class ResumeWarning(RuntimeWarning):
    """Issued when a run that is resumed has something to tell.

    A snapshot that cannot be read was left out, batches are read again, or the last bits of
    results may differ since something else does: torch's version, the number of threads.
    """


@public
class WorkerDiedWarning(RuntimeWarning):
    """Issued when a worker process died and its job is tried again, or had to be killed.

    It is killed when its training has not ended in time after a cancellation.
    """
