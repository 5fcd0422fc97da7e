"""What a run keeps on disk: its directory, its snapshots, its log; and how it goes on from there.

Ties the archive, the checkpointer, the metric log and the writer thread to one run, and says
what a run adds to a snapshot of its trainer. The engine knows none of it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from fitloop._checkpointing.archive import Archive
from fitloop._checkpointing.checkpointer import Checkpoint, Checkpointer
from fitloop._checkpointing.run_log import RunLog
from fitloop._checkpointing.run_position import check_run, opened_from, opened_state
from fitloop._checkpointing.snapshot import RunPart, Snapshot, apply_snapshot
from fitloop._concurrency.background_writer import BackgroundWriter
from fitloop._concurrency.control import RunControl
from fitloop._data.inspection import (
    can_skip_by_index,
    generator_states,
    has_live_workers,
    is_stateful,
    loader_label,
    set_generator_states,
)
from fitloop._data.resumption import ResumePosition, start_workers
from fitloop._engine.loop import Engine
from fitloop._engine.plan import PassPosition, PassProgress, RunPlan
from fitloop._errors import CheckpointError, ResumeWarning
from fitloop._events import Event
from fitloop._metrics.results import EpochMetricsRecorder, FitResult
from fitloop._rng.guard import RngGuard
from fitloop._rng.trainer_rng import loader_state
from fitloop._storage.durable import DirectoryLock
from fitloop._training.best import BestTracker
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase


class Persistence:
    """The files of one run, on its step thread; `open` and `close` are its first and last calls.

    Without a ``policy`` it takes no snapshots and keeps the log only.
    """

    def __init__(self, core: TrainerState, policy: Checkpoint | None, *, resume: bool) -> None:
        self._core = core
        self._policy = policy
        self._resume = resume
        self._lock = DirectoryLock(core.config.save_path)
        self._archive = Archive(core.config.save_path)
        self._writer = BackgroundWriter(core.config.name)
        self._fit = core.completed_fits
        self._plan: RunPlan | None = None
        self._engine: Engine | None = None
        self._metrics: EpochMetricsRecorder | None = None
        self._tracker: BestTracker | None = None
        self._checkpointer: Checkpointer | None = None
        self._stop_reason = ""
        self._log = RunLog(core, self._writer, raises=policy is None or policy.on_error == "raise")
        self._began = time.perf_counter()
        self.found: Snapshot | None = None
        """what the run is resumed from"""

    # -- before the run --------------------------------------------------------------------------

    def open(self, plan: RunPlan) -> RunPlan:
        """Take the directory, look for a snapshot to go on from, and return what is left to do.

        Raises `CheckpointError` when another run has the directory, when there are snapshots of
        another training, and when the snapshot is of a trainer with another seed.
        """
        self._lock.acquire()
        self._plan = plan
        if self._policy is None:
            return plan
        self._archive.open()
        core = self._core
        if self._resume:
            self.found = self._archive.find(self._fit, plan.epochs)
        elif not core.owns_archive and not self._archive.is_empty():
            if not self._policy.overwrite:
                raise CheckpointError(
                    f"{self._archive.directory} holds the snapshots of an earlier training; "
                    "fit(resume=True) goes on with it, another save_path= keeps it, "
                    "Checkpoint(overwrite=True) removes it"
                )
            self._archive.clear()
        core.owns_archive = True
        core.loaders.tracks_positions = True
        if self.found is not None:
            self._check_fits(self.found)
            self._plan = self._plan_from(self.found, plan)
        return self._plan

    @property
    def is_over(self) -> bool:
        """Whether the run that was to be resumed had ended already."""
        return self.found is not None and bool(self.found.position["finished"])

    @property
    def num_threads(self) -> int | None:
        """Intra-op threads of the run that is resumed."""
        return None if self.found is None else self.found.trainer["num_threads"]

    def _check_fits(self, found: Snapshot) -> None:
        own, saved = self._core.config, found.trainer
        if saved["seed"] != own.seed:
            raise CheckpointError(
                f"{found.path} is of a trainer with seed={saved['seed']}, this one has "
                f"seed={own.seed}; resume with the same seed"
            )
        differing = []
        if own.num_threads not in (None, saved["num_threads"]):
            differing.append(f"num_threads was {saved['num_threads']} and is {own.num_threads}")
        if found.versions.get("torch") != str(torch.__version__):
            differing.append(f"torch was {found.versions.get('torch')} and is {torch.__version__}")
        if differing:
            warnings.warn(
                f"resuming {own.name!r}: results may differ in their last bits, since "
                + " and ".join(differing),
                ResumeWarning,
                stacklevel=2,
            )

    def _plan_from(self, found: Snapshot, plan: RunPlan) -> RunPlan:
        try:
            position = found.position
            check_run(position, found.run)
            return replace(
                plan,
                first_epoch=int(position["first_epoch"]),
                epochs_before=int(position["epochs_done"]),
                position=self._pass_position(found),
            )
        except Exception as error:  # whatever a forged tree makes of it
            raise CheckpointError(
                f"{found.path} cannot be read: its run is not as fitloop writes it: {error!r}"
            ) from error

    def _pass_position(self, found: Snapshot) -> PassPosition | None:
        saved = found.run["pass"]
        if saved is None:
            return None
        return PassPosition(
            start_metrics=saved["start_metrics"],
            exported=saved["exported"],
            resume_from=ResumePosition(
                batches=len(saved["exported"]["sizes"]),
                pass_start=opened_from(saved["opened"]),
                rng_state=loader_state(found.random, Phase.TRAIN),
                generators=saved["generators"],
                loader_state=saved["loader"],
            ),
            restore=self._restore_again,
        )

    def restore(self) -> None:
        """Put the snapshot into the trainer and its loaders; no stream may be entered.

        Raises `CheckpointError`, having changed nothing of the trainer, when they do not fit.
        """
        assert self.found is not None
        assert self._plan is not None
        saved = self.found.run["loaders"]
        apply_snapshot(self._core, self.found)
        for phase, loader in self._plan.phases:
            own = saved.get(str(phase))
            if own is None or self.is_over:
                continue
            if own["continued"] and isinstance(loader, DataLoader):
                self._restore_workers(phase, loader)
            if len(own["generators"]) == len(generator_states(loader)):
                set_generator_states(loader, own["generators"])
            if own["state"] is not None and is_stateful(loader):
                loader.load_state_dict(own["state"])
            self._core.loaders.skip_in_next_pass(phase, own["read"])

    def _restore_again(self) -> None:
        self.restore()
        self._let_go()

    def _let_go(self) -> None:
        """Keep what is asked for later only: the rest holds a file that may have been removed."""
        if self.found is not None:
            self.found = replace(self.found, state={"run": self.found.run})

    def _restore_workers(self, phase: Phase, loader: DataLoader[Any]) -> None:
        """Start worker processes that were kept, unless the pass that goes on does so itself."""
        assert self._plan is not None
        position = self._plan.position if phase is Phase.TRAIN else None
        if (
            position is None
            or position.resume_from.pass_start.reused_workers
            or can_skip_by_index(loader)
        ):
            start_workers(loader)
            if not can_skip_by_index(loader):
                warnings.warn(
                    f"resuming: {loader_label(phase, loader)} keeps its worker processes between "
                    "the epochs; what its dataset draws in them goes on from anew, so that results "
                    "differ if it draws. persistent_workers=False is exact",
                    ResumeWarning,
                    stacklevel=2,
                )

    # -- the run ---------------------------------------------------------------------------------

    def begin(
        self,
        engine: Engine,
        metrics: EpochMetricsRecorder,
        tracker: BestTracker | None,
        control: RunControl,
        guard: RngGuard,
    ) -> None:
        """Be ready to take snapshots of a run that is about to begin."""
        self._engine, self._metrics, self._tracker = engine, metrics, tracker
        self._began = time.perf_counter()
        if self._policy is not None:
            self._checkpointer = Checkpointer(
                self._policy,
                self._core,
                self._archive,
                self._writer,
                self._part,
                rest=guard.outside,
                cut=lambda: control.cancelled,
            )

    def go_on(self) -> None:
        """Put back what a run that is resumed had reached; does nothing for another one."""
        if self.found is not None:
            self.restore()
            run = self.found.run
            assert self._metrics is not None
            self._metrics.restore(run["log"])
            if self._tracker is not None:
                self._tracker.tracked = bool(run["tracked"])
            self._began -= run["seconds"]
            if self._plan is not None and self._plan.position is None:
                self._let_go()
        self._log.begin(0 if self._plan is None else self._plan.epochs_before)

    def result(self) -> FitResult:
        """Return how the run went that had ended before it was resumed."""
        assert self.found is not None
        run, position = self.found.run, self.found.position
        metrics = EpochMetricsRecorder()
        metrics.restore(run["log"])
        return FitResult(
            epochs=position["epochs_done"],
            stop_reason=position["stop_reason"],
            best_score=self._core.best_score,
            best_epoch=self._core.best_epoch,
            metrics=metrics.arrays(),
            seconds=run["seconds"],
        )

    @property
    def seconds_before(self) -> float:
        """How long the run had taken before it was resumed."""
        return 0.0 if self.found is None else float(self.found.run["seconds"])

    @property
    def batch_hooks(self) -> list[Callable[[], None]]:
        """What to call after every batch of the train phase."""
        return [] if self._checkpointer is None else [self._checkpointer.after_batch]

    def observe(self, event: Event) -> None:
        """Log what the event adds to the history, and take a snapshot if one is due."""
        self._log.observe(event)
        if self._checkpointer is not None:
            self._checkpointer.observe(event)

    def _part(self, finished: bool) -> RunPart:
        """Return what the run adds to a snapshot that is taken now."""
        engine, plan = self._engine, self._plan
        assert engine is not None
        assert plan is not None
        assert self._metrics is not None
        cursor = None if finished else engine.cursor
        done = engine.epochs_completed
        batch = 0 if cursor is None else cursor.state.batch_num
        drawn = None if cursor is None else cursor.source.rng_state_after
        return RunPart(
            position={
                "fit": self._fit,
                "finished": finished,
                "stop_reason": self._stop_reason if finished else None,
                "epochs": plan.epochs,
                "first_epoch": plan.first_epoch,
                "epochs_done": done,
                "epoch": plan.first_epoch + done - (0 if cursor is not None else 1),
                "batch": batch,
            },
            state={
                "log": self._metrics.export(),
                "tracked": self._tracker is not None and self._tracker.tracked,
                "seconds": time.perf_counter() - self._began,
                "loaders": {
                    str(phase): self._loader_state(phase, loader, cursor)
                    for phase, loader in plan.phases
                },
                "pass": None if cursor is None else self._pass_state(cursor),
            },
            loader_rng={} if drawn is None else {Phase.TRAIN: drawn},
            with_grads=plan.define_all or (cursor is not None and batch == cursor.state.batches),
        )

    def _loader_state(
        self, phase: Phase, loader: Any, cursor: PassProgress | None
    ) -> dict[str, Any]:
        between = cursor is None or phase is not Phase.TRAIN
        # A DataLoader's own would begin its next iteration, which draws.
        tells = between and is_stateful(loader) and not isinstance(loader, DataLoader)
        return {
            "generators": generator_states(loader),
            "continued": has_live_workers(loader),
            "read": self._core.loaders.batches_read(loader) if between else 0,
            "state": loader.state_dict() if tells else None,
        }

    def _pass_state(self, cursor: PassProgress) -> dict[str, Any]:
        opened, generators, loader = self._core.loaders.pass_position(Phase.TRAIN)
        return {
            "start_metrics": dict(cursor.start_metrics),
            "exported": cursor.state._export(),
            "opened": opened_state(opened),
            "generators": generators,
            "loader": loader,
        }

    # -- afterwards ------------------------------------------------------------------------------

    def finish(self, stop_reason: str | None) -> None:
        """Return when everything is durable; ``stop_reason`` is None for a run that did not end.

        Raises `CheckpointError` when something could not be written.
        """
        self._stop_reason = stop_reason or ""
        if self._checkpointer is not None and not self.is_over:
            self._checkpointer.finish(ended=stop_reason is not None)
        self._writer.close()
        self._log.tell_error()

    def close(self) -> None:
        """Give the directory back."""
        self._core.loaders.stop_tracking_positions()
        self._engine = None
        self._lock.release()
