"""The training loop: the order of epochs, phases, batches and stage functions, on the step thread.

Everything else in a run (history, best model, schedulers, progress, snapshots) observes its
events, or is called after each batch. Knows no terminal, file or figure. The `LoopPortal` runs
coroutines on the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from inspect import isawaitable
from typing import Any

import torch

from fitloop._concurrency.control import Cancelled
from fitloop._concurrency.coroutines import SteppedAwaitable, close_unawaited
from fitloop._data.device import DeviceTransfer
from fitloop._data.inspection import (
    is_iterable,
    length_of,
    loader_label,
    sample_counts,
    set_epoch,
)
from fitloop._data.resumption import ResumePosition
from fitloop._data.sources import END, LoadContext, Source
from fitloop._engine.loop_state import LoopState, StateWriter
from fitloop._engine.metric_objects import computed_metrics
from fitloop._engine.optimization import Hook
from fitloop._engine.plan import EngineDeps, PassPosition, RunPlan
from fitloop._engine.precision import in_precision
from fitloop._engine.stages import default_batch_step, default_epoch_end, stage_functions
from fitloop._engine.step_log import learning_rates
from fitloop._errors import ConfigurationError, MetricError, add_note_safely, one_line, quoted_list
from fitloop._events import (
    BatchProgress,
    EpochEnded,
    EpochStarted,
    Event,
    PhaseEnded,
    PhaseStarted,
)
from fitloop._metrics.batch_values import as_numbers
from fitloop._types import Phase, Stage, StopReason

PROGRESS_SECONDS = 0.1
"""shortest time between two `BatchProgress` events"""


class Engine:
    """Runs one plan, once."""

    def __init__(self, plan: RunPlan, deps: EngineDeps) -> None:
        self._plan = plan
        self._deps = deps
        self._control = deps.control
        self._stages = stage_functions(deps.config)
        self._transfer = DeviceTransfer(deps.config.device, deps.config.dtype, cast=plan.cast)
        self.activity = "before the first epoch"
        """the current phase, epoch and batch in words, for the note on an exception"""
        self.epochs_completed = plan.epochs_before
        self._train_pass: tuple[StateWriter, Source, dict[str, float]] | None = None
        """the current train phase, with the metrics of its ``epoch_start``; None outside one"""

    def run(self) -> None:
        """Train or test, epoch after epoch.

        ::

            for each epoch:
                EpochStarted
                for each phase (train, then valid; or test):
                    model.train() or .eval(), grad mode
                    epoch_start(state)
                    PhaseStarted
                    for each batch:
                        optimizer.zero_grad()                          train, begins a window
                        batch_step(state)                              its values are collected
                        the optimizer step of an incomplete window     train, in the last batch
                        EngineDeps.after_batch                         train only
                        MetricsLogged                                  train only, ``log_every``
                        BatchProgress                                  at most ten times a second
                    epoch_end(state)
                    PhaseEnded
                EpochEnded
                ask whether to go on

        Raises:
            Cancelled: the run was cancelled; its current batch is complete.
        """
        plan = self._plan
        if plan.epochs_before and plan.position is None:  # the question may have been open
            self._ask_after(plan.epochs_before)
        for epoch_in_run in range(plan.epochs_before + 1, plan.epochs + 1):
            self._agree()
            self._check_cancelled()
            if self._control.halted:
                return
            self._epoch(plan.first_epoch + epoch_in_run - 1, epoch_in_run)
            self._ask_after(epoch_in_run)
        self._agree()
        self._check_cancelled()

    def _ask_after(self, epoch_in_run: int) -> None:
        plan = self._plan
        more = epoch_in_run < plan.epochs and not self._control.halted
        if more and plan.ask_every and epoch_in_run % plan.ask_every == 0:
            epoch = plan.first_epoch + epoch_in_run - 1
            self.activity = f"asking whether to go on after epoch {epoch}"
            if not self._deps.ask(epoch, epoch_in_run):
                self._control.stop(StopReason.PROMPT)

    def begin(self) -> None:
        """Set the modes of the model for a training run, before any code of the user is called."""
        if self._plan.phases[0][0] is Phase.TRAIN and not self._defines_all(Phase.TRAIN):
            self._deps.modes.begin()

    def call_hook(self, name: str, function: Callable[[Any], object] | None, argument: Any) -> None:
        """Call a function outside the phases, such as ``preloop``; an ``async def`` is awaited."""
        if function is None:
            return
        self.activity = name
        torch.set_grad_enabled(True)
        result = function(argument)
        if isawaitable(result):
            self._await(result)

    @property
    def is_in_train_phase(self) -> bool:
        """Whether a pass over the train loader goes on."""
        return self._train_pass is not None

    def position(self) -> PassPosition | None:
        """Return the position in the current train phase, outside stage functions; else None."""
        if self._train_pass is None:
            return None
        writer, source, start_metrics = self._train_pass
        deps, state = self._deps, writer.state
        pass_start, carried, loader_state = deps.loaders.pass_position(Phase.TRAIN)
        return PassPosition(
            start_metrics=start_metrics,
            collected=writer.export(),
            resume_from=ResumePosition(
                batches=state.batch_num,
                pass_start=pass_start,
                rng_state=source.rng_state_after or deps.guard.loader(Phase.TRAIN).state(),
                carried=None if source.reads_ahead else carried,
                loader_state=loader_state,
            ),
            is_at_end=state.batch_num == state.batches,
        )

    def _epoch(self, epoch: int, epoch_in_run: int) -> None:
        deps, plan = self._deps, self._plan
        trainer = deps.config.name
        started_at = time.perf_counter()
        numbers: dict[str, Any] = {
            "epoch": epoch,
            "epoch_in_run": epoch_in_run,
            "epochs": plan.epochs,
        }
        self.activity = f"beginning epoch {epoch}"
        self._emit(EpochStarted(trainer=trainer, **numbers))
        metrics: dict[str, dict[str, float]] = {}
        rates: dict[str, float] = {}
        complete = True
        for phase, loader in plan.phases:
            deps.portal.cancel_without_loop()
            self._agree()
            if self._control.halted:
                complete = False
                break
            self.activity = f"{phase}, epoch {epoch}, beginning"
            if phase is Phase.VALID:  # the averages may use its numbers
                deps.guard.enter_phase(phase)
            with deps.validation() if phase is Phase.VALID else nullcontext():
                result = self._phase(phase, loader, epoch, epoch_in_run)
            if result is None:
                deps.modes.leave_evaluation()
                complete = False
                break
            metrics[phase], is_complete = result
            if phase is Phase.TRAIN:  # those of an epoch's schedulers come later
                rates = learning_rates(deps.config.optimizers)
            complete = complete and is_complete
        if not metrics:  # stopped before any phase had a result
            return
        self._check_cancelled()
        self.activity = f"ending epoch {epoch}"
        self.epochs_completed += 1
        self._emit(
            EpochEnded(
                trainer=trainer,
                **numbers,
                metrics=metrics,
                complete=complete,
                seconds=time.perf_counter() - started_at,
                learning_rates=rates,
            )
        )

    def _phase(
        self, phase: Phase, loader: Any, epoch: int, epoch_in_run: int
    ) -> tuple[dict[str, float], bool] | None:
        """Run one phase; return its metrics, and whether it was complete.

        Returns None if the run was stopped before the first batch, or during a validation or test,
        whose metrics would be those of another data set.
        """
        deps, plan = self._deps, self._plan
        started_at = time.perf_counter()
        batches = self._expected_batches(phase, loader, epoch)
        writer = StateWriter(deps.config, phase, epoch, self._control.stop, steps=deps.steps)
        state = writer.state
        self._enter(phase)
        self._set_epoch(phase, loader, epoch)
        start = self._call(state, Stage.EPOCH_START)
        position = None
        if phase is Phase.TRAIN and epoch_in_run == plan.epochs_before + 1:
            position = plan.position
        if position is not None:
            deps.guard.outside(deps.restore_position)
            start = position.start_metrics
            writer.restore(position.collected)
        self.activity = f"{phase}, epoch {epoch}, opening {loader_label(phase, loader)}"
        source = self._open(state, loader, None if position is None else position.resume_from)
        if phase is Phase.TRAIN:
            self._train_pass = writer, source, start
        try:
            writer.begin(batches, *sample_counts(loader, plan.steps))
            self.activity = f"{phase}, epoch {epoch}, beginning"
            self._emit(
                PhaseStarted(trainer=deps.config.name, epoch=epoch, phase=phase, batches=batches)
            )
            complete = self._pass(writer, source)
        except BaseException as error:
            self._close_after(error, source, loader)
            raise
        self._train_pass = None
        self.activity = f"{phase}, epoch {epoch}, closing {loader_label(phase, loader)}"
        deps.loaders.close(source, loader)
        self._check_cancelled()
        complete = self._gather(writer, loader, complete=complete)
        count = state.batch_num
        if not complete and (count == 0 or phase is not Phase.TRAIN):
            return None
        writer.end()
        metrics = self._epoch_metrics(state)
        deps.modes.leave_evaluation()
        self.activity = f"{phase}, epoch {epoch}, ending"
        self._emit(
            PhaseEnded(
                trainer=deps.config.name,
                epoch=epoch,
                phase=phase,
                metrics=metrics,
                start_metrics=start,
                batch_metrics=writer.values.scalars(count) if plan.track_batch_metrics else {},
                batches=count,
                samples=writer.samples,
                seconds=time.perf_counter() - started_at,
            )
        )
        return metrics, complete

    def _expected_batches(self, phase: Phase, loader: Any, epoch: int) -> int | None:
        """Return the batches of a pass; None if they are not known. Several ranks compare them."""
        batches, parallel = length_of(loader, self._plan.steps), self._deps.parallel
        if parallel is None:
            return batches
        self.activity = f"{phase}, epoch {epoch}, comparing the ranks"
        return parallel.begin_pass(phase, loader, batches)

    def _gather(self, writer: StateWriter, loader: Any, *, complete: bool) -> bool:
        """Gather the values of all ranks after a pass; return whether all have completed it.

        Raises ConfigurationError if there were no batches.
        """
        state, parallel = writer.state, self._deps.parallel
        if parallel is not None:
            self.activity = f"{state.phase}, epoch {state.epoch_num}, gathering the values of ranks"
            complete = parallel.end_pass(writer, complete=complete)
        if state.batch_num == 0 and complete:
            raise ConfigurationError(
                f"{loader_label(state.phase, loader)} gave no batches in epoch {state.epoch_num}; "
                "expected at least one. An iterator can be read only once: pass a list, a "
                "DataLoader, or a function that makes a new iterator. A DataLoader with "
                "drop_last=True leaves out a last batch that is not full"
            )
        return complete

    def _epoch_metrics(self, state: LoopState) -> dict[str, float]:
        """Return the metrics of ``epoch_end`` and of the metric objects."""
        metrics = self._call(state, Stage.EPOCH_END)
        self.activity = f"{state.phase}, epoch {state.epoch_num}, computing metrics"
        computed = computed_metrics(self._deps.config.metrics)
        twice = sorted(metrics.keys() & computed.keys())
        if twice and self._stages[state.phase, Stage.EPOCH_END] is not default_epoch_end:
            raise MetricError(
                f"{state.phase}_epoch_end returned {quoted_list(twice)}, which metrics= computes "
                "too; leave it out, or give it another name"
            )
        return {**metrics, **computed}

    def _pass(self, writer: StateWriter, source: Source) -> bool:
        """Run the batches of a phase; return whether it was complete."""
        deps, state = self._deps, writer.state
        log = deps.step_log if state.is_train else None
        if log is not None:
            log.begin_phase(writer)
        complete = self._batches(writer, source)
        self._agree()
        if state.is_train and not self._control.cancelled:  # else the run is resumed in the window
            self.activity = f"{state.phase}, epoch {state.epoch_num}, the last optimizer step"
            deps.steps.flush()
            deps.steps.guard.end_pass()
            if log is not None:
                deps.guard.outside(log.end_phase)
        return complete

    def _close_after(self, error: BaseException, source: Source, loader: Any) -> None:
        try:
            self._deps.loaders.close(source, loader)
        except Exception as later:  # the caller must see the first error
            add_note_safely(error, f"closing the loader then raised {one_line(later)}")

    def _batches(self, writer: StateWriter, source: Source) -> bool:
        """Run the batches of a phase; return whether it was complete."""
        deps, control, state = self._deps, self._control, writer.state
        phase = state.phase
        wrap = deps.instrumentation.wrap
        step = wrap(phase, "step", self._stages[phase, Stage.BATCH_STEP])
        await_step = wrap(phase, "step", self._await)
        step = in_precision(step, deps.config, phase, await_step)
        put = wrap(phase, "metrics", writer.values.put)
        fetch = wrap(phase, "wait", source.fetch)
        preparations: list[Hook] = []
        reactions: list[Hook] = []
        if phase is Phase.TRAIN:
            preparations, flush = deps.steps.batch_hooks(
                state, control, defines_all=self._defines_all(phase)
            )
            reactions = [*flush, *deps.after_batch]
        if deps.parallel is not None:
            fetch = deps.parallel.fetch(state, fetch)
            reactions = [deps.parallel.boundary(state), *reactions]
        begin, end_of_batch, clock = writer.next_batch, deps.guard.end_of_batch, time.perf_counter
        started_at = clock()
        report_at = started_at + PROGRESS_SECONDS
        epoch = f"{phase}, epoch {state.epoch_num}"
        if control.halted:
            self._check_cancelled()
            return False
        while True:
            try:
                batch = fetch()
                if batch is END:
                    return not control.halted
                begin(batch)
            except BaseException:
                self.activity = f"{epoch}, loading batch {state.batch_num + 1}"
                raise
            try:
                for prepare in preparations:
                    prepare()
                values = step(state)
                if type(values) is not dict and isawaitable(values):
                    values = await_step(values)
                put(values, state.batch_num)
                for react in reactions:
                    react()
            except BaseException:
                self.activity = f"{epoch}, batch_step of batch {state.batch_num}"
                raise
            end_of_batch()
            if control.halted:
                self._check_cancelled()
                return state.batch_num == state.batches
            now = clock()
            if now >= report_at:
                report_at = now + PROGRESS_SECONDS
                self._report(writer, now - started_at)

    def _report(self, writer: StateWriter, seconds: float) -> None:
        state = writer.state
        self.activity = f"{state.phase}, epoch {state.epoch_num}, after batch {state.batch_num}"
        self._emit(
            BatchProgress(
                trainer=self._deps.config.name,
                epoch=state.epoch_num,
                phase=state.phase,
                batch=state.batch_num,
                batches=state.batches,
                samples=writer.samples,
                seconds=seconds,
                metrics=writer.running_means(),
                learning_rates=learning_rates(state.optimizers) if state.is_train else {},
            )
        )

    def _enter(self, phase: Phase) -> None:
        """Set modes and random stream for a phase, and reset the metric objects."""
        deps = self._deps
        train, defined = phase is Phase.TRAIN, self._defines_all(phase)
        if train and not defined:
            deps.modes.train()
        elif not defined:
            deps.modes.evaluate()
        torch.set_grad_enabled(train or defined)  # of this thread only
        deps.guard.enter_phase(phase)
        for metric in deps.config.metrics.values():
            metric.reset()

    def _defines_all(self, phase: Phase) -> bool:
        """Return whether the user's step sets modes and gradients; the default one does not."""
        step = self._stages[phase, Stage.BATCH_STEP]
        return self._plan.define_all and step is not default_batch_step

    def _set_epoch(self, phase: Phase, loader: Any, epoch: int) -> None:
        """Tell the loader the epoch, before ``epoch_start``, which may tell it another one."""
        if is_iterable(loader):
            self.activity = f"{phase}, epoch {epoch}, set_epoch of {loader_label(phase, loader)}"
            set_epoch(loader, epoch - 1)

    def _open(self, state: LoopState, loader: Any, resume_from: ResumePosition | None) -> Source:
        deps, phase = self._deps, state.phase
        context = LoadContext(
            label=loader_label(phase, loader),
            control=self._control,
            epoch=state.epoch_num - 1,
            start_transfer=self._transfer.start,
            finish_transfer=self._transfer.finish if self._transfer.is_async else None,
            rng=deps.guard.loader(phase),
            close_timeout=deps.config.loader_grace,
            read_wrapper=deps.instrumentation.read_wrapper(phase),
        )
        limit = self._plan.steps
        if deps.parallel is not None and resume_from is None:
            deps.parallel.share_order(loader, context.rng)
        return deps.loaders.open(
            loader, phase, context, deps.portal, limit=limit, resume_from=resume_from
        )

    def _call(self, state: LoopState, stage: Stage) -> dict[str, float]:
        """Call ``epoch_start`` or ``epoch_end`` and return its metrics."""
        self.activity = f"{state.phase}, epoch {state.epoch_num}, {stage}"
        function = self._stages[state.phase, stage]
        if function is None:
            return {}
        wrap = self._deps.instrumentation.wrap
        values = wrap(state.phase, stage, function)(state)
        if isawaitable(values):
            values = wrap(state.phase, stage, self._await)(values)
        return as_numbers(values, state.phase, stage)

    def _await(self, awaitable: Any) -> Any:
        """Run the coroutine of an ``async def`` stage on the event loop, and wait for it."""
        guard = self._deps.guard
        try:
            with guard.on_event_loop() as waits:
                return self._deps.portal.call(
                    lambda: SteppedAwaitable(awaitable, waits.step, waits.prepare_step)
                )
        except Cancelled:
            close_unawaited(awaitable)
            raise

    def _emit(self, event: Event) -> None:
        self._deps.guard.outside(self._deps.emit, event)

    def _agree(self) -> None:
        """Let all ranks stop or be cancelled here together."""
        if self._deps.parallel is not None:
            self._deps.parallel.votes.agree()

    def _check_cancelled(self) -> None:
        if self._control.cancelled:
            raise Cancelled
