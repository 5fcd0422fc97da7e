"""Runs that are only simulated: their events, and the log that they would write."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fitloop import (
    BatchProgress,
    EpochEnded,
    EpochStarted,
    Event,
    History,
    Phase,
    PhaseEnded,
    PhaseStarted,
    RunEnded,
    RunStarted,
)
from fitloop._checkpointing.run_log import RunLog
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._engine.event_bus import EventBus
from fitloop._storage.durable import DirectoryLock
from fitloop._training.best import Criteria

TRAINER_NAME = "t"
BATCHES = 200
IN_FIT: dict[str, Any] = {"trainer": TRAINER_NAME, "call": "fit", "step": 7}


def run_started(epochs: int = 3, call: str = "fit") -> RunStarted:
    return RunStarted(trainer=TRAINER_NAME, call=call, epochs=epochs, first_epoch=1)


def epoch_started(epoch: int, epochs: int = 3) -> EpochStarted:
    return EpochStarted(**IN_FIT, epoch=epoch, epoch_in_run=epoch, epochs=epochs)


def phase_started(epoch: int, phase: Phase = Phase.TRAIN) -> PhaseStarted:
    return PhaseStarted(**IN_FIT, epoch=epoch, phase=phase, batches=BATCHES)


def progress(epoch: int, batch: int, phase: Phase = Phase.TRAIN) -> BatchProgress:
    return BatchProgress(
        **IN_FIT,
        epoch=epoch,
        phase=phase,
        batch=batch,
        batches=BATCHES,
        samples=8 * batch,
        seconds=batch / 100,
        metrics={"loss": 0.5, "accuracy": 0.25},
        learning_rates={"lr": 0.1},
    )


def phase_ended(epoch: int, phase: Phase = Phase.TRAIN) -> PhaseEnded:
    return PhaseEnded(
        **IN_FIT,
        epoch=epoch,
        phase=phase,
        metrics={"loss": 1 / epoch, "accuracy": 0.5},
        start_metrics={},
        batch_metrics={"loss": array("d", [epoch, 0.5])},
        batches=BATCHES,
        samples=8 * BATCHES,
        seconds=2.0,
    )


def epoch_ended(epoch: int, epochs: int = 3, *phases: Phase) -> EpochEnded:
    return EpochEnded(
        **IN_FIT,
        epoch=epoch,
        epoch_in_run=epoch,
        epochs=epochs,
        metrics={str(phase): phase_ended(epoch).metrics for phase in phases or (Phase.TRAIN,)},
        complete=True,
        seconds=2.5,
    )


def run_ended(epochs: int = 3, call: str = "fit", **changes: Any) -> RunEnded:
    values: dict[str, Any] = {"stop_reason": "completed", "best_score": 0.5, "best_epoch": 1}
    values |= {**IN_FIT, "call": call, "epochs": epochs, "seconds": 7.5, **changes}
    return RunEnded(**values)


def epoch_events(number: int, epochs: int = 3, batches: tuple[int, ...] = ()) -> list[Event]:
    """Return the events of a whole epoch, with a `BatchProgress` for each of ``batches``."""
    return [
        epoch_started(number, epochs),
        phase_started(number),
        *(progress(number, batch) for batch in batches),
        phase_ended(number),
        epoch_ended(number, epochs),
    ]


class FakeRun:
    """The part of a trainer that its log uses, with a clock of the test."""

    def __init__(
        self,
        directory: Path,
        *,
        raises: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.told: list[Event] = []
        self.history = History()
        event_bus = EventBus()
        event_bus.set_observers([self.told.append])
        config = SimpleNamespace(save_path=directory, name=TRAINER_NAME)
        self.core: Any = SimpleNamespace(
            config=config,
            history=self.history,
            event_bus=event_bus,
            metric_log=None,
            epoch_num=0,
            criteria=Criteria("accuracy", 1, is_default=True),
        )
        self.writer = BackgroundWriter(TRAINER_NAME)
        self._options: dict[str, Any] = {"raises": raises, "clock": clock}
        self.log = self._new()

    def _new(self) -> RunLog:
        return RunLog(self.core, self.writer, **self._options)

    def begin(self, epochs: int = 3, call: str = "fit", done: int = 0) -> None:
        """Start a run."""
        self.log = self._new()
        self.observe(run_started(epochs, call))
        self.log.begin(run_started(epochs, call), done)

    def observe(self, *events: Event) -> None:
        """Record the events, and write the records."""
        for event in events:
            self.history.observe(event)
            self.log.observe(event)
            self.writer.close()


@contextmanager
def fake_run(
    directory: Path, epochs: int = 3, call: str = "fit", **start: Any
) -> Iterator[FakeRun]:
    """Start a run that locks its directory, as a live one does, until the end of the block."""
    lock = DirectoryLock(directory)
    lock.acquire()
    run = FakeRun(directory)
    try:
        run.begin(epochs, call, **start)
        yield run
    finally:
        run.writer.close()
        lock.release()
