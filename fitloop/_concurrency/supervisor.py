"""Runs a task in a thread and awaits it, under asyncio, uvloop and trio.

`supervise` starts the thread, runs coroutines for it on the event loop, and returns only after the
thread has ended, however often it is cancelled.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from traceback import clear_frames
from typing import Any, Protocol, TypeVar, cast

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from fitloop._concurrency.control import Abandoned, Cancelled, RunControl
from fitloop._concurrency.event_loops import (
    LoopTasks,
    ThreadsafeEvent,
    is_scope_cancelled,
    loop_end_check,
    raise_in_scope,
)
from fitloop._concurrency.task_state import TaskState, lend_state
from fitloop._errors import LoaderHungWarning, add_note_safely, warn_user

T = TypeVar("T")
JOIN_TIMEOUT = 0.0005
"""timeout in seconds of the blocking join of a thread that has delivered its outcome"""


@dataclass(eq=False, slots=True)
class _Request:
    """A coroutine function that a thread sends to the event loop, and its outcome."""

    call: Callable[[], Awaitable[Any]]
    done: bool = False
    result: Any = None
    error: BaseException | None = None


class LoopPortal:
    """The way from the threads of a run to the event loop that awaits the run."""

    def __init__(self, control: RunControl) -> None:
        self._control = control
        self.tasks = LoopTasks()
        self._wake_event = ThreadsafeEvent()
        self._requests: deque[_Request] = deque()
        self._open_requests: set[_Request] = set()
        self._is_loop_closed = loop_end_check()
        self._closed = False
        self.finished = False
        self.background_tasks = 0
        """those that run; they wake the awaiting task at their end"""

    def cancel_without_loop(self) -> None:
        """Cancel the run if its event loop was closed: nothing awaits or cancels it any more."""
        if self._is_loop_closed():
            self._control.cancel()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run ``function`` on the event loop, block until it ends, and return its result.

        Raises its exception, as the same object. Raises `Cancelled` if the run was cancelled, after
        the coroutine has ended. The coroutine has the context variables and the modes of torch of
        this thread, and leaves its own to it.
        """
        with lend_state() as state:
            request = self._post(lambda: state.run(function))
            # Wait also after a cancellation: the coroutine may be in the middle of a step.
            with self._control.changed:
                while not request.done:
                    self._control.changed.wait()
        if request.error is not None:
            raise request.error
        return cast("T", request.result)

    def start(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run ``function`` on the event loop, with a copy of this thread's state; do not wait.

        Raises `Cancelled` if the portal is closed.
        """
        state = TaskState.of_caller()
        self._post(lambda: state.run(function))

    def _post(self, function: Callable[[], Awaitable[Any]]) -> _Request:
        request = _Request(function)
        self.cancel_without_loop()
        with self._control.changed:
            if self._closed or self._is_loop_closed():
                raise Cancelled
            self._requests.append(request)
            self._open_requests.add(request)
        self._wake_event.set()
        return request

    def finish(self) -> None:
        """Tell the awaiting task that the thread has delivered its outcome; call this last."""
        self.finished = True
        self._wake_event.set()

    def wake(self) -> None:
        """Wake the awaiting task."""
        self._wake_event.set()

    async def wait(self) -> None:
        """Wait for a request, `wake` or `finish`."""
        await self._wake_event.wait()

    def take_requests(self) -> list[_Request]:
        """Return the new requests, and remove them."""
        with self._control.changed:
            requests = list(self._requests)
            self._requests.clear()
        return requests

    def close(self) -> None:
        """Refuse new requests."""
        with self._control.changed:
            self._closed = True

    def cancel_requests(self) -> None:
        """Answer all open requests with `Cancelled`; their coroutines will never run."""
        with self._control.changed:
            for request in self._open_requests:
                if not request.done:
                    request.error, request.done = Cancelled(), True
            self._open_requests.clear()
            self._control.changed.notify_all()

    async def serve(self, request: _Request) -> None:
        """Run the coroutine of a request, and answer the request."""
        try:
            with self.tasks.entered():
                request.result = await request.call()
        except anyio.get_cancelled_exc_class() as error:
            # If the run is not cancelled, user code awaited a cancelled task: an ordinary error.
            request.error = error
            if self._closed or is_scope_cancelled():
                request.error = Cancelled()
                self._control.cancel()
            raise_in_scope(error)
        except BaseException as error:  # raised again in the thread
            request.error = error
        finally:
            with self._control.changed:
                request.done = True
                self._open_requests.discard(request)
                self._control.changed.notify_all()


class ThreadTask(Protocol):
    """The work of a supervised thread: `execute`, and then `finish`, exactly once."""

    def execute(self) -> None:
        """Do the work, or raise. `finish` cleans up."""

    def finish(self, error: BaseException | None) -> Any:
        """Clean up after `execute`, which raised ``error``. Return the result, or raise.

        Runs in the same thread, or in a new thread if the first one hangs in a loader.
        """


class _StepThread:
    """The thread of a task, and its outcome."""

    def __init__(
        self,
        make_task: Callable[[], ThreadTask],
        control: RunControl,
        portal: LoopPortal,
        name: str,
        grace: float,
    ) -> None:
        self._make_task: Callable[[], ThreadTask] | None = make_task
        self._task: ThreadTask | None = None
        self._control, self._portal, self._name = control, portal, name
        self._state = TaskState.of_caller()
        self._grace = grace
        self._threads: list[threading.Thread] = []
        self.result: Any = None
        self.error: BaseException | None = None

    def start(self) -> None:
        _register_exit_hook()
        _step_threads.add(self)
        self._start_thread(self._run)

    def replace(self) -> None:
        """Finish the task in a new thread, since the first one hangs in its loader."""
        self._threads.clear()
        self._state = TaskState.of_caller()  # the other thread stays in its context
        self._start_thread(lambda: self._finish(Cancelled()))

    def _start_thread(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(
            target=self._state.call, args=(target,), name=f"fitloop {self._name}", daemon=True
        )
        self._threads.append(thread)  # first: the program may end as soon as the thread runs
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no thread
            self._threads.remove(thread)
            self.error = error
            self._portal.finish()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            assert self._make_task is not None
            self._task = self._make_task()
            self._task.execute()
        except Abandoned:
            return
        except BaseException as raised:  # raised again in the awaiting task
            error = raised
        if isinstance(error, Cancelled):
            # Its frames may have the last reference to an iterator, which waits for its workers
            # where it is deleted: not on the event loop.
            clear_frames(error.__traceback__)
        try:
            if self._control.claim_end():
                self._finish(error)
        finally:
            del error  # its traceback refers to this frame

    def _finish(self, error: BaseException | None) -> None:
        try:
            if self._task is not None:
                self.result = self._task.finish(error)
            elif error is not None:  # of making the task
                raise error
        except BaseException as raised:  # raised again in the awaiting task
            self.error = raised
        finally:
            del error  # its traceback refers to this frame
        self._task = self._make_task = None  # the thread ends a moment after the run
        self._portal.finish()

    def is_running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def cancel(self) -> None:
        """Cancel the run without its event loop, which has ended."""
        self._control.cancel()
        self._portal.close()
        self._portal.cancel_requests()

    def join_until(self, deadline: float) -> bool:
        """Wait for the thread until a time, and return whether it has ended.

        One that hangs in a loader counts as ended after its grace.
        """
        for thread in self._threads:
            thread.join(max(0.0, min(self._grace, deadline - time.monotonic())))
            if thread.is_alive():
                if self._control.abandon_loader():
                    return True
                thread.join(max(0.0, deadline - time.monotonic()))
        return not self.is_running()

    def is_alive(self) -> bool:
        """Return whether the thread has not ended yet, after a join of at most `JOIN_TIMEOUT`.

        The join blocks the event loop. A loop without it would keep the interpreter busy, which
        the thread needs in order to end.
        """
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT)
        return any(thread.is_alive() for thread in self._threads)


_step_threads: weakref.WeakSet[_StepThread] = weakref.WeakSet()
EXIT_TIMEOUT = 30.0
"""seconds that the end of the program waits for the batches that are going on"""


@cache
def _register_exit_hook() -> None:
    """Make runs end with the program; called before the first one starts."""
    atexit.register(_end_runs)


def _end_runs() -> None:
    """Cancel the runs that still go on when the program ends, and wait for their threads.

    Otherwise the interpreter would end the threads in the middle of torch: the program would abort.
    After `EXIT_TIMEOUT`, or Ctrl-C, the program ends at once, without the interpreter.
    """
    running = [thread for thread in list(_step_threads) if thread.is_running()]
    deadline = time.monotonic() + EXIT_TIMEOUT
    try:
        for thread in running:
            thread.cancel()
        if all(thread.join_until(deadline) for thread in running):
            return
        interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    except KeyboardInterrupt:
        interrupted = True
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    failed = getattr(sys, "last_type", None) is not None
    os._exit(128 + signal.SIGINT if interrupted else int(failed))


wait_scope: ContextVar[Callable[[], AbstractAsyncContextManager[None]]] = ContextVar(
    "fitloop wait scope", default=nullcontext
)
"""Returns a scope that `supervise` enters while it waits for its thread.

Code that holds a lock which the thread may need sets a scope that releases the lock.
"""


async def supervise(
    make_task: Callable[[], ThreadTask],
    control: RunControl,
    portal: LoopPortal,
    *,
    name: str,
    grace: float,
    background_tasks: Sequence[Callable[[], Awaitable[None]]] = (),
    end_background_tasks: Callable[[], None] = lambda: None,
) -> Any:
    """Run a task in a new thread, inside `wait_scope`, and return the result of its ``finish``.

    Args:
        make_task: returns the work of the thread; called on the thread, since it may take long.
        control: the flags that stop or cancel the task.
        portal: the task's way to the event loop.
        name: of the trainer, for messages and the name of the thread.
        grace: seconds to wait, after a cancellation, for a thread that is inside a loader.
        background_tasks: run on the event loop beside the thread. An exception of one of them ends
            the task, and is raised from here.
        end_background_tasks: called after the task, so that the background tasks can end.

    Cancellation: cancels ``control`` and all coroutines that run for the task; the thread ends at
    its next boundary and is joined; then the first cancellation is raised again. Further
    cancellations change nothing. A thread that is still inside a loader after ``grace`` seconds is
    left behind, with a `LoaderHungWarning`.
    """
    async with wait_scope.get()():
        thread = _StepThread(make_task, control, portal, name, grace)
        return await _supervise(
            thread, control, portal, name, grace, background_tasks, end_background_tasks
        )


async def _supervise(
    thread: _StepThread,
    control: RunControl,
    portal: LoopPortal,
    name: str,
    grace: float,
    background_tasks: Sequence[Callable[[], Awaitable[None]]],
    end_background_tasks: Callable[[], None],
) -> Any:
    interruption: BaseException | None = None
    try:
        async with anyio.create_task_group() as group:
            for background_task in background_tasks:
                group.start_soon(_run_background_task, background_task, control, portal, name)
                portal.background_tasks += 1
            thread.start()
            try:
                while not (portal.finished or control.failure):
                    await portal.wait()
                    for request in portal.take_requests():
                        group.start_soon(portal.serve, request)
                end_background_tasks()
                # The end of the group would cancel them at each await of their cleanup.
                while portal.background_tasks and not control.failure:
                    await portal.wait()
            except BaseException as raised:
                interruption = raised
                control.cancel()
                if not (control.cancelled or isinstance(raised, GeneratorExit)):
                    await _serve_until_agreed(group, control, portal, grace)
                portal.close()
                if isinstance(raised, GeneratorExit):  # the event loop has ended
                    portal.cancel_requests()
                    raise
                portal.tasks.cancel(group.cancel_scope, raised)
            if control.failure is not None:
                portal.close()
                portal.tasks.cancel(group.cancel_scope)
    except anyio.get_cancelled_exc_class() as raised:  # while background tasks ended
        interruption = interruption or raised
        control.cancel()
    except BaseExceptionGroup as raised:  # a second Ctrl-C, anywhere above
        interruption = interruption or raised.exceptions[0]
        control.cancel()
        portal.close()
    portal.cancel_requests()
    interruption = await _shut_down(thread, control, portal, grace) or interruption
    if interruption is None and isinstance(thread.error, Cancelled) and control.failure is None:
        # A coroutine of the run got the cancellation of a scope before this task: raise it here.
        await anyio.lowlevel.checkpoint()
    for loader in control.hung_loaders:
        _warn_hung(loader, name, grace)
    return _outcome(thread, control, interruption)


async def _serve_until_agreed(
    group: TaskGroup, control: RunControl, portal: LoopPortal, grace: float
) -> None:
    """Serve the thread of a run on several ranks until all have agreed on its end.

    A thread that is inside a loader after ``grace`` seconds is cancelled alone.
    """
    forget = control.on_halt(portal.wake)
    deadline = anyio.current_time() + grace
    try:
        while not (control.cancelled or portal.finished or control.failure):
            try:
                with anyio.CancelScope(shield=True, deadline=deadline):
                    await portal.wait()
            except (anyio.get_cancelled_exc_class(), KeyboardInterrupt):
                pass  # a native Task.cancel() passes the shield; the first one is raised
            for request in portal.take_requests():
                group.start_soon(portal.serve, request)
            if anyio.current_time() >= deadline:
                if control.current_loader is not None:
                    control.cancel_alone()
                deadline = anyio.current_time() + grace
    finally:
        forget()


class FunctionTask:
    """A `ThreadTask` that calls one function."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._result: Any = None

    def execute(self) -> None:
        """Call the function."""
        self._result = self._function()

    def finish(self, error: BaseException | None) -> Any:
        """Return the result of the function, or raise its error."""
        if error is not None:
            raise error
        return self._result


async def run_in_thread(
    name: str, function: Callable[[], T], control: RunControl | None = None
) -> T:
    """Call a blocking function in a thread that is named after ``name``.

    Args:
        name: of the thread.
        function: runs to its end: a cancellation is raised when it has returned.
        control: cancelled together with this coroutine, so that the function may end early.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    control = control or RunControl()
    make_task, portal = partial(FunctionTask, function), LoopPortal(control)
    result: T = await supervise(make_task, control, portal, name=name, grace=0.0)
    return result


async def _run_background_task(
    background_task: Callable[[], Awaitable[None]],
    control: RunControl,
    portal: LoopPortal,
    name: str,
) -> None:
    try:
        with portal.tasks.entered():
            await TaskState.of_caller().run(background_task)
    except anyio.get_cancelled_exc_class() as error:
        if not (control.halted or is_scope_cancelled()):
            _fail(error, control, portal, name)  # it awaited a cancelled task
        raise_in_scope(error)
    except BaseException as error:
        _fail(error, control, portal, name)
    finally:
        portal.background_tasks -= 1
        portal.wake()


def _fail(error: BaseException, control: RunControl, portal: LoopPortal, name: str) -> None:
    """End the run for an exception of an async callback. `supervise` raises it again."""
    add_note_safely(error, f"in trainer {name!r}: in an async callback")
    control.cancel(error)
    portal.wake()


async def _shut_down(
    thread: _StepThread, control: RunControl, portal: LoopPortal, grace: float
) -> BaseException | None:
    """Wait for the thread; return the first cancellation that arrived meanwhile, or None."""
    first: BaseException | None = None
    deadline = anyio.current_time() + grace
    with anyio.CancelScope(shield=True):
        while not portal.finished:
            try:
                with anyio.CancelScope(deadline=deadline):
                    await portal.wait()
            except (anyio.get_cancelled_exc_class(), KeyboardInterrupt) as again:
                # A native Task.cancel() passes the shield of anyio. The caller raises it.
                first = first or again
            if anyio.current_time() >= deadline:
                deadline = math.inf
                if control.abandon_loader():
                    thread.replace()
        while True:
            try:  # Ctrl-C may come anywhere in it
                if not thread.is_alive():
                    break
                await anyio.lowlevel.checkpoint()
            except (anyio.get_cancelled_exc_class(), KeyboardInterrupt) as again:
                first = first or again
    return first


def _outcome(thread: _StepThread, control: RunControl, interruption: BaseException | None) -> Any:
    # An exception of user code has priority over a cancellation at the same time.
    error = interruption
    if control.failure is not None:
        error = control.failure
    if thread.error is not None and not isinstance(thread.error, Cancelled):
        if control.failure not in (None, thread.error):
            add_note_safely(thread.error, f"meanwhile an async callback raised {control.failure!r}")
        error = thread.error
    thread.error = None
    try:
        if error is not None:
            raise error
        return thread.result
    finally:
        del error, interruption


def _warn_hung(loader: str, name: str, grace: float) -> None:
    warn_user(
        f"{name}: {loader} had not returned {grace:g} s after the run was to end; its thread "
        "is left behind and ends when the loader returns. Give loader_grace= to wait longer",
        LoaderHungWarning,
    )
