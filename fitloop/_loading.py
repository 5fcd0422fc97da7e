"""Batches out of any loader, inline or ahead of the steps, whichever is faster.

Owns the way from a loader to the step thread. A `Source` is one pass over one loader. What the
loader is decides which: `InlineSource` iterates in the step thread, `AheadSource` in a thread of
its own that fills a bounded queue, `AsyncSource` in a task on the event loop. Which of them is
used is decided elsewhere. Knows nothing of models, metrics or stages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import anyio

from fitloop._control import Cancelled, RunControl
from fitloop._crossing import Doorbell, LoopSide, loop_scheduler
from fitloop._random import Stream, Turn


class _End:
    def __repr__(self) -> str:
        return "END"


END: Final = _End()
"""What `Source.fetch` returns when there are no batches any more."""


class Source(Protocol):
    """One pass over a loader, used by the step thread alone."""

    def fetch(self) -> Any:
        """Return the next batch, placed and received, or `END`.

        Raises what the loader raised, as the same object; `Cancelled` when the run was
        cancelled while it waited.
        """

    def close(self) -> list[Any]:
        """Stop loading and return the raw batches that were read but not fetched."""


@dataclass(slots=True)
class Feed:
    """What every source needs: the loader's iterator and how to use it."""

    iterator: Iterator[Any]
    label: str
    """how messages name the loader, e.g. ``train_dl (DataLoader)``"""
    control: RunControl
    place: Callable[[Any], Any] = lambda batch: batch
    receive: Callable[[Any], Any] = lambda batch: batch
    stream: Stream | None = None
    """the randomness of the loader, in a seeded run whose loader may draw"""
    turn: Turn | None = None
    """the turn of the step thread, in a seeded run"""
    limit: int | None = None
    """batches to read at most"""
    grace: float = 5.0
    """seconds that `Source.close` waits for a loader that does not return"""
    watch: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None
    """wraps the call that reads a batch, for the profiler"""
    hung: list[str] = field(default_factory=list)
    """labels of the loaders that `Source.close` did not wait for any longer"""

    def borrow_turn(self) -> Stream | None:
        """Enter the loader's stream on the step thread's turn; return what to go back to."""
        if self.turn is None or self.stream is None:
            return None
        steps = self.turn.stream
        self.turn.take(self.stream)
        return steps

    def return_turn(self, steps: Stream | None) -> None:
        """Go back to the stream of the steps."""
        if self.turn is not None:
            self.turn.take(steps)

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Block the step thread, its turn given up meanwhile; false when the run was stopped.

        Raises:
            Cancelled: the run was cancelled first.
        """
        steps = None
        if self.turn is not None:
            steps = self.turn.stream
            self.turn.give()  # the loader may be waiting for it
        arrived = self.control.wait_for(ready, obey_stop=True)
        if self.control.cancelled:
            raise Cancelled
        self.return_turn(steps)
        return arrived


class InlineSource:
    """Iterates the loader in the step thread, between the steps."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._next = feed.iterator.__next__
        self._read = 0

    def fetch(self) -> Any:
        """See `Source`."""
        feed = self._feed
        if feed.limit is not None:
            if self._read >= feed.limit:
                return END
            self._read += 1
        control = feed.control
        steps = feed.borrow_turn()
        control.loading = feed.label
        try:
            batch = self._next()
        except StopIteration:
            batch = END
        except BaseException:
            control.left_loader(failed=True)
            raise
        control.loading = None
        if control.cancelled:
            control.left_loader()
        if steps is not None:
            feed.return_turn(steps)
        return END if batch is END else feed.receive(feed.place(batch))

    def close(self) -> list[Any]:
        """See `Source`."""
        return []


class AheadSource:
    """Iterates the loader in a thread of its own, up to ``depth`` batches ahead of the steps."""

    def __init__(self, feed: Feed, depth: int) -> None:
        self._feed = feed
        self._depth = depth
        self._ready: deque[tuple[Any, Any]] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self.paused = False
        """the thread reads no more, although the loader may have more"""
        self.waited = 0
        """batches for which the step thread had to wait"""
        self._turn = Turn(self._is_closed) if feed.stream is not None else None
        if self._turn is not None:
            feed.control.on_halt(self._turn.wake)
        self._thread = threading.Thread(
            target=self._load, name=f"fitloop loads {feed.label}", daemon=True
        )
        self._thread.start()

    def fetch(self) -> Any:
        """See `Source`."""
        feed = self._feed
        changed = feed.control.changed
        ready = self._ready
        if not ready:
            self.waited += 1
            if not feed.wait(lambda: bool(ready) or self._ended):
                return END
        with changed:
            if not ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return END
            _raw, placed = ready.popleft()
            changed.notify_all()
        return feed.receive(placed)

    def close(self) -> list[Any]:
        """See `Source`; a loader that does not return within the grace is left to itself."""
        feed = self._feed
        with feed.control.changed:
            self._closed = True
            feed.control.changed.notify_all()
        if self._turn is not None:
            if feed.turn is not None:
                feed.turn.give()
            self._turn.wake()
        self._thread.join(feed.grace)
        if self._thread.is_alive():
            feed.hung.append(feed.label)
            if self._turn is not None:
                self._turn.revoke()
        with feed.control.changed:
            unread = [raw for raw, _placed in self._ready]
            self._ready.clear()
        return unread

    def pause(self) -> None:
        """Let the thread end after the batch in hand; what is ready can still be fetched."""
        with self._feed.control.changed:
            self.paused = True
            self._feed.control.changed.notify_all()

    def _is_closed(self) -> bool:
        return self._closed or self.paused or self._feed.control.cancelled

    def _load(self) -> None:
        feed, changed = self._feed, self._feed.control.changed
        read = 0
        error: BaseException | None = None
        try:
            while feed.limit is None or read < feed.limit:
                with changed:
                    while len(self._ready) >= self._depth and not self._is_closed():
                        changed.wait()
                    if self._is_closed():
                        return
                raw = self._draw()
                if raw is END:
                    break
                read += 1
                item = (raw, feed.place(raw))
                with changed:
                    self._ready.append(item)
                    changed.notify_all()
        except Cancelled:
            pass
        except BaseException as raised:  # crosses to the step thread
            error = raised
        finally:
            with changed:
                self._error = error
                self._ended = True
                changed.notify_all()

    def _draw(self) -> Any:
        feed = self._feed
        if self._turn is not None and feed.stream is not None:
            self._turn.take(feed.stream)
        try:
            return next(feed.iterator)
        except StopIteration:
            return END
        finally:
            if self._turn is not None:
                self._turn.give()


class AsyncSource:
    """Iterates an async loader in a task on the event loop, up to ``depth`` batches ahead.

    With a depth of 0 the task reads a batch only when the step thread asks for one. Its code
    runs on the event loop, between whatever else runs there, so it takes no turns at the
    process's random generators.
    """

    def __init__(
        self, iterator: AsyncIterator[Any], feed: Feed, side: LoopSide, depth: int
    ) -> None:
        self._iterator = iterator
        self._feed = feed
        self._depth = depth
        self._asked = 0
        self._ready: deque[Any] = deque()
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self._room: Doorbell | None = None
        self._cancel: Callable[[], None] = lambda: None
        side.start(self._pump)

    def fetch(self) -> Any:
        """See `Source`."""
        feed, changed = self._feed, self._feed.control.changed
        with changed:
            self._asked += 1
        if self._depth == 0:
            self._ring()
        if not feed.wait(lambda: bool(self._ready) or self._ended):
            return END
        with changed:
            if not self._ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return END
            batch = self._ready.popleft()
        self._ring()
        return feed.receive(feed.place(batch))

    def close(self) -> list[Any]:
        """See `Source`; returns when the task on the event loop has ended."""
        control = self._feed.control
        with control.changed:
            self._closed = True
            self._cancel()
        control.wait_for(lambda: self._ended, obey_stop=False)
        with control.changed:
            unread = list(self._ready)
            self._ready.clear()
        return unread

    def _ring(self) -> None:
        with self._feed.control.changed:
            room = self._room
        if room is not None:
            room.ring()

    async def _pump(self) -> None:
        changed = self._feed.control.changed
        schedule = loop_scheduler()
        scope = anyio.CancelScope()
        with changed:
            self._room = Doorbell()
            self._cancel = lambda: schedule(scope.cancel)
            closed = self._closed
        error: BaseException | None = None
        try:
            if not closed:
                with scope:
                    await self._read_all(self._room)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as raised:  # crosses to the step thread
            error = raised
        finally:
            await self._close_iterator()
            with changed:
                self._error = error
                self._ended = True
                changed.notify_all()

    async def _close_iterator(self) -> None:
        aclose = getattr(self._iterator, "aclose", None)
        if aclose is not None:
            with anyio.move_on_after(self._feed.grace, shield=True):
                await aclose()

    async def _read_all(self, room: Doorbell) -> None:
        changed, limit = self._feed.control.changed, self._feed.limit
        read = 0
        while limit is None or read < limit:
            while read >= self._asked + self._depth:
                await room.wait()
            try:
                batch = await anext(self._iterator)
            except StopAsyncIteration:
                return
            read += 1
            with changed:
                self._ready.append(batch)
                changed.notify_all()
