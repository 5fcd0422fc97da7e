"""`Runner`: many trainings in one program, a limited number at a time.

Owns the queue of waiting jobs and the set of running ones. The place where a training runs is the
business of the backend.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, Unpack

import anyio

from fitloop._arguments import absolute_path, checked_arguments, expect, leaves_user_frames
from fitloop._checkpointing.policy import Checkpoint, check_checkpoint
from fitloop._concurrency.event_loops import CancelOnceScope, is_scope_cancelled, loop_scheduler
from fitloop._concurrency.supervisor import run_in_thread
from fitloop._display.console import write_output
from fitloop._display.printed import RunGroup
from fitloop._engine.config import check_callbacks, check_flag, check_optional
from fitloop._engine.event_bus import EventStream, EventStreams
from fitloop._errors import ConfigurationError
from fitloop._events import JobStarted
from fitloop._processes.child import refuse_while_importing
from fitloop._public import public
from fitloop._run.fit_options import FitOptions, fit_option
from fitloop._runner.arguments import named_arguments
from fitloop._runner.execution import JobExecutor, ResourceAllocator
from fitloop._runner.jobs import CompletedJobs, Job, Outcome, bind, cancelled_outcome, check_options
from fitloop._runner.results import Results
from fitloop._storage.durable import DirectoryLock
from fitloop._storage.job_files import directory_name
from fitloop._system import available_cores
from fitloop._trainer.fitloop import FitLoop
from fitloop._trainer.sync import SyncFitLoop
from fitloop.backends.base import Backend, JobSpec
from fitloop.backends.process.backend import resolve_backend
from fitloop.callbacks.callback import Callback

Made: TypeAlias = FitLoop | SyncFitLoop


@public
class Runner:
    """Runs trainings that are submitted to it, a limited number at a time.

    ::

        async with Runner(max_concurrent=4, save_path="runs") as runner:
            for lr in (1e-2, 1e-3, 1e-4):
                runner.submit(make_trainer, lr, name=f"lr={lr}", epochs=10)
            async for outcome in runner.as_completed():
                print(outcome.name, outcome.result or outcome.error)

    Leaving the block waits for all jobs. The error of a job is in its outcome; it is not raised,
    and does not affect other jobs. An error that is no `Exception`, such as SystemExit, concerns
    the program: raised in this process, it cancels all jobs and is raised from the block; in a
    worker process it only fails its job. With equal ``seed`` and ``num_threads`` a training gives
    the same bits as alone.

    Cancelling the block, or an exception in it, cancels all jobs: running ones end at a batch
    boundary, waiting ones never start. A Runner is for one ``async with`` of one event loop. Its
    methods must be called there, except `cancel` and `cancel_all`, which any thread may call.

    Args:
        max_concurrent: number of trainings at a time; by default the cores of this process.
        backend: ``"thread"``, ``"process"`` or a `ProcessBackend`, or a `Backend` of your own.
        save_path: a directory. Each job has a directory of its own in it, and is resumable: a job
            that is done there is not run again, an unfinished one continues, and a failed one
            starts from its last snapshot. No other Runner can use the directory meanwhile. A job
            is recognized by its name alone, so give each a ``name`` that says what it trains.
        checkpoint: when snapshots are taken there, unless ``submit`` says so.
        fail_fast: the first failure cancels all other jobs, and is raised from the block.
        callbacks: called with every event of every training, as the callbacks of a trainer.
        keep_trainers: keep the trained trainer in the outcome; else it is dropped.
        cuda_streams: give each run in this process a CUDA stream of its own, so that kernels of
            several runs on one device overlap. Each stream has its own memory cache, so they take
            more memory. Code of yours that reads the tensors of a running trainer must wait for
            its stream.

    A trainer without a ``num_threads`` of its own always gets the same number of threads: cores
    divided by ``max_concurrent``. With several accelerators, each trainer without a ``device``
    gets the next one, round robin. A trainer without a ``name`` is named after its job.

    Raises:
        ConfigurationError: an argument is invalid.
    """

    @checked_arguments()
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
        self._max_concurrent = (
            check_optional("max_concurrent", max_concurrent, 1, meaning="trainings at a time")
            or available_cores()
        )
        self._backend = resolve_backend(backend)
        self._save_path = None
        if save_path is not None:
            self._save_path = absolute_path("save_path", save_path, "the path of a directory")
        if checkpoint is not None and save_path is None:
            raise ConfigurationError(
                "checkpoint is given, and no save_path to keep snapshots in; give save_path="
            )
        self._checkpoint = check_checkpoint(checkpoint)
        self._fail_fast = check_flag("fail_fast", fail_fast)
        self._event_streams = EventStreams()
        self._group = RunGroup()
        self._interrupted = 0
        """number of jobs that ran when all were cancelled"""
        self._executor = JobExecutor(
            backend=self._backend,
            allocator=ResourceAllocator(
                self._max_concurrent,
                self._save_path.name if self._save_path else f"sweep-{secrets.token_hex(3)}",
                cuda_streams=check_flag("cuda_streams", cuda_streams),
            ),
            callbacks=check_callbacks(callbacks),
            keep_trainers=check_flag("keep_trainers", keep_trainers),
            emit=self._event_streams.push,
            group=self._group,
        )
        self._jobs: dict[str, Job] = {}
        self._waiting: OrderedDict[str, Job] = OrderedDict()
        self._running = 0
        self._submitted = 0
        self._completed = CompletedJobs()
        self._failure: BaseException | None = None
        """error that ends the Runner, raised from the block"""
        self._task_group: Any = None
        self._block = CancelOnceScope()
        """the body of the ``async with`` block"""
        self._loop_thread = 0
        self._schedule: Callable[[Callable[[], object]], None] = lambda call: None
        self._open = False
        self._lock: DirectoryLock | None = None

    # -- the block -----------------------------------------------------------------------------

    async def __aenter__(self) -> Runner:
        """Lock the directory and start.

        Raises:
            CheckpointError: another Runner uses ``save_path``, or it cannot be written to.
            RuntimeError: the Runner was used before, or this process is a new one that only imports
                the program's script.
        """
        refuse_while_importing("a Runner was opened")
        if self._task_group is not None:
            raise RuntimeError("this Runner was used before; make another one")
        if self._save_path is not None:
            self._lock = DirectoryLock(self._save_path)
            try:
                await run_in_thread("runner", self._lock.acquire)
            except BaseException:  # such as a cancellation, raised after the lock was acquired
                await self._close()
                raise
        self._loop_thread, self._schedule = threading.get_ident(), loop_scheduler()
        self._task_group = anyio.create_task_group()
        await self._task_group.__aenter__()
        self._block.__enter__()
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is not None:
            self._open = False
            self._cancel_jobs()
        if self._block.__exit__(kind, error, traceback):  # `_fail` has ended it
            error = None
        swallowed = False
        try:
            cancellation = await self._wait_for_jobs(error)
            # A task group would wrap any other error in a group.
            kind = None if cancellation is None else type(cancellation)
            is_ended = await self._task_group.__aexit__(kind, cancellation, None)
            swallowed = cancellation is not None and bool(is_ended)
        finally:
            self._open = False
            self._cancel_waiting()
            self._event_streams.end()
            await self._close()
        if self._failure is not None and (error is None or swallowed):
            raise self._failure
        return swallowed

    async def _wait_for_jobs(self, error: BaseException | None) -> BaseException | None:
        """Wait until no job runs, with ``error`` from the block; return a cancellation to raise.

        A native cancellation cancels the jobs once. A second one, or that of an anyio scope, ends
        the wait: the task group then cancels them at every await.
        """
        cancelled = anyio.get_cancelled_exc_class()
        cancellation = error if isinstance(error, cancelled) else None
        while self._running and not (cancellation and is_scope_cancelled()):
            try:
                await self._completed.wait()
            except cancelled as raised:
                self._open = False
                self._cancel_jobs()
                if cancellation is not None:
                    break
                cancellation = raised
        return cancellation

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await self._backend.close()
            finally:
                if self._lock is not None:
                    await run_in_thread("runner", self._lock.release)
            if self._group.is_ending and self._group.prints:
                text = self._cancelled_text()
                await run_in_thread("runner", lambda: write_output(text))

    def _cancelled_text(self) -> str:
        """Return the line for a `Runner` that was cancelled: its trainings print no lines then."""
        counts = Counter(job.status for job in self._jobs.values())
        waiting = counts["cancelled"] - self._interrupted
        parts = [f"{counts['done']} done", f"{self._interrupted} interrupted"]
        parts += [f"{counts['failed']} failed"] if counts["failed"] else []
        parts += [f"{waiting} not started"] if waiting > 0 else []
        way = "" if self._save_path is None else ". Started again, the program goes on with them"
        return f"cancelled; of {len(self._jobs)} trainings: {', '.join(parts)}{way}\n"

    # -- jobs ----------------------------------------------------------------------------------

    @leaves_user_frames
    def submit(
        self,
        target: Callable[..., Made | Awaitable[Made]] | Made,
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        name: str | None = None,
        epochs: int = 1,
        **options: Unpack[FitOptions],
    ) -> Job:
        """Submit a training; it starts when a place is free. A waiting job costs next to nothing.

        Args:
            target: a function, plain or async, that returns a `FitLoop`. Plain functions are called
                in a thread, one at a time. With the thread backend also a trainer; with a
                ``save_path``, its own ``save_path`` must be the directory of its job.
            args: positional arguments of the function. They are used when the job starts: give each
                job objects of its own. Results tables have a column for each, by the name of the
                parameter.
            kwargs: keyword arguments of the function, such as ``{"lr": 0.1}``.
            name: name of the job, and of a trainer without one; by default the function's name and
                a number. With ``save_path`` also the name of the job's directory.
            epochs: epochs of ``fit``.
            options: more arguments of ``fit``.

        Raises:
            ConfigurationError: the name is in use, or the target or an argument of ``fit`` is
                invalid.
            TypeError: ``fit`` has no such argument. Arguments that only a subclass of `FitLoop` has
                are accepted for a trainer of that subclass, not for a function that returns one.
            RuntimeError: called outside of the ``async with`` block, or in another thread.
        """
        if not self._open:
            raise RuntimeError("this Runner is not open; submit inside of its `async with` block")
        if threading.get_ident() != self._loop_thread:
            raise RuntimeError(
                "submit() was called in another thread than the Runner's; have the event loop call "
                "it, as with anyio.from_thread.run_sync or call_soon_threadsafe"
            )
        name = self._default_name(target) if name is None else str(name)
        fits = name and name.encode(errors="ignore").decode() == name  # no half of a surrogate pair
        expect(fits, "name", name, "a name, or None for one of its own")
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
            target=bind(name, target, kwargs) if kwargs else target,
            args=args,
            epochs=fit_option("epochs", epochs),
            options=options,
            directory=directory,
            arguments=named_arguments(target, args, kwargs or {}),
        )
        self._backend.check(spec)
        job = self._jobs[name] = Job(
            spec, lambda job: self._call_on_loop(partial(self._cancel_job, job))
        )
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
        """Cancel a job, see `Job.cancel`; any thread. Raises KeyError for an unknown name."""
        self._job(name).cancel()

    def forget(self, name: str) -> None:
        """Drop a job that is over, and its outcome; its name may be used again.

        For a Runner that lives for long, as in a service. The files of the job stay.

        Raises:
            KeyError: there is no such job.
            RuntimeError: the job is not over yet.
        """
        job = self._job(name)
        if job.status in ("waiting", "running"):
            raise RuntimeError(f"job {name!r} is {job.status}; cancel it, and await its outcome")
        del self._jobs[name]
        self._completed.forget(name)
        self._event_streams.forget(name)

    def cancel_all(self) -> None:
        """Cancel every job that is not over, from any thread; more may be submitted."""
        self._call_on_loop(self._cancel_jobs)

    async def as_completed(self) -> AsyncIterator[Outcome]:
        """Yield the outcome of every job once, in order of completion.

        Ends when all jobs that were submitted so far are over. Several tasks may iterate.
        """
        async for outcome in self._completed.iterate(
            lambda: not self._waiting and not self._running
        ):
            yield outcome

    async def results(self) -> Results[Outcome]:
        """Wait for all jobs that were submitted so far; return their outcomes.

        They are in order of submission, and print as a table, best score first.
        """
        return Results([await job.outcome() for job in self.jobs])

    def events(self) -> EventStream:
        """Return a stream of the events of all jobs: ``async with runner.events() as events``.

        ``event.trainer`` is the name of the job. The last event of a job is its `JobEnded`, after
        the events of its run, if it had one. Its outcome may be available before these are read.
        The stream ends with the Runner.
        """
        return EventStream(self._event_streams, ends_with_run=False)

    # -- running them --------------------------------------------------------------------------

    def _start(self) -> None:
        while self._waiting and self._running < self._max_concurrent:
            self._running += 1
            scope = CancelOnceScope()
            _name, job = self._waiting.popitem(last=False)
            job.scope = scope
            self._task_group.start_soon(self._run, job, scope)

    async def _run(self, job: Job, scope: CancelOnceScope) -> None:
        start, outcome, has_begun = time.perf_counter(), None, False
        try:
            await anyio.lowlevel.checkpoint_if_cancelled()
            if scope.cancel_called:
                return
            with scope:
                has_begun = True
                self._event_streams.push(JobStarted(trainer=job.name))
                assert job.state is not None
                execute = partial(self._executor.execute, job.spec, scope)
                outcome = await job.state.run(execute)
        finally:
            self._running -= 1
            if outcome is None:
                outcome = cancelled_outcome(job.spec, time.perf_counter() - start)
                if not scope.cancel_called:  # a scope around the Runner is cancelled
                    self._group.is_ending = True
                if has_begun and self._group.is_ending:
                    self._interrupted += 1
            if not isinstance(outcome.error, Exception | asyncio.CancelledError | None):
                self._fail(outcome.error)  # such as SystemExit, which must end the program
            self._complete(job, outcome)
            if self._open:
                self._start()

    def _complete(self, job: Job, outcome: Outcome) -> None:
        job.complete(outcome)
        self._event_streams.push(outcome.event())
        self._completed.add(outcome)
        if outcome.status == "failed" and self._fail_fast and outcome.error is not None:
            self._fail(outcome.error)

    def _fail(self, error: BaseException) -> None:
        """End the Runner; the block raises the error."""
        if self._failure is None:
            self._failure = error
            self._open = False
            self._cancel_jobs()
            self._block.cancel()

    def _call_on_loop(self, call: Callable[[], object]) -> None:
        """Call a function on the event loop: at once if this is its thread, else soon."""
        if threading.get_ident() == self._loop_thread:
            call()
        else:
            self._schedule(call)

    def _cancel_job(self, job: Job) -> None:
        if job.scope is not None:
            job.scope.cancel()
        elif self._waiting.get(job.name) is job:
            del self._waiting[job.name]
            self._complete(job, cancelled_outcome(job.spec))

    def _cancel_jobs(self) -> None:
        self._group.is_ending = True
        self._cancel_waiting()
        for job in self._jobs.values():
            self._cancel_job(job)

    def _cancel_waiting(self) -> None:
        while self._waiting:
            _name, job = self._waiting.popitem(last=False)
            self._complete(job, cancelled_outcome(job.spec))

    def __repr__(self) -> str:
        counts = Counter(job.status for job in self._jobs.values())
        jobs = ", ".join(f"{number} {status}" for status, number in counts.items())
        return f"<Runner of {self._max_concurrent} at a time: {jobs or 'no jobs'}>"
