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
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from fitloop._concurrency.control import Cancelled, RunControl
from fitloop._concurrency.task_state import TaskState
from fitloop._data.structure import copy_batch
from fitloop._errors import ConfigurationError, add_note_safely, one_line
from fitloop._rng.guard import LoaderRng
from fitloop._rng.states import RngState


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
    def reads_ahead(self) -> bool:
        """Whether the loader may have been read further than the last fetched batch."""

    @property
    def rng_state_after(self) -> RngState | None:
        """State of the loader's generators after the last fetched batch.

        None if no batch was read ahead, so that the generators themselves have this state.
        """

    def close(self) -> list[Any]:
        """Stop reading and return the batches that were read but not fetched, as read."""


@dataclass
class LoadContext:
    """The connections of a source to its run."""

    label: str
    """name of the loader in messages, such as ``train_dl (DataLoader)``"""
    control: RunControl
    rng: LoaderRng
    """random numbers of the loader in this pass"""
    epoch: int = 0
    """number of the epoch, counted from 0, for a loader that a function makes"""
    start_transfer: Callable[[Any], Any] = lambda batch: batch
    """starts to move a batch to the device; called by the thread that read it"""
    finish_transfer: Callable[[Any], Any] | None = None
    """ends the transfer in the step thread; None if `start_transfer` does everything"""
    rereads_unfetched: bool = True
    """batches that were not fetched will be read again, with the same random numbers"""
    reuses_memory: bool = False
    """the loader may write into a batch after the next one was read, so batches ahead are copies"""
    close_timeout: float = 5.0
    """seconds that `Source.close` waits for a loader that does not return"""
    read_wrapper: Callable[[Callable[[], Any]], Callable[[], Any]] | None = None
    """wraps the function that reads a batch, for the profiler"""

    def wait(self, ready: Callable[[], bool], begin: Callable[[], object] = lambda: None) -> bool:
        """Block the step thread, its generators released; return false if the run was stopped.

        ``begin`` is called when they are released: what another thread then draws is not of the
        steps.

        Raises:
            Cancelled: the run was cancelled first.
        """
        with self.rng.waiting():
            begin()
            is_ready = self.control.wait_for(ready, obey_stop=True)
            if self.control.cancelled:
                raise Cancelled
        return is_ready


class InlineSource:
    """Reads the loader in the step thread, between the steps."""

    reads_ahead = False
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
        except BaseException as error:
            control.leave_loader(failed=True)
            note_of_thread(error)
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


def note_of_thread(error: BaseException) -> None:
    """Add a note on the thread in which loaders are read, if the error speaks of threads."""
    if "thread" in one_line(error).lower():
        add_note_safely(
            error,
            "each call of the trainer reads its loaders in a new thread (with prefetch= in one "
            "more for each pass): open what belongs to a thread in the loader's __iter__",
        )


class PrefetchSource:
    """Reads the loader in a thread of its own, up to ``depth`` batches ahead of the steps.

    The thread begins with a copy of the context variables and modes of torch of the step thread.
    """

    reads_ahead = True

    def __init__(self, context: LoadContext, read: Callable[[], Any], depth: int) -> None:
        self._context = context
        self._depth = depth
        self._queue: deque[tuple[Any, Any, RngState | None]] = deque()
        """batch as read, batch on the device, state of the loader's generators after it"""
        self.rng_state_after = self._rng_state()
        self._error: BaseException | None = None
        self._finished = False
        self._closed = False
        self._rng_reader = context.rng.reader(context.control, self._is_closed)
        self._thread = threading.Thread(
            target=TaskState.of_caller().call,
            args=(partial(self._load, self._rng_reader.wrap_read(read)),),
            name=f"fitloop loads {context.label}",
            daemon=True,
        )
        try:
            self._thread.start()
        except BaseException:  # the system gives no thread
            self._rng_reader.close()
            raise

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

    def _is_closed(self) -> bool:
        return self._closed or self._context.control.cancelled

    def _rng_state(self) -> RngState | None:
        rng = self._context.rng
        return rng.state() if rng.has_stream else None

    def _lasting(self, raw: Any) -> Any:
        """Return the batch, or a copy that the loader cannot write into while it is in use."""
        if not self._context.reuses_memory:
            return raw
        try:
            return copy_batch(raw)
        except Exception as error:
            raise ConfigurationError(
                f"{self._context.label} gave a {type(raw).__name__} that cannot be copied "
                f"({one_line(error)}); batches that are read ahead are copied, since a loader may "
                "use their memory again. Give prefetch=0"
            ) from error

    def _load(self, read: Callable[[], Any]) -> None:
        context, changed = self._context, self._context.control.changed
        error: BaseException | None = None
        self._rng_reader.allow_waits()
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
                    break
                raw = self._lasting(raw)
                rng_state = self._rng_state()
                item = (raw, context.start_transfer(raw), rng_state)
                with changed:
                    self._queue.append(item)
                    changed.notify_all()
        except Cancelled:
            pass
        except BaseException as raised:  # the step thread raises it
            error = raised
            add_note_safely(
                error,
                f"{context.label} was read in a thread ahead of the steps; prefetch=0 reads it "
                "between the steps, in their thread",
            )
        finally:
            with changed:
                self._error = error
                self._finished = True
                changed.notify_all()
