"""From the arguments of a coroutine to a supervised run: plans, options, and who is told.

The glue between the public verbs and `Run`; runs on the event loop and never blocks it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, TypeVar

import anyio.lowlevel
import torch

from fitloop._concurrency.control import RunControl
from fitloop._concurrency.in_use import in_use
from fitloop._concurrency.supervisor import LoopPortal, supervise
from fitloop._data.inspection import check_loader
from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._display.jupyter import interruptible
from fitloop._engine.config import check_number
from fitloop._engine.event_bus import EventStream, feed_callback
from fitloop._engine.plan import RunPlan
from fitloop._errors import MissingLoaderError
from fitloop._events import Event, PhaseEnded
from fitloop._rng.exclusive import GivenWay
from fitloop._run.fit_options import fit_option
from fitloop._run.run import Run, RunOptions
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase

Callback = Callable[[Any], object]
T = TypeVar("T")


async def launch(
    core: TrainerState,
    trainer: Any,
    plan: RunPlan,
    callbacks: Sequence[Callback] = (),
    *,
    make: Callable[..., Run] = Run,
    **options: Any,
) -> Any:
    """Run ``plan`` on a thread of its own and return its `FitResult`.

    ``make`` makes the run; ``options`` are those of `RunOptions`. Raises `BusyError`
    at once, and what `supervise` raises.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()  # or a thread would be started for nothing
    plain = [callback for callback in callbacks if not is_async_callback(callback)]
    threads = (
        core.config.num_threads or TRAINER_DEFAULTS.get().num_threads or torch.get_num_threads()
    )
    options["observers"] = [*options.get("observers", ()), *plain]
    with in_use(core.config.name, plan.call, core, core.config.model), interruptible():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(GivenWay())
            background_tasks, streams = [], []
            for callback in callbacks:
                if is_async_callback(callback):
                    stream = await stack.enter_async_context(EventStream(core.event_bus, None))
                    streams.append(stream)
                    background_tasks.append(partial(feed_callback, stream, callback))
            control = RunControl()
            side = LoopPortal(control)
            settings = RunOptions(
                num_threads=threads, own_stream=TRAINER_DEFAULTS.get().cuda_stream, **options
            )
            run = make(core, trainer, plan, settings, control, side)
            core.control = control
            try:
                return await supervise(
                    run,
                    control,
                    side,
                    name=core.config.name,
                    grace=core.config.loader_grace,
                    background_tasks=background_tasks,
                    end_background_tasks=partial(_end_all, streams),
                )
            finally:
                core.control = None
                core.event_bus.set_observers(())


def _end_all(streams: Sequence[EventStream]) -> None:
    for stream in streams:
        stream.end()


class FunctionTask:
    """A `Work` that calls one function: weights in and out, reset."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None

    def execute(self) -> None:
        """Call it."""
        self._result = self._function()

    def finish(self, error: BaseException | None) -> Any:
        """Return what it returned."""
        if error is not None:
            raise error
        return self._result


async def run_exclusively_in_thread(core: TrainerState, call: str, function: Callable[[], T]) -> T:
    """Call a blocking function in a thread while the trainer counts as busy.

    It is not interrupted: a cancellation is raised when it has returned.
    """
    with in_use(core.config.name, call, core, core.config.model):
        return await run_in_thread(core.config.name, function)


async def run_in_thread(
    name: str, function: Callable[[], T], control: RunControl | None = None
) -> T:
    """Call a blocking function in a thread that is named after ``name``.

    It is not interrupted: a cancellation is raised when it has returned. ``control`` tells it of
    one meanwhile.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    control = control or RunControl()
    work = FunctionTask(function)
    async with GivenWay():
        result: T = await supervise(work, control, LoopPortal(control), name=name, grace=0.0)
    return result


def phases_to_run(
    core: TrainerState, call: str, given: Mapping[Phase, Any], needed: Phase, *others: Phase
) -> tuple[tuple[Phase, Any], ...]:
    """Return the phases of an epoch with their loaders: the needed one, and others that have one.

    Raises:
        MissingLoaderError: the needed phase has none.
        ConfigurationError: a given loader is none.
    """
    for phase, loader in given.items():
        if loader is not None:
            check_loader(f"{phase}_dl of {call}()", loader)
    loaders = core.loaders_of(given)
    if loaders[needed] is None:
        raise MissingLoaderError(needed, call)
    wanted = [needed, *(phase for phase in others if loaders[phase] is not None)]
    return tuple((phase, loaders[phase]) for phase in wanted)


def dry_plan(
    core: TrainerState,
    call: str,
    given: Mapping[Phase, Any],
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
        first_epoch=core.epoch_num + 1,
        phases=phases_to_run(core, call, given, Phase.TRAIN, Phase.VALID, Phase.TEST),
        steps=fit_option("steps", steps),
        define_all=define_all,
        cast=cast,
    )


def criteria_check(core: TrainerState) -> Callable[[Event], None]:
    """Return an observer that raises when a validation does not return the criteria."""
    criteria = core.criteria

    def check(event: Event) -> None:
        if criteria and isinstance(event, PhaseEnded) and event.phase is Phase.VALID:
            criteria.score(event.metrics)

    return check


def is_async_callback(callback: object) -> bool:
    """Return whether a callback is to be awaited on the event loop."""
    plain = callback.func if isinstance(callback, partial) else callback
    if inspect.isroutine(plain):
        return inspect.iscoroutinefunction(plain)
    return inspect.iscoroutinefunction(getattr(plain, "__call__", None))  # noqa: B004
