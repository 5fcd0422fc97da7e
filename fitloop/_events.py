"""What happens in a run, as typed events, in the order in which it happens.

This module owns the event classes and knows nobody who listens. Events are frozen, carry plain
numbers only, and are cheap to turn into JSON with `Event.as_dict`, so that they may be sent to
a web page or another process as they are.

The order of the events of ``fit(epochs=2)`` with validation::

    RunStarted
    EpochStarted
      PhaseStarted(train)  BatchProgress ...  PhaseEnded(train)
      PhaseStarted(valid)  BatchProgress ...  PhaseEnded(valid)
      BestImproved                            when the criteria did not get worse
    EpochEnded
    SnapshotWritten                           with checkpoint; some time after it was taken
    PromptAsked  PromptAnswered               with continue_loop
    EpochStarted ... EpochEnded
    PromptAnswered  WentBack                  a no to a question that was left open meanwhile
    RunEnded                                  always the last, also after an error

A `Runner` adds `JobStarted` before the first of them and `JobEnded` after the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fitloop._public import public
from fitloop._types import EpochMetrics, Phase

if TYPE_CHECKING:
    from array import array


@public
@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events."""

    kind: ClassVar[str] = "event"

    trainer: str
    """name of the trainer it happened in"""

    def as_dict(self) -> dict[str, Any]:
        """Return the event as plain, JSON-ready values, its ``kind`` among them.

        The per-batch values of a `PhaseEnded` are left out.
        """
        values: dict[str, Any] = {"kind": self.kind}
        for item in fields(self):
            if item.name != "batch_metrics":
                values[item.name] = _plain(getattr(self, item.name))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Phase) else value


@public
@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A ``fit`` or ``test`` begins."""

    kind: ClassVar[str] = "run_started"

    call: str
    """``"fit"`` or ``"test"``"""
    epochs: int
    """epochs this run will train at most"""
    first_epoch: int
    """number of its first epoch in the trainer's life, counted from 1"""


@public
@dataclass(frozen=True, kw_only=True)
class EpochStarted(Event):
    """An epoch begins."""

    kind: ClassVar[str] = "epoch_started"

    epoch: int
    """number of the epoch in the trainer's life, counted from 1"""
    epoch_in_run: int
    """number of the epoch in this run, counted from 1"""
    epochs: int
    """epochs of this run"""


@public
@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """A pass over a loader begins, after the ``epoch_start`` stage."""

    kind: ClassVar[str] = "phase_started"

    epoch: int
    phase: Phase
    batches: int | None
    """batches to come; None when the loader has no length"""


@public
@dataclass(frozen=True, kw_only=True)
class BatchProgress(Event):
    """How far a phase is; sent about ten times a second at most, never per batch."""

    kind: ClassVar[str] = "batch_progress"

    epoch: int
    phase: Phase
    batch: int
    """batches done"""
    batches: int | None
    samples: int
    """samples done"""
    seconds: float
    """since the phase began"""


@public
@dataclass(frozen=True, kw_only=True)
class PhaseEnded(Event):
    """A pass over a loader is over and its ``epoch_end`` stage has returned."""

    kind: ClassVar[str] = "phase_ended"

    epoch: int
    phase: Phase
    metrics: EpochMetrics
    """what ``epoch_end`` returned"""
    start_metrics: EpochMetrics
    """what ``epoch_start`` returned"""
    batch_metrics: Mapping[str, array[float]] = field(repr=False, compare=False)
    """the scalar values of the batch steps, one array a name; empty when they are not tracked"""
    batches: int
    """batches seen"""
    samples: int
    """samples seen"""
    seconds: float


@public
@dataclass(frozen=True, kw_only=True)
class BestImproved(Event):
    """The criteria reached or passed its best value; the weights were kept."""

    kind: ClassVar[str] = "best_improved"

    epoch: int
    criteria: str
    score: float


@public
@dataclass(frozen=True, kw_only=True)
class EpochEnded(Event):
    """All phases of an epoch are over."""

    kind: ClassVar[str] = "epoch_ended"

    epoch: int
    epoch_in_run: int
    epochs: int
    metrics: Mapping[str, EpochMetrics]
    """phase -> what its ``epoch_end`` returned"""
    complete: bool
    """false when ``stop()`` cut the epoch short"""
    seconds: float


@public
@dataclass(frozen=True, kw_only=True)
class SnapshotWritten(Event):
    """A snapshot is whole and durable."""

    kind: ClassVar[str] = "snapshot_written"

    epoch: int
    """number of the epoch that it was taken in, counted over the trainer's life"""
    batch: int
    """train batches of that epoch it was taken after; 0 at the end of the epoch"""
    path: str
    nbytes: int
    seconds: float
    """how long writing took, while training went on"""


@public
@dataclass(frozen=True, kw_only=True)
class SnapshotFailed(Event):
    """A snapshot could not be written; older ones are still there."""

    kind: ClassVar[str] = "snapshot_failed"

    epoch: int
    batch: int
    path: str
    error: str


@public
@dataclass(frozen=True, kw_only=True)
class PromptAsked(Event):
    """A run asks whether to go on; it waits for the answer, unless it ``trains_on``."""

    kind: ClassVar[str] = "prompt_asked"

    epoch: int
    epoch_in_run: int
    epochs: int
    question: str
    timeout: float | None = None
    """seconds after which ``default`` is taken for the answer; None for no limit"""
    default: bool = True
    trains_on: bool = False
    """the run goes on meanwhile, and a no will bring it back to this epoch"""


@public
@dataclass(frozen=True, kw_only=True)
class PromptAnswered(Event):
    """The continue question was answered."""

    kind: ClassVar[str] = "prompt_answered"

    epoch: int
    go_on: bool


@public
@dataclass(frozen=True, kw_only=True)
class WentBack(Event):
    """What was trained while a question was open is undone, since its answer was no."""

    kind: ClassVar[str] = "went_back"

    epoch: int
    """number of the epoch that was the last one when it was asked"""
    epoch_in_run: int


@public
@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The run is over; the last event of every run, also of a failed or cancelled one."""

    kind: ClassVar[str] = "run_ended"

    call: str
    stop_reason: str
    epochs: int
    """epochs trained to their end in this run"""
    best_score: float | None
    """the best of the trainer's life so far; None when no criteria was tracked"""
    best_epoch: int | None
    seconds: float
    error: str | None = None
    """type and message of what ended a failed run"""


@public
@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A `Runner` begins a job: its trainer is built now, and its run begins."""

    kind: ClassVar[str] = "job_started"


@public
@dataclass(frozen=True, kw_only=True)
class JobEnded(Event):
    """A job of a `Runner` is over; its last event, also when it never began."""

    kind: ClassVar[str] = "job_ended"

    status: str
    """``"done"``, ``"failed"`` or ``"cancelled"``"""
    seconds: float
    """since it began, with the building of the trainer"""
    error: str | None = None
    """type and message of what it failed with"""
