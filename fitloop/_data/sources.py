"""One pass over a loader: reads batches in the step thread, or in a thread ahead of it.

`InlineSource` reads in the step thread, between the steps. `PrefetchSource` reads in a thread of
its own into a bounded queue. `fitloop._data.async_source` reads an async loader on the event loop.
`fitloop._data.loaders` chooses one. Each gets a function ``read`` that returns the next batch of
the loader or raises `StopIteration`. Knows no models, metrics or stage functions.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._rng.guard import LoaderRng, NullGuard
from fitloop._rng.states import RngState
from fitloop._types import Phase


class _End:
    def __repr__(self) -> str:
        return "END"


END: Final = _End()
"""The result of `Source.fetch` after the last batch."""


class Source(Protocol):
    """One pass over a loader; for the step thread."""

    @property
    def fetch(self) -> Callable[[], Any]:
        """A function that returns the next batch, ready on the device, or `END`.

        It raises exceptions of the loader, as the same objects, and `Cancelled` if the run was
        cancelled meanwhile.
        """

    @property
    def rng_state_after(self) -> RngState | None:
        """State of the loader's generators after the last fetched batch.

        None if no batch was read ahead, so that the generators themselves have this state.
        """

    def close(self) -> list[Any]:
        """Stop reading and return the batches that were read but not fetched, as read."""


@dataclass(slots=True)
class LoadContext:
    """The connections of a source to its run."""

    label: str
    """name of the loader in messages, such as ``train_dl (DataLoader)``"""
    control: RunControl
    start_transfer: Callable[[Any], Any] = lambda batch: batch
    """starts to move a batch to the device; called by the thread that read it"""
    finish_transfer: Callable[[Any], Any] | None = None
    """ends the transfer in the step thread; None if `start_transfer` does everything"""
    rng: LoaderRng = field(default_factory=lambda: NullGuard().loader(Phase.TRAIN))
    """random numbers of the loader in this pass"""
    rereads_unfetched: bool = True
    """batches that were not fetched will be read again, with the same random numbers"""
    close_timeout: float = 5.0
    """seconds that `Source.close` waits for a loader that does not return"""
    read_wrapper: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None
    """wraps the function that reads a batch, for the profiler"""

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Block the step thread, its generators released; return false if the run was stopped.

        Raises:
            Cancelled: the run was cancelled first.
        """
        with self.rng.waiting():
            is_ready = self.control.wait_for(ready, obey_stop=True)
            if self.control.cancelled:
                raise Cancelled
        return is_ready


class InlineSource:
    """Reads the loader in the step thread, between the steps."""

    rng_state_after: RngState | None = None

    def __init__(self, context: LoadContext, read: Callable[[], Any]) -> None:
        # Closures, because they are called for every batch: they find everything in their cells.
        self.fetch, self._close = _inline(context, read)

    def close(self) -> list[Any]:
        """See `Source`."""
        return self._close()


def _inline(
    context: LoadContext, read: Callable[[], Any] | None
) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
    control, label = context.control, context.label
    start, finish = context.start_transfer, context.finish_transfer
    unread: list[Any] = []

    def fetch() -> Any:
        control.current_loader = label
        if control.cancelled:
            control.leave_loader()
        try:
            batch = read()  # type: ignore[misc]
        except StopIteration:
            batch = END
        except BaseException:
            control.leave_loader(failed=True)
            raise
        control.current_loader = None
        if control.cancelled:
            if batch is not END:
                unread.append(batch)
            control.leave_loader()
        if batch is END:
            return END
        moved = start(batch)
        return moved if finish is None else finish(moved)

    def close() -> list[Any]:
        nonlocal read
        read = None  # an exception may keep this frame alive, and thereby the loader's workers
        return unread

    return context.rng.wrap_read(fetch), close


class PrefetchSource:
    """Reads the loader in a thread of its own, up to ``depth`` batches ahead of the steps."""

    def __init__(self, context: LoadContext, read: Callable[[], Any], depth: int) -> None:
        self._context = context
        self._depth = depth
        self._queue: deque[tuple[Any, Any, RngState | None]] = deque()
        """batch as read, batch on the device, state of the loader's generators after it"""
        self.rng_state_after = self._rng_state()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self.exhausted = False
        """the loader has no more batches"""
        self.paused = False
        """the thread reads no more, although the loader may have more batches"""
        self._rng_reader = context.rng.reader(context.control, self._is_closed)
        self._thread = threading.Thread(
            target=self._load,
            args=(self._rng_reader.wrap_read(read),),
            name=f"fitloop loads {context.label}",
            daemon=True,
        )
        self._thread.start()

    def fetch(self) -> Any:
        """See `Source`."""
        context, queue = self._context, self._queue
        changed = context.control.changed
        if not queue and not context.wait(lambda: bool(queue) or self._finished):
            return END
        with changed:
            if not queue:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return END
            _raw, moved, self.rng_state_after = queue.popleft()
            changed.notify_all()
        return moved if context.finish_transfer is None else context.finish_transfer(moved)

    def close(self) -> list[Any]:
        """See `Source`; after the timeout the thread is abandoned inside the loader."""
        context = self._context
        with context.control.changed:
            self._closed = True
            context.control.changed.notify_all()
        with context.rng.waiting():
            self._rng_reader.wake()
            self._thread.join(context.close_timeout)
            if self._thread.is_alive():
                context.control.hung_loaders.append(context.label)
            self._rng_reader.close()
            with context.control.changed:
                unread = [raw for raw, _moved, _rng_state in self._queue]
                self._queue.clear()
                hangs = not self._finished
            if context.rereads_unfetched and self.rng_state_after and unread and not hangs:
                context.rng.set_state(self.rng_state_after)
        return unread

    def pause(self) -> None:
        """End the thread after the batch that it reads now; the queue can still be fetched."""
        with self._context.control.changed:
            self.paused = True
            self._context.control.changed.notify_all()

    def _is_closed(self) -> bool:
        return self._closed or self.paused or self._context.control.cancelled

    def _rng_state(self) -> RngState | None:
        rng = self._context.rng
        return rng.state() if rng.has_stream else None

    def _load(self, read: Callable[[], Any]) -> None:
        context, changed = self._context, self._context.control.changed
        error: BaseException | None = None
        try:
            while True:
                with changed:
                    while len(self._queue) >= self._depth and not self._is_closed():
                        changed.wait()
                    if self._is_closed():
                        return
                try:
                    raw = read()
                except StopIteration:
                    self.exhausted = True
                    break
                rng_state = self._rng_state()
                item = (raw, context.start_transfer(raw), rng_state)
                with changed:
                    self._queue.append(item)
                    changed.notify_all()
        except Cancelled:
            pass
        except BaseException as raised:  # the step thread raises it
            error = raised
        finally:
            with changed:
                self._error = error
                self._finished = True
                changed.notify_all()
