"""One run of a trainer, on its thread: what comes before the loop, around it, and after it.

`Run.execute` prepares and loops; `Run.finish` puts back what a run may not leave behind, however
it ended, and says how it went. Knows no event loop but through `LoopPortal`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fitloop._checkpointing.checkpointer import Checkpointer
from fitloop._checkpointing.rollback import RollbackPoint
from fitloop._checkpointing.run_files import FileOptions, RunFiles
from fitloop._checkpointing.run_position import LoaderPosition, RunPosition
from fitloop._concurrency.control import Abandoned, Cancelled, RunControl
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._concurrency.time_slices import TimeSliceHook
from fitloop._concurrency.torch_threads import intra_op_threads
from fitloop._data.cuda_stream import CudaStreamScope, NullStreamScope
from fitloop._engine.config import STAGE_NAMES
from fitloop._engine.loop import Engine
from fitloop._engine.loop_state import add_attribute_hint
from fitloop._engine.plan import EngineDeps, Instrumentation, NoInstrumentation, RunPlan
from fitloop._errors import add_note_safely, one_line
from fitloop._events import Event, RunEnded, RunStarted
from fitloop._metrics.results import EpochMetricsRecorder, FitResult
from fitloop._rng.guard import RngGuard
from fitloop._rng.trainer_rng import TrainerRng
from fitloop._run.prompts import BackgroundPrompts, BlockingPrompts, PromptOptions, Prompts
from fitloop._training.best import BestTracker
from fitloop._training.capture import TrainingCapture
from fitloop._training.schedulers import SchedulerSteps
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase, StopReason

Observer = Callable[[Event], object]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What is special about a run."""

    num_threads: int
    """intra-op threads of the step thread"""
    observers: Sequence[Observer] = ()
    """called with every event, after the trainer's own"""
    prompt: PromptOptions | None = None
    """how to ask whether to go on; None for a run that never does"""
    load_best: bool = False
    dry: bool = False
    """put everything back afterwards, and record nothing"""
    instrumentation: Instrumentation = field(default_factory=NoInstrumentation)
    files: FileOptions | None = None
    """what the run writes to disk; None for nothing"""
    own_stream: bool = False
    """on CUDA, its kernels go beside those of other runs"""


class Run:
    """A `Work`: one fit, test, sanity check or profile."""

    def __init__(
        self,
        core: TrainerState,
        trainer: Any,
        plan: RunPlan,
        options: RunOptions,
        control: RunControl,
        side: LoopPortal,
    ) -> None:
        self._core = core
        self._trainer = trainer
        self._plan = plan
        self._options = options
        self._control = control
        self._side = side
        self._log = EpochMetricsRecorder()
        self._tracker: BestTracker | None = None
        self._engine: Engine | None = None
        self._around: EngineDeps | None = None
        self._guard: RngGuard | None = None
        self._capture: TrainingCapture | None = None
        phases = [phase for phase, _loader in plan.phases]
        self._schedulers: SchedulerSteps | None = None
        if Phase.TRAIN in phases:  # made here, so that it refuses before anything has begun
            self._schedulers = SchedulerSteps(
                core.config, core.criteria, validates=Phase.VALID in phases
            )
        self._loaders = core.loaders.for_dry_run() if options.dry else core.loaders
        self._modes: list[tuple[Any, bool]] = []
        self._prompts: Prompts | None = None
        self._slice: TimeSliceHook | None = None
        self._lane = NullStreamScope()
        self._fit = core.completed_fits
        self._files: RunFiles | None = None
        self._checkpointer: Checkpointer | None = None
        self._found: FitResult | None = None
        """of a run that had ended before it was resumed"""
        self._has_threads = False
        self._began = 0.0

    # -- on the step thread --------------------------------------------------------------------

    def execute(self) -> None:
        """Prepare, call ``preloop``, run the engine, call ``postloop``."""
        core, plan = self._core, self._plan
        self._began = time.perf_counter()
        resumption = None
        if self._options.files is not None:
            files = self._files = RunFiles(core, self._options.files, plan)
            resumption = files.resumption
        if resumption is not None:
            plan = self._plan = resumption.plan
            self._began -= resumption.position.seconds
        self._enter_threads()
        core.move_to_device()  # on the stream that others use, too
        if self._options.own_stream and core.config.device.type == "cuda":
            self._lane = CudaStreamScope(core.config.device)
        self._lane.enter()
        self._modes = [(module, module.training) for module in core.config.model.modules()]
        guard = self._guard = self._make_guard()
        if self._options.dry:
            self._capture = core.capture()
        elif plan.call == "fit":
            core.save_pretrained(resuming=resumption is not None)
            self._tracker = core.best_tracker(core.event_bus.emit)
        part = self._slice = TimeSliceHook(guard.wait, self._control)
        core.event_bus.set_observers(self._observers(part))
        around = self._around = EngineDeps(
            parts=core.config,
            control=self._control,
            side=self._side,
            loaders=self._loaders,
            emit=core.event_bus.emit,
            ask=self._ask,
            guard=guard,
            thread_contexts=(self._lane, guard),
            instrumentation=self._options.instrumentation,
            restore_position=self._restore_position,
        )
        engine = self._engine = Engine(plan, around)
        self._prompts = self._make_prompts(guard)
        if self._files is not None and self._options.files and self._options.files.checkpoint:
            self._checkpointer = Checkpointer(
                self._options.files.checkpoint,
                core,
                self._files.archive,
                self._files.writer,
                position=self._run_position,
                outside=guard.outside,
                control=self._control,
            )
        around.batch_hooks = self._batch_hooks(part)
        if isinstance(self._prompts, BackgroundPrompts):
            around.batch_hooks.append(self._prompts.after_batch)
        self._guarded(engine, guard)

    def _loop(self, engine: Engine, guard: RngGuard) -> None:
        core, plan = self._core, self._plan
        begun = RunStarted(
            trainer=core.config.name,
            call=plan.call,
            epochs=plan.epochs,
            first_epoch=plan.first_epoch,
        )
        guard.outside(core.event_bus.emit, begun)
        resumption = None if self._files is None else self._files.resumption
        if resumption is not None and resumption.position.finished:
            self._resume(begun)
            self._found = self._result_of(resumption.position)
            return
        guard.enter_phase(plan.phases[0][0])
        trains = self._schedulers is not None
        if trains:
            engine.call_plain("preloop", core.config.preloop, self._trainer)
        guard.outside(self._resume, begun)
        engine.run()
        self._resolve_prompt(engine)
        if trains:
            engine.call_plain("postloop", core.config.postloop, self._trainer)

    def _guarded(self, engine: Engine, guard: RngGuard) -> None:
        try:
            self._loop(engine, guard)
        except (Cancelled, Abandoned):
            raise
        except BaseException as error:
            add_attribute_hint(error)
            add_note_safely(error, f"in trainer {self._core.config.name!r}: {self._position()}")
            raise

    def _position(self) -> str:
        """Return where the run is, for the note on an exception."""
        assert self._engine is not None
        return self._engine.describe_position()

    def _rng(self) -> TrainerRng:
        """Return the random numbers of this run."""
        rng = self._core.rng
        return rng.fork() if self._options.dry else rng

    def _make_guard(self) -> RngGuard:
        parts = self._core.config
        stages = [getattr(parts, name) for name in STAGE_NAMES.values()]
        return RngGuard(self._rng(), self._control, [parts.model, parts.loss_function, *stages])

    def _batch_hooks(self, part: TimeSliceHook) -> list[Callable[[], None]]:
        schedulers, checkpointer = self._schedulers, self._checkpointer
        hooks = [schedulers.after_batch] if schedulers and schedulers.per_batch else []
        return [
            *hooks,
            part.after_batch,
            *([checkpointer.after_batch] if checkpointer else ()),
        ]  # snapshots come after a slice

    def _enter_threads(self) -> None:
        number = self._options.num_threads
        resumption = None if self._files is None else self._files.resumption
        if self._core.config.num_threads is None and resumption is not None:
            number = resumption.num_threads or number
        self._core.num_threads = number
        self._has_threads = intra_op_threads.enter(number)

    def _observers(self, part: TimeSliceHook) -> list[Observer]:
        observers: list[Observer] = [part.observe, self._log.observe]
        if not self._options.dry:
            observers.append(self._core.history.observe)
        if self._schedulers is not None:
            observers.append(self._schedulers.observe)
        if self._tracker is not None:
            observers.append(self._tracker.observe)
        if self._plan.call == "fit":
            observers.append(self._core.observe)
        observers += self._options.observers
        if self._files is not None:  # last, so that it keeps what others did
            observers.append(self._files.log.observe)
        if self._options.files is not None and self._options.files.checkpoint is not None:
            observers.append(self._observe_for_snapshots)
        return observers

    def _make_prompts(self, guard: RngGuard) -> Prompts | None:
        prompt, core = self._options.prompt, self._core
        if prompt is None:
            return None
        emit = partial(guard.outside, core.event_bus.emit)
        around = (prompt.ask, self._control, self._side, emit, guard.wait)
        if not prompt.in_background:
            return BlockingPrompts(*around)
        mark = partial(
            guard.outside, RollbackPoint, core, self._plan.phases, self._log, self._tracker
        )
        return BackgroundPrompts(*around, mark=mark, rest=guard.outside)

    def _ask(self, epoch: int, epoch_in_run: int) -> bool:
        prompt, prompts = self._options.prompt, self._prompts
        assert prompt is not None
        assert prompts is not None
        name, epochs = self._core.config.name, self._plan.epochs
        return prompts.ask(prompt.event(name, epoch, epoch_in_run, epochs))

    def _resolve_prompt(self, engine: Engine) -> None:
        """Wait for the answer to a question that is open, and go back if it is no."""
        if self._prompts is None:
            return
        reached = self._prompts.resolve()
        if reached is not None:
            engine.epochs_completed = reached

    # -- afterwards, on this or another thread --------------------------------------------------

    def finish(self, error: BaseException | None) -> Any:
        """Put back what must be, restore the best weights, tell the observers, and report."""
        self._lane.enter()  # this may be another thread
        if error is None and self._control.cancelled:
            error = Cancelled()
        if isinstance(error, Cancelled) and self._control.failure is not None:
            error = self._control.failure
        if self._prompts is not None:
            self._prompts.cancel()
        steps: list[tuple[str, Callable[[], None]]] = [("putting back", self._put_back)]
        if self._guard is not None:
            steps.insert(0, ("putting back the random generators", self._guard.close))
        if self._options.load_best and (error is None or isinstance(error, Cancelled)):
            steps.append(("restoring the best weights", self._load_best))
        for doing, step in steps:  # all of them, whatever the others raise
            try:
                step()
            except BaseException as raised:
                error = self._first(error, raised, doing)
        try:
            self._end_fit(error)
        except BaseException as raised:
            error = self._first(error, raised, "writing what is kept on disk")
        try:
            self._tell_end(error)
        except BaseException as raised:
            error = self._first(error, raised, "in a callback at the end of the run")
        if self._has_threads:
            intra_op_threads.leave()
        self._lane.leave()
        if self._slice is not None:
            self._slice.close()
        if self._files is not None:
            self._files.close()
        result = None if error is not None else self._found or self._result()
        # These refer back to this run, and all of them to the model.
        self._engine = self._around = self._prompts = self._slice = None
        try:
            if error is not None:
                raise error
            return result
        finally:
            del error

    def _first(
        self, error: BaseException | None, raised: BaseException, doing: str
    ) -> BaseException:
        """Return which of two errors the caller is to see: the first that is one."""
        if error is None or isinstance(error, Cancelled):
            return self._noted(raised, doing)
        add_note_safely(error, f"{doing} then raised {one_line(raised)}")
        return error

    def _noted(self, error: BaseException, doing: str) -> BaseException:
        add_note_safely(error, f"in trainer {self._core.config.name!r}: {doing}")
        return error

    def _put_back(self) -> None:
        for module, training in self._modes:
            module.training = training
        self._loaders.restore()
        if self._capture is not None:
            self._capture.restore()

    def _load_best(self) -> None:
        tracked = self._tracker is not None and self._tracker.tracked and self._found is None
        if tracked and self._core.best_score is not None:
            self._core.restore_best(self._trainer)

    def _end_fit(self, error: BaseException | None) -> None:
        ended = error is None and self._engine is not None and self._found is None
        if ended and self._plan.call == "fit":
            self._core.completed_fits += 1
        if self._checkpointer is not None and self._found is None:
            self._checkpointer.finish(finished=ended)
        if self._files is not None:
            self._files.flush()

    def _tell_end(self, error: BaseException | None) -> None:
        core, engine = self._core, self._engine
        if engine is None:  # it failed before anybody was told that it began
            return
        ended = RunEnded(
            trainer=core.config.name,
            call=self._plan.call,
            stop_reason=self._stop_reason(error),
            epochs=engine.epochs_completed,
            best_score=core.best_score,
            best_epoch=core.best_epoch,
            seconds=time.perf_counter() - self._began,
            error=None if error is None else one_line(error),
        )
        assert self._guard is not None
        self._guard.outside(core.event_bus.emit, ended)

    def _stop_reason(self, error: BaseException | None) -> str:
        if isinstance(error, Cancelled):
            return str(StopReason.CANCELLED)
        if error is not None:
            return str(StopReason.FAILED)
        if self._found is not None:
            return self._found.stop_reason
        return self._control.stop_reason or str(StopReason.COMPLETED)

    def _observe_for_snapshots(self, event: Event) -> None:
        if self._checkpointer is not None:
            self._checkpointer.observe(event)

    def _resume(self, started: RunStarted) -> None:
        """Restore the position of a resumed run, and start the log of any run."""
        if self._files is None:
            return
        resumption = self._files.resumption
        if resumption is not None:
            resumption.restore()
            self._log.restore(resumption.position.metrics)
            if self._tracker is not None:
                self._tracker.tracked = resumption.position.best_tracked
            if resumption.position.train_pass is None:
                resumption.release_snapshot()
        self._files.log.begin(started, self._plan.epochs_before)

    def _restore_position(self) -> None:
        assert self._files is not None
        assert self._files.resumption is not None
        self._files.resumption.restore()
        self._files.resumption.release_snapshot()

    def _run_position(self, finished: bool) -> RunPosition:
        """Return what the run adds to a snapshot that is taken now."""
        assert self._engine is not None
        plan, position = self._plan, self._engine.position()
        in_train = position.train_pass is not None
        return RunPosition(
            fit=self._fit,
            finished=finished,
            stop_reason=self._stop_reason(None) if finished else None,
            epochs=plan.epochs,
            first_epoch=plan.first_epoch,
            epochs_completed=position.epochs_completed,
            metrics=self._log.export(),
            best_tracked=self._tracker is not None and self._tracker.tracked,
            seconds=time.perf_counter() - self._began,
            loaders={
                str(phase): LoaderPosition.of(
                    self._loaders, loader, in_pass=in_train and phase is Phase.TRAIN
                )
                for phase, loader in plan.phases
            },
            train_pass=position.train_pass,
            has_gradients=position.has_gradients,
        )

    def _result_of(self, position: RunPosition) -> FitResult:
        return FitResult(
            epochs=position.epochs_completed,
            stop_reason=position.stop_reason or "",
            best_score=self._core.best_score,
            best_epoch=self._core.best_epoch,
            metrics=self._log.arrays(),
            seconds=position.seconds,
        )

    def _result(self) -> FitResult:
        assert self._engine is not None
        return FitResult(
            epochs=self._engine.epochs_completed,
            stop_reason=self._stop_reason(None),
            best_score=self._core.best_score,
            best_epoch=self._core.best_epoch,
            metrics=self._log.arrays(),
            seconds=time.perf_counter() - self._began,
        )
