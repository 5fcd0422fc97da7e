"""Trainings in this process: the thread backend, and the function that trains for every backend."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from fitloop._checkpointing.checkpointer import Checkpoint
from fitloop._concurrency.control import RunControl
from fitloop._defaults import TRAINER_DEFAULTS, TrainerDefaults
from fitloop._errors import ConfigurationError
from fitloop._events import Event
from fitloop._rng.exclusive import alone_in_steps, exclusive_rng
from fitloop._run.launch import run_in_thread
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop.backends.base import WEIGHTS, JobSpec, TrainingResult


class ThreadBackend:
    """Trainings in this process, each on a thread of its own."""

    def check(self, spec: JobSpec) -> None:
        """Refuse a trainer with arguments; everything else is seen when it is called."""
        if isinstance(spec.target, FitLoop | SyncFitLoop):
            if spec.args:
                raise ConfigurationError(
                    f"job {spec.name!r}: a trainer was submitted with the arguments "
                    f"{spec.args!r:.80}; expected none, they are for a function that makes one"
                )
            check_save_path(spec, spec.target)
        elif not callable(spec.target):
            raise ConfigurationError(
                f"job {spec.name!r}: {spec.target!r:.80} was submitted; expected a function that "
                "returns a FitLoop, or a FitLoop"
            )

    async def run(
        self, spec: JobSpec, share: TrainerDefaults, tell: Callable[[Event], None]
    ) -> TrainingResult:
        """Build the trainer in a thread and await its ``fit``."""
        return await train(spec, share, tell)

    async def close(self) -> None:
        """Nothing is kept."""


async def train(
    spec: JobSpec, share: TrainerDefaults, tell: Callable[[Event], None]
) -> TrainingResult:
    """Do the training of a job in this process: what every backend does in the end."""
    token = TRAINER_DEFAULTS.set(share)
    try:
        trainer = await build(spec)
        options = dict(spec.options)
        options["callbacks"] = [*options.get("callbacks", ()), tell]
        if spec.directory is not None:
            check_save_path(spec, trainer)
            options.setdefault("checkpoint", Checkpoint())
            options.setdefault("resume", True)
        result = await trainer.fit(spec.epochs, **options)
        weights = None
        if spec.directory is not None:
            weights = await trainer.save_model(WEIGHTS, spec.directory, overwrite=True)
        return TrainingResult(result=result, weights=weights, trainer=trainer)
    finally:
        TRAINER_DEFAULTS.reset(token)


def check_save_path(spec: JobSpec, trainer: FitLoop | SyncFitLoop) -> None:
    """Refuse a trainer that keeps its files elsewhere than its job does: it could not be resumed.

    Raises:
        ConfigurationError: it does.
    """
    if spec.directory is None or trainer.save_path.absolute() == spec.directory:
        return
    raise ConfigurationError(
        f"job {spec.name!r}: the trainer keeps its files in {trainer.save_path}; expected "
        f"{spec.directory}, where the Runner keeps those of this job. Give it that save_path=, "
        "submit a function that makes it without one, or leave the Runner's out"
    )


async def build(spec: JobSpec) -> FitLoop:
    """Return the trainer of a job.

    A plain factory is called in a thread, no two at once, and no trainer draws meanwhile: what it
    seeds and draws is what it would be alone. An async one has that between two of its waits.
    """
    return as_trainer(await build_from(spec.target, spec.args, spec.name), f"job {spec.name!r}")


async def build_from(target: Any, args: tuple[Any, ...], name: str) -> Any:
    """Return a trainer that is given as such, or what the factory makes of ``args``."""
    if isinstance(target, FitLoop | SyncFitLoop):
        return target
    if iscoroutinefunction(target):
        return await alone_in_steps(target(*args))
    control = RunControl()

    def call() -> Any:
        with exclusive_rng(control):
            return target(*args)

    made = await run_in_thread(name, call, control)
    return await alone_in_steps(made) if isawaitable(made) else made


def as_trainer(made: Any, label: str) -> FitLoop:
    """Return the trainer that a factory made, the one for event loops of a blocking one.

    Raises:
        ConfigurationError: it made something else.
    """
    if isinstance(made, SyncFitLoop):
        made = made.loop
    if not isinstance(made, FitLoop):
        raise ConfigurationError(f"{label}: the factory returned {made!r:.80}; expected a FitLoop")
    return made
