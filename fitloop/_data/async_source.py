"""One pass over an async iterable, such as a database or another service: read on the event loop.

See `fitloop._data.sources` for the other sources.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import anyio

from fitloop._concurrency.event_loops import (
    CancelOnceScope,
    ThreadsafeEvent,
    is_scope_cancelled,
)
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._data.sources import END, LoadContext


class AsyncSource:
    """Reads an async loader in a task on the event loop, up to ``depth`` batches ahead.

    With a depth of 0 the task reads a batch only when the step thread fetches one. The loader runs
    between the other tasks of the event loop, so it never waits for the global generators. The
    first ``skip`` batches are discarded; ``limit`` is the most that are read after them.
    """

    rng_state_after = None

    def __init__(
        self,
        iterable: AsyncIterable[Any],
        context: LoadContext,
        portal: LoopPortal,
        *,
        depth: int,
        limit: int | None = None,
        skip: int = 0,
    ) -> None:
        self._iterable = iterable
        self._iterator: AsyncIterator[Any] | None = None
        self._context = context
        self._depth = depth
        self.reads_ahead = depth > 0
        self._limit = limit
        self._skip = skip
        self._requested = 0
        """fetches of the step thread so far"""
        self._queue: deque[Any] = deque()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self._has_room: ThreadsafeEvent | None = None
        self._cancel: Callable[[], None] = lambda: None
        portal.start(self._run)

    def fetch(self) -> Any:
        """See `Source`."""
        context, changed = self._context, self._context.control.changed
        with changed:
            self._requested += 1
        if not context.wait(lambda: bool(self._queue) or self._finished, self._wake_task):
            return END
        with changed:
            if not self._queue:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return END
            batch = self._queue.popleft()
        self._wake_task()
        moved = context.start_transfer(batch)
        return moved if context.finish_transfer is None else context.finish_transfer(moved)

    def close(self) -> list[Any]:
        """See `Source`; returns when the task on the event loop has ended."""
        context, control = self._context, self._context.control
        with control.changed:
            self._closed = True
        self._wake_task()
        with control.changed:
            if not context.rereads_unfetched:
                # Cancelling an async generator ends it, so it may first return its current batch.
                control.changed.wait_for(
                    lambda: self._finished or control.cancelled, context.close_timeout
                )
            self._cancel()
        control.wait_for(lambda: self._finished, obey_stop=False)
        with control.changed:
            unread = list(self._queue)
            self._queue.clear()
            error, self._error = self._error, None
        if error is not None:
            raise error
        return unread

    def _wake_task(self) -> None:
        with self._context.control.changed:
            has_room = self._has_room
        if has_room is not None:
            has_room.set()

    # -- on the event loop -----------------------------------------------------------------------

    async def _run(self) -> None:
        changed = self._context.control.changed
        error: BaseException | None = None
        try:
            with CancelOnceScope() as scope:
                with changed:
                    self._has_room = ThreadsafeEvent()
                    self._cancel = scope.cancel_soon
                await self._read_all(self._has_room)
        except BaseException as raised:
            control = self._context.control
            is_of_run = self._closed or control.cancelled or is_scope_cancelled()
            if is_of_run and isinstance(raised, anyio.get_cancelled_exc_class()):
                if not self._closed:  # else the step thread would take it for the end of the loader
                    control.cancel()
                raise
            error = raised  # the step thread raises it
        finally:
            error = await self._close_iterator() or error
            with changed:
                self._error = error
                self._finished = True
                changed.notify_all()

    async def _close_iterator(self) -> BaseException | None:
        """Close an async generator that was not read to its end; return its exception."""
        aclose = getattr(self._iterator, "aclose", None)
        if aclose is None:
            return None
        try:
            with anyio.move_on_after(self._context.close_timeout, shield=True):
                await aclose()
        except BaseException as raised:  # the step thread raises it
            return raised
        return None

    async def _read_all(self, has_room: ThreadsafeEvent) -> None:
        changed, limit = self._context.control.changed, self._limit
        while not self._requested + self._depth and not self._closed:
            await has_room.wait()
        if self._closed:
            return
        self._iterator = aiter(self._iterable)
        for _ in range(self._skip):
            await anext(self._iterator, None)
        count = 0
        while limit is None or count < limit:
            while count >= self._requested + self._depth and not self._closed:
                await has_room.wait()
            if self._closed:
                return
            try:
                batch = await anext(self._iterator)
            except StopAsyncIteration:
                return
            count += 1
            with changed:
                self._queue.append(batch)
                changed.notify_all()
