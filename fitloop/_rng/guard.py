"""The seam between runs and random numbers.

An `RngGuard` lasts for one run, a `LoaderRng` for one pass over a loader, a `ReaderRng` for one
thread that reads ahead. A method that waits for the generators raises `Cancelled` if the run is
cancelled first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, TypeVar

from fitloop._blocks import contextmanager
from fitloop._concurrency.control import RunControl
from fitloop._concurrency.supervisor import wait_scope
from fitloop._rng.global_state import global_state, restore_global_state
from fitloop._rng.lease import GeneratorLease
from fitloop._rng.states import RngState
from fitloop._rng.streams import GLOBAL_STREAM, Stream
from fitloop._rng.torch_ops import CodeTraits
from fitloop._rng.trainer_rng import TrainerRng
from fitloop._rng.waits import CoroutineWaits, PlainWaits, used_by_event_loop
from fitloop._types import Phase

T = TypeVar("T")


class RngGuard:
    """Gives the code of one run its random numbers, also beside other runs; for the step thread.

    Args:
        rng: the random numbers of the trainer.
        control: of the run.
        code: model, loss and stage functions, to see whether they are compiled.
    """

    def __init__(
        self,
        rng: TrainerRng,
        control: RunControl,
        code: Iterable[object] = (),
    ) -> None:
        self._rng = rng
        self._traits = CodeTraits(*code)
        self._lease = lease = GeneratorLease(lambda: control.cancelled, rng.devices)
        if rng.has_streams:
            lease.announce_stream()
        self._forget = control.on_halt(lease.notify_cancelled)
        self._is_closed = False
        self.end_of_batch: Callable[[], None] = lease.yield_to_waiters
        """To be called after each batch: lets waiting runs use the generators first."""

    def enter_phase(self, phase: Phase) -> None:
        """Install the random numbers for the stage functions of a phase."""
        opaque = self._traits.must_hold_lock(train=phase is Phase.TRAIN)
        self._lease.begin_pass(self._rng.steps(phase), opaque=opaque)

    def allow_waits(self) -> None:
        """Let code on this thread wait for other trainings, which use the generators meanwhile."""
        wait_scope.set(PlainWaits(self._lease).scope)

    def on_event_loop(self) -> AbstractContextManager[CoroutineWaits]:
        """Make a block in which the event loop runs a coroutine while this thread waits.

        The event loop executes the coroutine by `SteppedAwaitable`, with two methods of the value
        of the block: ``step``, and ``prepare_step`` before each step.
        """
        return used_by_event_loop(self._lease)

    def loader(self, phase: Phase) -> LoaderRng:
        """Return the random numbers for one pass over the loader of a phase."""
        return LoaderRng(self._lease, self._rng.loader(phase), self._rng.devices)

    def outside(self, call: Callable[..., T], *args: Any) -> T:
        """Call code that is no stage function, such as a callback: it uses no stream of the run.

        Works after `close` too, in any thread.
        """
        if self._is_closed:
            with closing(GeneratorLease()) as lease:
                lease.enter_callback()
                token = wait_scope.set(PlainWaits(lease).scope)
                try:
                    return call(*args)
                finally:
                    wait_scope.reset(token)
        stream = self._lease.enter_callback()
        result = call(*args)
        self._lease.leave_callback(stream)
        return result

    def wait(self, call: Callable[[], T]) -> T:
        """Call a function that waits for long; other runs use the generators meanwhile."""
        with self._lease.released(fully=True):
            return call()

    def close(self) -> None:
        """Leave the global generators as they were without the run; any thread."""
        self._forget()
        self._lease.close()
        self._is_closed = True


@contextmanager
def copied_numbers(rng: TrainerRng, phase: Phase) -> Iterator[None]:
    """Use a copy of the random numbers of a phase in a block outside of runs.

    The numbers of the trainer and the global generators are afterwards as before.
    """
    with closing(GeneratorLease(devices=rng.devices)) as lease:
        lease.begin_pass(rng.fork().steps(phase))
        yield


class LoaderRng:
    """The random numbers of a loader during one pass.

    Args:
        lease: of the step thread.
        stream: of the loader; None if the loader uses the global generators.
        devices: names of the accelerators of the trainer.
        reads: whether reading a batch may use random numbers.
    """

    def __init__(
        self,
        lease: GeneratorLease,
        stream: Stream | None = None,
        devices: Iterable[str] = (),
        *,
        reads: bool = True,
    ) -> None:
        self._lease, self._stream, self._devices, self._reads = lease, stream, tuple(devices), reads
        self.waiting: Callable[[], AbstractContextManager[None]] = lease.released
        """Makes a block in which the step thread waits for the loader, which may need the lock."""

    @property
    def has_stream(self) -> bool:
        """Whether the stream must be installed while a batch is read."""
        return self._stream is not None and self._reads

    def without_reads(self) -> LoaderRng:
        """Return the same for a loader that uses no random numbers after its beginning."""
        return LoaderRng(self._lease, self._stream, self._devices, reads=False)

    def state(self) -> RngState:
        """Return the state of the stream, or of the global generators."""
        return global_state(self._devices) if self._stream is None else self._stream.state()

    def set_state(self, state: RngState) -> None:
        """Continue from ``state``; the stream must not be installed now."""
        if self._stream is None:
            restore_global_state(state)
        else:
            self._stream.set_state(state)

    @contextmanager
    def installed(self, *, forks: bool = False) -> Iterator[None]:
        """Install the stream in a block, for the beginning of a pass.

        With ``forks``, which is for a loader that starts processes, no other trainer is inside a
        generator meanwhile. After an exception the stream stays, since the run ends and its guard
        is closed.
        """
        if self._stream is None:
            with self._lease.exclusive() if forks else nullcontext():
                yield
            return
        steps = self._lease.switch_stream(self._stream)
        yield
        self._lease.restore(steps)

    def wrap_read(self, read: Callable[[], T]) -> Callable[[], T]:
        """Return ``read`` with the stream installed around it, for the step thread."""
        stream, lease = self._stream, self._lease
        if stream is None or not self._reads:
            return read

        def read_with_stream() -> T:
            steps = lease.switch_stream(stream)
            batch = read()
            lease.restore(steps)
            return batch

        return read_with_stream

    def reader(self, control: RunControl, is_closed: Callable[[], bool]) -> ReaderRng:
        """Return the random numbers of the loader for a thread that reads ahead of the steps."""
        stream = (self._stream or GLOBAL_STREAM) if self._reads else None
        return ReaderRng(stream, control, self._lease.for_reader(is_closed))


class ReaderRng:
    """The random numbers of a thread that reads ahead; ``stream`` is None if it needs none."""

    def __init__(self, stream: Stream | None, control: RunControl, lease: GeneratorLease) -> None:
        self._stream, self._lease = stream, lease
        if stream not in (None, GLOBAL_STREAM):
            lease.announce_stream()
        self.wake: Callable[[], None] = lease.notify_cancelled
        """Ends a wait for the generators if the thread is to end; any thread."""
        self._forget = control.on_halt(self.wake)

    def allow_waits(self) -> None:
        """Let the loader wait for other trainings; called by the thread that reads."""
        wait_scope.set(PlainWaits(self._lease).scope)

    def wrap_read(self, read: Callable[[], T]) -> Callable[[], T]:
        """Return ``read`` with the generators acquired around it."""
        lease, stream = self._lease, self._stream
        if stream is None:
            return read

        def read_with_lease() -> T:
            lease.acquire(stream)
            try:
                return read()
            finally:
                lease.release()

        return read_with_lease

    def close(self) -> None:
        """Release the generators, also of a thread that hangs; any thread."""
        self._forget()
        self._lease.close()
