"""The interface between a `Runner` and the backends that carry out its trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fitloop._defaults import TrainerDefaults
from fitloop._events import Event
from fitloop._metrics.results import FitResult
from fitloop._public import public
from fitloop._trainer.fitloop import FitLoop


@public
@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """The description of one training, complete for any backend."""

    name: str
    target: Any
    """a function that returns a trainer, or a trainer"""
    args: tuple[Any, ...]
    """positional arguments of ``target``"""
    epochs: int
    options: Mapping[str, Any]
    """keyword arguments of ``fit``"""
    directory: Path | None
    """absolute path of the directory for the files of the job; None if it keeps none"""
    arguments: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    """the arguments of ``target`` by name, as plain values for people and loggers"""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """The result of a completed training, as a backend returns it."""

    result: FitResult
    weights: Path | None = None
    """file with the weights after the training; None if the job has no directory"""
    trainer: FitLoop | None = None
    """the trained trainer; None if the training was in another process"""


@public
class Backend(Protocol):
    """A place where a `Runner` has its trainings done: this process, worker processes, a cluster.

    The Runner calls all methods on its event loop. `run_job` does the training of a job in the
    process that calls it. This backend trains short jobs in the current process, and long ones in
    worker processes::

        from fitloop import Runner
        from fitloop.backends import ProcessBackend, run_job

        class MixedBackend:
            def __init__(self):
                self.workers = ProcessBackend()

            def check(self, spec):
                if spec.epochs > 10:
                    self.workers.check(spec)

            async def run(self, spec, defaults, emit):
                run = self.workers.run if spec.epochs > 10 else run_job
                return await run(spec, defaults, emit)

            async def close(self):
                await self.workers.close()

        async with Runner(backend=MixedBackend()) as runner:
            runner.submit(make_trainer, epochs=3)

    `fitloop.backends.remote` has the code for trainings in other processes or on other machines.
    """

    def check(self, spec: JobSpec) -> None:
        """Refuse a job that this backend can never run; called by ``submit``.

        Raises:
            ConfigurationError: the job cannot run.
        """

    async def run(
        self, spec: JobSpec, defaults: TrainerDefaults, emit: Callable[[Event], None]
    ) -> TrainingResult:
        """Do one training and return its result; called for several jobs at a time.

        Args:
            spec: the training.
            defaults: settings for the trainer where its user gave none: threads, device, name,
                directory.
            emit: passes an event of the training on to the Runner; from any thread, never blocks.

        Raises whatever the factory or the training raised; `WorkerDiedError` if its process died.

        Cancellation: the training ends at a batch boundary, nothing of it keeps running, and the
        cancellation is raised again.
        """

    async def close(self) -> None:
        """Free all resources; called once, after the last training. Not cancelled."""
