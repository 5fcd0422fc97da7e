"""Where the trainings of a `Runner` run: what it asks of a backend, and the one of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import isawaitable, iscoroutinefunction
from pathlib import Path
from typing import Any, Protocol

from fitloop._checkpointing.checkpointer import Checkpoint
from fitloop._concurrency.control import RunControl
from fitloop._defaults import SHARE, Share
from fitloop._errors import ConfigurationError
from fitloop._events import Event
from fitloop._metrics.results import FitResult
from fitloop._rng.exclusive import alone_in_steps, exclusive_rng
from fitloop._run.launch import run_in_thread
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop

WEIGHTS = "weights.msgpack"
"""in the directory of a job: what its model had at the end"""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """What is to be done: all that a backend needs to know."""

    name: str
    target: Any
    """a function that returns a trainer, or a trainer"""
    args: tuple[Any, ...]
    epochs: int
    options: Mapping[str, Any]
    """of ``fit``"""
    directory: Path | None
    """where its files are; None to keep none"""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a backend returns for a training that came to its end."""

    result: FitResult
    weights: Path | None = None
    trainer: FitLoop | None = None


class Backend(Protocol):
    """Runs trainings, wherever that is. All calls are made on the event loop of the Runner.

    A cluster is one more of these: it carries the `JobSpec` and the `Share` to where the training
    is to run, has `train` done there, and brings events, questions and cancellations across.
    """

    def check(self, spec: JobSpec) -> None:
        """Refuse what could never run, when it is submitted.

        Raises:
            ConfigurationError: it could not.
        """

    async def run(self, spec: JobSpec, share: Share, tell: Callable[[Event], None]) -> Done:
        """Do one training; as many at once as the Runner wants.

        ``tell`` takes events from any thread, and never blocks. Raises what the factory or the
        training raised; for a worker that died an error that says so.

        Cancellation: the training ends at a batch boundary before the cancellation is raised, and
        nothing of it is left running.
        """

    async def close(self) -> None:
        """Leave nothing behind; called once, when nothing runs any more. Not cancelled."""


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
            check_place(spec, spec.target)
        elif not callable(spec.target):
            raise ConfigurationError(
                f"job {spec.name!r}: {spec.target!r:.80} was submitted; expected a function that "
                "returns a FitLoop, or a FitLoop"
            )

    async def run(self, spec: JobSpec, share: Share, tell: Callable[[Event], None]) -> Done:
        """Build the trainer in a thread and await its ``fit``."""
        return await train(spec, share, tell)

    async def close(self) -> None:
        """Nothing is kept."""


async def train(spec: JobSpec, share: Share, tell: Callable[[Event], None]) -> Done:
    """Do the training of a job in this process: what every backend does in the end."""
    token = SHARE.set(share)
    try:
        trainer = await build(spec)
        options = dict(spec.options)
        options["callbacks"] = [*options.get("callbacks", ()), tell]
        if spec.directory is not None:
            check_place(spec, trainer)
            options.setdefault("checkpoint", Checkpoint())
            options.setdefault("resume", True)
        result = await trainer.fit(spec.epochs, **options)
        weights = None
        if spec.directory is not None:
            weights = await trainer.save_model(WEIGHTS, spec.directory, overwrite=True)
        return Done(result=result, weights=weights, trainer=trainer)
    finally:
        SHARE.reset(token)


def check_place(spec: JobSpec, trainer: FitLoop | SyncFitLoop) -> None:
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
    return as_trainer(await made_by(spec.target, spec.args, spec.name), f"job {spec.name!r}")


async def made_by(target: Any, args: tuple[Any, ...], name: str) -> Any:
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
