"""Batches out of any loader, inline or ahead of the steps, whichever is faster.

Owns the way from a loader to the step thread. A `Source` is one pass over one loader. What the
loader is decides which: `InlineSource` iterates in the step thread, `PrefetchSource` in a thread of
its own that fills a bounded queue; `AsyncSource`, in `_async_loading`, in a task on the event
loop. Which of them is used is decided elsewhere. Knows nothing of models, metrics or stages.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._rng.guard import LoaderRng
from fitloop._rng.streams import RngState


class _End:
    def __repr__(self) -> str:
        return "END"


END: Final = _End()
"""What `Source.fetch` returns when there are no batches any more."""


class Source(Protocol):
    """One pass over a loader, used by the step thread alone."""

    @property
    def fetch(self) -> Callable[[], Any]:
        """What returns the next batch, placed and received, or `END`.

        It raises what the loader raised, as the same object; `Cancelled` when the run was
        cancelled while it waited.
        """

    @property
    def rng_state_after(self) -> RngState | None:
        """The loader's randomness after the last batch that was fetched; None if it is its
        stream's as it is.
        """  # noqa: D205

    def close(self) -> list[Any]:
        """Stop loading and return the raw batches that were read but not fetched."""


@dataclass(slots=True)
class LoadContext:
    """What every source needs: the loader's iterator and how to use it."""

    iterator: Iterator[Any]
    label: str
    """how messages name the loader, e.g. ``train_dl (DataLoader)``"""
    control: RunControl
    start_transfer: Callable[[Any], Any] = lambda batch: batch
    """starts moving a batch to the device; in the thread that read it"""
    finish_transfer: Callable[[Any], Any] | None = None
    """ends it, in the step thread; None when `start_transfer` has done everything"""
    rng: LoaderRng = field(default_factory=LoaderRng)
    """Random numbers of the loader in this pass."""
    rereads_unfetched: bool = True
    """batches that were not fetched are read again, so their random numbers are drawn again"""
    close_timeout: float = 5.0
    """seconds that `Source.close` waits for a loader that does not return"""
    read_wrapper: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None
    """wraps the call that reads a batch, for the profiler"""

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Block the step thread, its generators released; false when the run was stopped.

        Raises:
            Cancelled: the run was cancelled first.
        """
        with self.rng.waiting():
            arrived = self.control.wait_for(ready, obey_stop=True)
            if self.control.cancelled:
                raise Cancelled
        return arrived


class InlineSource:
    """Iterates the loader in the step thread, between the steps."""

    def __init__(self, context: LoadContext) -> None:
        # Closures, since this is called for every batch: they find everything in their cells.
        self.fetch, self._close = _inline(context)
        self.rng_state_after: RngState | None = None

    def close(self) -> list[Any]:
        """See `Source`."""
        return self._close()


def _inline(context: LoadContext) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
    control, label, place, receive = (
        context.control,
        context.label,
        context.start_transfer,
        context.finish_transfer,
    )
    read: Callable[[], Any] | None = context.iterator.__next__
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
        placed = place(batch)
        return placed if receive is None else receive(placed)

    def close() -> list[Any]:
        nonlocal read
        read = None  # an exception may keep this frame, and it the loader's workers
        context.iterator = iter(())
        return unread

    return context.rng.wrap_read(fetch), close


class PrefetchSource:
    """Iterates the loader in a thread of its own, up to ``depth`` batches ahead of the steps."""

    def __init__(self, context: LoadContext, depth: int) -> None:
        self._context = context
        self._depth = depth
        self._ready: deque[tuple[Any, Any, RngState | None]] = deque()
        self.rng_state_after = context.rng.state() if context.rng.has_stream else None
        """the loader's randomness after the last batch that was fetched"""
        self._error: BaseException | None = None
        self._ended = False
        self._closed = False
        self.exhausted = False
        """the loader has come to its end"""
        self.paused = False
        """the thread reads no more, although the loader may have more"""
        self.waited = 0
        """batches for which the step thread had to wait"""
        self._reader = context.rng.reader(context.control, self._is_closed)
        self._thread = threading.Thread(
            target=self._load, name=f"fitloop loads {context.label}", daemon=True
        )
        self._thread.start()

    def fetch(self) -> Any:
        """See `Source`."""
        context = self._context
        changed = context.control.changed
        ready = self._ready
        if not ready:
            self.waited += 1
            if not context.wait(lambda: bool(ready) or self._ended):
                return END
        with changed:
            if not ready:
                if self._error is not None:
                    error, self._error = self._error, None
                    raise error
                return END
            _raw, placed, self.rng_state_after = ready.popleft()
            changed.notify_all()
        return placed if context.finish_transfer is None else context.finish_transfer(placed)

    def close(self) -> list[Any]:
        """See `Source`; a loader that does not return within the grace is left to itself."""
        context = self._context
        with context.control.changed:
            self._closed = True
            context.control.changed.notify_all()
        with context.rng.waiting():
            self._reader.wake()
            self._thread.join(context.close_timeout)
            if self._thread.is_alive():
                context.control.hung_loaders.append(context.label)
            self._reader.close()
            with context.control.changed:
                unread = [raw for raw, _placed, _drawn in self._ready]
                self._ready.clear()
                hung = not self._ended
                context.iterator = context.iterator if hung else iter(())
            if context.rereads_unfetched and self.rng_state_after and unread and not hung:
                context.rng.set_state(self.rng_state_after)
        return unread

    def pause(self) -> None:
        """Let the thread end after the batch in hand; what is ready can still be fetched."""
        with self._context.control.changed:
            self.paused = True
            self._context.control.changed.notify_all()

    def _is_closed(self) -> bool:
        return self._closed or self.paused or self._context.control.cancelled

    def _load(self) -> None:
        context, changed = self._context, self._context.control.changed
        read = self._reader.wrap_read(lambda: next(context.iterator))
        error: BaseException | None = None
        try:
            while True:
                with changed:
                    while len(self._ready) >= self._depth and not self._is_closed():
                        changed.wait()
                    if self._is_closed():
                        return
                try:
                    raw = read()
                except StopIteration:
                    self.exhausted = True
                    break
                drawn = context.rng.state() if context.rng.has_stream else None
                item = (raw, context.start_transfer(raw), drawn)
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
