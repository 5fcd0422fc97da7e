"""The jobs of a `Runner`: a submitted training, its state, and its outcome."""

from __future__ import annotations

import gc
import inspect
import traceback
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, Literal

import anyio

from fitloop._arguments import refuse_call, unknown_argument
from fitloop._concurrency.event_loops import CancelOnceScope
from fitloop._concurrency.supervisor import wait_scope
from fitloop._concurrency.task_state import TaskState
from fitloop._errors import ConfigurationError, is_internal, one_line
from fitloop._events import JobEnded
from fitloop._format import format_duration, printable
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._run.fit_options import fit_option
from fitloop._runner.arguments import Plain
from fitloop._trainer.fitloop import FitLoop
from fitloop.backends.base import JobSpec

RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
"""flags of code whose frames can be suspended"""

Status = Literal["waiting", "running", "done", "failed", "cancelled"]


@public
@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome:
    """The outcome of a job: its result, its error, or neither if it was cancelled."""

    name: str
    status: Literal["done", "failed", "cancelled"]
    arguments: Mapping[str, Plain] = field(default_factory=dict)
    """the arguments of the function that makes the trainer, see `Record.arguments`"""
    epochs: int = 0
    """epochs that the job was submitted with"""
    result: FitResult | None = None
    """result of ``fit``, if the job is done"""
    error: BaseException | None = None
    """error of the factory, the training or the worker process, if the job failed; without
    ``keep_trainers`` the frames of its traceback have lost their local variables"""
    seconds: float = 0.0
    """duration of the job, including the construction of the trainer"""
    directory: Path | None = None
    """directory of its files, with ``save_path``"""
    weights: Path | None = None
    """file with the weights after the training: ``load_model(weights.name, weights.parent)``"""
    trainer: FitLoop | None = field(default=None, compare=False)
    """the trained trainer, with ``keep_trainers`` and if it is in this process"""
    restored: bool = False
    """whether an earlier Runner with this ``save_path`` did the job; this one only read its file"""

    def event(self) -> JobEnded:
        """Return the last event of the job."""
        error = None if self.error is None else one_line(self.error)
        return JobEnded(trainer=self.name, status=self.status, seconds=self.seconds, error=error)

    def __repr__(self) -> str:
        text: str = self.status
        if self.result is not None:
            text = f"done, {self.result!r}"
        elif self.error is not None:
            text = f"failed, {printable(one_line(self.error))}"
        suffix = ", restored" if self.restored else ""
        return f"<Outcome {self.name!r} {text} in {format_duration(self.seconds)}{suffix}>"


@public
class Job:
    """A training that was submitted to a `Runner`.

    Belongs to the event loop of the Runner; only `cancel` may be called from other threads.
    """

    __slots__ = ("_cancel", "_completed", "_outcome", "scope", "spec", "state")

    def __init__(self, spec: JobSpec, cancel: Callable[[Job], None]) -> None:
        self.spec = spec
        self.scope: CancelOnceScope | None = None
        """cancel scope of the job while it runs; None before and after"""
        self.state: TaskState | None = TaskState.of_caller()
        """state of the submitting task, for the task of the job; None when the job is over"""
        self._cancel = cancel
        self._outcome: Outcome | None = None
        self._completed: anyio.Event | None = None

    @property
    def name(self) -> str:
        """The name that the job was submitted with."""
        return self.spec.name

    @property
    def status(self) -> Status:
        """``"waiting"``, ``"running"``, ``"done"``, ``"failed"`` or ``"cancelled"``."""
        if self._outcome is not None:
            return self._outcome.status
        return "waiting" if self.scope is None else "running"

    def cancel(self) -> None:
        """End the job at its next batch boundary; never start it if it waits.

        Does nothing when the job is over. May be called from any thread, and never blocks. A call
        from another thread takes effect when the Runner's event loop handles it; not any more when
        that has ended.
        """
        if self._outcome is None:
            self._cancel(self)

    async def outcome(self) -> Outcome:
        """Wait for the end of the job and return its outcome. Never raises the error of the job.

        Cancellation: ends the wait, not the job.
        """
        if self._outcome is None:
            if self._completed is None:
                self._completed = anyio.Event()
            async with wait_scope.get()():
                await self._completed.wait()
        assert self._outcome is not None
        return self._outcome

    def complete(self, outcome: Outcome) -> None:
        """Set the outcome, and drop the references to the target and its arguments."""
        self._outcome = outcome
        self.scope = self.state = None
        self.spec = replace(self.spec, target=None, args=(), options={})
        if self._completed is not None:
            self._completed.set()

    def __repr__(self) -> str:
        return f"<Job {self.name!r} {self.status}>"


def cancelled_outcome(spec: JobSpec, seconds: float = 0.0) -> Outcome:
    """Return the outcome of a job that was cancelled after ``seconds``, or has not run so far."""
    return Outcome(
        name=spec.name,
        status="cancelled",
        arguments=spec.arguments,
        epochs=spec.epochs,
        directory=spec.directory,
        seconds=seconds,
    )


def bind(name: str, target: Any, kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a function with keyword arguments bound; refuse a target that takes none."""
    if not callable(target):
        raise ConfigurationError(
            f"job {name!r}: {target!r:.80} was submitted with kwargs={dict(kwargs)!r:.80}; "
            "expected none, they are for a function that makes a trainer"
        )
    return partial(target, **kwargs)


def check_options(name: str, target: Any, options: Mapping[str, Any]) -> None:
    """Refuse arguments that ``fit`` would refuse whatever the trainer is.

    Raises:
        TypeError: ``fit`` has no such argument.
        ConfigurationError: an argument is invalid.
    """
    target_type = target if isinstance(target, type) else type(target)
    trainer_type = target_type if issubclass(target_type, FitLoop) else FitLoop
    arguments = _arguments(trainer_type.fit)
    for option, value in options.items():
        if arguments is not None and option not in arguments:
            if option == "ranks":
                refuse_call(
                    f"job {name!r}: fit() has no argument 'ranks'; give it to the backend, as in "
                    f"Runner(backend=ProcessBackend(ranks={value!r:.20}))"
                )
            if option in _parameters(target):
                refuse_call(
                    f"job {name!r}: fit() has no argument {option!r}; give that of the function "
                    f"that makes the trainer in kwargs={{{option!r}: ...}}"
                )
            message = unknown_argument("fit()", option, arguments)
            refuse_call(
                f"job {name!r}: {message}{'' if message.endswith('?') else '.'} Arguments of the "
                "function that makes the trainer are given in order, or in kwargs={...}"
            )
        fit_option(option, value)


def _parameters(target: Any) -> Collection[str]:
    """Return the names of the parameters of a function; none if it does not tell them."""
    try:
        return inspect.signature(target).parameters
    except (TypeError, ValueError):
        return ()


@cache
def _arguments(fit: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names of the arguments of ``fit``; None if it takes any."""
    parameters = inspect.signature(fit).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return tuple(parameters)[1:]


class CompletedJobs:
    """The outcomes of the completed jobs, in order of completion."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome] = {}
        """position in that order -> outcome; without the forgotten ones"""
        self._positions: dict[str, int] = {}
        """by name of the job"""
        self._count = 0
        self._changed = anyio.Event()

    def add(self, outcome: Outcome) -> None:
        """Add an outcome and wake the iterators."""
        self._outcomes[self._count] = outcome
        self._positions[outcome.name] = self._count
        self._count += 1
        self._changed.set()
        self._changed = anyio.Event()

    def forget(self, name: str) -> None:
        """Drop the outcome of a job; iterators that have not reached it skip it."""
        del self._outcomes[self._positions.pop(name)]

    async def iterate(self, are_all: Callable[[], bool]) -> AsyncIterator[Outcome]:
        """Yield the outcomes as they are added, until ``are_all`` says that no more will come."""
        position = 0
        while True:
            while position < self._count:
                outcome = self._outcomes.get(position)
                position += 1
                if outcome is not None:
                    yield outcome
            if are_all():
                return
            await self.wait()

    async def wait(self) -> None:
        """Wait until one more job is completed."""
        async with wait_scope.get()():
            await self._changed.wait()


def clear_frames(error: BaseException) -> None:
    """Clear the local variables of an error's traceback; they would keep the trainer alive.

    An error that several coroutines have raised, as that of a broken connection, has frames of all
    of them. Those that go on keep their variables: to clear a suspended frame ends its coroutine.
    """
    frames = _frames_of(error)
    suspended = _suspended(frames)
    for frame in frames:
        if frame not in suspended:
            with suppress(RuntimeError):  # it is running
                frame.clear()


def _frames_of(error: BaseException) -> Collection[FrameType]:
    """Return the frames of the tracebacks of an error, its causes, contexts and parts."""
    seen: set[int] = set()
    frames: dict[FrameType, None] = {}
    todo: list[BaseException | None] = [error]
    while todo:
        current = todo.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        frames |= {frame: None for frame, _line in traceback.walk_tb(current.__traceback__)}
        todo += [current.__cause__, current.__context__]
        if isinstance(current, BaseExceptionGroup):
            todo += current.exceptions
    return frames.keys()


def _suspended(frames: Collection[FrameType]) -> set[FrameType]:
    """Return the frames of coroutines and generators that have not ended."""
    resumable = [frame for frame in frames if frame.f_code.co_flags & RESUMABLE]
    is_of_one_job = len({frame.f_code for frame in resumable}) == len(resumable)
    if is_of_one_job and all(map(is_internal, resumable)):
        return set()  # they have ended with the job; the search takes as long as many batches
    suspended: set[FrameType | None] = set()
    for owner in gc.get_referrers(*resumable):
        kind = type(owner)  # isinstance would ask proxies for their class
        if kind is CoroutineType:
            suspended.add(owner.cr_frame)
        elif kind is GeneratorType:
            suspended.add(owner.gi_frame)
        elif kind is AsyncGeneratorType:
            suspended.add(owner.ag_frame)
    return {frame for frame in resumable if frame in suspended}
