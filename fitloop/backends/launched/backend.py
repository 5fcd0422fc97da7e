"""`LauncherBackend`: the trainings of a `Runner` on workers that a `Launcher` starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from fitloop._defaults import TrainerDefaults
from fitloop._engine.config import check_number, check_seconds
from fitloop._errors import ConfigurationError
from fitloop._events import Event
from fitloop.backends.base import JobSpec, TrainingResult
from fitloop.backends.launched.claim import free_lock
from fitloop.backends.launched.launcher import Launcher
from fitloop.backends.launched.worker_connection import WorkerConnection
from fitloop.backends.remote.client import check_remote_job, run_remotely


class LauncherBackend:
    """Trainings on workers that a `Launcher` starts, one for each job, such as on other machines.

    Jobs, results, events, prints, questions and cancellations are those of a `ProcessBackend`. A
    worker connects back to this process over TCP. Both sides prove that they know a key, which is
    new for each worker; what they send is not encrypted, and consists of pickles. So use it in
    networks that you trust.

    The files of a job are written by its worker: a ``save_path`` of the Runner must be on a file
    system that all machines share, under the same name, or the job is refused. A worker that could
    not be reached and was given up ends when it would write the next file, if a later worker has
    its job.

    A worker ends when its connection does. If its machine is lost, that is noticed after half a
    minute. A worker may wait in the queue of a cluster for any time, in which its job counts as
    running. A Runner with several accelerators in this process does not deal them: a worker uses
    what its launcher leaves visible.

    Args:
        launcher: starts the workers.
        retries: further tries for a job whose worker died, each from its last snapshot and with a
            `WorkerDiedWarning`. A try that wrote a snapshot does not count, so that a machine may
            be taken away any number of times. Only if the Runner has a ``save_path``.
        grace: seconds for a cancelled training to end; then its worker is killed, with a
            `WorkerDiedWarning`. A callback in this process that has not returned by then is left
            behind in its thread.

    Raises:
        ConfigurationError: an argument is invalid, or this is Windows.
    """

    def __init__(self, launcher: Launcher, *, retries: int = 1, grace: float = 10.0) -> None:
        if not callable(getattr(launcher, "start", None)) or isinstance(launcher, type):
            raise ConfigurationError(
                f"launcher is {launcher!r:.80}; expected a Launcher, such as SlurmLauncher()"
            )
        if os.name == "nt":
            raise ConfigurationError("a LauncherBackend does not run on Windows")
        self._launcher = launcher
        self._retries = check_number("retries", retries, 0)
        self._grace = check_seconds("grace", grace) or 0.0

    def check(self, spec: JobSpec) -> None:
        """Refuse a job that cannot be sent to another process; see `Backend.check`."""
        check_remote_job(spec)

    async def run(
        self, spec: JobSpec, defaults: TrainerDefaults, emit: Callable[[Event], None]
    ) -> TrainingResult:
        """Do the training on a new worker; see `Backend.run`."""
        earlier: list[WorkerConnection] = []

        def launch() -> WorkerConnection:
            if spec.directory is not None and earlier and earlier[-1].is_lost:
                free_lock(spec.directory)
            earlier.append(WorkerConnection(self._launcher, spec))
            return earlier[-1]

        there = replace(defaults, device=None, num_threads=self._launcher.threads)
        return await run_remotely(
            launch, spec, there, emit, retries=self._retries, grace=self._grace
        )

    async def close(self) -> None:
        """Do nothing: each worker has ended with its job."""
