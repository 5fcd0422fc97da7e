"""What a run is to do, and what the engine does it with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from fitloop._concurrency.control import RunControl
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._data.loaders import Loaders
from fitloop._data.resumption import PassStart, ResumePosition
from fitloop._data.sources import Source
from fitloop._engine.config import TrainerConfig
from fitloop._engine.loop_state import StateWriter
from fitloop._engine.stages import ThreadContext
from fitloop._events import Event
from fitloop._rng.guard import RngGuard
from fitloop._rng.states import RngState
from fitloop._types import Phase

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run is to do; checked by whoever made it."""

    call: str
    """the coroutine that was called: ``"fit"``, ``"test"`` ..."""
    epochs: int
    first_epoch: int
    """number of the first epoch in the trainer's life, counted from 1"""
    phases: tuple[tuple[Phase, Any], ...]
    """the phases of an epoch, each with its loader"""
    steps: int | None = None
    """batches of each phase at most"""
    define_all: bool = False
    """grad mode, ``zero_grad`` and train/eval mode are left to the stage functions"""
    cast: bool = True
    track_batch_metrics: bool = True
    ask_every: int = 0
    """epochs between two continue questions; 0 for none"""
    epochs_before: int = 0
    """epochs of this run that were trained before it was resumed"""
    position: PassPosition | None = None
    """where in the next epoch to go on; None for its beginning"""


@dataclass(frozen=True, kw_only=True)
class PassPosition:
    """A position between two batches of a train phase, from which a run can be resumed."""

    start_metrics: dict[str, float]
    """metrics that ``train_epoch_start`` returned in this phase"""
    collected: Any
    """data of `StateWriter.export`"""
    batches: int
    """batches that were trained"""
    pass_start: PassStart
    """the state with which the pass over the loader began"""
    rng_state: RngState | None
    """random state of the loader after these batches; None if its stream still has that state"""
    generators: list[Tensor]
    """states of the loader's own generators after these batches"""
    loader_state: Any
    """the loader's ``state_dict`` after these batches, if it has one"""

    def resume_from(self) -> ResumePosition:
        """Return the position for the loader."""
        assert self.rng_state is not None
        return ResumePosition(
            batches=self.batches,
            pass_start=self.pass_start,
            rng_state=self.rng_state,
            generators=self.generators,
            loader_state=self.loader_state,
        )


@dataclass(frozen=True, kw_only=True)
class EnginePosition:
    """The position of a run in its plan."""

    epochs_completed: int
    train_pass: PassPosition | None = None
    """position in the train phase of the next epoch; None between two epochs or phases"""
    has_gradients: bool
    """whether gradients are needed to continue from here"""


@dataclass(slots=True, kw_only=True)
class PassProgress:
    """The parts of a train phase that is in progress."""

    writer: StateWriter
    source: Source
    start_metrics: dict[str, float]


class Instrumentation:
    """Wraps the calls of the engine, to time them for example. This base class wraps nothing."""

    def wrap(self, phase: Phase, name: str, function: F) -> F:
        """Return ``function``, or a function that calls it; at the beginning of each pass."""
        return function

    def read_wrapper(self, phase: Phase) -> Callable[[Any], Any] | None:
        """Return a wrapper for the call that reads a batch from a loader; None for no wrapper."""
        return None


@dataclass(slots=True, kw_only=True)
class EngineDeps:
    """The dependencies of the engine."""

    config: TrainerConfig
    control: RunControl
    portal: LoopPortal
    loaders: Loaders
    guard: RngGuard
    """random numbers of the run"""
    thread_contexts: Sequence[ThreadContext]
    """contexts of the step thread, which coroutines on the event loop's thread must enter"""
    emit: Callable[[Event], None] = lambda event: None
    ask: Callable[[int, int], bool] = lambda epoch, epoch_in_run: True
    """asks whether to go on after an epoch, given its number in all runs and in this one"""
    after_batch: Sequence[Callable[[], object]] = ()
    """called after each step of the train phase"""
    instrumentation: Instrumentation = field(default_factory=Instrumentation)
    restore_position: Callable[[], None] = lambda: None
    """restores the trainer once more in a resumed epoch, since ``epoch_start`` may change it"""
    clock: Callable[[], float] = time.perf_counter
