"""When snapshots are taken, and what a run that is resumed begins with.

`Checkpoint` is the users' wish. `Checkpointer` observes a run: it copies the state when a
snapshot is due and has a writer thread do the rest. Knows neither the engine nor the bytes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fitloop._checkpointing.archive import Archive
from fitloop._checkpointing.snapshot import PreparedSnapshot, RunPart, take_snapshot
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._engine.config import check_optional, check_seconds
from fitloop._errors import CheckpointError, ConfigurationError
from fitloop._events import EpochEnded, Event, SnapshotFailed, SnapshotWritten
from fitloop._storage.durable import reason
from fitloop._storage.tensors import SnapshotBuffers
from fitloop._training.trainer_state import TrainerState


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When ``fit`` takes a snapshot of the whole training, and how many it keeps.

    Whatever comes first: the intervals are independent of each other, and one more is taken when
    the run ends. Training waits for the copy of the state in memory; a thread writes it to
    ``save_path/snapshots``. While it writes, a snapshot that is due waits for the next batch
    boundary.

    Raises ConfigurationError for values that cannot work.
    """

    every_epochs: int | None = 1
    every_batches: int | None = None
    """train batches"""
    every_seconds: float | None = None
    """of wall-clock time"""
    keep: int | None = 2
    """how many of the running fit are kept; None keeps all. The end of every fit is kept too"""
    on_error: Literal["raise", "warn"] = "raise"
    """a snapshot that cannot be written ends the run with a CheckpointError at the next batch
    boundary, or is told by a `SnapshotFailed` event while training goes on"""
    overwrite: bool = False
    """a run that is not resumed removes the snapshots of an earlier training; else they are
    a CheckpointError"""

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_batches", "keep"):
            check_optional(f"Checkpoint({name}=)", getattr(self, name), 1)
        check_seconds("Checkpoint(every_seconds=)", self.every_seconds)
        if self.on_error not in ("raise", "warn"):
            raise ConfigurationError(
                f"Checkpoint(on_error=) is {self.on_error!r}; expected 'raise' or 'warn'"
            )


class Checkpointer:
    """Takes the snapshots of one run. On the step thread, but for the writing."""

    def __init__(
        self,
        policy: Checkpoint,
        core: TrainerState,
        archive: Archive,
        writer: BackgroundWriter,
        part: Callable[[bool], RunPart],
        rest: Callable[[Callable[[], None]], None],
        cut: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._core = core
        self._archive = archive
        self._writer = writer
        self._part = part
        """makes what the run adds, given whether it has ended"""
        self._rest = rest
        """calls a function while no stream of random numbers is entered"""
        self._cut = cut
        """whether the run ends after this batch, before its time"""
        self._clock = clock
        self._staging = SnapshotBuffers()
        self._outcomes: deque[Event] = deque()
        self._writing = False
        self._epochs = 0
        self._batches = 0
        self._due = False
        self._last = clock()

    def after_batch(self) -> None:
        """Take a snapshot if one is due; a batch hook."""
        policy = self._policy
        self._batches += 1
        if self._outcomes:
            self._rest(self._tell)
        if policy.every_batches is not None and self._batches >= policy.every_batches:
            self._due = True
        elif policy.every_seconds is not None and not self._due:
            self._due = self._clock() - self._last >= policy.every_seconds
        if (self._due or self._cut()) and not self._writing:
            self._rest(self._take)

    def observe(self, event: Event) -> None:
        """Take a snapshot at the end of an epoch, if one is due; an observer."""
        if not isinstance(event, EpochEnded):
            return
        self._tell()
        self._epochs += 1
        policy = self._policy
        if policy.every_epochs is not None and self._epochs >= policy.every_epochs:
            self._due = True
        if event.epoch_in_run == event.epochs:
            # What more epochs would go on from: the best weights may be restored after it.
            self._due = True
            self._writer.close()
        if self._due and not self._writing and event.complete:
            self._take()

    def finish(self, *, ended: bool) -> None:
        """Take the last snapshot, if the run has ended, and return when all is durable.

        Raises `CheckpointError` when something could not be written, if that is the wish.
        """
        self._writer.close()
        try:
            self._tell()
        finally:
            if ended:
                self._take(finished=True)
                self._writer.close()
                self._tell()

    def _take(self, *, finished: bool = False) -> None:
        self._due = False
        self._epochs = self._batches = 0
        self._last = self._clock()
        part = self._part(finished)
        path = self._archive.next_path()
        try:
            taken = take_snapshot(self._core, self._staging, part)
        except CheckpointError as error:
            self._outcomes.append(self._failure(path, part, error))
            self._tell()
            return
        self._writing = True
        try:
            self._writer.submit(lambda: self._write(taken, part, path, finished))
        except BaseException:
            self._writing = False
            raise

    def _write(self, taken: PreparedSnapshot, part: RunPart, path: Path, finished: bool) -> None:
        """Write to disk; on the writer's thread."""
        began = self._clock()
        position = part.position
        where = {"epoch": position["epoch"], "batch": position["batch"]}
        try:
            size = taken.write(path, overwrite=True)
            fit = position["fit"]
            self._archive.add(path, fit, finished=finished, keep=self._policy.keep)
            self._outcomes.append(
                SnapshotWritten(
                    trainer=self._core.config.name,
                    path=str(path),
                    nbytes=size,
                    seconds=self._clock() - began,
                    **where,
                )
            )
        except Exception as error:  # told on the step thread
            self._outcomes.append(self._failure(path, part, error))
        finally:
            self._writing = False

    def _failure(self, path: Path, part: RunPart, error: Exception) -> SnapshotFailed:
        return SnapshotFailed(
            trainer=self._core.config.name,
            epoch=part.position["epoch"],
            batch=part.position["batch"],
            path=str(path),
            error=reason(error),
        )

    def _tell(self) -> None:
        """Emit what the writer has to say; raise for a failure, if that is the wish."""
        while self._outcomes:
            event = self._outcomes.popleft()
            self._core.event_bus.emit(event)
            if isinstance(event, SnapshotFailed) and self._policy.on_error == "raise":
                raise CheckpointError(
                    f"{event.path} cannot be written: {event.error}; the older snapshots are "
                    "still there. Checkpoint(on_error='warn') trains on instead"
                )


def check_checkpoint(checkpoint: object, *, resume: bool) -> Checkpoint | None:
    """Return the policy of a run; None for one without snapshots.

    Raises ConfigurationError when it is none.
    """
    if checkpoint is None:
        return Checkpoint() if resume else None
    if not isinstance(checkpoint, Checkpoint):
        raise ConfigurationError(
            f"checkpoint is {checkpoint!r:.60}; expected a fitloop.Checkpoint, such as "
            "Checkpoint(every_epochs=1)"
        )
    return checkpoint
