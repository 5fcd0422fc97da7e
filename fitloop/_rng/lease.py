"""A lease is the right of one thread to use the global random generators.

The lock: `GLOBAL_RNG_LOCK` protects the global generators of Python, numpy and torch. A lease
with a stream holds it exclusively, because it installs the stream. Leases on the generators' own
state (`GLOBAL_STREAM`, of trainers without a seed) share it.

Modes: a lease is in one of three modes.

- *Exclusive*: from batch to batch. A pass begins so, and stays so while no other thread waits.
- *Observed*: after two steps at whose end others waited. Steps begin without the lock; each torch
  operation that uses random numbers holds it while it runs (`RngFunctionMode`).
- *Pinned*: code of an observed step has used Python's or numpy's generators, or torch's generator
  state (`GlobalRngPatches`). The thread holds the lock from then to the end of the step.

Waits: a run waits at the beginning of a phase, and at the end of a step if others wait; an observed
step before it uses random numbers; a thread that reads ahead before each batch. First come, first
served. A wait in the middle of a step is not cancelled, since each step is finished.

Not protected: code outside fitloop that uses the global generators in another thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from fitloop._blocks import contextmanager
from fitloop._rng.forks import protect_forks
from fitloop._rng.global_lock import CALLBACKS_IN_FLIGHT, GLOBAL_RNG_LOCK, FairSharedLock
from fitloop._rng.interception import RNG_PATCHES, current_listener, remove_listener, set_listener
from fitloop._rng.native_state import read_python
from fitloop._rng.streams import GLOBAL_STREAM, SavedGlobalState, Stream
from fitloop._rng.torch_ops import RngFunctionMode, can_intercept

_STEPS_BEFORE_OBSERVED = 2
"""Contended steps of a pass that are exclusive, to find uses that cannot be intercepted."""


class GeneratorLease:
    """The right of one thread to use the global generators, with one stream installed in them.

    Any thread may call `close` and `notify_cancelled`. After `lend`, the event loop's thread may
    call `install`, `uninstall` and `suspend`, until the thread of the lease goes on.

    Args:
        cancelled: whether to give up a wait for the lock with `Cancelled`.
        devices: names of the accelerators whose generators belong to the streams.
        lock: another one for tests.
    """

    def __init__(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        devices: Iterable[str] = (),
        lock: FairSharedLock = GLOBAL_RNG_LOCK,
    ) -> None:
        _reset_in_forked_children()
        self._cancelled, self._lock = cancelled, lock
        self._opaque = False
        """Steps of this pass cannot be observed."""
        self._devices = tuple(devices)
        self._process = os.getpid()
        self.stream: Stream | None = None
        """The stream that the thread uses; None while the lease is released."""
        self._is_installed = False
        """The stream is in the generators or is being put there; the lease holds the lock."""
        self._saved: Stream | None = None
        """State of the generators from before the stream was installed."""
        self._mode: RngFunctionMode | None = None
        """Intercepts torch operations while the lease is observed."""
        self._observes = False
        """Steps of this pass are observed."""
        self._contended_steps = 0
        self._may_be_notified = False
        """Whether patches could report uses since the stream was installed."""
        self._python_seen = GLOBAL_STREAM.python
        """State of Python's generator after the last use that a patch reported."""
        self._unobservable: set[int] = set()
        """Streams that code used without a patch noticing, by ``id``."""
        self._in_callback = False
        self._has_waited_for_callbacks = False
        """A callback that began before may wait for this training: it is waited for once only."""

    def for_reader(self, cancelled: Callable[[], bool]) -> GeneratorLease:
        """Return a lease on the same lock, for the loader thread of this run."""
        return GeneratorLease(cancelled, self._devices, self._lock)

    # -- holding the lock ------------------------------------------------------------------------

    def announce_stream(self) -> None:
        """Let callbacks of other trainers know that this lease will install streams."""
        STREAM_USERS.add(id(self))

    def begin_pass(self, stream: Stream, *, opaque: bool = False) -> None:
        """Acquire the lease exclusively, for a pass about which nothing is known yet.

        Steps of ``opaque`` code cannot be observed: they hold the lock to their end.
        """
        self._opaque = opaque
        self._observes, self._contended_steps = False, 0
        if stream is not GLOBAL_STREAM and not self._has_waited_for_callbacks:
            self.announce_stream()
            CALLBACKS_IN_FLIGHT.wait(self._cancelled)  # those that begin from now on are observed
            self._has_waited_for_callbacks = True
        self.acquire(stream)

    def acquire(self, stream: Stream) -> None:
        """Wait for the lock and install ``stream``, or change to it if the lock is held.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        if self._mode is not None:
            self.release()
        if self.stream is None:
            self.acquire_lock(stream, self._cancelled)
            self._save_and_install(stream)
        elif self.stream is not stream or not self._is_installed:
            self._change_to(stream)
        set_listener(self)

    def release(self) -> Stream | None:
        """Put the generators' own state back, and release the lock; return the stream."""
        stream, self.stream = self.stream, None
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.end()
        self._put_back(stream)
        remove_listener(self)
        self._lock.release(self)
        return stream

    def release_fully(self) -> Stream | None:
        """Release the lease for long: other threads need not be observed because of this one."""
        stream = self.release()
        self._observes = False
        if RNG_PATCHES.remove_user(self):
            self._lock.when_free(RNG_PATCHES.uninstall)
        return stream

    def restore(self, stream: Stream | None) -> None:
        """Use ``stream`` again after `release`, `switch_stream` or `enter_callback`."""
        if stream is None:
            self.release()
        elif self._observes and id(stream) not in self._unobservable:
            self._observe(stream)
        else:
            self.acquire(stream)

    def switch_stream(self, stream: Stream) -> Stream | None:
        """Use another stream; return the one before, for `restore`."""
        before = self.stream
        if self._is_installed and self._mode is None:
            self._change_to(stream)
        else:
            self.restore(stream)
        return before

    @contextmanager
    def released(self, *, fully: bool = False) -> Iterator[None]:
        """Release the lease for a block; restore it unless the block fails or is cancelled."""
        stream = self.release_fully() if fully else self.release()
        yield
        if not self._cancelled():
            self.restore(stream)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock alone in a block, so that no other trainer is inside a generator.

        Only the generators' own state is shared, so with any other stream this does nothing.
        """
        stream = self.stream
        if stream is not GLOBAL_STREAM:
            yield
            return
        self.release()
        self._lock.acquire(self, self._cancelled)
        yield
        self._lock.release(self)
        self.restore(stream)

    def yield_to_waiters(self) -> None:
        """Let waiting threads use the generators first; called at the end of every step."""
        if not (self._observes or self._lock.has_waiters):
            return
        stream = self.stream
        if stream is None:
            return
        if self._mode is not None:
            self._unpin()
            if RNG_PATCHES.is_only_user(self):
                self.begin_pass(stream, opaque=self._opaque)
            return
        self._contended_steps += 1
        self._opaque = self._opaque or not can_intercept()
        self.uninstall()
        RNG_PATCHES.add_user(self)
        self.release()
        is_known = self._contended_steps >= _STEPS_BEFORE_OBSERVED
        is_observable = not self._opaque and id(stream) not in self._unobservable
        self._observes = is_known and is_observable
        self.restore(stream)

    def acquire_lock(self, stream: Stream, cancelled: Callable[[], bool]) -> None:
        """Wait for the lock only; raise Cancelled if ``cancelled`` returns true before."""
        # Callbacks may wait for each other at locks of the user. So one that shares the lock with
        # another must not queue behind a thread that wants it exclusively.
        shared = stream is GLOBAL_STREAM
        self._lock.acquire(self, cancelled, shared=shared, overtakes=self._in_callback)

    def release_lock(self) -> None:
        """Undo `acquire_lock`."""
        self._lock.release(self)

    def suspend(self) -> Stream | None:
        """Release the lease in the middle of code that waits for another training.

        Return the stream that the code needs afterwards; None if it had none.
        """
        CALLBACKS_IN_FLIGHT.discard(self)
        stream = self.release_fully()
        return GLOBAL_STREAM if self._in_callback else stream

    def resume(self, stream: Stream) -> None:
        """Undo `suspend`, with the lock acquired."""
        self.stream = stream
        self.install()
        if self._in_callback:
            self.enter_callback()

    # -- installing streams, with the lock held --------------------------------------------------

    def install(self) -> None:
        """Undo `uninstall`."""
        if self.stream is not None and not self._is_installed:
            self._save_and_install(self.stream)
            set_listener(self)

    def uninstall(self) -> None:
        """Put the generators' own state back, but keep the lock."""
        self._put_back(self.stream)
        remove_listener(self)

    def lend(self) -> None:
        """Hold the lock in this thread while the event loop's thread installs the stream."""
        self.pin_until_step_end()
        self.uninstall()
        mode, self._mode = self._mode, None
        if mode is not None:  # the other thread could not end it
            mode.end()

    def _save_and_install(self, stream: Stream) -> None:
        self._is_installed = True  # patches report uses by this thread from now on
        self._saved = GLOBAL_STREAM if stream is GLOBAL_STREAM else SavedGlobalState(self._devices)
        self._install(stream)

    def _change_to(self, stream: Stream) -> None:
        if self._is_installed and self.stream is not None:
            self._capture(self.stream)
        self._install(stream)

    def _install(self, stream: Stream) -> None:
        self.stream, self._is_installed = stream, True
        stream.install()
        self._may_be_notified, self._python_seen = RNG_PATCHES.has_users, stream.python

    def _capture(self, stream: Stream) -> None:
        stream.capture()
        if self._may_be_notified and stream.python != self._python_seen:
            self._unobservable.add(id(stream))  # by functions bound before the patches

    def _put_back(self, stream: Stream | None) -> None:
        if self._is_installed and self._saved is not None and stream is not None:
            self._capture(stream)
            self._saved.install()
            self._is_installed = False

    # -- observed and pinned steps ---------------------------------------------------------------

    def _observe(self, stream: Stream) -> None:
        if self._mode is not None:
            self._unpin()
            self.stream = stream
            return
        self.release()
        self.stream = stream
        self._mode = RngFunctionMode(self)
        self._mode.begin()
        set_listener(self)

    def call_rng_op(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a torch operation that may use random numbers, with the lock held."""
        if self._is_installed:
            return function(*args, **kwargs)
        self.pin_until_step_end()
        try:
            return function(*args, **kwargs)
        finally:
            if self._mode is not None:  # else the operation, such as `backward`, was suspended
                self._unpin()

    def pin_until_step_end(self) -> None:
        """Hold the lock from now to the end of an observed step."""
        stream = self.stream
        if stream is not None and not self._is_installed and self._process == os.getpid():
            self.acquire_lock(stream, _never)
            self._save_and_install(stream)

    def before_python_use(self) -> None:
        """Hold the lock to the end of the step, since code is going to use Python's generator."""
        self.pin_until_step_end()
        is_seen = not self._may_be_notified or self.stream in (None, GLOBAL_STREAM)
        if not is_seen and read_python() != self._python_seen:
            self._unobservable.add(id(self.stream))

    def after_python_use(self) -> None:
        """Remember the state of Python's generator after a use that was reported."""
        if self.stream is not GLOBAL_STREAM:
            self._python_seen = read_python()

    def _unpin(self) -> None:
        if self._is_installed:
            self._put_back(self.stream)
            self._lock.release(self)

    # -- callbacks, and the end ------------------------------------------------------------------

    def enter_callback(self) -> Stream | None:
        """Release the lease for a callback, which uses the global state; return the stream.

        If other leases may install streams meanwhile, the callback is observed.
        """
        stream = self.stream
        self._in_callback = True
        CALLBACKS_IN_FLIGHT.add(self)  # before the check: a lease that begins checks vice versa
        if self._mode is None and STREAM_USERS - {id(self)}:
            CALLBACKS_IN_FLIGHT.discard(self)
            if stream is None:
                self.acquire(GLOBAL_STREAM)
            self.uninstall()
            RNG_PATCHES.add_user(self)
        self.release()
        if RNG_PATCHES.has_users:
            CALLBACKS_IN_FLIGHT.discard(self)
            self._observe(GLOBAL_STREAM)
        return stream

    def leave_callback(self, stream: Stream | None) -> None:
        """Use ``stream`` again as before `enter_callback`."""
        CALLBACKS_IN_FLIGHT.discard(self)
        self._in_callback = False
        self.restore(stream)

    def close(self) -> None:
        """Release the lease for good, also of a thread that hangs; any thread."""
        CALLBACKS_IN_FLIGHT.discard(self)
        self.release_fully()
        STREAM_USERS.discard(id(self))

    def notify_cancelled(self) -> None:
        """Let a waiting thread check whether it is cancelled; any thread."""
        CALLBACKS_IN_FLIGHT.notify_all()
        self._lock.notify_all()


def _never() -> bool:
    return False


STREAM_USERS: set[int] = set()
"""Holders that change the generators, by ``id``: leases that install streams, and factories."""


@cache
def _reset_in_forked_children() -> None:
    """Free the locks in each process that is forked from now on: it has no other threads."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reset)
    protect_forks()


def _reset() -> None:
    STREAM_USERS.clear()
    CALLBACKS_IN_FLIGHT.__init__()  # type: ignore[misc]
    GLOBAL_RNG_LOCK.__init__()  # type: ignore[misc]
    RNG_PATCHES.forget_users()


@contextmanager
def global_generators() -> Iterator[None]:
    """Lock the global generators, to read or change their state.

    If the thread has a lease, they hold its stream.
    """
    if (listener := current_listener()) is not None:
        listener.pin_until_step_end()
        yield
        return
    lease = GeneratorLease()
    lease.acquire(GLOBAL_STREAM)
    try:
        yield
    finally:
        lease.release()
