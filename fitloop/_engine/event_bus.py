"""The delivery of events: to observers on the step thread, and to streams on event loops.

`EventBus.emit` calls the observers at once, in their order. An `EventStream` is a bounded queue
that any event loop reads at its own pace.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from inspect import isawaitable
from typing import Any, cast

import anyio

from fitloop._blocks import contextmanager
from fitloop._concurrency.control import Cancelled
from fitloop._concurrency.coroutines import close_unawaited, is_coroutine_function
from fitloop._concurrency.event_loops import ThreadsafeEvent
from fitloop._concurrency.supervisor import LoopPortal
from fitloop._engine.backlog import Backlog
from fitloop._errors import add_note_safely
from fitloop._events import AnyEvent, BatchProgress, Event, MetricsLogged, RunEnded
from fitloop._public import public

STREAM_LIMIT = 1024
"""default size of the queue of a stream"""
LATE_READER_SECONDS = 0.5
"""time in which another run may begin before a late reader gets the end of the last one"""


@public
class EventStream:
    """An async iterator over events; ``trainer.events()`` and ``runner.events()`` return one.

    Iteration ends after the `RunEnded` of a trainer's run, and with a runner; the next
    ``async for`` reads the next run. A slow reader does not slow the training: a newer
    `BatchProgress` replaces an unread older one, and beyond ``limit`` events the oldest are
    dropped, `MetricsLogged` before others. A cancelled reader loses no event: the next ``async
    for`` continues with it.

    A stream that is opened while a run goes on first gives the events of that run so far: all but
    `MetricsLogged`, of `BatchProgress` only the last one, and each `PhaseEnded` without
    ``batch_metrics``. Of a long run the oldest of them are dropped, but not its `RunStarted`.

    A stream that is opened after a run has ended first gives the `RunEnded` of that run, so that a
    late reader does not wait for a run that is over; unless another run begins within half a
    second of the first read. A stream of a runner gives of each job that is over its `JobEnded`.
    """

    def __init__(
        self,
        streams: EventStreams,
        limit: int | None = STREAM_LIMIT,
        *,
        ends_with_run: bool = True,
    ) -> None:
        self._streams = streams
        self._limit = limit
        self._ends_with_run = ends_with_run
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._bell: ThreadsafeEvent | None = None
        self._is_ended = False
        self._read_end = False
        self._late_end: RunEnded | None = None
        """the end of a run that was over when the stream was opened, until the first read"""
        self.dropped = 0
        """number of events that were dropped"""

    async def __aenter__(self) -> EventStream:
        self._bell = ThreadsafeEvent()
        self._late_end = self._streams.last_end if self._ends_with_run else None
        self._streams.add_stream(self)
        return self

    def begin(self, past: Iterable[Event], dropped: int) -> None:
        """Begin with past events, of which some were dropped."""
        for event in past:
            self._add(event)
        self.dropped += dropped

    async def __aexit__(self, *_error: object) -> None:
        self._streams.remove_stream(self)

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> AnyEvent:
        if self._bell is None:
            raise RuntimeError(
                "this event stream is not open; use `async with trainer.events() as events`"
            )
        if self._read_end:
            self._read_end = False  # the next ``async for`` reads the next run
            raise StopAsyncIteration
        if self._late_end is not None and not self._events:
            with anyio.move_on_after(LATE_READER_SECONDS):
                await self._bell.wait()
            if not self._events and self._streams.last_end is self._late_end:
                self._add(self._late_end)
        self._late_end = None
        while True:
            with self._lock:
                if self._events:
                    event = self._events.popleft()
                    break
                if self._is_ended:
                    raise StopAsyncIteration
            await self._bell.wait()
        self._read_end = self._ends_with_run and isinstance(event, RunEnded)
        return cast("AnyEvent", event)

    def push(self, event: Event) -> None:
        """Add an event, and wake the reader; any thread."""
        self._add(event)
        if self._bell is not None:
            self._bell.set()

    def _add(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, BatchProgress):
                self._drop_older(event)
            self._events.append(event)
            if self._limit is not None and len(self._events) > self._limit:
                logged = (i for i, one in enumerate(self._events) if isinstance(one, MetricsLogged))
                del self._events[next(logged, 0)]
                self.dropped += 1

    def _drop_older(self, event: BatchProgress) -> None:
        """Drop an older progress event of the same trainer at the end of the queue."""
        for index in range(len(self._events) - 1, -1, -1):
            older = self._events[index]
            if isinstance(older, MetricsLogged):
                continue
            if not isinstance(older, BatchProgress):
                return
            if older.trainer == event.trainer:
                del self._events[index]
                return

    def end(self) -> None:
        """End the iteration after the queued events; any thread."""
        with self._lock:
            self._is_ended = True
        if self._bell is not None:
            self._bell.set()


class EventStreams:
    """The open event streams of a trainer or runner; for any thread."""

    def __init__(self) -> None:
        self._streams: list[EventStream] = []
        self._lock = threading.Lock()
        self._backlog = Backlog(STREAM_LIMIT // 2)
        self._is_ended = False
        self.last_end: RunEnded | None = None
        """the end of the last ``fit`` or ``test``; None while one goes on, and before the first"""

    def add_stream(self, stream: EventStream) -> None:
        """Pass the backlog, and every event from now on, to ``stream``."""
        with self._lock:
            stream.begin(self._backlog.events(), self._backlog.dropped)
            self._streams = [*self._streams, stream]
        if self._is_ended:
            stream.end()

    def remove_stream(self, stream: EventStream) -> None:
        """Pass no more events to ``stream``."""
        with self._lock:
            self._streams = [each for each in self._streams if each is not stream]

    def forget(self, trainer: str) -> None:
        """Drop a job that is over from the backlog."""
        with self._lock:
            self._backlog.forget(trainer)

    @property
    def has_streams(self) -> bool:
        """Whether a stream is open."""
        return bool(self._streams)

    def push(self, event: Event) -> None:
        """Pass an event to every stream; never blocks."""
        with self._lock:
            self._backlog.note(event)
            streams = self._streams
        for stream in streams:
            stream.push(event)

    def end(self) -> None:
        """End every stream after its queued events; a stream added later ends at once."""
        self._is_ended = True
        for stream in self._streams:
            stream.end()


class EventBus(EventStreams):
    """Passes each event to the streams of a trainer and to the observers of its run."""

    def __init__(self) -> None:
        super().__init__()
        self._observers: list[Callable[[Event], object]] = []
        self._queue: deque[Event] = deque()
        self._emitting = False
        self._call = ""
        self._step_counts: Sequence[int] = ()
        self._is_streamed = True
        """whether the events go to the streams"""

    def _clear_backlog(self) -> None:
        with self._lock:
            self._backlog.clear()

    @contextmanager
    def run(self, call: str, step_counts: Sequence[int]) -> Iterator[None]:
        """Mark a block in which a run goes on; one without events leaves `last_end` as it was.

        The events of the block get this ``call``, and a ``step``: the largest of ``step_counts``,
        a list that changes in place. Events that have a call or a step keep it. Streams get the
        events of ``"fit"`` and ``"test"`` only, since other calls leave no trace.
        """
        self._call, self._step_counts = call, step_counts
        self._is_streamed, before = call in ("fit", "test"), self.last_end
        if self._is_streamed:
            self.last_end = None
        try:
            yield
        finally:
            self.set_observers(())
            self.last_end = self.last_end or before
            self._call, self._step_counts, self._is_streamed = "", (), True
            self._clear_backlog()

    def _stamp(self, event: Event) -> None:
        # In place, since the event has no other user yet: a changed copy would cost more.
        if not event.call:
            object.__setattr__(event, "call", self._call)
        if not event.step:
            object.__setattr__(event, "step", max(self._step_counts, default=0))

    def set_observers(self, observers: Iterable[Callable[[Event], object]]) -> None:
        """Set the observers of the next run."""
        self._observers = list(observers)
        self._queue.clear()
        self._emitting = False

    def _end(self, event: RunEnded) -> None:
        """Pass on the last event to all observers: they may have to clean up.

        Raises the first error of an observer, after the others were called.
        """
        first: BaseException | None = None
        for observe in self._observers:
            try:
                observe(event)
            except BaseException as error:
                first = first or error
        if first is not None:
            raise first

    def emit(self, event: Event) -> None:
        """Pass on an event, on the step thread; raise the error of an observer.

        An event that an observer emits meanwhile is passed on after this one.
        """
        self._stamp(event)
        self._queue.append(event)
        if self._emitting:
            return
        self._emitting = True
        try:
            while self._queue:
                current = self._queue.popleft()
                if isinstance(current, RunEnded) and self._is_streamed:
                    self.last_end = current
                    self._clear_backlog()
                if self._is_streamed:
                    self.push(current)  # first, since observers can raise an error
                if isinstance(current, RunEnded):
                    self._end(current)
                else:
                    for observe in self._observers:
                        observe(current)
        finally:
            self._emitting = False


class UserCallbacks:
    """The callbacks of one run: plain ones to observe its events, async ones with a task for each.

    Enter it before the run starts: then no event is lost.
    """

    def __init__(
        self,
        streams: EventStreams,
        callbacks: Iterable[Callable[[Any], object]],
        portal: LoopPortal,
    ) -> None:
        self._streams = streams
        self._readers: list[tuple[EventStream, Callable[[Any], object]]] = []
        self.plain: list[Callable[[Any], object]] = []
        self.before_snapshot: list[Callable[[], object]] = []
        """methods of this name, see `Callback`"""
        for callback in callbacks:
            before_snapshot = getattr(callback, "before_snapshot", None)
            if callable(before_snapshot):
                self.before_snapshot.append(before_snapshot)
            if is_coroutine_function(callback):
                self._readers.append((EventStream(streams, None), callback))
            else:
                self.plain.append(partial(_call, callback, portal))

    @property
    def tasks(self) -> list[Callable[[], Awaitable[None]]]:
        """Coroutine functions, each of which awaits an async callback for one event at a time."""
        return [partial(_feed, stream, callback) for stream, callback in self._readers]

    def end(self) -> None:
        """End the tasks after the events so far; any thread."""
        for stream, _callback in self._readers:
            stream.end()

    async def __aenter__(self) -> None:
        for stream, _callback in self._readers:
            await stream.__aenter__()

    async def __aexit__(self, *_error: object) -> None:
        for stream, _callback in self._readers:
            self._streams.remove_stream(stream)


async def _feed(stream: EventStream, callback: Callable[[Any], object]) -> None:
    async for event in stream:
        with _noted(callback, event):
            await cast("Awaitable[object]", callback(event))


def _call(callback: Callable[[Any], object], portal: LoopPortal, event: Event) -> None:
    """Call a plain callback; await what it returns on the event loop, if that is an awaitable."""
    with _noted(callback, event):
        returned = callback(event)
        if isawaitable(returned):
            try:
                portal.call(lambda: returned)
            except Cancelled:  # the run ends at its next boundary; others still get this event
                close_unawaited(returned)


@contextmanager
def _noted(callback: object, event: Event) -> Iterator[None]:
    """Name the callback in a note on an exception of the block."""
    try:
        yield
    except Exception as error:
        name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
        add_note_safely(error, f"in the callback {name}, at {type(event).__name__}")
        raise
