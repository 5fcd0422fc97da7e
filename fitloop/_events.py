"""The events of a run. They are frozen, have plain values, and become JSON by `Event.as_dict`.

The order of the events of ``fit(epochs=2)`` with validation::

    RunStarted
    EpochStarted
      PhaseStarted(train)  BatchProgress, MetricsLogged ...  PhaseEnded(train)
      PhaseStarted(valid)  BatchProgress ...  PhaseEnded(valid)
      BestImproved                            if the criteria did not get worse
      EarlyStopped                            with early_stop; EpochEnded and RunEnded follow
    EpochEnded
    SnapshotWritten                           with checkpoint; some time after it was taken
    PromptAsked  PromptAnswered               with continue_loop
    EpochStarted ... EpochEnded
    PromptAnswered  WentBack                  with continue_while_asking, after a no
    RunEnded                                  always the last, also after an error

A `Runner` adds `JobStarted` before the first of them and `JobEnded` after the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from fitloop._format import json_ready
from fitloop._public import public
from fitloop._types import EpochMetrics, Phase

if TYPE_CHECKING:
    from array import array


@public
@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events. Events are compared by value, and can be in sets and keys of a dict.

    `AnyEvent` is the union of all of them. A type checker knows the class of one after ``match
    event: case EpochEnded(): ...`` and after ``if event.kind == "epoch_ended": ...``.
    """

    kind: ClassVar[str] = "event"

    trainer: str
    """name of the trainer"""
    call: str = ""
    """the method that runs: ``"fit"`` or ``"test"``; empty for `JobStarted` and `JobEnded`"""
    step: int = 0
    """optimizer steps that the trainer has made in its life, over all runs; a step that was left
    out does not count. With several optimizers, the largest of their numbers. That of a resumed run
    goes on where the snapshot was taken, and that of a `SnapshotWritten` is in the snapshot"""

    def as_dict(self) -> dict[str, Any]:
        """Return the event as JSON-ready values, with its ``kind``.

        A number that is not finite becomes None, since JSON has no NaN and no infinity. The dict of
        a `PhaseEnded` has no values of single batches.
        """
        values: dict[str, Any] = {"kind": self.kind}
        for item in fields(self):
            if item.name != "batch_metrics":
                values[item.name] = json_ready(getattr(self, item.name))
        return values


@public
@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A ``fit`` or ``test`` begins."""

    kind: ClassVar[Literal["run_started"]] = "run_started"

    epochs: int
    """largest number of epochs of this run"""
    first_epoch: int
    """number of its first epoch over all runs, counted from 1"""
    resumed: bool = False
    """whether it goes on with an interrupted run; then ``step`` is that of the snapshot"""
    run_id: str = ""
    """identifies the training, for loggers: the same in all runs of a trainer until ``reset`` or
    ``load``, and when the training is interrupted and resumed"""
    save_path: str = ""
    """directory of the trainer's files"""
    sweep: str | None = None
    """name that the trainings of a `Runner` have in common: that of its ``save_path``, or a random
    one; None without a `Runner`"""
    parameters: Mapping[str, str | int | float | bool | None] = field(
        default_factory=dict, hash=False
    )
    """settings of the training: the arguments that a job was submitted with, and epochs, learning
    rate and others by the names of their arguments. A setting that differs between the parameter
    groups of the optimizers has a name for each group, as the rates of `MetricsLogged` have"""


@public
@dataclass(frozen=True, kw_only=True)
class EpochStarted(Event):
    """An epoch begins."""

    kind: ClassVar[Literal["epoch_started"]] = "epoch_started"

    epoch: int
    """number of the epoch over all runs, counted from 1"""
    epoch_in_run: int
    """number of the epoch in this run, counted from 1"""
    epochs: int
    """epochs of this run"""


@public
@dataclass(frozen=True, kw_only=True)
class PhaseStarted(Event):
    """A pass over a loader begins, after the ``epoch_start`` stage."""

    kind: ClassVar[Literal["phase_started"]] = "phase_started"

    epoch: int
    phase: Phase
    batches: int | None
    """number of batches; None if the loader has no length"""


@public
@dataclass(frozen=True, kw_only=True)
class BatchProgress(Event):
    """The progress of a phase, about ten times a second at most."""

    kind: ClassVar[Literal["batch_progress"]] = "batch_progress"

    epoch: int
    phase: Phase
    batch: int
    """batches done"""
    batches: int | None
    samples: int | None
    """samples done; None if the size of a batch is not known"""
    seconds: float
    """since the phase began"""
    metrics: EpochMetrics = field(default_factory=dict, hash=False)
    """means of the batches of the phase so far, as far as their values have come from the device;
    the names are those of `MetricsLogged`"""
    learning_rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    """present rates, with the names of `MetricsLogged`"""


@public
@dataclass(frozen=True, kw_only=True)
class MetricsLogged(Event):
    """The metrics of the last optimizer steps of a train phase; see ``fit(log_every=)``.

    ``step`` is the last of these optimizer steps.
    """

    kind: ClassVar[Literal["metrics_logged"]] = "metrics_logged"

    epoch: int
    phase: Phase
    batch: int
    """number of the last of their batches in the phase, counted from 1"""
    metrics: EpochMetrics = field(hash=False)
    """means of the numbers that the batch steps returned since the last event of this kind in the
    phase. Names and weights are those of the default ``epoch_end``: ``loss`` is the mean of
    ``running_loss`` over samples, ``accuracy`` that of ``running_corr``; others keep their name.
    With ``nonfinite="skip"``, batches whose loss is not finite are left out"""
    learning_rates: Mapping[str, float] = field(hash=False)
    """the rates of this step: ``lr`` if there is one parameter group. Of several groups, those of
    all optimizers in their order: ``lr/`` and the ``"name"`` of the group, or else its number from
    0. A rate that is a tensor on a device is left out, since reading it would wait"""


@public
@dataclass(frozen=True, kw_only=True)
class PhaseEnded(Event):
    """A pass over a loader has ended, and its ``epoch_end`` stage has returned."""

    kind: ClassVar[Literal["phase_ended"]] = "phase_ended"

    epoch: int
    phase: Phase
    metrics: EpochMetrics = field(hash=False)
    """the metrics of ``epoch_end``"""
    start_metrics: EpochMetrics = field(hash=False)
    """the metrics of ``epoch_start``"""
    batch_metrics: Mapping[str, array[float]] = field(repr=False, compare=False)
    """the scalar values of the batch steps by name; empty if they are not tracked"""
    batches: int
    """number of batches"""
    samples: int | None
    """number of samples; None if the size of a batch is not known"""
    seconds: float


@public
@dataclass(frozen=True, kw_only=True)
class BestImproved(Event):
    """The criteria reached or passed its best value, and the weights were stored."""

    kind: ClassVar[Literal["best_improved"]] = "best_improved"

    epoch: int
    criteria: str
    score: float


@public
@dataclass(frozen=True, kw_only=True)
class EarlyStopped(Event):
    """The run ends after this validation, as its `EarlyStop` says."""

    kind: ClassVar[Literal["early_stopped"]] = "early_stopped"

    epoch: int
    metric: str
    message: str
    """the reason in one line"""


@public
@dataclass(frozen=True, kw_only=True)
class EpochEnded(Event):
    """All phases of an epoch have ended."""

    kind: ClassVar[Literal["epoch_ended"]] = "epoch_ended"

    epoch: int
    epoch_in_run: int
    epochs: int
    metrics: Mapping[str, EpochMetrics] = field(hash=False)
    """phase -> the metrics of its ``epoch_end``"""
    complete: bool
    """False if the run stopped within the epoch"""
    seconds: float
    learning_rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    """rates after the train phase, with the names of `MetricsLogged`; none in `FitLoop.test`"""


@public
@dataclass(frozen=True, kw_only=True)
class SnapshotWritten(Event):
    """A snapshot is complete on disk."""

    kind: ClassVar[Literal["snapshot_written"]] = "snapshot_written"

    epoch: int
    """number of its epoch over all runs"""
    batch: int
    """number of train batches of the epoch before the snapshot; 0 at the end of the epoch"""
    path: str
    nbytes: int
    seconds: float
    """duration of the writing, during which training went on"""


@public
@dataclass(frozen=True, kw_only=True)
class SnapshotFailed(Event):
    """A snapshot could not be written. Older snapshots still exist."""

    kind: ClassVar[Literal["snapshot_failed"]] = "snapshot_failed"

    epoch: int
    batch: int
    path: str
    error: str


@public
@dataclass(frozen=True, kw_only=True)
class PromptAsked(Event):
    """A run asks whether to go on. It waits for the answer, unless it ``trains_on``."""

    kind: ClassVar[Literal["prompt_asked"]] = "prompt_asked"

    epoch: int
    epoch_in_run: int
    epochs: int
    question: str
    timeout: float | None = None
    """seconds after which ``default`` is the answer; None for no limit"""
    default: bool = True
    trains_on: bool = False
    """the run goes on while the question is open; a no restores the state of this epoch"""


@public
@dataclass(frozen=True, kw_only=True)
class PromptAnswered(Event):
    """The continue question was answered."""

    kind: ClassVar[Literal["prompt_answered"]] = "prompt_answered"

    epoch: int
    go_on: bool


@public
@dataclass(frozen=True, kw_only=True)
class WentBack(Event):
    """The answer was no, and the training since the question was undone."""

    kind: ClassVar[Literal["went_back"]] = "went_back"

    epoch: int
    """number of the last epoch before the question"""
    epoch_in_run: int


@public
@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The run has ended: the last event of every run, also after an error or a cancellation."""

    kind: ClassVar[Literal["run_ended"]] = "run_ended"

    stop_reason: str
    epochs: int
    """number of complete epochs of this run"""
    best_score: float | None
    """the best score over all runs; None if no criteria was tracked"""
    best_epoch: int | None
    seconds: float
    error: str | None = None
    """type and message of the exception that ended the run"""
    restored_epoch: int | None = None
    """the epoch whose weights were put back into the model at the end, over all runs; None if the
    model keeps those that it had"""


@public
@dataclass(frozen=True, kw_only=True)
class JobStarted(Event):
    """A `Runner` starts a job: it builds the trainer and starts its run."""

    kind: ClassVar[Literal["job_started"]] = "job_started"


@public
@dataclass(frozen=True, kw_only=True)
class JobEnded(Event):
    """A job of a `Runner` has ended: its last event, also if it never started."""

    kind: ClassVar[Literal["job_ended"]] = "job_ended"

    status: str
    """``"done"``, ``"failed"`` or ``"cancelled"``"""
    seconds: float
    """since its start, including the building of the trainer"""
    error: str | None = None
    """type and message of the exception of the job"""


AnyEvent: TypeAlias = (
    RunStarted
    | EpochStarted
    | PhaseStarted
    | BatchProgress
    | MetricsLogged
    | PhaseEnded
    | BestImproved
    | EarlyStopped
    | EpochEnded
    | SnapshotWritten
    | SnapshotFailed
    | PromptAsked
    | PromptAnswered
    | WentBack
    | RunEnded
    | JobStarted
    | JobEnded
)
"""every event"""
