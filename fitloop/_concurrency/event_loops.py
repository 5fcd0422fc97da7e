"""The differences between asyncio (also uvloop) and trio: scheduling, waking and cancelling."""

from __future__ import annotations

import asyncio
import contextvars
import math
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import anyio

from fitloop._blocks import contextmanager

RETRY_SECONDS = 0.1
"""time after which a `CancelOnceScope` looks again at a task that other code has cancelled"""


def loop_scheduler() -> Callable[[Callable[[], object]], None]:
    """Return a function that schedules a call on the running event loop, from any thread.

    Calls after the end of the loop are dropped.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        token = trio.lowlevel.current_trio_token()

        def schedule_trio(call: Callable[[], object]) -> None:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(call)

        return schedule_trio

    def schedule_asyncio(call: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(call)

    return schedule_asyncio


def loop_end_check() -> Callable[[], bool]:
    """Return a function that tells any thread whether the running event loop is closed by then."""
    try:
        return asyncio.get_running_loop().is_closed
    except RuntimeError:
        return lambda: False  # trio ends its tasks first


_started: set[asyncio.Task[None]] = set()
"""tasks of `start_task`, since an event loop keeps only weak references"""


def start_task(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function, which raises no errors, in a task beside the present one."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        context = contextvars.copy_context()
        trio.lowlevel.spawn_system_task(function, context=context)
        return
    task = loop.create_task(function())
    _started.add(task)
    task.add_done_callback(_started.discard)


def hide_running_loop() -> None:
    """Remove the event loop from the current context, which is a copy for a new thread.

    Otherwise sniffio would find the loop in the thread, where user code may call `SyncFitLoop`.
    """
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:
        sniffio.current_async_library_cvar.set(None)


class ThreadsafeEvent:
    """An event for one task, which any thread can set. A wait clears it.

    Create it inside the event loop of the task.
    """

    def __init__(self) -> None:
        self._schedule = loop_scheduler()
        self._event = anyio.Event()

    def set(self) -> None:
        """Wake the waiting task, or the next wait."""
        self._schedule(self._wake)

    def _wake(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Wait until the event was set since the last wait. A cancelled wait loses no `set`.

        A second Ctrl-C, raised in here or in `_wake`, may lose one `set`, but not the next one. A
        waiting task must check its condition again after each wait.
        """
        await self._event.wait()
        self._event = anyio.Event()


class LoopTasks:
    """The tasks on the event loop that now run user code for a run.

    They are cancelled in the way of the awaiting task: once by a native ``Task.cancel()``, so that
    asyncio code can await in its cleanup, or at every await by an anyio scope.
    """

    def __init__(self) -> None:
        self._native: set[asyncio.Task[Any]] = set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Add the current task while it runs user code."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # trio only has scopes
            task = None
        if task is None:
            yield
            return
        self._native.add(task)
        try:
            yield
        finally:
            self._native.discard(task)

    def cancel(self, scope: anyio.CancelScope, interruption: BaseException | None = None) -> None:
        """Cancel all tasks in the way that ``interruption`` cancelled the awaiting task.

        Without one, because other code of the run has failed: once under asyncio.
        """
        native = isinstance(interruption, asyncio.CancelledError) or (
            interruption is None and self._native
        )
        if not native or is_scope_cancelled():
            scope.cancel()
            return
        for task in self._native:
            if not task.done() and not task.cancelling():  # a second one would cut its cleanup off
                task.cancel()


class CancelOnceScope:
    """A block on the event loop that other code can cancel; the cancellation ends with the block.

    Under asyncio the code in the block is cancelled once, as by ``Task.cancel()``, so that its
    cleanup may await. Under trio this is an anyio scope, which cancels at every await.

    Args:
        timeout: seconds after which the block cancels itself.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self._timeout = timeout
        self._task: asyncio.Task[Any] | None = None
        """the task of the block while it runs under asyncio"""
        self._scope: anyio.CancelScope | None = None
        """the scope of the block under trio"""
        self._timer: asyncio.Handle | None = None
        self._cancellations = 0
        """of the task, by other code before the block"""
        self._is_delivered = False
        self.cancel_called = False

    def __enter__(self) -> Self:
        self._schedule = loop_scheduler()
        try:
            self._task = asyncio.current_task()
        except RuntimeError:
            self._scope = anyio.CancelScope()
            if self._timeout is not None:
                self._scope.deadline = anyio.current_time() + self._timeout
            self._scope.__enter__()
        else:
            assert self._task is not None
            self._cancellations = self._task.cancelling()
            if self._timeout is not None:
                self._timer = asyncio.get_running_loop().call_later(self._timeout, self.cancel)
        if self.cancel_called:
            self._deliver()
        return self

    def cancel(self) -> None:
        """Cancel the block, or a later one at its start; on the event loop."""
        if not self.cancel_called:
            self.cancel_called = True
            self._deliver()

    def cancel_soon(self) -> None:
        """Cancel the block, which has begun, from any thread."""
        self._schedule(self.cancel)

    def _deliver(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
        elif self._task is None:
            pass  # the block has not begun, or is over
        elif self._task is asyncio.current_task():
            # Its next await may be after the block: cancel it when it waits.
            self._timer = asyncio.get_running_loop().call_soon(self._deliver)
        elif self._task.cancelling() > self._cancellations:
            # A second one would cut the cleanup off. But the code may go on after the first one.
            self._timer = asyncio.get_running_loop().call_later(RETRY_SECONDS, self._deliver)
        else:
            self._is_delivered = True
            self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if self._scope is not None:
            return bool(self._scope.__exit__(kind, error, traceback))
        if self._timer is not None:
            self._timer.cancel()
        task, self._task = self._task, None
        if task is None or not self._is_delivered:
            return False
        is_last = task.uncancel() <= self._cancellations
        return is_last and isinstance(error, asyncio.CancelledError)


def is_scope_cancelled() -> bool:
    """Return whether an anyio scope around the current task is cancelled; always so under trio."""
    return anyio.current_effective_deadline() == -math.inf


def raise_in_scope(cancellation: BaseException) -> None:
    """Raise a cancellation again if it comes from an anyio scope.

    A native one ends here: in a task group it would cancel all other tasks at every await.
    """
    if is_scope_cancelled():
        raise cancellation
