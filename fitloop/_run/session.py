"""The conditions in which the code of a run executes on its step thread, and their removal.

`RunSession` is common to fits, tests, dry runs and benchmarks. It records nothing and emits no
event: `Run` does that around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fitloop._blocks import contextmanager
from fitloop._concurrency.control import Abandoned, Cancelled, RunControl
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._concurrency.time_slices import TimeSliceHook
from fitloop._concurrency.torch_threads import intra_op_threads
from fitloop._data.cuda_stream import CudaStreamScope, NullStreamScope
from fitloop._defaults import TrainerDefaults
from fitloop._engine.config import STAGE_NAMES
from fitloop._engine.loop import Engine
from fitloop._engine.loop_state import add_attribute_hint
from fitloop._engine.modes import Modes
from fitloop._engine.optimization import OptimizerSteps
from fitloop._engine.parallel import ParallelRun
from fitloop._engine.plan import EngineDeps, RunPlan
from fitloop._engine.sharding import reshard
from fitloop._errors import RestoreWarning, add_note_safely, one_line, warn_user
from fitloop._rng.guard import RngGuard
from fitloop._rng.trainer_rng import TrainerRng
from fitloop._training.schedulers import SchedulerSteps, check_modes
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """The inputs of any kind of run; `launch` makes them."""

    state: TrainerState
    trainer: Any
    """the public object, which ``preloop``, ``postloop`` and ``configure_optimizer`` receive"""
    plan: RunPlan
    schedulers: SchedulerSteps | None
    """None if the plan has no train phase"""
    parallel: ParallelRun | None = None
    """the other ranks of the training; None if there are none"""
    control: RunControl
    portal: LoopPortal
    callbacks: Sequence[Callable[[Any], object]]
    """the user's plain callbacks, called with every event"""
    num_threads: int
    """intra-op threads of the step thread"""
    own_cuda_stream: bool
    """whether the kernels of this run overlap with those of other runs"""
    defaults: TrainerDefaults
    """defaults of the job of a `Runner`"""
    before_snapshot: Sequence[Callable[[], object]] = ()
    """methods of callbacks that are called before a snapshot is written"""


class RunSession:
    """Prepares the step thread and the trainer for one run, and restores both.

    At the end of the run, call `restore` and then `close`, from any thread.

    Args:
        context: inputs of the run.
        plan, num_threads: replace those of the context, for a resumed run.
        dry: restore the training at the end, and use copies of the trainer's random streams.
        rng: replaces these random streams.
        code: functions that the run calls, besides those of the trainer.
    """

    def __init__(
        self,
        context: RunContext,
        plan: RunPlan | None = None,
        *,
        dry: bool = False,
        num_threads: int | None = None,
        rng: TrainerRng | None = None,
        code: Sequence[object] = (),
    ) -> None:
        state = context.state
        config = state.config
        self.context = context
        self.plan = plan or context.plan
        self.activity = ""
        """words before the position in the note on an exception, e.g. for a part of a benchmark"""
        self.on_restore: list[Callable[[], object]] = []
        """functions that `restore` calls after everything else"""
        with ExitStack() as stack:
            self.num_threads = state.num_threads = num_threads or context.num_threads
            if intra_op_threads.enter(self.num_threads):
                stack.callback(intra_op_threads.leave)
            state.move_to_device()  # on the thread's own CUDA stream, which other runs use too
            has_stream = context.own_cuda_stream and config.device.type == "cuda"
            self._cuda_stream = CudaStreamScope(config.device) if has_stream else NullStreamScope()
            self._cuda_stream.enter()
            stack.callback(self._cuda_stream.leave)
            ranks, schedulers = context.parallel, context.schedulers
            if ranks is not None:
                stack.callback(ranks.end)
                if schedulers is not None:
                    ranks.wrap()
            self._modes = [(module, module.training) for module in config.model.modules()]
            self._is_dry = dry
            if rng is None:
                rng = state.rng.fork() if dry else state.rng
            stages = (getattr(config, name) for name in STAGE_NAMES.values())
            all_code = [config.called_model, config.loss_function, *stages, *code]
            self.guard = RngGuard(rng, context.control, all_code)
            stack.callback(self.guard.close)
            self.guard.allow_waits()
            self._loaders = state.loaders.for_dry_run() if dry else state.loaders
            self._before = state.capture(stages=False) if dry else None
            self._marks: dict[str, object] = {}
            """marks of objects that a dry run cannot restore"""
            if self._before is not None:
                self._before.check(f"{self.plan.call}()")
                self._marks = state.objects.marks()
            self.time_slice = TimeSliceHook(self.guard.wait, context.control)
            stack.callback(self.time_slice.close)
            after_step = () if schedulers is None else schedulers.after_step
            checks_finite = self.plan.call != "find_lr"  # which ends at a loss that is not
            self.steps = OptimizerSteps(
                config, state.step_counts, after_step, checks_finite=checks_finite, ranks=ranks
            )
            """the optimizer steps; `restore` removes their hooks"""
            self._deps = EngineDeps(
                config=config,
                control=context.control,
                portal=context.portal,
                loaders=self._loaders,
                modes=Modes(config.model, config.optimizers),
                guard=self.guard,
                steps=self.steps,
                parallel=ranks,
                validation=state.validation,
            )
            self._engine = Engine(self.plan, self._deps)
            self.close: Callable[[], None] = stack.pop_all().close
            """leaves the CUDA stream, and releases intra-op threads and time slice"""

    def step_per_batch(self) -> Callable[[], None] | None:
        """Return the function that steps the schedulers of interval ``"batch"``; None if none.

        In a pass without a length it may wait for the end of the pass, with an optimizer step.
        """
        schedulers, steps = self.context.schedulers, self.steps
        if schedulers is None or not schedulers.per_batch:
            return None
        if self.context.state.config.accumulate == 1:
            return schedulers.after_batch
        steps.after_window = schedulers.catch_up
        return lambda: schedulers.after_batch(is_undecided=steps.is_undecided)

    def engine(self, plan: RunPlan | None = None, **deps: Any) -> Engine:
        """Return an engine for a plan; ``deps`` replaces fields of `EngineDeps`.

        Notes on exceptions name the position of the engine that was returned last.
        """
        self._engine = Engine(plan or self.plan, replace(self._deps, **deps))
        return self._engine

    @contextmanager
    def error_notes(self) -> Iterator[None]:
        """Add the trainer and the position of the run to an exception of the block."""
        try:
            yield
        except (Cancelled, Abandoned):
            raise
        except BaseException as error:
            add_attribute_hint(error)
            name, position = self.context.state.config.name, self._engine.activity
            add_note_safely(error, f"in trainer {name!r}: {self.activity}{position}")
            raise

    def restore_training(self) -> None:
        """Return to the state of the training that a dry run began with."""
        if self._before is None:
            return
        self._before.restore()
        changed = self.context.state.objects.changed_since(self._marks)
        if changed:
            warn_user(
                f"{', '.join(changed)} changed in {self.plan.call}() and was not put back; give "
                "what the training depends on to the trainer in stateful=",
                RestoreWarning,
            )

    def restore(self, ending: RunEnding) -> None:
        """Restore the random generators and the modes; after a dry run, also the training."""
        self._cuda_stream.enter()  # this may be another thread than the step thread
        ending.attempt("putting back the random generators", self.guard.close)
        grace = self.context.state.config.loader_grace
        functions: list[Callable[[], object]] = [
            self.steps.remove,
            partial(reshard, self.context.state.config.model),
            self._end_validation,
            self._restore_modes,
            partial(self._loaders.end_process, grace),
            self._loaders.restore,
            self.restore_training,
            *self.on_restore,
        ]
        for function in functions:
            ending.attempt("putting back", function)

    def _end_validation(self) -> None:
        average = self.context.state.average
        if average is not None:
            average.end_block()

    def _restore_modes(self) -> None:
        if not self._is_dry:
            self._deps.modes.evaluate_optimizers()
        for module, training in self._modes:
            module.training = training


def scheduler_steps(state: TrainerState, plan: RunPlan) -> SchedulerSteps | None:
    """Return the steps of the schedulers in a run; None if it does not train.

    Raises ConfigurationError if a scheduler cannot be stepped in this run.
    """
    check_modes(state.config, state.criteria)  # of those that a function has made
    phases = [phase for phase, _loader in plan.phases]
    if Phase.TRAIN not in phases:
        return None
    return SchedulerSteps(
        state.config,
        state.criteria,
        validates=Phase.VALID in phases,
        warns=plan.call == "fit",
        steps=plan.call != "find_lr",
    )


class RunEnding:
    """The end of a run: all its steps are attempted, and the first error is kept."""

    def __init__(self, name: str, control: RunControl, error: BaseException | None) -> None:
        self._name, self._is_of_others = name, control.is_of_others
        if error is None and control.cancelled:
            error = Cancelled()
        if isinstance(error, Cancelled) and control.failure is not None:
            error = control.failure
        self.error = error

    @property
    def has_failed(self) -> bool:
        """Whether there is an error other than a cancellation."""
        return self.error is not None and not isinstance(self.error, Cancelled)

    def attempt(self, activity: str, step: Callable[[], object]) -> None:
        """Call ``step``; an error after the first one becomes a note on it."""
        try:
            step()
        except BaseException as error:
            if self.error is None or not self.has_failed:
                add_note_safely(error, f"in trainer {self._name!r}: {activity}")
                self.error = error
            else:
                add_note_safely(self.error, f"{activity} then raised {one_line(error)}")

    def result(self, value: Any) -> Any:
        """Return ``value``, or raise the error; the last call."""
        error, self.error = self.error, None  # a raised error refers to this frame
        try:
            if isinstance(error, Cancelled) and self._is_of_others:
                return value
            if isinstance(error, StopIteration):
                # Python itself would make this of it in a coroutine, without the notes.
                wrapped = RuntimeError("the code of a run raised StopIteration")
                for note in getattr(error, "__notes__", ()):
                    add_note_safely(wrapped, note)
                raise wrapped from error
            if error is not None:
                raise error
            return value
        finally:
            del error
