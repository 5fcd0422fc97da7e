"""The files of one run: its locked directory, snapshots and metric log, and how it is resumed.

Brings together the archive, the metric log and the writer thread, and gives each rank its part of a
snapshot. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from fitloop._checkpointing.archive import Archive
from fitloop._checkpointing.best_model_files import remove_best_models
from fitloop._checkpointing.comparison import check_fits
from fitloop._checkpointing.policy import Checkpoint, FileOptions
from fitloop._checkpointing.run_log import RunLog
from fitloop._checkpointing.run_position import RunPosition
from fitloop._checkpointing.snapshot import Snapshot, apply_snapshot, read_snapshot
from fitloop._checkpointing.training_state import load_parts, refusing
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._data.carried_state import set_carried_states
from fitloop._data.inspection import (
    can_skip_by_index,
    is_stateful,
    loader_label,
)
from fitloop._data.resumption import start_workers
from fitloop._engine.optimization import StepCounts
from fitloop._engine.parallel import ParallelRun
from fitloop._engine.plan import RunPlan
from fitloop._errors import CheckpointError, ResumeWarning, warn_user
from fitloop._rng.states import RngState
from fitloop._rng.trainer_rng import loader_state
from fitloop._storage.durable import DirectoryLock
from fitloop._training.capture import copy_values
from fitloop._training.parts import StatePart
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase


class RunFiles:
    """The open files of one run, for its step thread; `close` must be the last call.

    A rank that is not the first one reads the snapshot from which a run is resumed, and writes
    nothing.

    Raises `CheckpointError` if another run uses the directory, if the archive holds snapshots of
    another training, or if the run cannot be resumed from its snapshot.
    """

    def __init__(
        self,
        trainer: TrainerState,
        options: FileOptions,
        plan: RunPlan,
        parallel: ParallelRun | None,
    ) -> None:
        self._trainer = trainer
        self._world = None if parallel is None else parallel.world
        self.checkpoint = options.checkpoint
        self.writer = BackgroundWriter(trainer.config.name)
        self.archive = Archive(trainer.config.save_path)
        self.log: RunLog | None = None
        """the log of metrics; None on a rank that writes nothing"""
        self.resumption: Resumption | None = None
        self._lock: DirectoryLock | None = None
        if self._world is None or self._world.is_first:
            raises = options.checkpoint is None or options.checkpoint.on_error == "raise"
            self.log = RunLog(trainer, self.writer, raises=raises)
            self._lock = DirectoryLock(trainer.config.save_path)
            self._lock.acquire()
        try:
            if options.checkpoint is not None:
                self.resumption = self._resumption(options.checkpoint, plan, options.resume)
        except BaseException:
            self.close()
            raise

    def _resumption(self, checkpoint: Checkpoint, plan: RunPlan, resume: bool) -> Resumption | None:
        trainer, world = self._trainer, self._world
        if world is None or world.is_first:
            snapshot = self._open_archive(checkpoint, plan, resume)
            if world is not None:
                path = None if snapshot is None else str(snapshot.path)
                world.broadcast((path, trainer.run_id))
        else:
            path, trainer.run_id = world.broadcast(None)
            snapshot = None if path is None else read_snapshot(Path(path))
        trainer.loaders.tracks_positions = True
        if snapshot is None:
            return None
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        return Resumption(trainer, _rank_part(snapshot, trainer, rank, size), plan)

    def _open_archive(self, checkpoint: Checkpoint, plan: RunPlan, resume: bool) -> Snapshot | None:
        """Return the snapshot from which the run is resumed, or None."""
        trainer, archive = self._trainer, self.archive
        archive.open()
        snapshot = archive.find(trainer.completed_fits, plan.epochs) if resume else None
        if not (resume or trainer.owns_archive or archive.is_empty()):
            if not checkpoint.overwrite:
                raise CheckpointError(
                    f"{archive.directory} holds the snapshots of an earlier training; "
                    "fit(resume=True) goes on with it, another save_path= keeps it, "
                    "Checkpoint(overwrite=True) removes it"
                )
            archive.clear()
            remove_best_models(trainer.best_models.directory)
            trainer.best_models.forget()
        trainer.run_id = archive.identify(trainer.run_id, resume=resume)
        trainer.owns_archive = True
        return snapshot

    def flush(self) -> None:
        """Return when everything is durable. Raises `CheckpointError` if the log is not."""
        self.writer.close()
        if self.log is not None:
            self.log.raise_error()

    def close(self) -> None:
        """Release the directory."""
        self._trainer.loaders.stop_tracking_positions()
        if self._lock is not None:
            self._lock.release()


class Resumption:
    """A snapshot in the archive from which a run is resumed."""

    def __init__(self, trainer: TrainerState, snapshot: Snapshot, plan: RunPlan) -> None:
        self._trainer = trainer
        self._snapshot = snapshot
        self.num_threads: int | None = snapshot.trainer["num_threads"]
        with refusing(f"{snapshot.path} cannot be read: its run is not as fitloop writes it"):
            rng_state = loader_state(snapshot.random, Phase.TRAIN)
            self.position = RunPosition.from_trees(
                snapshot.position, snapshot.state["run"], rng_state
            )
            counts = StepCounts(len(trainer.config.optimizers))
            counts.load_state_dict(snapshot.state.get("steps", {}))
            self.step = counts.step
        check_fits(trainer, snapshot, dict(plan.phases), self.position)
        self.plan = replace(
            plan,
            first_epoch=self.position.first_epoch,
            epochs_before=self.position.epochs_completed,
            position=self.position.train_pass,
        )

    def restore(self, parts: Mapping[str, StatePart]) -> None:
        """Apply the snapshot to trainer, loaders and parts of the run, outside random streams.

        In the middle of an epoch this is called twice: before ``epoch_start`` and after it.
        Raises `CheckpointError`, having changed nothing of the trainer, if they do not match.
        """
        apply_snapshot(self._trainer, self._snapshot)
        if self.position.finished:
            return
        with refusing(f"{self._snapshot.path} cannot be read: a part of its run does not fit"):
            load_parts(parts, self.position.parts)
        for phase, loader in self.plan.phases:
            saved = self.position.loaders.get(str(phase))
            if saved is not None:
                self._restore_loader(phase, loader, saved)

    def release_snapshot(self) -> None:
        """Let go of the mapped file, which may have been removed; no `restore` comes after it."""
        self._snapshot = replace(self._snapshot, state={})

    def _restore_loader(self, phase: Phase, loader: Any, saved: dict[str, Any]) -> None:
        if saved["continued"] and isinstance(loader, DataLoader):
            self._restore_workers(phase, loader)
        set_carried_states(loader, saved["generators"])
        if saved["state"] is not None and is_stateful(loader):
            loader.load_state_dict(saved["state"])
        self._trainer.loaders.skip_in_next_pass(phase, saved["read"])

    def _restore_workers(self, phase: Phase, loader: DataLoader[Any]) -> None:
        """Start persistent worker processes, unless the resumed pass itself starts them."""
        train_pass = self.position.train_pass if phase is Phase.TRAIN else None
        by_index = can_skip_by_index(loader)
        if train_pass is None or train_pass.resume_from.pass_start.reused_workers or by_index:
            start_workers(loader)
            if not by_index:
                warn_user(
                    f"resuming: {loader_label(phase, loader)} keeps its worker processes between "
                    "the epochs; what its dataset draws in them goes on from anew, so that results "
                    "differ if it draws. persistent_workers=False is exact",
                    ResumeWarning,
                )


def _rank_part(snapshot: Snapshot, trainer: TrainerState, rank: int, size: int) -> Snapshot:
    """Return a snapshot as one rank of ``size`` applies it.

    Rank 0 wrote the file. The list ``ranks`` in it has an entry for each rank: the random streams
    of its steps, its position in its loader, and the values that it has collected. On another
    number of ranks than before, the steps draw other random numbers, and a `ResumeWarning` says so.
    Raises `CheckpointError` if it is in the middle of an epoch then.
    """
    run = snapshot.state["run"]
    if not isinstance(run, dict) or ("ranks" not in run and size == 1):
        return snapshot
    seed = snapshot.trainer["seed"]
    if trainer.config.may_adopt_seed and seed is not None and seed != trainer.config.seed:
        trainer.adopt_seed(seed)
    run = dict(run)
    parts = run.pop("ranks", [{}])
    shared = replace(snapshot, state={**snapshot.state, "run": run})
    with refusing(f"{snapshot.path} cannot be read: its ranks are not as fitloop writes them"):
        if len(parts) != size:
            return _on_other_ranks(shared, trainer, len(parts), rank, size)
        rank_state = parts[rank]
        run.update(rank_state["parts"], **{"pass": rank_state["pass"]})
        return replace(shared, random=_states(rank_state["random"]))


def _on_other_ranks(
    snapshot: Snapshot, trainer: TrainerState, before: int, rank: int, size: int
) -> Snapshot:
    if snapshot.state["run"]["pass"] is not None:
        raise CheckpointError(
            f"{snapshot.path} is in the middle of an epoch of {before} ranks, and there are {size} "
            f"now; resume on {before}, or remove this file to go on from the end of an epoch"
        )
    if not snapshot.position.get("finished"):
        warn_user(
            f"resuming: {snapshot.path} is of {before} ranks, and there are {size} now; what steps "
            "draw, such as dropout, differs from then on, and an optimizer step has "
            f"{size} batches instead of {before}",
            ResumeWarning,
        )
    if rank == 0:
        return snapshot
    trees = trainer.rng.state_tree().items()
    steps: dict[str, Any] = {name: tree for name, tree in trees if name.endswith(" steps")}
    return replace(snapshot, random={**snapshot.random, **_states(steps)})


def _states(trees: dict[str, Any]) -> dict[str, RngState]:
    return {name: RngState.from_tree(copy_values(tree)) for name, tree in trees.items()}
