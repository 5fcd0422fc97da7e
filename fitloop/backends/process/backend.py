"""Trainings in worker processes: the backend, which carries jobs there and tries again.

The worker's side is `worker`, the client of one `client`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

from fitloop._concurrency.control import RunControl
from fitloop._concurrency.supervisor import LoopPortal, supervise
from fitloop._defaults import TrainerDefaults
from fitloop._display.jupyter import interruptible
from fitloop._engine.config import check_number, check_seconds
from fitloop._engine.event_bus import EventBus, EventStream, feed_callback
from fitloop._errors import ConfigurationError, WorkerDiedError, WorkerDiedWarning, add_note_safely
from fitloop._events import Event
from fitloop._rng.exclusive import GivenWay
from fitloop._run.launch import is_async_callback, run_in_thread
from fitloop.backends.base import Backend, JobSpec, TrainingResult
from fitloop.backends.process.client import WorkerClient, options_for_worker
from fitloop.backends.process.pool import WorkerPool
from fitloop.backends.process.serialization import serialize_job
from fitloop.backends.process.worker import serve
from fitloop.backends.thread import ThreadBackend

MOST_NICE = 19


def resolve_backend(given: Any) -> Backend:
    """Return the backend that a `Runner` was given, perhaps by its name.

    Raises:
        ConfigurationError: it is none.
    """
    if given == "thread":
        return ThreadBackend()
    if given == "process":
        return ProcessBackend()
    if isinstance(given, str) or not hasattr(given, "run"):
        raise ConfigurationError(
            f"backend is {given!r:.60}; expected 'thread', 'process' or a Backend"
        )
    chosen: Backend = given
    return chosen


def check_nice(given: Any) -> int:
    """Return a niceness that worker processes can have.

    Raises:
        ConfigurationError: they cannot.
    """
    nice = check_number("nice", given, 0)
    if nice > MOST_NICE or (nice and not hasattr(os, "nice")):
        raise ConfigurationError(
            f"nice is {nice}; expected 0 to {MOST_NICE}, on Windows 0: what the niceness of "
            "worker processes is more than that of this one"
        )
    return nice


class ProcessBackend:
    """Trainings in worker processes: real parallelism for models whose steps are mostly Python.

    ``Runner(backend="process")`` has one with the defaults. Workers are spawned, so that a script
    needs ``if __name__ == "__main__":``, and used again for the next job; they end with the Runner.
    What is submitted goes there by cloudpickle (``pip install fitloop[process]``): a function and
    arguments, never a trainer or a model. Results and events come back; weights only in the file
    `Outcome.weights`, with ``save_path``; a trainer never does.

    What Python prints there appears here, line by line. Callbacks and ``on_continue`` of
    ``submit`` and of the Runner are called in this process, those that the trainer was made with
    in the worker. A callback that raises here ends the training a little later than it would
    there.

    A worker that dies is the `WorkerDiedError` of its job only. When the parent dies, however it
    does, the workers end at once.

    Args:
        retries: how often a job whose worker died is tried again, with a `WorkerDiedWarning`,
            from its last snapshot; with ``save_path`` only.
        grace: seconds after a cancellation in which a training is to end; else its worker is
            killed, with a `WorkerDiedWarning`.
        nice: niceness added to that of this process (0 to 19, not on Windows): above 0, when
            cores are short, this process and its event loop come before the trainings, as does
            whatever else the machine does.

    Raises:
        ConfigurationError: an argument cannot work.
    """

    def __init__(self, *, retries: int = 1, grace: float = 10.0, nice: int = 0) -> None:
        self._retries = check_number("retries", retries, 0)
        self._grace = check_seconds("grace", grace) or 0.0
        self._pool = WorkerPool(partial(serve, check_nice(nice)))

    def check(self, spec: JobSpec) -> None:
        """Refuse what cannot go to another process.

        Raises:
            ConfigurationError: it could not.
        """
        serialize_job(spec.name, (spec.target, spec.args, options_for_worker(spec)))
        ThreadBackend().check(spec)

    async def run(
        self, spec: JobSpec, share: TrainerDefaults, tell: Callable[[Event], None]
    ) -> TrainingResult:
        """Have a worker do the training, and another one if that dies.

        Raises what the training raised, with the worker's traceback as a note, or
        `WorkerDiedError`.
        """
        tries = 1 + (self._retries if spec.directory is not None else 0)
        for number in range(1, tries + 1):
            try:
                return await self._try(spec, share, tell)
            except WorkerDiedError as error:
                if number == tries:
                    if number > 1:
                        add_note_safely(error, f"it was tried {number} times")
                    raise
                warnings.warn(
                    f"{error}\nIt goes on from its last snapshot, try {number + 1} of {tries}",
                    WorkerDiedWarning,
                    stacklevel=2,
                )
        raise AssertionError

    async def _try(
        self, spec: JobSpec, share: TrainerDefaults, tell: Callable[[Event], None]
    ) -> TrainingResult:
        event_bus, control = EventBus(), RunControl()
        side = LoopPortal(control)
        background_tasks, plain = [], []
        async with AsyncExitStack() as stack:
            stack.enter_context(interruptible())
            await stack.enter_async_context(GivenWay())
            for callback in spec.options.get("callbacks", ()):
                if is_async_callback(callback):
                    stream = await stack.enter_async_context(EventStream(event_bus, None))
                    background_tasks.append(partial(feed_callback, stream, callback))
                else:
                    plain.append(callback)
            talk = WorkerClient(
                self._pool, spec, share, control, side, event_bus, tell, plain, self._grace
            )
            try:
                done: TrainingResult = await supervise(
                    talk,
                    control,
                    side,
                    name=spec.name,
                    grace=0.0,
                    background_tasks=background_tasks,
                    end_background_tasks=event_bus.end,
                )
            finally:
                if talk.was_killed:
                    warnings.warn(
                        f"{spec.name}: the training had not ended {self._grace:g} s after it was "
                        "cancelled; its worker process was killed. Give grace= to wait longer",
                        WorkerDiedWarning,
                        stacklevel=2,
                    )
        return done

    async def close(self) -> None:
        """End the workers."""
        await run_in_thread("runner", self._pool.close)
