"""Trainings in this process: the thread backend, and `run_job`, which trains for every backend."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isawaitable, iscoroutinefunction
from typing import Any

from fitloop._checkpointing.policy import Checkpoint
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.supervisor import run_in_thread
from fitloop._defaults import TRAINER_DEFAULTS, TrainerDefaults
from fitloop._errors import ConfigurationError
from fitloop._events import Event
from fitloop._rng.exclusive import exclusive_rng
from fitloop._storage.job_files import OUTCOME_NAME, WEIGHTS_NAME
from fitloop._storage.weight_files import are_one_file
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop.backends.base import JobSpec, TrainingResult


class ThreadBackend:
    """Trainings in this process, each on a thread of its own."""

    def check(self, spec: JobSpec) -> None:
        """Refuse a target that is neither a function nor a trainer; see `Backend.check`."""
        if isinstance(spec.target, FitLoop | SyncFitLoop):
            if spec.args:
                raise ConfigurationError(
                    f"job {spec.name!r}: a trainer was submitted with the arguments "
                    f"{spec.args!r:.80}; expected none, they are for a function that makes one"
                )
            check_save_path(spec, spec.target)
        elif not callable(spec.target) or _is_verb(spec.target):
            raise ConfigurationError(
                f"job {spec.name!r}: {spec.target!r:.80} was submitted; expected a function that "
                "returns a FitLoop, or a FitLoop; the Runner calls its fit()"
            )

    async def run(
        self, spec: JobSpec, defaults: TrainerDefaults, emit: Callable[[Event], None]
    ) -> TrainingResult:
        """Do the training in this process; see `Backend.run`."""
        return await run_job(spec, defaults, emit)

    async def close(self) -> None:
        """Do nothing: this backend holds no resources."""


def _is_verb(target: Any) -> bool:
    is_method = isinstance(getattr(target, "__self__", None), FitLoop | SyncFitLoop)
    return is_method and target.__name__ in ("fit", "train", "test")


async def run_job(
    spec: JobSpec, defaults: TrainerDefaults, emit: Callable[[Event], None]
) -> TrainingResult:
    """Do the training of a job in this process: build its trainer, await ``fit``, save the weights.

    Every backend calls this function in the process where the training runs. Arguments, errors
    and cancellation are those of `Backend.run`.
    """
    token = TRAINER_DEFAULTS.set(defaults)
    try:
        trainer = await build_trainer(spec)
        options = dict(spec.options)
        options["callbacks"] = [*options.get("callbacks", ()), emit]
        if spec.directory is not None:
            check_save_path(spec, trainer)
            _check_best_name(spec, trainer)
            options.setdefault("checkpoint", Checkpoint())
            options.setdefault("resume", True)
        result = await trainer.fit(spec.epochs, **options)
        weights = None
        if spec.directory is not None:
            weights = await trainer.save_model(WEIGHTS_NAME, spec.directory, overwrite=True)
        return TrainingResult(result=result, weights=weights, trainer=trainer)
    finally:
        TRAINER_DEFAULTS.reset(token)


def check_save_path(spec: JobSpec, trainer: FitLoop | SyncFitLoop) -> None:
    """Refuse a trainer whose files are not in the directory of its job: it could not be resumed."""
    if spec.directory is None or trainer.save_path == spec.directory:
        return
    raise ConfigurationError(
        f"job {spec.name!r}: the trainer keeps its files in {trainer.save_path}; expected "
        f"{spec.directory}, where the Runner keeps those of this job. Give it that save_path=, "
        "submit a function that makes it without one, or leave the Runner's out"
    )


def _check_best_name(spec: JobSpec, trainer: FitLoop) -> None:
    """Refuse a trainer whose best weights have the name of another file of the job."""
    name = trainer.best_model_name
    if any(are_one_file(name, other) for other in (WEIGHTS_NAME, OUTCOME_NAME)):
        raise ConfigurationError(
            f"job {spec.name!r}: the trainer has best_model_name={name!r}, which names another "
            "file of the job; expected another name"
        )


async def build_trainer(spec: JobSpec) -> FitLoop:
    """Return the trainer of a job: its target, or the trainer that its target returns."""
    return as_trainer(await build_from(spec.target, spec.args, spec.name), f"job {spec.name!r}")


async def build_from(target: Any, args: tuple[Any, ...], name: str) -> Any:
    """Return ``target`` if it is a trainer, else the value that it returns for ``args``.

    A plain function is called in a thread that is named after ``name``. Meanwhile no other factory
    runs, and no trainer uses the random generators: a factory that seeds them builds the same
    model as in a program of its own. An async function has no exclusive access to the generators,
    since other code runs while it awaits: build models in a plain function.
    """
    if isinstance(target, FitLoop | SyncFitLoop):
        return target
    if iscoroutinefunction(target):
        return await target(*args)
    control = RunControl()

    def call() -> Any:
        with exclusive_rng(control):
            return target(*args)

    value = await run_in_thread(name, call, control)
    return await value if isawaitable(value) else value


def as_trainer(value: Any, label: str) -> FitLoop:
    """Return a factory's value as a trainer; for a `SyncFitLoop` the `FitLoop` inside it.

    Raises:
        ConfigurationError: the value is no trainer; the message begins with ``label``.
    """
    if isinstance(value, SyncFitLoop):
        value = value.loop
    if not isinstance(value, FitLoop):
        raise ConfigurationError(f"{label}: the factory returned {value!r:.80}; expected a FitLoop")
    return value
