"""`LauncherBackend`: the trainings of a `Runner` on workers that a `Launcher` starts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from fitloop._arguments import expect
from fitloop._defaults import TrainerDefaults
from fitloop._errors import ConfigurationError
from fitloop._events import Event
from fitloop.backends.base import JobSpec, TrainingResult
from fitloop.backends.launched.claim import free_lock
from fitloop.backends.launched.launcher import Launcher, RanksLauncher
from fitloop.backends.launched.worker_connection import WorkerConnection, launch_workers
from fitloop.backends.remote.client import RemoteBackend, run_remotely
from fitloop.backends.remote.ranks import WorkerRanks
from fitloop.backends.remote.transport import Transport


class LauncherBackend(RemoteBackend):
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
        ranks: number of workers for each training, see `ProcessBackend`. A rank reaches the others
            by the name of its machine (GLOO_SOCKET_IFNAME chooses the network interface).

    Raises:
        ConfigurationError: an argument is invalid, or this is Windows.
    """

    def __init__(
        self, launcher: Launcher, *, retries: int = 1, grace: float = 10.0, ranks: int = 1
    ) -> None:
        fits = callable(getattr(launcher, "start", None)) and not isinstance(launcher, type)
        expect(fits, "launcher", launcher, "a Launcher, such as SlurmLauncher()")
        if os.name == "nt":
            raise ConfigurationError("a LauncherBackend does not run on Windows")
        super().__init__(retries=retries, grace=grace, ranks=ranks)
        self._launcher = launcher
        if self._ranks > 1 and not isinstance(launcher, RanksLauncher):
            raise ConfigurationError(
                f"ranks is {ranks}, and a {type(launcher).__name__} starts one worker for each "
                "training; expected a launcher with a method start_ranks, such as that of a "
                "RayBackend"
            )

    async def run(
        self, spec: JobSpec, defaults: TrainerDefaults, emit: Callable[[Event], None]
    ) -> TrainingResult:
        """Do the training on a new worker; see `Backend.run`."""
        earlier: list[WorkerConnection] = []

        def launch() -> Transport:
            if spec.directory is not None and any(worker.is_lost for worker in earlier):
                free_lock(spec.directory)
            earlier[:] = launch_workers(self._launcher, spec, self._ranks)
            return earlier[0] if self._ranks == 1 else WorkerRanks(earlier, self._launcher.host)

        threads = self._launcher.threads
        there = replace(defaults, device=None, num_threads=threads, ranks=self._ranks)
        return await run_remotely(
            launch, spec, there, emit, retries=self._retries, grace=self._grace
        )
