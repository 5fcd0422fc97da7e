"""Crossing between an event loop and the threads of a run, under asyncio, uvloop and trio.

Owns the one hop of a run: `supervise` starts the step thread, serves what it asks of the event
loop, and does not return before the thread has ended, however often it is cancelled. Knows
nothing of models or loaders. The thread-portal waiting is `RunControl`'s.
"""

from __future__ import annotations

import contextvars
import math
import threading
import warnings
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, cast

import anyio
import anyio.lowlevel

from fitloop._concurrency.control import Abandoned, Cancelled, RunControl
from fitloop._concurrency.event_loops import (
    LoopTasks,
    ThreadsafeEvent,
    hide_running_loop,
    is_scope_cancelled,
    raise_in_scope,
)
from fitloop._errors import LoaderHungWarning, add_note_safely

T = TypeVar("T")
JOIN_TIMEOUT = 0.0005
"""seconds that a thread which has said its last word is waited for without anything else"""


class _Request:
    """A coroutine function that a thread wants run on the event loop, and its outcome."""

    __slots__ = ("call", "done", "error", "result")

    def __init__(self, call: Callable[[], Awaitable[Any]]) -> None:
        self.call = call
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class LoopPortal:
    """What the threads of a run may ask of the event loop that awaits it."""

    def __init__(self, control: RunControl) -> None:
        self._control = control
        self.tasks = LoopTasks()
        self._wake_event = ThreadsafeEvent()
        self._requests: deque[_Request] = deque()
        self._open_requests: set[_Request] = set()
        self._closed = False
        self.finished = False

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Run ``function`` on the event loop, block until it is over and return its result.

        Raises what it raised, as the same object; raises `Cancelled` when the run was cancelled,
        after the coroutine has ended.
        """
        request = self._post(function)
        # Not given up early: the coroutine may be in the middle of a step.
        with self._control.changed:
            while not request.done:
                self._control.changed.wait()
        if request.error is not None:
            raise request.error
        return cast("T", request.result)

    def start(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run ``function`` on the event loop without waiting for it.

        Raises `Cancelled` when the event loop serves this run no longer.
        """
        self._post(function)

    def _post(self, function: Callable[[], Awaitable[Any]]) -> _Request:
        request = _Request(function)
        with self._control.changed:
            if self._closed:
                raise Cancelled
            self._requests.append(request)
            self._open_requests.add(request)
        self._wake_event.set()
        return request

    def finish(self) -> None:
        """Tell the awaiting task that the threads of the run are done; the last call of all."""
        self.finished = True
        self._wake_event.set()

    def wake(self) -> None:
        """Have the awaiting task look again."""
        self._wake_event.set()

    async def wait(self) -> None:
        """Wait for a request, or for the end."""
        await self._wake_event.wait()

    def take(self) -> list[_Request]:
        """Return the new requests."""
        with self._control.changed:
            taken = list(self._requests)
            self._requests.clear()
        return taken

    def close(self) -> None:
        """Take no requests any more."""
        with self._control.changed:
            self._closed = True

    def answer_rest(self) -> None:
        """Answer with `Cancelled` whatever waits for a coroutine that will never run."""
        with self._control.changed:
            for request in self._open_requests:
                if not request.done:
                    request.error, request.done = Cancelled(), True
            self._open_requests.clear()
            self._control.changed.notify_all()

    async def serve(self, request: _Request) -> None:
        """Run one request to its end and answer it."""
        try:
            with self.tasks.entered():
                request.result = await request.call()
        except anyio.get_cancelled_exc_class() as error:
            # Else it awaited something that was cancelled, which is an error like any other.
            request.error = error
            if self._closed or is_scope_cancelled():
                request.error = Cancelled()
                self._control.cancel()
            raise_in_scope(error)
        except BaseException as error:  # crosses to the thread that asked
            request.error = error
        finally:
            with self._control.changed:
                request.done = True
                self._open_requests.discard(request)
                self._control.changed.notify_all()


class ThreadTask(Protocol):
    """What a step thread does: `execute`, and then `finish`, which always runs, once."""

    def execute(self) -> None:
        """Do the work; may raise, and leaves tidying up to `finish`."""

    def finish(self, error: BaseException | None) -> Any:
        """Tidy up after `execute`, which raised ``error``; return the result or raise.

        Runs in the step thread, or in another one when the step thread was abandoned.
        """


class _StepThread:
    """The thread of a run, and the outcome it leaves."""

    def __init__(
        self, task: ThreadTask, control: RunControl, portal: LoopPortal, name: str
    ) -> None:
        self._task, self._control, self._portal, self._name = task, control, portal, name
        self._threads: list[threading.Thread] = []
        self.result: Any = None
        self.error: BaseException | None = None

    def start(self) -> None:
        self._launch(self._run)

    def replace(self) -> None:
        """Finish in another thread, since this one does not come back from its loader."""
        self._threads.clear()
        self._launch(lambda: self._settle(Cancelled()))

    def _launch(self, target: Callable[[], None]) -> None:
        context = contextvars.copy_context()
        context.run(hide_running_loop)
        thread = threading.Thread(
            target=context.run, args=(target,), name=f"fitloop {self._name}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._task.execute()
        except Abandoned:
            return
        except BaseException as raised:  # crosses to the awaiting task
            error = raised
        try:
            if self._control.claim_end():
                self._settle(error)
        finally:
            del error  # its traceback refers to this frame

    def _settle(self, error: BaseException | None) -> None:
        try:
            self.result = self._task.finish(error)
        except BaseException as raised:  # crosses to the awaiting task
            self.error = raised
        self._task = cast("ThreadTask", None)  # the thread may outlive the run by a moment
        self._portal.finish()

    def is_alive(self) -> bool:
        """Return whether a thread is in the moment between its last word and its end.

        Holds the event loop for half a millisecond at most: looking again and again would keep
        the interpreter from the thread that needs it to end.
        """
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT)
        return any(thread.is_alive() for thread in self._threads)


wait_scope: ContextVar[Callable[[], AbstractAsyncContextManager[None]]] = ContextVar(
    "fitloop wait scope", default=nullcontext
)
"""Makes a scope that `supervise` enters while it waits for its thread.

Code that holds something which the thread may need sets a scope that releases it meanwhile.
"""


async def supervise(
    task: ThreadTask,
    control: RunControl,
    portal: LoopPortal,
    *,
    name: str,
    grace: float,
    background_tasks: Sequence[Callable[[], Awaitable[None]]] = (),
    end_background_tasks: Callable[[], None] = lambda: None,
) -> Any:
    """Run ``task`` in a thread of its own and return what its ``finish`` returned.

    Waits inside `wait_scope`.

    ``background_tasks`` run beside it as tasks; ``end_background_tasks`` lets them
    end when the task is over. The error of a background task ends the run and is raised from here.

    Cancellation: ``control`` is told, the coroutines that the work has asked for are cancelled,
    the thread ends at its next boundary and is joined, and the first cancellation is raised
    again. This also holds when it is cancelled again meanwhile. A thread that is still inside a
    loader after ``grace`` seconds is left there, with a `LoaderHungWarning`.
    """
    async with wait_scope.get()():
        thread = _StepThread(task, control, portal, name)
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
            thread.start()
            try:
                while not (portal.finished or control.failure):
                    await portal.wait()
                    for request in portal.take():
                        group.start_soon(portal.serve, request)
                end_background_tasks()
            except BaseException as raised:
                interruption = raised
                control.cancel()
                portal.close()
                if isinstance(raised, GeneratorExit):  # the event loop is gone: nothing to await
                    portal.answer_rest()
                    raise
                portal.tasks.cancel(raised, group.cancel_scope)
            if control.failure is not None:
                portal.close()
                group.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class() as raised:  # while the background_tasks were ending
        interruption = interruption or raised
        control.cancel()
    except BaseExceptionGroup as raised:  # Ctrl-C pressed again, anywhere above
        interruption = interruption or raised.exceptions[0]
        control.cancel()
        portal.close()
    portal.answer_rest()
    interruption = await _shut_down(thread, control, portal, grace) or interruption
    if interruption is None and isinstance(thread.error, Cancelled) and control.failure is None:
        # A coroutine of the run saw the cancellation of a scope before this task did.
        await anyio.lowlevel.checkpoint()
    for loader in control.hung_loaders:
        _warn_hung(loader, name, grace)
    return _outcome(thread, control, interruption)


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
    task, portal = FunctionTask(function), LoopPortal(control)
    result: T = await supervise(task, control, portal, name=name, grace=0.0)
    return result


async def _run_background_task(
    background_task: Callable[[], Awaitable[None]],
    control: RunControl,
    portal: LoopPortal,
    name: str,
) -> None:
    try:
        with portal.tasks.entered():
            await background_task()
    except anyio.get_cancelled_exc_class() as error:
        if not (control.halted or is_scope_cancelled()):
            _fail(error, control, portal, name)  # it awaited something that was cancelled
        raise_in_scope(error)
    except BaseException as error:
        _fail(error, control, portal, name)


def _fail(error: BaseException, control: RunControl, portal: LoopPortal, name: str) -> None:
    """End the run for what an async callback raised; supervise raises it again."""
    add_note_safely(error, f"in trainer {name!r}: in an async callback")
    control.cancel(error)
    portal.wake()


async def _shut_down(
    thread: _StepThread, control: RunControl, portal: LoopPortal, grace: float
) -> BaseException | None:
    """Wait for the thread through any number of cancellations; return the first of them."""
    first: BaseException | None = None
    deadline = anyio.current_time() + grace
    with anyio.CancelScope(shield=True):
        while not portal.finished:
            try:
                with anyio.CancelScope(deadline=deadline):
                    await portal.wait()
            except (anyio.get_cancelled_exc_class(), KeyboardInterrupt) as again:
                # A native Task.cancel() passes anyio's shield. It is not lost: see `first`.
                first = first or again
            if anyio.current_time() >= deadline:
                deadline = math.inf
                if control.abandon_loader():
                    thread.replace()
        while thread.is_alive():
            try:
                await anyio.lowlevel.checkpoint()
            except (anyio.get_cancelled_exc_class(), KeyboardInterrupt) as again:
                first = first or again
    return first


def _outcome(thread: _StepThread, control: RunControl, interruption: BaseException | None) -> Any:
    # What user code raised must not be lost in a cancellation that came at the same time.
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
    warnings.warn(
        f"{name}: {loader} had not returned {grace:g} s after the run was to end; its thread "
        "is left behind and ends when the loader returns. Give loader_grace= to wait longer",
        LoaderHungWarning,
        stacklevel=2,
    )
