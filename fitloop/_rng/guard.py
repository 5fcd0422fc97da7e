"""The seam between runs and random numbers: everything that other packages need during a run.

An `RngGuard` lasts for one run, a `LoaderRng` for one pass over a loader, a `ReaderRng` for one
thread that reads ahead. `NullGuard` does nothing, for engines and sources in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fitloop._rng.lease import GeneratorLease, outside_runs
from fitloop._rng.state_io import (
    global_fingerprint,
    global_state,
    restore_global_state,
)
from fitloop._rng.streams import GLOBAL_STREAM, RngState, Stream
from fitloop._rng.torch_ops import is_opaque

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fitloop._concurrency.control import RunControl
    from fitloop._rng.trainer_rng import TrainerRng
    from fitloop._types import Phase

T = TypeVar("T")


def _do_nothing() -> None: ...


class RngGuard:
    """Gives the code of one run its random numbers, whatever else runs in the process.

    For the step thread, except `close`.

    Args:
        rng: the numbers of the trainer.
        control: cancels waiting for the generators.
        code: model, loss and stage functions. If one of them is compiled or scripted, its use of
            random numbers cannot be observed, so each step has the generators to itself.
    """

    def __init__(self, rng: TrainerRng, control: RunControl, code: Iterable[object] = ()) -> None:
        self._rng = rng
        self._lease = GeneratorLease(
            lambda: control.cancelled, rng.cuda, hides_draws=is_opaque(*code)
        )
        self._forget = control.on_halt(self._lease.notify_cancelled)
        self._closed = False
        self.end_of_batch: Callable[[], None] = self._lease.yield_to_waiters
        """Called after each batch: lets waiting runs use the generators."""

    def enter_phase(self, phase: Phase) -> None:
        """Install the numbers for the stage functions of a phase; may wait for other runs.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        self._lease.begin_pass(self._rng.steps(phase))

    def loader(self, phase: Phase) -> LoaderRng:
        """Return the random numbers for one pass over the loader of a phase."""
        return LoaderRng(self._lease, self._rng.loader(phase), self._rng.cuda)

    def outside(self, call: Callable[..., T], *args: Any) -> T:
        """Call code that is no stage function, such as a callback, and return its result.

        It uses the global generators, never a stream. After `close` for any thread.
        """
        if self._closed:
            with outside_runs():
                return call(*args)
        state = self._lease.suspend()
        result = call(*args)
        self._lease.resume_from(state)
        return result

    def wait(self, call: Callable[[], T]) -> T:
        """Call a function that waits for long, for a person or a time slice; return its result.

        Other runs use the generators meanwhile.
        """
        with self._lease.released(fully=True):
            return call()

    def on_event_loop(self) -> AbstractContextManager[None]:
        """Prepare for a coroutine of the run that the event loop runs while this thread waits.

        The event loop's thread calls `resume` and `pause` around each step of the coroutine. It
        never waits there, because the run has the generators to itself until the step ends.
        """
        return self._lease.used_by_event_loop()

    def resume(self) -> None:
        """Install the numbers of the run in the calling thread, for one step of a coroutine."""
        self._lease.resume()

    def pause(self) -> None:
        """Undo `resume`."""
        self._lease.pause()

    def close(self) -> None:
        """Leave the global generators as they were without the run; any thread, once."""
        self._forget()
        self._lease.close()
        self._closed = True


class NullGuard(RngGuard):
    """A guard that does nothing: all code uses the global generators as it likes."""

    def __init__(self) -> None:
        self.end_of_batch = _do_nothing

    def enter_phase(self, phase: Phase) -> None:
        """Do nothing."""

    def loader(self, phase: Phase) -> LoaderRng:
        """Return an object that does nothing."""
        return LoaderRng()

    def outside(self, call: Callable[..., T], *args: Any) -> T:
        """Call the function."""
        return call(*args)

    def wait(self, call: Callable[[], T]) -> T:
        """Call the function."""
        return call()

    def on_event_loop(self) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def resume(self) -> None:
        """Do nothing."""

    def pause(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class LoaderRng:
    """The random numbers of a loader during one pass.

    Args:
        lease: of the step thread; None for an object that does nothing.
        stream: of the loader; None if the loader uses the global generators.
        cuda: CUDA devices of the trainer.
        reads: reading a batch may use random numbers.
    """

    def __init__(
        self,
        lease: GeneratorLease | None = None,
        stream: Stream | None = None,
        cuda: Iterable[int] = (),
        *,
        reads: bool = True,
    ) -> None:
        self._lease, self._stream, self._cuda, self._reads = lease, stream, tuple(cuda), reads

    @property
    def has_stream(self) -> bool:
        """Whether reading a batch needs a stream of its own to be installed."""
        return self._stream is not None and self._reads

    def without_reads(self) -> LoaderRng:
        """Return the same for a loader that uses no random numbers after its beginning."""
        return LoaderRng(self._lease, self._stream, self._cuda, reads=False)

    def state(self) -> RngState:
        """Return the state that the next number of the loader comes from."""
        return global_state(self._cuda) if self._stream is None else self._stream.state()

    def set_state(self, state: RngState) -> None:
        """Continue from `state`; the stream must not be installed now."""
        if self._stream is None:
            restore_global_state(state)
        else:
            self._stream.set_state(state)

    def fingerprint(self) -> tuple[object, ...]:
        """Return a value that changes when the calling thread uses the CPU generators."""
        return global_fingerprint()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Install the numbers of the loader in the step thread, for the beginning of a pass.

        After an exception they stay: the run ends, and closing its guard cleans up.
        """
        if self._lease is None or self._stream is None:
            yield
            return
        state = self._lease.switch_stream(self._stream)
        yield
        self._lease.restore(state)

    def wrap_read(self, read: Callable[[], T]) -> Callable[[], T]:
        """Return `read` with the numbers of the loader installed around it; step thread."""
        lease, stream = self._lease, self._stream
        if lease is None or stream is None or not self._reads:
            return read
        switch_stream, restore = lease.switch_stream, lease.restore

        def read_with_stream() -> T:
            state = switch_stream(stream)
            batch = read()
            restore(state)
            return batch

        return read_with_stream

    def waiting(self) -> AbstractContextManager[None]:
        """Release the generators while the step thread waits for the loader, which may need them.

        Raises at the end:
            Cancelled: the run was cancelled.
        """
        return nullcontext() if self._lease is None else self._lease.released()

    def reader(self, control: RunControl, is_closed: Callable[[], bool]) -> ReaderRng:
        """Return the numbers of the loader for a thread that reads ahead of the steps."""
        if self._lease is None or not self._reads:
            return ReaderRng(None, control, is_closed)
        return ReaderRng(self._stream or GLOBAL_STREAM, control, is_closed)


class ReaderRng:
    """The random numbers of a thread that reads a loader ahead of the steps.

    Args:
        stream: None if reading uses no random numbers.
        control: of the run.
        is_closed: the thread is to end, so it must not wait for the generators.
    """

    def __init__(
        self, stream: Stream | None, control: RunControl, is_closed: Callable[[], bool]
    ) -> None:
        self._stream = stream
        self._lease = None if stream is None else GeneratorLease(is_closed, reads=True)
        self._forget = _do_nothing
        if self._lease is not None:
            self._forget = control.on_halt(self._lease.notify_cancelled)

    def wrap_read(self, read: Callable[[], T]) -> Callable[[], T]:
        """Return `read` with the generators acquired around it.

        The function raises `Cancelled` if the thread is to end before the generators are free.
        """
        lease, stream = self._lease, self._stream
        if lease is None:
            return read

        def read_with_lease() -> T:
            lease.acquire(stream)
            try:
                return read()
            finally:
                lease.release()

        return read_with_lease

    def wake(self) -> None:
        """End a wait for the generators if the thread is to end; any thread."""
        if self._lease is not None:
            self._lease.notify_cancelled()

    def close(self) -> None:
        """Release the generators, also of a thread that hangs; any thread."""
        self._forget()
        if self._lease is not None:
            self._lease.close()


def save_global_state(cuda: Iterable[int] = ()) -> Callable[[], None]:
    """Return a function that puts the global generators back to their state of now."""
    return partial(restore_global_state, global_state(cuda))
