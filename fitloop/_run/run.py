"""One fit, test, sanity check or profile, on its step thread.

`Run` observes the engine in a `RunSession`: it emits the events of the run, keeps its metrics and
its best weights, asks whether to go on, and writes its files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from fitloop._checkpointing.checkpointer import Checkpointer
from fitloop._checkpointing.policy import FileOptions
from fitloop._checkpointing.rollback import RollbackPoint
from fitloop._checkpointing.run_files import RunFiles
from fitloop._checkpointing.run_position import RunPosition, loader_tree
from fitloop._concurrency.control import Cancelled
from fitloop._engine.metric_objects import MetricStates
from fitloop._engine.plan import Instrumentation
from fitloop._engine.stages import default_batch_step
from fitloop._engine.step_log import StepLog
from fitloop._errors import CheckpointError, RestoreWarning, one_line, warn_user
from fitloop._events import Event, RunEnded, RunStarted
from fitloop._metrics.results import EpochMetricsRecorder, FitResult
from fitloop._run.parameters import run_parameters
from fitloop._run.prompts import BackgroundPrompts, PromptOptions, Prompts
from fitloop._run.ranks import meet
from fitloop._run.session import RunContext, RunEnding, RunSession
from fitloop._training.early_stop import EarlyStop, EarlyStopper
from fitloop._training.parts import StatePart, states_of
from fitloop._training.trainer_state import new_run_id
from fitloop._training.untrained_check import LostGradientsCheck, UntrainedCheck
from fitloop._types import Phase, StopReason


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The differences between the kinds of runs."""

    observers: Sequence[Callable[[Event], object]] = ()
    """called with every event, before the user's callbacks"""
    prompt: PromptOptions | None = None
    """how the run asks whether to go on; None if it never does"""
    load_best: bool = False
    early_stop: EarlyStop | None = None
    log_every: int | None = None
    """optimizer steps from one `MetricsLogged` to the next; None for none"""
    dry: bool = False
    """restore everything afterwards, and leave the history as it is"""
    instrumentation: Instrumentation = field(default_factory=Instrumentation)
    files: FileOptions | None = None
    """the files that the run writes; None if it writes none"""


class Observer(NamedTuple):
    """A part of a run that reacts to its events, to each train batch, or to both."""

    on_event: Callable[[Event], object] | None = None
    after_batch: Callable[[], object] | None = None


class Run:
    """One run of a trainer, from its files and observers to its result.

    It is constructed and executed on the step thread.
    """

    def __init__(self, context: RunContext, options: RunOptions) -> None:
        state = context.state
        self._context, self._state, self._options = context, state, options
        self._start = time.perf_counter()
        self._restored_epoch: int | None = None
        self._fit = state.completed_fits
        self._parts: dict[str, StatePart] = {}
        """parts of the state of this run, by their key in snapshots"""
        if context.parallel is not None:
            meet(state, context.plan, context.parallel, self._shared_options())
        state.user_settings.begin_call()
        with ExitStack() as stack:
            self._files: RunFiles | None = None
            if options.files is not None:
                self._files = RunFiles(state, options.files, context.plan, context.parallel)
                stack.callback(self._files.close)
            self._resumption = None if self._files is None else self._files.resumption
            self._session = self._open_session()
            stack.callback(self._session.close)
            self._plan = self._session.plan
            if not options.dry:
                state.run_id = state.run_id or new_run_id()
            self._parts["window"] = self._session.steps
            if context.schedulers is not None:
                self._parts["schedulers"] = context.schedulers
            config = state.config
            if config.metrics:
                self._parts["metrics"] = MetricStates(
                    config.metrics, config.device, lambda: self._engine.is_in_train_phase
                )
            self._metrics = EpochMetricsRecorder()
            self._tracker = None
            if self._plan.call == "fit":
                state.save_pretrained(resuming=self._resumption is not None)
                state.watch_loaders(dict(self._plan.phases))
                if self._resumption is None:
                    state.compare_only_with(dict(self._plan.phases).get(Phase.VALID))
                self._tracker = state.best_tracker(state.event_bus.emit)
            self._early_stopper = self._make_early_stopper()
            self._average = None if self._context.schedulers is None else state.average
            if self._average is not None:
                self._average.begin()
            self._step_log = self._make_step_log()
            self._checkpointer = self._make_checkpointer()
            self._prompts = self._make_prompts()
            observers = self._observers()
            self._engine = self._session.engine(
                emit=state.event_bus.emit,
                step_log=self._step_log,
                ask=self._ask,
                after_batch=[o.after_batch for o in observers if o.after_batch is not None],
                instrumentation=options.instrumentation,
                restore_position=self._restore_position,
            )
            state.event_bus.set_observers(o.on_event for o in observers if o.on_event is not None)
            self._close = stack.pop_all().close

    def _shared_options(self) -> dict[str, object]:
        """Return the options that must be the same on all ranks."""
        options = self._options
        policy = None if options.files is None else options.files.checkpoint
        return {
            "load_best": options.load_best,
            "checkpoint": None if policy is None else type(policy).__name__,
            "keep_best": None if policy is None else policy.keep_best,
            "on_error": None if policy is None else policy.on_error,
        }

    def _open_session(self) -> RunSession:
        resumption, dry = self._resumption, self._options.dry
        if resumption is None:
            return RunSession(self._context, dry=dry)
        self._start -= resumption.position.seconds
        configured = self._state.config.num_threads is not None
        return RunSession(
            self._context,
            resumption.plan,
            dry=dry,
            num_threads=None if configured else resumption.num_threads,
        )

    def _observers(self) -> list[Observer]:
        """Return everything that observes the run, in the order in which it is called.

        Each event, and each train batch, goes down this list. A later observer can rely on the
        work of an earlier one: a snapshot contains the effect of all others on the trainer. Event
        streams and async callbacks, which run elsewhere, receive an event before this list.
        """
        state, options, schedulers = self._state, self._options, self._context.schedulers
        observers = [Observer(self._metrics.observe)]  # the result of this run
        if not options.dry:
            observers.append(Observer(state.history.observe))
        if schedulers is not None:
            if self._resumption is not None:
                schedulers.skip_checks()
            observers.append(Observer(schedulers.observe, self._session.step_per_batch()))
        if self._average is not None:
            observers.append(Observer(self._average.observe, self._average.after_batch))
        if self._step_log is not None:
            observers.append(Observer(after_batch=self._step_log.after_batch))
        # It may wait for other runs, with the generators released, so before the checkpointer.
        time_slice = self._session.time_slice
        observers.append(Observer(time_slice.observe, time_slice.after_batch))
        if self._tracker is not None:
            observers.append(Observer(self._tracker.observe))
        if self._early_stopper is not None:
            observers.append(Observer(self._early_stopper.observe))
        if self._plan.call == "fit":
            observers.append(Observer(state.observe))  # counts the epochs
            config, limit = state.config, self._plan.steps
            # A scaler may skip all steps, and the first few batches may make none.
            own_step = config.train_step is not None and config.scaler is None and limit is None
            if own_step and self._resumption is None:  # a resumed epoch may have no batch left
                check = UntrainedCheck(config, state.step_counts, self._session.steps.guard)
                observers.append(Observer(check.observe))
            if self._may_lose_gradients():
                steps = self._session.steps
                steps.before_batch = LostGradientsCheck(config, state.step_counts, steps.guard)
        observers += [Observer(observe) for observe in options.observers]
        observers += [Observer(callback) for callback in self._context.callbacks]
        if self._files is not None and self._files.log is not None:
            observers.append(Observer(self._files.log.observe))
        if self._checkpointer is not None:
            checkpointer = self._checkpointer
            observers.append(Observer(checkpointer.observe, checkpointer.after_batch))
        if isinstance(self._prompts, BackgroundPrompts):
            observers.append(Observer(after_batch=self._prompts.after_batch))
        return observers

    def _may_lose_gradients(self) -> bool:
        """Return whether a step of the user has no gradients of the batches before."""
        config = self._state.config
        return (
            config.train_step not in (None, default_batch_step)
            and not self._plan.define_all
            and config.accumulate == 1
            and config.scaler is None
            and self._resumption is None
        )

    def _make_early_stopper(self) -> EarlyStopper | None:
        if self._options.early_stop is None:
            return None
        stopper = self._parts["early_stop"] = EarlyStopper(
            self._options.early_stop,
            self._state.criteria,
            trainer=self._state.config.name,
            stop=self._context.control.stop,
            emit=self._state.event_bus.emit,
        )
        return stopper

    def _make_step_log(self) -> StepLog | None:
        state, options = self._state, self._options
        if options.log_every is None:
            return None
        log = self._parts["step_log"] = StepLog(
            options.log_every,
            state.config,
            state.step_counts,
            emit=state.event_bus.emit,
            outside=self._session.guard.outside,
            is_heard=lambda: bool(self._context.callbacks) or state.event_bus.has_streams,
        )
        self._session.steps.watch = log
        return log

    def _make_checkpointer(self) -> Checkpointer | None:
        if self._files is None or self._files.checkpoint is None:
            return None
        return Checkpointer(
            self._files.checkpoint,
            self._state,
            self._files.archive,
            self._files.writer,
            position=self._position,
            loaders=dict(self._plan.phases),
            outside=self._session.guard.outside,
            control=self._context.control,
            parallel=self._context.parallel,
            check=self._session.steps.guard.check,
            before_writing=self._context.before_snapshot,
        )

    def _make_prompts(self) -> Prompts | None:
        options = self._options.prompt
        if options is None:
            return None
        if not options.in_background:
            return Prompts(options, self._session)
        self._state.capture().check("fit(continue_while_asking=True)")
        mark = partial(
            RollbackPoint,
            self._state,
            self._plan.phases,
            self._metrics,
            self._tracker,
            self._parts,
        )
        return BackgroundPrompts(options, self._session, mark)

    # -- on the step thread ----------------------------------------------------------------------

    def execute(self) -> None:
        """Emit `RunStarted`, call ``preloop``, run the engine, call ``postloop``."""
        with self._session.error_notes():
            if self._context.schedulers is not None:
                self._session.steps.register()
            self._execute()

    def _execute(self) -> None:
        config, plan, outside = self._state.config, self._plan, self._session.guard.outside
        self._engine.begin()
        resumption = self._resumption
        started = RunStarted(
            trainer=config.name,
            epochs=plan.epochs,
            first_epoch=plan.first_epoch,
            step=0 if resumption is None else resumption.step,
            resumed=resumption is not None,
            run_id=self._state.run_id,
            save_path=str(config.save_path),
            sweep=self._context.defaults.sweep,
            parameters=run_parameters(config, plan, self._context.defaults),
        )
        outside(self._state.event_bus.emit, started)
        if self._was_finished:
            self._begin(started)
            return
        self._session.guard.enter_phase(plan.phases[0][0])
        trains = self._context.schedulers is not None
        if trains:
            self._engine.call_hook("preloop", config.preloop, self._context.trainer)
        outside(self._begin, started)
        if self._checkpointer is not None:
            outside(self._checkpointer.begin)
        self._engine.run()
        if self._prompts is not None:
            rollback_epoch = self._prompts.resolve()
            if rollback_epoch is not None:
                self._engine.epochs_completed = rollback_epoch
        if trains:
            self._engine.call_hook("postloop", config.postloop, self._context.trainer)

    def _ask(self, epoch: int, epoch_in_run: int) -> bool:
        prompts, parallel = self._prompts, self._context.parallel
        if prompts is None:
            return True
        ask = partial(prompts.ask_after, epoch, epoch_in_run)
        return ask() if parallel is None else parallel.answer(ask)

    @property
    def _was_finished(self) -> bool:
        """Whether the run to be resumed had finished already."""
        return self._resumption is not None and self._resumption.position.finished

    def _begin(self, started: RunStarted) -> None:
        """Restore the position of a resumed run, and begin the log."""
        resumption = self._resumption
        if resumption is not None:
            resumption.restore(self._parts)
            self._metrics.restore(resumption.position.metrics)
            if self._tracker is not None:
                self._tracker.tracked = resumption.position.best_tracked
            if self._early_stopper is not None and not resumption.position.finished:
                self._early_stopper.stop_if_over(self._state.epoch_num)
            if resumption.position.train_pass is None:
                resumption.release_snapshot()
        if self._files is not None and self._files.log is not None:
            self._files.log.begin(started, self._plan.epochs_before)

    def _restore_position(self) -> None:
        """Restore once more, after ``epoch_start`` of a resumed epoch."""
        if self._resumption is not None:
            self._resumption.restore(self._parts)
            self._resumption.release_snapshot()

    def _position(self, finished: bool) -> RunPosition:
        """Return the present position of the run, for a snapshot."""
        if self._step_log is not None:  # a resumed run must not emit them again
            self._step_log.flush()
        self._session.steps.settle()
        plan, train_pass = self._plan, self._engine.position()
        is_reading = train_pass is not None
        return RunPosition(
            fit=self._fit,
            finished=finished,
            stop_reason=self._stop_reason(None) if finished else None,
            epochs=plan.epochs,
            first_epoch=plan.first_epoch,
            epochs_completed=self._engine.epochs_completed,
            metrics=self._metrics.export(),
            best_tracked=self._tracker is not None and self._tracker.tracked,
            seconds=self._seconds(),
            loaders={
                str(phase): loader_tree(
                    self._state.loaders, loader, in_pass=is_reading and phase is Phase.TRAIN
                )
                for phase, loader in plan.phases
            },
            train_pass=train_pass,
            parts=states_of(self._parts),
            has_gradients=plan.define_all
            or self._session.steps.is_open
            or (train_pass is not None and train_pass.is_at_end),
        )

    def _seconds(self) -> float:
        if self._resumption is not None and self._was_finished:
            return self._resumption.position.seconds
        return time.perf_counter() - self._start

    # -- at the end, on this or another thread ---------------------------------------------------

    def finish(self, error: BaseException | None) -> FitResult:
        """Restore the trainer, load the best weights, complete the files, and emit `RunEnded`.

        Returns the result, or raises the first error of the run.
        """
        ending = RunEnding(self._state.config.name, self._context.control, error)
        del error  # its traceback refers to this frame
        if self._prompts is not None:
            self._prompts.cancel()
        self._session.restore(ending)
        if self._options.load_best and not ending.has_failed:
            ending.attempt("restoring the best weights", self._load_best)
        is_complete = ending.error is None and not self._was_finished
        ending.attempt("writing what is kept on disk", partial(self._complete_files, is_complete))
        ending.attempt(
            "in a callback at the end of the run", partial(self._emit_ended, ending.error)
        )
        self._close()
        self._state.forget_loaders()
        result = self._result()
        self._state.user_settings.end_call()
        vars(self).clear()  # or references in a circle would keep the model in memory
        return ending.result(result)  # type: ignore[no-any-return]

    def _load_best(self) -> None:
        parallel = self._context.parallel
        if parallel is not None and parallel.is_sharded and parallel.cannot_meet:
            return
        tracked = self._tracker is not None and self._tracker.tracked and not self._was_finished
        if not tracked or self._state.best_score is None or self._state.has_best_weights():
            return
        try:
            self._state.restore_best(self._context.trainer)
            self._restored_epoch = self._state.best_epoch
        except CheckpointError as error:  # the training itself is whole
            warn_user(
                f"the best weights, of epoch {self._state.best_epoch}, were not restored, and the "
                f"model keeps the present ones: {error}",
                RestoreWarning,
            )

    def _complete_files(self, is_complete: bool) -> None:
        if is_complete and self._plan.call == "fit":
            self._state.completed_fits += 1
        if self._checkpointer is not None and not self._was_finished:
            self._checkpointer.finish(finished=is_complete)
        if self._files is not None:
            self._files.flush()

    def _emit_ended(self, error: BaseException | None) -> None:
        state = self._state
        event = RunEnded(
            trainer=state.config.name,
            stop_reason=self._stop_reason(error),
            epochs=self._engine.epochs_completed,
            best_score=state.best_score,
            best_epoch=state.best_epoch,
            seconds=self._seconds(),
            error=None if error is None else one_line(error),
            restored_epoch=self._restored_epoch,
        )
        self._session.guard.outside(state.event_bus.emit, event)

    def _stop_reason(self, error: BaseException | None) -> str:
        if isinstance(error, Cancelled):
            return str(StopReason.CANCELLED)
        if error is not None:
            return str(StopReason.FAILED)
        if self._resumption is not None and self._was_finished:
            return self._resumption.position.stop_reason or ""
        return self._context.control.stop_reason or str(StopReason.COMPLETED)

    def _result(self) -> FitResult:
        criteria = self._state.criteria
        return FitResult(
            epochs=self._engine.epochs_completed,
            stop_reason=self._stop_reason(None),
            best_score=self._state.best_score,
            best_epoch=self._state.best_epoch,
            metrics=self._metrics.arrays(),
            seconds=self._seconds(),
            criteria=None if criteria is None else criteria.name,
            criteria_direction=None if criteria is None else criteria.direction,
            first_epoch=self._plan.first_epoch,
        )
