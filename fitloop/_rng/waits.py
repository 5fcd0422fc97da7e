"""Waits of a run's code for other trainings, which use the global generators meanwhile.

A stage function holds the lock on the generators. If it trains another model, that run may wait
for the lock without end. So `supervise` enters a scope of this module while it waits: the scope
releases the lease of the stage. Afterwards the stage has the same stream again, at the same number.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import nullcontext
from typing import Any

import anyio

from fitloop._blocks import asynccontextmanager, contextmanager
from fitloop._concurrency.control import Cancelled
from fitloop._concurrency.supervisor import run_in_thread, wait_scope
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.streams import Stream

Acquire = Callable[[Callable[[], bool]], None]
"""acquires a lock; raises Cancelled when its argument, which it calls, returns true before"""


async def acquire_again(acquire: Acquire) -> None:
    """Acquire a lock without blocking the event loop.

    Cancellation: raised when the lock is acquired, since the code goes on with it.
    """
    try:
        acquire(lambda: True)
    except Cancelled:  # another thread holds it
        token = wait_scope.set(nullcontext)
        try:
            with anyio.CancelScope(shield=True):
                await run_in_thread("random generators", lambda: acquire(lambda: False))
        finally:
            wait_scope.reset(token)


class _LeaseWaits:
    """The waits of code that has a lease. They may overlap, in several tasks."""

    def __init__(self, lease: GeneratorLease) -> None:
        self._lease = lease
        self._mutex = threading.RLock()
        self._stream: Stream | None = None
        """the stream that the lease had before it was released"""

    def _is_over(self) -> bool:
        """Return whether the lease is not needed at present."""
        raise NotImplementedError

    def _release(self) -> None:
        self._stream = self._lease.suspend() or self._stream

    async def _acquire(self) -> None:
        if self._stream is not None and self._lease.stream is None:
            await acquire_again(self._take)

    def _take(self, cancelled: Callable[[], bool]) -> None:
        assert self._stream is not None
        self._lease.acquire_lock(self._stream, cancelled)
        with self._mutex:
            if self._is_over():
                self._lease.release_lock()
            else:
                self._lease.stream = self._stream  # not installed yet


class PlainWaits(_LeaseWaits):
    """The waits of plain code on the thread of a run, where it may run an event loop of its own.

    Without a wait the lease is held, also by other tasks of that event loop. During one it is not:
    numbers that other tasks use then are those of the process.
    """

    def __init__(self, lease: GeneratorLease) -> None:
        super().__init__(lease)
        self._thread = threading.get_ident()
        self._waits = 0

    def _is_over(self) -> bool:
        return self._waits > 0

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        """Release the lease for a block; in another thread, do nothing."""
        if threading.get_ident() != self._thread:  # its context is a copy of that of the run
            yield
            return
        self._waits += 1
        self._release()
        try:
            yield
        except GeneratorExit:  # the event loop has ended, but not the plain code
            self._waits -= 1
            if not self._waits and self._stream is not None:
                self._take(lambda: False)
                self._go_on()
            raise
        except BaseException:
            await self._end_wait()
            raise
        await self._end_wait()

    async def _end_wait(self) -> None:
        self._waits -= 1
        if not self._waits:
            try:
                await self._acquire()
            finally:
                self._go_on()

    def _go_on(self) -> None:
        if self._stream is not None and self._lease.stream is not None:
            self._lease.resume(self._stream)
            self._stream = None


class CoroutineWaits(_LeaseWaits):
    """The waits of a coroutine that the event loop runs with the lease of a waiting thread.

    Its own waits release the lease to their end. During waits in other tasks that it has begun,
    the lease is released between the steps of the coroutine.
    """

    def __init__(self, lease: GeneratorLease) -> None:
        super().__init__(lease)
        self._stream = lease.stream
        self._own_waits = self._other_waits = 0
        self._is_in_step = self._has_ended = False
        self._is_ready = False
        """The next step begins with the lease, which no other thread may release before it."""

    def _is_over(self) -> bool:
        return self._has_ended

    def prepare_step(self) -> Coroutine[Any, Any, None] | None:
        """Return what must be awaited before the next step. None: the step must follow now."""
        if self._own_waits or self._stream is None:
            return None
        with self._mutex:
            self._is_ready = self._lease.stream is not None
        return None if self._is_ready else self._acquire()

    def step(self, method: Callable[[Any], Any], value: Any) -> Any:
        """Execute one step of the coroutine, with the stream installed."""
        with self._mutex:
            self._lease.install()
            self._is_in_step = True
            try:
                return method(value)
            finally:
                self._is_in_step = self._is_ready = False
                self._lease.uninstall()
                if self._other_waits:
                    self._release()

    def _release(self) -> None:
        if self._lease.stream is not None:
            super()._release()

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        """Release the lease for a block of the coroutine, or of code that it has begun."""
        with self._mutex:  # of another thread: not in the middle of a step
            is_own = self._is_in_step
            if self._has_ended:
                pass
            elif is_own:
                self._own_waits += 1
                self._release()
            else:
                self._other_waits += 1
                if not self._is_ready:
                    self._release()
        try:
            yield
        except GeneratorExit:  # the event loop has ended
            raise
        except BaseException:
            await self._end_wait(is_own)
            raise
        await self._end_wait(is_own)

    async def _end_wait(self, is_own: bool) -> None:
        if not is_own:
            self._other_waits -= 1
            return
        try:
            # A wait of another task may release it again, between the steps of this coroutine.
            while self._own_waits == 1 and self._lease.stream is None and self._stream is not None:
                await self._acquire()
        finally:
            self._own_waits -= 1
            if not self._own_waits:
                self._lease.install()

    def end(self) -> None:
        """Let tasks that still wait leave the lease alone; on the waiting thread."""
        with self._mutex:
            self._has_ended = True

    def go_on(self) -> None:
        """Take the lease back on the waiting thread, as before the coroutine."""
        if self._lease.stream is None and self._stream is not None:
            self._lease.acquire(self._stream)
        self._lease.install()


@contextmanager
def used_by_event_loop(lease: GeneratorLease) -> Iterator[CoroutineWaits]:
    """Hold the lock in this thread while the event loop's thread installs the stream."""
    lease.lend()
    waits = CoroutineWaits(lease)
    token = wait_scope.set(waits.scope)
    try:
        yield waits
    finally:
        waits.end()
        wait_scope.reset(token)
    waits.go_on()
