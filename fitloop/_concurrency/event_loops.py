"""What differs between event loops: scheduling from a thread, waking a task, cancelling one.

asyncio (uvloop too) and trio. Knows nothing of runs.
"""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import anyio


def loop_scheduler() -> Callable[[Callable[[], object]], None]:
    """Return a function that has a callable called on the running event loop, from any thread.

    Calls after the loop has ended are dropped: nobody is left whom they could concern.
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


def hide_running_loop() -> None:
    """Have the current context, a copy for a new thread, not say that an event loop runs in it.

    Else that thread could begin none of its own: user code may call `SyncFitLoop` there.
    """
    sniffio = sys.modules.get("sniffio")
    if sniffio is not None:
        sniffio.current_async_library_cvar.set(None)


class ThreadsafeEvent:
    """Wakes one task from any thread; rings between two wake-ups count as one.

    Made inside the event loop that will wait for it.
    """

    def __init__(self) -> None:
        self._schedule = loop_scheduler()
        self._lock = threading.Lock()
        self._is_set = False
        self._event = anyio.Event()

    def set(self) -> None:
        """Wake the waiting task, or the next one to wait."""
        with self._lock:
            if self._is_set:
                return
            self._is_set = True
        self._schedule(self._open)

    def _open(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        """Wait until it was rung since the last wait; a cancelled wait loses no ring.

        A second Ctrl-C may be raised anywhere in here or in `_open`: then a ring may be lost, but
        not the next one, and who waits looks again at what it waits for.
        """
        try:
            await self._event.wait()
            self._event = anyio.Event()
        finally:
            with self._lock:
                self._is_set = False


class LoopTasks:
    """The tasks in which user code runs on the event loop for a run, and how to cancel them.

    A native ``Task.cancel()`` is one edge, an anyio scope keeps cancelling: user code gets what
    the awaiting task got, so that asyncio code may await in its cleanup.
    """

    def __init__(self) -> None:
        self._native: set[asyncio.Task[Any]] = set()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Count the current task while user code runs in it."""
        try:
            task = asyncio.current_task()
        except RuntimeError:  # trio has no edges
            task = None
        if task is None:
            yield
            return
        self._native.add(task)
        try:
            yield
        finally:
            self._native.discard(task)

    def cancel(self, interruption: BaseException, scope: anyio.CancelScope) -> None:
        """Cancel them as the awaiting task was, by ``interruption``."""
        native = isinstance(interruption, asyncio.CancelledError)
        if not native or is_scope_cancelled():
            scope.cancel()
            return
        for task in self._native:
            task.cancel()


def is_scope_cancelled() -> bool:
    """Return whether an anyio scope around the current task is cancelled; always so under trio."""
    return anyio.current_effective_deadline() == -math.inf


def raise_in_scope(cancellation: BaseException) -> None:
    """Raise a cancellation again where an anyio scope waits for it.

    A native one ends here: in a task group it would cancel its siblings at every await.
    """
    if is_scope_cancelled():
        raise cancellation
