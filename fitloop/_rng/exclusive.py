"""Exclusive access to the global generators, for a plain function that builds a model.

The function may seed them and use them as if nothing else ran in the process. While it waits for a
training of its own, or for any other thread of fitloop, other code may use the generators. An
``async def`` function cannot have this: other code runs in its thread while it awaits.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator

from fitloop._blocks import asynccontextmanager, contextmanager
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.supervisor import wait_scope
from fitloop._rng.global_lock import CALLBACKS_IN_FLIGHT, GLOBAL_RNG_LOCK
from fitloop._rng.lease import STREAM_USERS
from fitloop._rng.waits import acquire_again


@contextmanager
def exclusive_rng(control: RunControl) -> Iterator[None]:
    """Hold the lock on the global generators in a block; for a thread that is no trainer's.

    Raises:
        Cancelled: ``control`` was cancelled while the block waited for the lock.
    """
    access = _ExclusiveAccess()
    token = wait_scope.set(access.released)
    try:
        # Callbacks of trainers take the lock from now on.
        STREAM_USERS.add(id(access))
        CALLBACKS_IN_FLIGHT.wait(lambda: control.cancelled)
        access.acquire(control)
        yield
    finally:
        STREAM_USERS.discard(id(access))
        wait_scope.reset(token)
        GLOBAL_RNG_LOCK.release(access)


class _ExclusiveAccess:
    """One holder of the lock, which may wait for several threads of fitloop at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waits = 0

    def acquire(self, control: RunControl) -> None:
        """Wait for the lock on the generators."""
        forget = control.on_halt(GLOBAL_RNG_LOCK.notify_all)
        try:
            self._acquire(lambda: control.cancelled)
        finally:
            forget()

    def _acquire(self, cancelled: Callable[[], bool]) -> None:
        GLOBAL_RNG_LOCK.acquire(self, cancelled)
        with self._lock:
            if self._waits:  # another task of the function has begun to wait just now
                GLOBAL_RNG_LOCK.release(self)

    @asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Release the lock while the block waits for a thread of fitloop."""
        with self._lock:
            self._waits += 1
            GLOBAL_RNG_LOCK.release(self)
        is_loop_running = True
        try:
            yield
        except GeneratorExit:
            is_loop_running = False  # nothing can be awaited any more
            raise
        finally:
            with self._lock:
                self._waits -= 1
            if is_loop_running and not self._waits:
                await acquire_again(self._acquire)
