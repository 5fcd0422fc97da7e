"""`Runner`: many trainings in one program, so many at a time, each as it would have been alone.

Owns the line of waiting jobs, who runs, and what is shared out among them. Where a training runs
is the backend's business.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import anyio

from fitloop._checkpointing.checkpointer import Checkpoint, check_checkpoint
from fitloop._concurrency.event_loops import loop_scheduler
from fitloop._concurrency.supervisor import run_in_thread
from fitloop._engine.config import check_callbacks, check_optional, checked_path
from fitloop._engine.event_bus import EventStream, EventStreams
from fitloop._errors import ConfigurationError
from fitloop._events import JobStarted
from fitloop._public import public
from fitloop._run.fit_options import fit_option
from fitloop._runner.execution import JobExecutor, ResourceAllocator, is_job_error
from fitloop._runner.jobs import (
    CompletedJobs,
    Job,
    Outcome,
    cancelled,
    check_options,
    directory_name,
    is_encodable,
)
from fitloop._storage.durable import DirectoryLock
from fitloop._system import available_cores
from fitloop.backends.base import Backend, JobSpec
from fitloop.backends.process.backend import resolve_backend
from fitloop.callbacks.callback import Callback

_HOW = "have the event loop call it, as with anyio.from_thread.run_sync or call_soon_threadsafe"


@public
class Runner:
    """Runs trainings that are submitted to it, at most so many at a time.

    ::

        async with Runner(max_concurrent=4, save_path="runs") as runner:
            for lr in (1e-2, 1e-3, 1e-4):
                runner.submit(make_trainer, lr, name=f"lr={lr}", epochs=10)
            async for outcome in runner.as_completed():
                print(outcome.name, outcome.result or outcome.error)

    Leaving the block waits for all of them. One that fails does not touch the others, and raises
    nothing: its error is in its outcome. What is no `Exception`, such as SystemExit, is of the
    program: raised in this process, it cancels all jobs and is raised from the block; a worker
    process only fails its job for it. With equal ``seed`` and ``num_threads`` a training gives
    the same bits as alone.

    Cancellation of the block, or an exception in it, cancels all: those that run end at a batch
    boundary, those that wait are never begun. A Runner is for one ``async with`` of one event loop,
    and its methods are for that loop, but for `cancel` and `cancel_all`, which are for any thread.

    Args:
        max_concurrent: trainings at a time; by default as many as this process has cores.
        backend: ``"thread"``, ``"process"`` or a `ProcessBackend`, or a `Backend` of your own.
        save_path: a directory; each job has one of its own in it, and is resumable. Jobs that are
            found done there are not run again, unfinished ones are gone on with, failed ones begin
            where their last snapshot was taken. While it runs, no other Runner can have it. A job
            is known again by its name alone: give each a ``name`` that says what it trains.
        checkpoint: when snapshots are taken there, unless ``submit`` says so.
        fail_fast: the first failure cancels the others, and is raised from the block.
        callbacks: called with every event of every training, as those of a trainer are.
        keep_trainers: outcomes have the trained trainer; else it is let go of.
        cuda_streams: each run in this process has a CUDA stream of its own, so that kernels of
            several on one device go side by side. They keep memory apart, so it takes more of it.
            Code of yours that reads a trainer's tensors while it runs must wait for its stream.

    A trainer that was not given its own ``num_threads`` gets its share of the cores for good:
    cores divided by ``max_concurrent``. Of several CUDA devices each trainer without a ``device``
    gets one, round robin. One without a ``name`` is named after its job.

    Raises:
        ConfigurationError: an argument cannot work.
    """

    def __init__(
        self,
        max_concurrent: int | None = None,
        *,
        backend: Literal["thread", "process"] | Backend = "thread",
        save_path: str | Path | None = None,
        checkpoint: Checkpoint | None = None,
        fail_fast: bool = False,
        callbacks: Sequence[Callback] = (),
        keep_trainers: bool = False,
        cuda_streams: bool = False,
    ) -> None:
        most = check_optional("max_concurrent", max_concurrent, 1, meaning="trainings at a time")
        self._most = most or available_cores()
        self._backend = resolve_backend(backend)
        self._save_path = None if save_path is None else checked_path(save_path)
        if checkpoint is not None and save_path is None:
            raise ConfigurationError(
                "checkpoint is given, and no save_path to keep snapshots in; give save_path="
            )
        self._checkpoint = check_checkpoint(checkpoint, resume=False)
        self._fail_fast = fail_fast
        self._listeners = EventStreams()
        self._execution = JobExecutor(
            backend=self._backend,
            allocator=ResourceAllocator(self._most, cuda_streams=cuda_streams),
            callbacks=check_callbacks(callbacks),
            keep_trainers=keep_trainers,
            push=self._listeners.push,
        )
        self._jobs: dict[str, Job] = {}
        self._waiting: OrderedDict[str, Job] = OrderedDict()
        self._running = 0
        self._submitted = 0
        self._ended = CompletedJobs()
        self._failure: BaseException | None = None
        self._group: Any = None
        self._thread = 0
        self._schedule: Callable[[Callable[[], object]], None] = lambda call: None
        self._open = False
        self._stack = AsyncExitStack()

    # -- the block -----------------------------------------------------------------------------

    async def __aenter__(self) -> Runner:
        """Take the directory, and be ready.

        Raises:
            CheckpointError: another Runner has ``save_path``, or it cannot be written to.
            RuntimeError: it was used before.
        """
        if self._group is not None:
            raise RuntimeError("this Runner was used before; make another one")
        if self._save_path is not None:  # the program may change to another directory meanwhile
            self._save_path = await run_in_thread("runner", self._save_path.absolute)
            lock = DirectoryLock(self._save_path)
            self._stack.push_async_callback(run_in_thread, "runner", lock.release)
            try:
                await run_in_thread("runner", lock.acquire)
            except BaseException:  # a cancellation is raised when it has been taken
                await self._close()
                raise
        self._thread, self._schedule = threading.get_ident(), loop_scheduler()
        self._group = anyio.create_task_group()
        await self._group.__aenter__()
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        swallowed = False
        if error is not None:
            self._open = False
            self._cancel_waiting()
        try:
            if error is None or isinstance(error, anyio.get_cancelled_exc_class()):
                swallowed = bool(await self._group.__aexit__(kind, error, traceback))
            else:  # which a task group would wrap in another one
                self._group.cancel_scope.cancel()
                await self._group.__aexit__(None, None, None)
        finally:
            self._open = False
            self._cancel_waiting()
            self._listeners.end()
            await self._close()
        if self._failure is not None and (error is None or swallowed):
            raise self._failure
        return swallowed

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._backend.close()
            await self._stack.aclose()

    # -- jobs ----------------------------------------------------------------------------------

    def submit(
        self, target: Any, *args: Any, name: str | None = None, epochs: int = 1, **options: Any
    ) -> Job:
        """Hand in a training; it begins when there is room for it. Waiting costs next to nothing.

        Args:
            target: a function, plain or async, that returns a `FitLoop`; a plain one is called in
                a thread, no two at a time. With the thread backend also a trainer; beside a
                ``save_path`` one whose own is the directory of its job there.
            args: what the function is called with; `functools.partial` binds keyword arguments.
                They are looked at when the job begins: give each job objects of its own.
            name: of the job, and of a trainer without one; by default the function's name and a
                number. With ``save_path`` its directory is named so.
            epochs: for ``fit``.
            options: more arguments of ``fit``.

        Raises:
            ConfigurationError: there is a job of this name, or the target or an argument of
                ``fit`` cannot work.
            TypeError: ``fit`` has no such argument. What only a subclass's takes is known when the
                subclass is submitted, not a function that makes one.
            RuntimeError: outside of the ``async with`` block, or in another thread.
        """
        if not self._open:
            raise RuntimeError("this Runner is not open; submit inside of its `async with` block")
        if threading.get_ident() != self._thread:
            raise RuntimeError("submit() was called in another thread than the Runner's; " + _HOW)
        name = self._default_name(target) if name is None else str(name)
        if not name or not is_encodable(name):
            raise ConfigurationError(
                f"name is {name!r}; expected a name, or None for one of its own"
            )
        if name in self._jobs:
            raise ConfigurationError(f"there is a job {name!r} already; give another name=")
        directory = None
        if self._save_path is not None:
            directory = self._save_path / directory_name(name)
            if self._checkpoint is not None:
                options.setdefault("checkpoint", self._checkpoint)
        check_options(name, target, options)
        spec = JobSpec(
            name=name,
            target=target,
            args=args,
            epochs=fit_option("epochs", epochs),
            options=options,
            directory=directory,
        )
        self._backend.check(spec)
        job = self._jobs[name] = Job(spec, self._have_cancelled)
        self._waiting[name] = job
        self._submitted += 1
        self._start()
        return job

    def _default_name(self, target: Any) -> str:
        stem = getattr(target, "__name__", None) or getattr(target, "name", None) or "job"
        stem = stem.replace("<lambda>", "job")
        numbers = itertools.count(self._submitted + 1)
        return next(name for n in numbers if (name := f"{stem}-{n}") not in self._jobs)

    def _job(self, name: str) -> Job:
        if name not in self._jobs:
            raise KeyError(f"no job {name!r}; there are: {', '.join(self._jobs) or 'none'}")
        return self._jobs[name]

    @property
    def jobs(self) -> list[Job]:
        """All jobs, in order of submission."""
        return list(self._jobs.values())

    def cancel(self, name: str) -> None:
        """Cancel a job; any thread, see `Job.cancel`. Raises KeyError for an unknown name."""
        self._job(name).cancel()

    def forget(self, name: str) -> None:
        """Let go of a job that is over, and of its outcome; its name may be used again.

        For a Runner that lives for long, as in a service. Its files stay.

        Raises:
            KeyError: there is no such job.
            RuntimeError: it is not over yet.
        """
        job = self._job(name)
        if job.status in ("waiting", "running"):
            raise RuntimeError(f"job {name!r} is {job.status}; cancel it, and await its outcome")
        del self._jobs[name]
        self._ended.forget(name)

    def cancel_all(self) -> None:
        """Cancel every job that is not over, from any thread; more may be submitted."""
        self._on_loop(self._cancel_jobs)

    async def as_completed(self) -> AsyncIterator[Outcome]:
        """Give the outcome of every job, in the order in which they end; each once.

        Ends when all that were submitted so far are over. Several may iterate.
        """
        async for outcome in self._ended.iterate(lambda: not self._waiting and not self._running):
            yield outcome

    async def results(self) -> list[Outcome]:
        """Wait for all jobs that were submitted so far; return outcomes in order of submission."""
        return [await job.outcome() for job in self.jobs]

    def events(self) -> EventStream:
        """Return the events of all jobs, to be read by any task: ``async with ... as events``.

        ``event.trainer`` is the name of the job. Each job has a `JobEnded`, which is its last one,
        and before it those of its run, if it came to one. Its outcome may be known before these
        are read. The stream ends when the Runner does.
        """
        return EventStream(self._listeners, ends_with_run=False)

    # -- running them --------------------------------------------------------------------------

    def _start(self) -> None:
        while self._waiting and self._running < self._most:
            self._running += 1
            scope = anyio.CancelScope()
            _name, job = self._waiting.popitem(last=False)
            job.begin(scope)
            self._group.start_soon(self._run, job, scope)

    async def _run(self, job: Job, scope: anyio.CancelScope) -> None:
        began, outcome = time.perf_counter(), None
        try:
            with scope:
                await anyio.lowlevel.checkpoint_if_cancelled()
                self._listeners.push(JobStarted(trainer=job.name))
                outcome = await self._execution.execute(job.spec)
        finally:
            self._running -= 1
            if outcome is None:
                outcome = cancelled(job, time.perf_counter() - began)
            if outcome.error is not None and not is_job_error(outcome.error):
                self._fail(outcome.error)
            self._end(job, outcome)
            if self._open:
                self._start()

    def _end(self, job: Job, outcome: Outcome) -> None:
        job.end(outcome)
        self._listeners.push(outcome.event())
        self._ended.add(outcome)
        if outcome.status == "failed" and self._fail_fast and outcome.error is not None:
            self._fail(outcome.error)

    def _fail(self, error: BaseException) -> None:
        """End everything for an error, which the block will raise."""
        if self._failure is None:
            self._failure = error
            self._open = False
            self._cancel_waiting()
            self._group.cancel_scope.cancel()

    def _on_loop(self, call: Callable[[], object]) -> None:
        """Call it now when this is the thread of the event loop, else have that call it."""
        if threading.get_ident() == self._thread:
            call()
        else:
            self._schedule(call)

    def _have_cancelled(self, job: Job) -> None:
        self._on_loop(partial(self._cancel_job, job))

    def _cancel_job(self, job: Job) -> None:
        if job.scope is not None:
            job.scope.cancel()
        elif self._waiting.get(job.name) is job:
            del self._waiting[job.name]
            self._end(job, cancelled(job))

    def _cancel_jobs(self) -> None:
        self._cancel_waiting()
        for job in self._jobs.values():
            self._cancel_job(job)

    def _cancel_waiting(self) -> None:
        while self._waiting:
            _name, job = self._waiting.popitem(last=False)
            self._end(job, cancelled(job))

    def __repr__(self) -> str:
        counts = Counter(job.status for job in self._jobs.values())
        told = ", ".join(f"{number} {status}" for status, number in counts.items())
        return f"<Runner of {self._most} at a time: {told or 'no jobs'}>"
