"""A training that was handed to a `Runner`: what is to be done, how it goes, what came of it."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from hashlib import blake2s
from pathlib import Path
from typing import Any, Literal

import anyio

from fitloop._errors import ConfigurationError, one_line
from fitloop._events import JobEnded
from fitloop._format import format_duration
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._run.fit_options import fit_option
from fitloop._trainer.fitloop import FitLoop
from fitloop.backends.base import JobSpec

LONGEST_NAME, LONGEST_NAME_BYTES = 120, 200
"""characters and bytes of the name of a job's directory; file systems take 255 bytes"""
Status = Literal["waiting", "running", "done", "failed", "cancelled"]


@public
@dataclass(frozen=True, kw_only=True, repr=False)
class Outcome:
    """What came of a job."""

    name: str
    status: Literal["done", "failed", "cancelled"]
    result: FitResult | None = None
    """of a job that is done"""
    error: BaseException | None = None
    """of a job that failed: what its factory, its training or its worker process raised; without
    ``keep_trainers`` the frames of its traceback have lost their local variables"""
    seconds: float = 0.0
    """from its beginning to its end, with the building of the trainer"""
    directory: Path | None = None
    """where its files are, with ``save_path``"""
    weights: Path | None = None
    """file of what the model had at the end: ``load_model(weights.name, weights.parent)``"""
    trainer: FitLoop | None = field(default=None, compare=False)
    """the trained one, with ``keep_trainers`` where it is in this process"""
    restored: bool = False
    """it was done by an earlier Runner on this ``save_path``, and only read"""

    def event(self) -> JobEnded:
        """Return the last event of the job."""
        error = None if self.error is None else one_line(self.error)
        return JobEnded(trainer=self.name, status=self.status, seconds=self.seconds, error=error)

    def __repr__(self) -> str:
        told: str = self.status
        if self.result is not None:
            told = f"done, {self.result!r}"
        elif self.error is not None:
            told = f"failed, {one_line(self.error)}"
        again = ", restored" if self.restored else ""
        return f"<Outcome {self.name!r} {told} in {format_duration(self.seconds)}{again}>"


@public
class Job:
    """A training in the hands of a `Runner`. For the event loop of the Runner; cancel anywhere."""

    __slots__ = ("_end", "_outcome", "_scope", "_waits", "spec")

    def __init__(self, spec: JobSpec, end: Callable[[Job], None]) -> None:
        self.spec = spec
        self._end = end
        """ends it, or has the event loop do so; any thread"""
        self._outcome: Outcome | None = None
        self._scope: anyio.CancelScope | None = None
        self._waits: anyio.Event | None = None

    @property
    def name(self) -> str:
        """The name that it was submitted with."""
        return self.spec.name

    @property
    def status(self) -> Status:
        """``"waiting"``, ``"running"``, ``"done"``, ``"failed"`` or ``"cancelled"``."""
        if self._outcome is not None:
            return self._outcome.status
        return "waiting" if self._scope is None else "running"

    def cancel(self) -> None:
        """End it at its next batch boundary, or never begin it; does nothing when it is over.

        May be called from any thread, and never blocks. From another one than the Runner's it
        takes effect when the event loop comes to it; not any more when that has ended.
        """
        if self._outcome is None:
            self._end(self)

    async def outcome(self) -> Outcome:
        """Wait until it is over; raises nothing that the job raised. May be cancelled."""
        if self._outcome is None:
            if self._waits is None:
                self._waits = anyio.Event()
            await self._waits.wait()
        assert self._outcome is not None
        return self._outcome

    @property
    def scope(self) -> anyio.CancelScope | None:
        """What it runs in, while it does."""
        return self._scope

    def begin(self, scope: anyio.CancelScope) -> None:
        """Note that it runs, in ``scope``."""
        self._scope = scope

    def end(self, outcome: Outcome) -> None:
        """Note what came of it, and let go of what it was made of."""
        self._outcome = outcome
        self._scope = None
        self.spec = JobSpec(
            name=self.name,
            target=None,
            args=(),
            epochs=self.spec.epochs,
            options={},
            directory=self.spec.directory,
        )
        if self._waits is not None:
            self._waits.set()

    def __repr__(self) -> str:
        return f"<Job {self.name!r} {self.status}>"


def cancelled(job: Job, seconds: float = 0.0) -> Outcome:
    """Return the outcome of a job that was cancelled, after so many seconds."""
    return Outcome(name=job.name, status="cancelled", seconds=seconds, directory=job.spec.directory)


def check_options(name: str, target: Any, options: Mapping[str, Any]) -> None:
    """Refuse arguments that ``fit`` would refuse, as far as that is known without the trainer.

    Raises:
        TypeError: ``fit`` has no such argument.
        ConfigurationError: it cannot work, whatever the trainer is.
    """
    trainers = target if isinstance(target, type) else type(target)
    known = _arguments((trainers if issubclass(trainers, FitLoop) else FitLoop).fit)
    for option, value in options.items():
        if known is not None and option not in known:
            raise TypeError(_unknown(name, option, known))
        fit_option(option, value)


@cache
def _arguments(fit: Callable[..., Any]) -> tuple[str, ...] | None:
    """Return the names that ``fit`` takes besides ``epochs``; None when it takes any."""
    parameters = inspect.signature(fit).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        return None
    return tuple(name for name in parameters if name not in ("self", "epochs"))


def _unknown(name: str, option: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(option, known, 1)
    meant = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}."
    return (
        f"job {name!r}: fit() has no argument {option!r}; {meant} Arguments of the function that "
        "makes the trainer are given in order, or bound with functools.partial"
    )


class CompletedJobs:
    """The outcomes of the jobs that are over, in the order in which they ended."""

    def __init__(self) -> None:
        self._outcomes: dict[int, Outcome] = {}
        self._numbers: dict[str, int] = {}
        """by name"""
        self._number = 0
        self._changed = anyio.Event()

    def add(self, outcome: Outcome) -> None:
        """Tell those who iterate of one more."""
        self._outcomes[self._number] = outcome
        self._numbers[outcome.name] = self._number
        self._number += 1
        self._changed.set()
        self._changed = anyio.Event()

    def forget(self, name: str) -> None:
        """Let go of the outcome of that name, whoever has not been given it yet."""
        del self._outcomes[self._numbers.pop(name)]

    async def iterate(self, are_all: Callable[[], bool]) -> AsyncIterator[Outcome]:
        """Give them as they come, until there are no more to come."""
        position = 0
        while True:
            while position < self._number:
                outcome = self._outcomes.get(position)
                position += 1
                if outcome is not None:
                    yield outcome
            if are_all():
                return
            await self._changed.wait()


def clear_frames(error: BaseException) -> None:
    """Clear the local variables of an error's traceback, which would keep a trainer alive."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        todo += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            todo += one.exceptions


def is_encodable(name: str) -> bool:
    """Return whether a name can be written down: half of a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def directory_name(name: str) -> str:
    """Return a name of a directory for a job.

    What file systems or shells take amiss is ``_``, and a long one is cut; then there is a digest
    of the whole name at its end, so that no other job has that directory.

    Raises:
        ConfigurationError: nothing is left of it.
    """
    place = re.sub(r"[^\w.=+,@-]", "_", name)
    if not place.strip("._"):
        raise ConfigurationError(f"name is {name!r}; expected one that a directory can have")
    if place.startswith("."):
        place = f"_{place[1:]}"
    if place == name and len(name) <= LONGEST_NAME and len(name.encode()) <= LONGEST_NAME_BYTES:
        return place
    short = place[:LONGEST_NAME].encode()[:LONGEST_NAME_BYTES].decode(errors="ignore")
    return f"{short}-{blake2s(name.encode(), digest_size=8).hexdigest()}"
