"""The plan of a run, and the dependencies of the engine that carries it out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from fitloop._concurrency.control import RunControl
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._data.loaders import Loaders
from fitloop._data.resumption import ResumePosition
from fitloop._engine.config import TrainerConfig
from fitloop._engine.modes import Modes
from fitloop._engine.optimization import OptimizerSteps
from fitloop._engine.parallel import ParallelRun
from fitloop._engine.step_log import StepLog
from fitloop._events import Event
from fitloop._rng.guard import RngGuard
from fitloop._types import Phase


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run; its values are checked already."""

    call: str
    """name of the coroutine: ``"fit"``, ``"test"`` ..."""
    epochs: int
    first_epoch: int
    """number of the first epoch over all runs of the trainer, counted from 1"""
    phases: tuple[tuple[Phase, Any], ...]
    """the phases of an epoch, each with its loader"""
    steps: int | None = None
    """largest number of batches in a phase"""
    define_all: bool = False
    """grad mode, ``zero_grad`` and train/eval mode are left to the steps that are not default"""
    cast: bool = True
    track_batch_metrics: bool = True
    ask_every: int = 0
    """epochs between two continue questions; 0 for none"""
    epochs_before: int = 0
    """epochs that the run completed before it was resumed"""
    position: PassPosition | None = None
    """position in the next epoch; None for its beginning"""


@dataclass(frozen=True, kw_only=True)
class PassPosition:
    """A position between two batches of a train phase, from which a run can be resumed."""

    start_metrics: dict[str, float]
    """metrics that ``train_epoch_start`` returned in this phase"""
    collected: Any
    """data of `StateWriter.export`"""
    resume_from: ResumePosition
    """position in the loader"""
    is_at_end: bool = False
    """no batch follows, so that the gradients of the last one stay"""


class Instrumentation:
    """Wraps the calls of the engine, to time them for example. This base class wraps nothing."""

    def wrap(self, phase: Phase, name: str, function: Any) -> Any:
        """Return ``function``, or a function that calls it; at the beginning of each pass."""
        return function

    def read_wrapper(self, phase: Phase) -> Callable[[Any], Any] | None:
        """Return a wrapper for the call that reads a batch from a loader; None for no wrapper."""
        return None


@dataclass(kw_only=True)
class EngineDeps:
    """The dependencies of the engine."""

    config: TrainerConfig
    control: RunControl
    portal: LoopPortal
    loaders: Loaders
    modes: Modes
    """train and eval modes of the model"""
    guard: RngGuard
    """random numbers of the run"""
    steps: OptimizerSteps
    """optimizer steps of the run"""
    emit: Callable[[Event], None] = lambda event: None
    ask: Callable[[int, int], bool] = lambda epoch, epoch_in_run: True
    """asks whether to go on after an epoch, given its number in all runs and in this one"""
    after_batch: Sequence[Callable[[], object]] = ()
    """called after each step of the train phase"""
    instrumentation: Instrumentation = field(default_factory=Instrumentation)
    parallel: ParallelRun | None = None
    """the other ranks of the training; None if there are none"""
    step_log: StepLog | None = None
    """logs the train phases; None if the run does not"""
    validation: Callable[[], AbstractContextManager[object]] = nullcontext
    """a block around each validation of a training"""
    restore_position: Callable[[], None] = lambda: None
    """restores the trainer once more in a resumed epoch, since ``epoch_start`` may change it"""
