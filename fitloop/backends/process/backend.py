"""The process backend, and the choice of a `Runner`'s backend by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from fitloop._arguments import expect
from fitloop._defaults import TrainerDefaults
from fitloop._engine.config import check_number
from fitloop._errors import ConfigurationError
from fitloop._events import Event
from fitloop._processes.child import StartMethod, check_start_method
from fitloop._public import public
from fitloop.backends.base import Backend, JobSpec, TrainingResult
from fitloop.backends.process.worker import serve
from fitloop.backends.process.worker_process import WorkerProcess
from fitloop.backends.remote.client import RemoteBackend, run_remotely
from fitloop.backends.remote.ranks import WorkerRanks
from fitloop.backends.remote.transport import LaunchWorker, Transport
from fitloop.backends.thread import ThreadBackend

MAX_NICE = 19


def resolve_backend(backend: Any) -> Backend:
    """Return the backend of a `Runner`, from its argument: a backend, or the name of one.

    Raises:
        ConfigurationError: the argument is neither.
    """
    if backend == "thread":
        return ThreadBackend()
    if backend == "process":
        return ProcessBackend()
    methods = ("check", "run", "close")
    missing = [name for name in methods if not callable(getattr(backend, name, None))]
    fits = not isinstance(backend, (str, type)) and len(missing) < len(methods)
    instance = ", an instance of the class" if isinstance(backend, type) else ""
    expect(fits, "backend", backend, f"'thread', 'process' or a Backend{instance}")
    if missing:
        raise ConfigurationError(
            f"backend is a {type(backend).__name__} without {' and '.join(missing)}; expected the "
            "three methods of a Backend: check, run and close"
        )
    chosen: Backend = backend
    return chosen


def check_nice(value: Any) -> int:
    """Return an increment of niceness for worker processes; raise for an impossible one."""
    nice = check_number("nice", value, 0)
    fits = nice <= MAX_NICE and (hasattr(os, "nice") or not nice)
    meaning = "what the niceness of worker processes is more than that of this one"
    expect(fits, "nice", nice, f"0 to {MAX_NICE}, on Windows 0: {meaning}")
    return nice


@public
class ProcessBackend(RemoteBackend):
    """Trainings in worker processes: real parallelism for models whose steps are mostly Python.

    ``Runner(backend="process")`` uses one with the default arguments. A worker imports the
    program's script, which so needs ``if __name__ == "__main__":``. On Linux, workers are forks of
    a *fork server*, a process that has imported torch and fitloop: each starts in hundredths of a
    second. The server starts with the first worker, in the seconds of these imports, and stays for
    later Runners until the program ends. If the program has changed its environment variables or
    its cores, priority or limits, the next worker has a new server.

    A worker does one job and ends. So a job may change its process as it likes: settings of torch,
    environment, modules, signal handlers. Each worker seeds the global random generators anew.

    Jobs are sent with cloudpickle (``pip install cloudpickle``): a function and its arguments,
    never a trainer or a model. Results and events come back. Weights come back
    only as the file `Outcome.weights`, if the Runner has a ``save_path``; the trainer never does.

    Lines that Python code prints in a worker are printed in this process. Callbacks and
    ``on_continue`` of ``submit`` and of the Runner are called in this process, those of the
    trainer's constructor in the worker. A callback that raises in this process ends the training a
    little later than in the worker.

    If a worker dies, its own job fails with `WorkerDiedError`, and no other. If the parent dies,
    for any reason, the workers end at once; except on Linux, a worker inside of a function that
    keeps the interpreter's lock ends after that function. Workers ignore SIGTERM, SIGHUP, SIGUSR1
    and SIGUSR2, which batch systems send to all processes of a program: the parent decides what
    to do, and cancels their jobs.

    Args:
        retries: further tries for a job whose worker died, each from its last snapshot and with a
            `WorkerDiedWarning`. A try that wrote a snapshot does not count. Only if the Runner has
            a ``save_path``.
        grace: seconds for a cancelled training to end; then its worker is killed, with a
            `WorkerDiedWarning`. A callback in this process that has not returned by then is left
            behind in its thread.
        ranks: number of worker processes for each training, its ranks, which train one model:
            `FitLoop` needs ``parallel="ddp"``. They find each other without a launcher, and prints,
            events, questions and files are those of rank 0. If one of them fails or dies, so does
            the job, and a further try starts all of them. They share the threads of the job.
        nice: number added to the niceness of this process for the workers (0 to 19; not on
            Windows). Above 0, this process and its event loop go first when cores are short, and
            so does everything else on the machine.
        start_method: ``"forkserver"``, as above, or ``"spawn"``, where each worker is a new
            interpreter with its own imports, which takes seconds for each job. The default is
            ``"forkserver"`` on Linux and ``"spawn"`` elsewhere.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    def __init__(
        self,
        *,
        retries: int = 1,
        grace: float = 10.0,
        ranks: int = 1,
        nice: int = 0,
        start_method: StartMethod | None = None,
    ) -> None:
        super().__init__(retries=retries, grace=grace, ranks=ranks)
        self._launch_worker = partial(
            WorkerProcess, partial(serve, check_nice(nice)), check_start_method(start_method)
        )

    async def run(
        self, spec: JobSpec, defaults: TrainerDefaults, emit: Callable[[Event], None]
    ) -> TrainingResult:
        """Do the training in a worker; see `Backend.run`.

        The error of a training has the worker's traceback as a note.
        """
        ranks, device = self._ranks, defaults.device
        launch: LaunchWorker = self._launch_worker
        if ranks > 1:
            first = ranks * (device.index or 0) if device is not None else 0
            launch = partial(_launch_ranks, self._launch_worker, ranks, first)
            threads = max(1, (defaults.num_threads or 1) // ranks)
            defaults = replace(defaults, num_threads=threads, ranks=ranks)
        return await run_remotely(
            launch, spec, defaults, emit, retries=self._retries, grace=self._grace
        )


def _launch_ranks(launch: LaunchWorker, ranks: int, first_device: int) -> WorkerRanks:
    """Start the workers of a training with several ranks."""
    workers: list[Transport] = []
    try:
        workers += (launch() for _ in range(ranks))
    except BaseException:
        for worker in workers:
            worker.close()
        raise
    return WorkerRanks(workers, "127.0.0.1", first_device)
