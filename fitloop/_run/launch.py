"""Starts the supervised thread of a public verb. Runs on the event loop and never blocks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import anyio.lowlevel
import torch

from fitloop._concurrency.in_use import in_use
from fitloop._concurrency.supervisor import LoopPortal, ThreadTask, run_in_thread, supervise
from fitloop._data.inspection import check_distinct, length_of
from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._display.jupyter import interruptible
from fitloop._engine.compilation import warn_of_compilation
from fitloop._engine.config import check_number
from fitloop._engine.event_bus import UserCallbacks
from fitloop._engine.plan import RunPlan
from fitloop._errors import MissingLoaderError, OptimizerWarning, note_call_site, warn_user
from fitloop._events import Event, PhaseEnded
from fitloop._run.mode_checks import checked_modes
from fitloop._run.prediction import leave_predictions
from fitloop._run.ranks import control_of, heard_callbacks, shared_plan, together
from fitloop._run.session import RunContext, scheduler_steps
from fitloop._training.early_stop import EarlyStop, EarlyStopper
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase
from fitloop.callbacks.callback import Callback

T = TypeVar("T")


async def launch(
    state: TrainerState,
    trainer: Any,
    plan: RunPlan,
    make_task: Callable[[RunContext], ThreadTask],
    callbacks: Sequence[Callback] = (),
) -> Any:
    """Run ``plan`` on a thread of its own, and return the result of the task.

    ``make_task`` is called on that thread: `Run` with its options, or another `ThreadTask` that
    opens a `RunSession`. So is code of the user: the length of a loader, and functions that make
    schedulers. Raises `BusyError` at once, ConfigurationError if two phases share an iterator that
    would be empty for the second, and everything that `supervise` raises.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()  # before a thread is started
    await leave_predictions(state)
    plan = shared_plan(state, plan)
    if plan.steps is None:  # an endless iterator may serve all phases, some batches for each
        check_distinct({f"{phase}_dl": loader for phase, loader in plan.phases})
    config, defaults = state.config, TRAINER_DEFAULTS.get()
    note_call_site()
    state.warn_of_ranks()
    if plan.call == "fit":
        config.check_parameters()
        warn_of_compilation(config.model, config.compile, plan.phases, plan.steps)
    trains = any(phase is Phase.TRAIN for phase, _loader in plan.phases)
    control, parallel = control_of(state, plan)
    portal = LoopPortal(control)
    user_callbacks = UserCallbacks(state.event_bus, heard_callbacks(state, callbacks), portal)
    with (
        in_use(config.name, plan.call, state, config.model),
        together(state, plan, parallel),
        checked_modes(plan.call, trains=trains),
        interruptible(),
        ExitStack() as schedulers,
        state.event_bus.run(plan.call, state.step_counts.per_optimizer),
    ):
        num_threads = config.num_threads or defaults.num_threads or torch.get_num_threads()

        def make() -> ThreadTask:
            _warn_of_short_epoch(state, plan)
            schedulers.enter_context(state.planned_schedulers.made_for(plan))
            context = RunContext(
                state=state,
                trainer=trainer,
                plan=plan,
                schedulers=scheduler_steps(state, plan),
                control=control,
                parallel=parallel,
                portal=portal,
                callbacks=user_callbacks.plain,
                num_threads=num_threads,
                own_cuda_stream=defaults.cuda_stream,
                defaults=defaults,
                before_snapshot=user_callbacks.before_snapshot,
            )
            return make_task(context)

        async with user_callbacks:
            state.control = control
            try:
                return await supervise(
                    make,
                    control,
                    portal,
                    name=config.name,
                    grace=config.loader_grace,
                    background_tasks=user_callbacks.tasks,
                    end_background_tasks=user_callbacks.end,
                )
            finally:
                state.control = None


def _warn_of_short_epoch(state: TrainerState, plan: RunPlan) -> None:
    """Warn of a fit whose epochs have fewer batches than one optimizer step."""
    accumulate = state.config.accumulate
    if plan.call != "fit" or accumulate == 1:
        return
    batches = length_of(plan.phases[0][1], plan.steps)
    if batches and batches < accumulate:
        warn_user(
            f"accumulate is {accumulate}, and an epoch has {batches} batches: each optimizer step "
            f"has only these, since no step has batches of two epochs. Give accumulate={batches}",
            OptimizerWarning,
        )


async def run_exclusively_in_thread(state: TrainerState, call: str, function: Callable[[], T]) -> T:
    """Call a blocking function in a thread, as `run_in_thread`, while the trainer is in use.

    ``call`` names the public verb. Raises `BusyError` if the trainer or its model is in use.
    """
    await leave_predictions(state)
    with in_use(state.config.name, call, state, state.config.model):

        def call_function() -> T:
            state.user_settings.begin_call()
            try:
                return function()
            finally:
                state.user_settings.end_call()

        return await run_in_thread(state.config.name, call_function)


def phases_to_run(
    state: TrainerState, call: str, loaders: Mapping[Phase, Any], required: Phase, *optional: Phase
) -> tuple[tuple[Phase, Any], ...]:
    """Return the phases of an epoch, each with its loader.

    These are the required phase, and the optional ones that have a loader. ``loaders`` are
    arguments of the call; a None stands for the loader of the constructor.

    Raises:
        MissingLoaderError: the required phase has no loader.
    """
    available = state.loaders_of(loaders)
    if available[required] is None:
        raise MissingLoaderError(required, call)
    phases = [required, *(phase for phase in optional if available[phase] is not None)]
    return tuple((phase, available[phase]) for phase in phases)


def dry_plan(
    state: TrainerState,
    call: str,
    loaders: Mapping[Phase, Any],
    *,
    epochs: int,
    steps: int | None,
    define_all: bool,
    cast: bool,
) -> RunPlan:
    """Return the plan of a run over every phase that has a loader."""
    return RunPlan(
        call=call,
        epochs=check_number("epochs", epochs, 1),
        first_epoch=state.epoch_num + 1,
        phases=phases_to_run(state, call, loaders, Phase.TRAIN, Phase.VALID, Phase.TEST),
        steps=steps,
        define_all=define_all,
        cast=cast,
    )


def criteria_check(
    state: TrainerState, early_stop: EarlyStop | None = None
) -> Callable[[Event], None]:
    """Return an observer that raises an error if a validation returns not all metrics.

    These are the criteria and the metric of ``early_stop``.
    """
    criteria, stopper = state.criteria, None
    if early_stop is not None:
        stopper = EarlyStopper(early_stop, criteria, trainer=state.config.name)

    def check(event: Event) -> None:
        if not isinstance(event, PhaseEnded) or event.phase is not Phase.VALID:
            return
        if criteria:
            criteria.score(event.metrics)
        if stopper:
            stopper.score(event.metrics)

    return check
