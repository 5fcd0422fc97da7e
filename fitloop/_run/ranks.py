"""How a run on one rank meets those of the other ranks: before it, and when it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import anyio

from fitloop._blocks import contextmanager
from fitloop._checkpointing.snapshot import step_arguments
from fitloop._concurrency.control import RunControl
from fitloop._defaults import TRAINER_DEFAULTS
from fitloop._engine.parallel import ParallelRun
from fitloop._engine.plan import RunPlan
from fitloop._engine.sharding import is_sharded
from fitloop._engine.wrapping import unwrap, wrapped
from fitloop._errors import BusyError, ConfigurationError, one_line
from fitloop._ranks.votes import SharedControl
from fitloop._ranks.world import World, current_world, launched_size
from fitloop._training.trainer_state import TrainerState
from fitloop._types import Phase

SHARED_CALLS = ("fit", "test", "run_sanity_check", "run_profiler")
"""calls that all ranks make together"""


def world_of(state: TrainerState) -> World | None:
    """Return the ranks that train a trainer together; None if this process trains it alone.

    Raises ConfigurationError if several processes were started and are not connected, or in a job
    of a `Runner` that several processes have.
    """
    if state.config.parallel is None:
        return None
    world, launched = current_world(), launched_size()
    defaults = TRAINER_DEFAULTS.get()
    if launched > 1 and defaults.sweep is not None and defaults.ranks == 1:
        raise ConfigurationError(
            f"parallel is {state.config.parallel!r:.60} in a job of a Runner, whose jobs have no "
            "order that all ranks share; start the program as one process, and give its backend "
            "the ranks: Runner(backend=ProcessBackend(ranks=2))"
        )
    if world is None and launched > 1:
        raise ConfigurationError(
            f"parallel is {state.config.parallel!r:.60}, and {launched} processes were started "
            "together, which are not connected; train inside `async with fitloop.world():`"
        )
    return world if world is not None and world.size > 1 else None


def writes_files(state: TrainerState) -> bool:
    """Return whether this process prints, asks and writes the files of a trainer."""
    world = world_of(state)
    return world is None or world.is_first


def sharing_world(state: TrainerState) -> World | None:
    """Return the ranks over which the parameters of a trainer are split now; None if they are not.

    They must meet to put the parameters together.
    """
    world = world_of(state)
    return world if world is not None and is_sharded(state.config.model) else None


def share_model(state: TrainerState) -> None:
    """Split the parameters of a trainer over the ranks, if a run would; all ranks meet."""
    world, config = world_of(state), state.config
    if world is not None and config.parallel != "ddp":
        unwrap(wrapped(config, world))


def control_of(state: TrainerState, plan: RunPlan) -> tuple[RunControl, ParallelRun | None]:
    """Return the flags of a run, and its meetings with other ranks; None if there are none.

    Raises ConfigurationError if ranks cannot make the call together.
    """
    world = world_of(state)
    if world is None or plan.call == "predict":
        return RunControl(), None
    if plan.call not in SHARED_CALLS:
        raise ConfigurationError(
            f"{plan.call}() does not work on several ranks; call it in one process"
        )
    unsynced = [
        name for name, m in state.config.metrics.items() if not hasattr(m, "dist_sync_on_step")
    ]
    if unsynced:
        raise ConfigurationError(
            f"metrics has {unsynced[0]!r}, an object that does not compute over all ranks; use "
            "metrics of torchmetrics, or return values from the batch steps, which are gathered"
        )
    state.adopt_rank(world.rank, world.seed)
    control = SharedControl()
    return control, ParallelRun(state.config, world, control)


def shared_plan(state: TrainerState, plan: RunPlan) -> RunPlan:
    """Return the plan of this rank: its loaders give the share of the rank in each batch."""
    world = world_of(state)
    if world is None or plan.call not in SHARED_CALLS:
        return plan
    rank, size = world.rank, world.size
    phases = tuple(
        (
            phase,
            state.shares.of(f"{phase}_dl", loader, rank, size, trains=phase is Phase.TRAIN),
        )
        for phase, loader in plan.phases
    )
    return replace(plan, phases=phases)


def heard_callbacks(
    state: TrainerState, callbacks: Sequence[Callable[[Any], object]]
) -> list[Callable[[Any], object]]:
    """Return the callbacks of this rank: all on rank 0, else those with ``every_rank``."""
    if writes_files(state):
        return list(callbacks)
    return [callback for callback in callbacks if getattr(callback, "every_rank", False)]


def meet(
    state: TrainerState, plan: RunPlan, parallel: ParallelRun, options: dict[str, Any]
) -> None:
    """Compare the plans, options and arguments of all ranks, on the step thread.

    These are what decides when ranks exchange something, and what their weights become.
    """
    config, average, criteria = state.config, state.config.average, state.criteria
    names = [] if average is None else [field.name for field in fields(average)]
    facts = {
        "epochs": plan.epochs,
        "first epoch": plan.first_epoch,
        "phases": [str(phase) for phase, _loader in plan.phases],
        "continue_loop": plan.ask_every,
        **options,
        **step_arguments(config),
        "average": [getattr(average, name) for name in names if name != "prepare"],
        "criteria": None if criteria is None else [criteria.name, criteria.direction],
    }
    if config.parallel != "ddp":  # rank 0 gathers the weights of its files
        facts["save_to_disk"] = config.save_to_disk
    parallel.meet(plan.call, facts)


@contextmanager
def together(state: TrainerState, plan: RunPlan, parallel: ParallelRun | None) -> Iterator[None]:
    """Use the connections to the other ranks in a block; if it fails alone, tell them and leave.

    Raises BusyError if another run uses them.
    """
    if parallel is None:
        yield
        return
    world, name = parallel.world, state.config.name
    if world.user is not None:
        raise BusyError(name, plan.call, f"the ranks are in use by {world.user}")
    world.user = f"{name}.{plan.call}()"
    try:
        yield
    except BaseException as error:
        is_end = isinstance(error, KeyboardInterrupt) or not isinstance(error, Exception)
        if not (parallel.control.is_agreed and is_end):
            world.explain(error)
            world.fail(_reason(error))
        raise
    finally:
        world.user = None


def _reason(error: BaseException) -> str:
    if isinstance(error, anyio.get_cancelled_exc_class()):
        return "it was cancelled where the ranks could not agree on it"
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith("in trainer")]
    return "; ".join([one_line(error), *notes[:1]])
