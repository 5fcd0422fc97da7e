"""Batches out of an async iterable: from a database, a socket, another service.

Owns the one source whose loader runs on the event loop; see `fitloop._data.sources` for the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import anyio

from fitloop._concurrency.event_loops import ThreadsafeEvent, is_scope_cancelled, loop_scheduler
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._data.sources import END, LoadContext
from fitloop._rng.streams import RngState


class AsyncSource:
    """Iterates an async loader in a task on the event loop, up to ``depth`` batches ahead.

    With a depth of 0 the task reads a batch only when the step thread asks for one. Its code
    runs on the event loop, between whatever else runs there, so it takes no turns at the
    process's random generators.
    """

    def __init__(
        self,
        iterable: AsyncIterable[Any],
        context: LoadContext,
        side: LoopPortal,
        *,
        depth: int,
        limit: int | None = None,
        skip: int = 0,
    ) -> None:
        self._iterable = iterable
        self._iterator: AsyncIterator[Any] | None = None
        self._limit = limit
        self._skip = skip
        """batches at the beginning that are read and left out"""
        self.rng_state_after: RngState | None = None
        self._context = context
        self._depth = depth
        self._asked = 0
        self._ready: deque[Any] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._room: ThreadsafeEvent | None = None
        self._cancel: Callable[[], None] = lambda: None
        side.start(self._pump)

    def fetch(self) -> Any:
        """See `Source`."""
        context, changed = self._context, self._context.control.changed
        with changed:
            self._asked += 1
        if self._depth == 0:
            self._ring()
        if not context.wait(lambda: bool(self._ready) or self._ended):
            return END
        with changed:
            if not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return END
            batch = self._ready.popleft()
        self._ring()
        placed = context.start_transfer(batch)
        return placed if context.finish_transfer is None else context.finish_transfer(placed)

    def close(self) -> list[Any]:
        """See `Source`; returns when the task on the event loop has ended."""
        context, control = self._context, self._context.control
        with control.changed:
            self._closed = True
        self._ring()
        with control.changed:
            if not context.rereads_unfetched:
                # Cancelling an async generator ends it; the batch it is at is given back.
                control.changed.wait_for(
                    lambda: self._ended or control.cancelled, context.close_timeout
                )
            self._cancel()
        control.wait_for(lambda: self._ended, obey_stop=False)
        with control.changed:
            unread = list(self._ready)
            self._ready.clear()
            error, self._error = self._error, None
        if error is not None:
            raise error
        return unread

    def _ring(self) -> None:
        with self._context.control.changed:
            room = self._room
        if room is not None:
            room.set()

    async def _pump(self) -> None:
        changed = self._context.control.changed
        schedule = loop_scheduler()
        scope = anyio.CancelScope()
        with changed:
            self._room = ThreadsafeEvent()
            self._cancel = lambda: schedule(scope.cancel)
            closed = self._closed
        error: BaseException | None = None
        try:
            if not closed:
                with scope:
                    await self._read_all(self._room)
        except BaseException as raised:
            if isinstance(raised, anyio.get_cancelled_exc_class()) and self._is_over():
                if not self._closed:  # or the step thread would take it for the loader's end
                    self._context.control.cancel()
                raise
            error = raised  # crosses to the step thread
        finally:
            error = await self._close_iterator() or error
            with changed:
                self._error = error
                self._ended = True
                changed.notify_all()

    def _is_over(self) -> bool:
        """Return whether a cancellation is the run's, and not one that the loader met."""
        return self._closed or self._context.control.cancelled or is_scope_cancelled()

    async def _close_iterator(self) -> BaseException | None:
        """Close an async generator that was not read to its end; return what that raised."""
        aclose = getattr(self._iterator, "aclose", None)
        if aclose is None:
            return None
        try:
            with anyio.move_on_after(self._context.close_timeout, shield=True):
                await aclose()
        except BaseException as raised:  # crosses to the step thread
            return raised
        return None

    async def _read_all(self, room: ThreadsafeEvent) -> None:
        changed, limit = self._context.control.changed, self._limit
        self._iterator = aiter(self._iterable)
        for _ in range(self._skip):
            await anext(self._iterator, None)
        read = 0
        while limit is None or read < limit:
            while read >= self._asked + self._depth and not self._closed:
                await room.wait()
            if self._closed:
                return
            try:
                batch = await anext(self._iterator)
            except StopAsyncIteration:
                return
            read += 1
            with changed:
                self._ready.append(batch)
                changed.notify_all()
