"""`Checkpointer`, which takes the snapshots of a run as its `Checkpoint` says.

A `Checkpointer` observes a run. If a snapshot is due, it copies the state of the trainer on the
step thread; the writer thread writes it. Knows neither the engine nor the format of the file.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fitloop._checkpointing.archive import Archive
from fitloop._checkpointing.best_model_files import BestModelFiles, is_of_validation
from fitloop._checkpointing.policy import Checkpoint
from fitloop._checkpointing.run_position import RunPosition
from fitloop._checkpointing.snapshot import PreparedSnapshot, take_snapshot
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._concurrency.control import RunControl
from fitloop._engine.parallel import ParallelRun
from fitloop._errors import CheckpointError, NonFiniteWarning, warn_user
from fitloop._events import EpochEnded, Event, SnapshotFailed, SnapshotWritten
from fitloop._storage.durable import reason
from fitloop._storage.tensors import SnapshotBuffers
from fitloop._storage.weight_files import StateDict
from fitloop._storage.weight_store import copied_weights, weights_of, whole_weights
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase


class Checkpointer:
    """Takes the snapshots of one run: on the step thread, except for the writing.

    Args:
        position: returns the position of the run; its argument says whether the run has finished.
        outside: calls a function while no random stream of the trainer is in use.
        control: of the run. A cancelled run takes one more snapshot.
        check: called before each snapshot; raises an error if none must be taken.
        before_writing: called on the writer thread before each snapshot is written.
    """

    def __init__(
        self,
        policy: Checkpoint,
        trainer: TrainerState,
        archive: Archive,
        writer: BackgroundWriter,
        *,
        position: Callable[[bool], RunPosition],
        loaders: Mapping[Phase, Any],
        outside: Callable[[Callable[[], None]], object],
        control: RunControl,
        check: Callable[[], object],
        before_writing: Sequence[Callable[[], object]],
        parallel: ParallelRun | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._trainer = trainer
        self._archive = archive
        self._writer = writer
        self._position = position
        self._loaders = loaders
        self._outside = outside
        self._control = control
        self._check_state = check
        self._before_writing = before_writing
        self._parallel = parallel
        self._is_first = parallel is None or parallel.is_first
        self._has_wished = False
        """rank 0 has told the others that a snapshot is due"""
        self._clock = clock
        self._buffers = SnapshotBuffers()
        self._outcomes: deque[Event] = deque()
        """events of the writer thread that are not emitted yet"""
        self._is_writing = self._has_warned = False
        self._epochs = 0
        self._batches = 0
        self._is_due = False
        self._last_taken = clock()
        self._best: BestModelFiles | None = None
        if policy.keep_best is not None and trainer.criteria is not None and self._is_first:
            self._best = BestModelFiles(
                policy.keep_best,
                trainer.best_models,
                trainer.criteria,
                writer,
                self._best_weights,
                self._note_failure,
            )

    def begin(self) -> None:
        """Prepare the files, before the first epoch.

        Raises `CheckpointError` if no snapshot can hold the state.
        """
        if self._best is not None:
            self._best.begin()
        if self._policy.on_error == "raise":
            self._snapshot(self._position(False))

    def after_batch(self) -> None:
        """Take a snapshot if one is due; called after each train batch."""
        policy = self._policy
        self._batches += 1
        if self._outcomes:
            self._outside(self._emit_outcomes)
        if policy.every_batches is not None and self._batches >= policy.every_batches:
            self._is_due = True
        elif policy.every_seconds is not None and not self._is_due:
            self._is_due = self._clock() - self._last_taken >= policy.every_seconds
        takes = (self._is_due or self._control.cancelled) and not self._is_writing
        if takes if self._parallel is None else self._agrees(self._parallel, wishes=takes):
            self._outside(self._take)

    def _agrees(self, parallel: ParallelRun, *, wishes: bool) -> bool:
        """Return whether all ranks take a snapshot at this batch boundary, which rank 0 wishes."""
        if self._control.cancelled:
            return not parallel.cannot_meet and bool(parallel.world.broadcast(wishes))
        if wishes and self._is_first and not self._has_wished:
            parallel.votes.wishes_snapshot = self._has_wished = True
        return parallel.votes.snapshot_is_due

    def observe(self, event: Event) -> None:
        """Take a snapshot at the end of an epoch if one is due; keep the best models."""
        if self._best is not None:
            self._best.observe(event)
        elif self._policy.keep_best is not None and is_of_validation(event):
            self._best_weights(False)  # rank 0 may want them
        if not isinstance(event, EpochEnded):
            return
        self._emit_outcomes()
        self._epochs += 1
        policy = self._policy
        if policy.every_epochs is not None and self._epochs >= policy.every_epochs:
            self._is_due = True
        if event.epoch_in_run == event.epochs:
            # A later fit with more epochs resumes here, before the best weights are restored.
            self._is_due = True
            self._writer.close()
        takes = self._is_due and not self._is_writing and event.complete
        if self._parallel is not None:
            takes = self._parallel.world.broadcast(takes)
        if takes:
            self._take()

    def finish(self, *, finished: bool) -> None:
        """Take the last snapshot of a finished run, and return when all are durable.

        Raises `CheckpointError` if one could not be written and the policy says "raise".
        """
        self._writer.close()
        if self._best is not None:
            self._best.settle()
        try:
            self._emit_outcomes()
        finally:
            if finished:
                self._take(finished=True)
                self._writer.close()
                self._emit_outcomes()
            if self._best is not None:
                self._best.finish()
                self._emit_outcomes()

    def _take(self, *, finished: bool = False) -> None:
        self._is_due = False
        self._epochs = self._batches = 0
        self._last_taken = self._clock()
        self._check_state()
        position, step = self._position(finished), self._trainer.step_counts.step
        name = self._trainer.non_finite_weight()
        if self._parallel is not None:
            name, position = self._gathered(self._parallel, name, position)
        if name is not None:
            self._warn_once(name)
            return
        path = self._archive.next_path() if self._is_first else Path()
        try:
            prepared = self._snapshot(position)
        except CheckpointError as error:
            if self._is_first:
                self._note_failure(path, error, position.epoch, position.batch, step)
                self._emit_outcomes()
            return
        if prepared is None:
            return
        if self._best is not None:
            self._best.note_snapshot(path)
        self._is_writing = True
        self._writer.submit(lambda: self._write(prepared, position, step, path))

    def _snapshot(self, position: RunPosition) -> PreparedSnapshot | None:
        """Copy the state; None on other ranks than the first one."""
        parallel = self._parallel
        world = parallel.world if parallel is not None and parallel.is_sharded else None
        if world is None and not self._is_first:
            return None
        return take_snapshot(self._trainer, self._buffers, position, self._loaders, world)

    def _gathered(
        self, parallel: ParallelRun, name: str | None, position: RunPosition
    ) -> tuple[str | None, RunPosition]:
        """Return the first weight that is not finite on any rank, and the position of all ranks."""
        self._has_wished = parallel.votes.snapshot_is_due = False
        if self._is_writing:
            self._writer.close()
        random = self._trainer.rng.state_tree(position.loader_rng)
        gathered = parallel.world.gather((name, position.rank_tree(random)))
        names = [name for name, _tree in gathered if name is not None]
        trees = [tree for _name, tree in gathered]
        return (names[0] if names else None), replace(position, ranks=trees)

    def _warn_once(self, weight: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"after {self._trainer.epoch_num} epochs of {self._trainer.config.name!r} no "
                f"snapshot is written while {weight!r} is not finite; a resumed run goes on from "
                "the last one before",
                NonFiniteWarning,
            )

    def _write(
        self, prepared: PreparedSnapshot, position: RunPosition, step: int, path: Path
    ) -> None:
        """Write the snapshot to disk; on the writer thread."""
        started = self._clock()
        try:
            for call in self._before_writing:
                call()
            size = prepared.write(path, overwrite=True)
            self._archive.add(
                path, position.fit, finished=position.finished, keep=self._policy.keep
            )
            self._outcomes.append(
                SnapshotWritten(
                    trainer=self._trainer.config.name,
                    path=str(path),
                    nbytes=size,
                    seconds=self._clock() - started,
                    epoch=position.epoch,
                    batch=position.batch,
                    step=step,
                )
            )
        except Exception as error:  # the step thread emits it
            self._note_failure(path, error, position.epoch, position.batch, step)
        finally:
            self._is_writing = False

    def _note_failure(
        self, path: Path, error: Exception, epoch: int, batch: int = 0, step: int = 0
    ) -> None:
        self._outcomes.append(
            SnapshotFailed(
                trainer=self._trainer.config.name,
                epoch=epoch,
                batch=batch,
                step=step,
                path=str(path),
                error=reason(error),
            )
        )

    def _best_weights(self, is_needed: bool) -> StateDict | None:
        """Return a copy of the weights of a validation, if rank 0 wants it and they are finite."""
        trainer, parallel = self._trainer, self._parallel
        is_sharded = parallel is not None and parallel.is_sharded
        if parallel is not None and is_sharded:
            is_needed = parallel.world.broadcast(is_needed)
        if not is_needed or trainer.non_finite_weight() is not None:
            return None
        weights = weights_of(trainer.config.model)
        return whole_weights(weights) if is_sharded else copied_weights(weights)

    def _emit_outcomes(self) -> None:
        """Emit the events of the writer thread; raise for a failure if the policy says so."""
        while self._outcomes:
            event = self._outcomes.popleft()
            if self._best is not None and isinstance(event, SnapshotWritten):
                self._best.note_durable(Path(event.path))
            self._trainer.event_bus.emit(event)
            if isinstance(event, SnapshotFailed) and self._policy.on_error == "raise":
                raise CheckpointError(
                    f"{event.path} cannot be written: {event.error}; the older snapshots are "
                    "still there. Checkpoint(on_error='warn') trains on instead"
                )
