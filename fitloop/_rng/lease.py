"""A lease is the right of one thread to use the global random generators.

What is locked: `GLOBAL_RNG_LOCK` protects the global generators of Python, numpy and torch. A lease
with a stream holds it exclusively, because it installs the stream. Leases on the generators' own
state (`GLOBAL_STREAM`, of trainers without a seed) share it.

When it is held: a lease is in one of three modes, from the cheapest for its own thread to the
cheapest for others.

- *Exclusive*: the thread holds the lock from batch to batch. A pass begins so, and stays so while
  no other thread waits.
- *Observed*: other threads have waited at the end of two steps. Steps begin without the lock; each
  torch operation that uses random numbers holds it while it runs (`RngFunctionMode`).
- *Pinned*: code of an observed step has used Python's or numpy's generators, or torch's generator
  state (`GlobalRngPatches`). The thread holds the lock from then to the end of the step.

Who waits: a run at the beginning of a phase, and at the end of a step if others wait; an observed
step before it uses random numbers; a thread that reads ahead before each batch. First come, first
served. A wait in the middle of a step is not cancelled, since each step is finished.

Not protected: code outside fitloop that uses the global generators in another thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from fitloop._rng.global_lock import CALLBACKS_IN_FLIGHT, GLOBAL_RNG_LOCK, FairSharedLock
from fitloop._rng.interception import (
    RNG_PATCHES,
    current_listener,
    remove_listener,
    set_listener,
)
from fitloop._rng.streams import GLOBAL_STREAM, SavedGlobalState, Stream, TorchStates
from fitloop._rng.torch_ops import RngFunctionMode, end_modes_in_child

_STEPS_BEFORE_OBSERVED = 2
"""Contended steps of a pass that are exclusive, to find uses that cannot be intercepted."""


class LeaseState(NamedTuple):
    """How a lease was held when it was released; an argument of `GeneratorLease.restore`."""

    stream: Stream | None
    observed: bool


class GeneratorLease:
    """The right of one thread to use the global generators, with one stream installed in them.

    For one thread. Any thread may call `close` and `notify_cancelled`; the event loop's thread may
    call `install` and `uninstall` while the thread waits in `used_by_event_loop`.

    Args:
        cancelled: whether to give up a wait for the lock with `Cancelled`.
        cuda: indices of the CUDA devices whose generators belong to the streams.
        lock: another one for tests.
        opaque: the code is compiled or scripted, so that its steps cannot be observed.
    """

    def __init__(
        self,
        cancelled: Callable[[], bool] = lambda: False,
        cuda: Iterable[int] = (),
        lock: FairSharedLock = GLOBAL_RNG_LOCK,
        *,
        opaque: bool = False,
    ) -> None:
        _reset_in_forked_children()
        self._cancelled = cancelled
        self._cuda = tuple(cuda)
        self._lock = lock
        self._opaque = opaque
        self._stream: Stream | None = None
        self._is_installed = False
        """The stream is in the generators or is being put there; the lease holds the lock."""
        self._saved: Stream | None = None
        """State of the generators from before the stream was installed."""
        self._saved_torch: TorchStates | None = None
        """The same for torch only, during an intercepted operation."""
        self._mode: RngFunctionMode | None = None
        """Intercepts torch operations while the lease is observed."""
        self._observes = False
        """Steps of this pass are observed."""
        self._contended_steps = 0
        """Steps of this pass at whose end other threads waited."""
        self._was_notified = self._may_be_notified = False
        """Whether patches reported a use since the stream was installed, and could have."""
        self._unobservable: set[int] = set()
        """Streams that code used without a patch noticing, by ``id``."""
        self._in_callback = False
        self._has_waited_for_callbacks = False

    def for_reader(self, cancelled: Callable[[], bool]) -> GeneratorLease:
        """Return a lease for a thread that reads ahead for this one."""
        return GeneratorLease(cancelled, self._cuda, self._lock)

    @property
    def stream(self) -> Stream | None:
        """The stream that the thread uses; None while the lease is released."""
        return self._stream

    # -- exclusive -------------------------------------------------------------------------------

    def announce_stream(self) -> None:
        """Let callbacks of other trainers know that this lease will install streams."""
        _STREAM_USERS.add(id(self))

    def begin_pass(self, stream: Stream) -> None:
        """Acquire the lease exclusively, for a pass about which nothing is known yet.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        self._observes, self._contended_steps = False, 0
        if stream is not GLOBAL_STREAM and not self._has_waited_for_callbacks:
            self.announce_stream()
            CALLBACKS_IN_FLIGHT.wait(self._cancelled)
            self._has_waited_for_callbacks = True
        self.acquire(stream)

    def acquire(self, stream: Stream) -> None:
        """Wait for the lock and install ``stream``; change to it if another one is installed.

        Raises:
            Cancelled: the run was cancelled while it waited.
        """
        if self._mode is not None:
            self.release()
        if self._stream is None:
            self._acquire_lock(stream, self._cancelled)
            self._save_and_install(stream)
        elif not self._is_installed:
            self._install(stream)
        elif self._stream is not stream:
            self._capture()
            self._install(stream)

    def release(self) -> LeaseState:
        """Put the generators' own state back, and release the lock; return the state for `restore`.

        Does nothing if the lease is not held.
        """
        state = LeaseState(self._stream, self._observes)
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.end()
        self._put_back()
        self._stream = None
        remove_listener(self)
        self._lock.release(self)
        return state

    def release_fully(self) -> LeaseState:
        """Release the lease for long: other threads need not be observed because of this one.

        `restore` acquires the lease exclusively then.
        """
        state = self.release()
        self._observes = False
        if RNG_PATCHES.remove_user(self):
            self._lock.when_free(RNG_PATCHES.uninstall)
        return LeaseState(state.stream, False)

    def restore(self, state: LeaseState) -> None:
        """Hold the lease again as before `release`, `switch_stream` or `enter_callback`."""
        if state.stream is None:
            self.release()
        elif state.observed and id(state.stream) not in self._unobservable:
            self.observe(state.stream)
        else:
            self.acquire(state.stream)

    def switch_stream(self, stream: Stream) -> LeaseState:
        """Change to another stream, observed or not as before; return the state for `restore`."""
        state = LeaseState(self._stream, self._observes)
        if self._is_installed and self._mode is None:
            self._capture()
            self._install(stream)
        else:
            self.restore(LeaseState(stream, self._observes))
        return state

    @contextmanager
    def released(self, *, fully: bool = False) -> Iterator[None]:
        """Release the lease for a block; restore it unless the block fails or is cancelled."""
        state = self.release_fully() if fully else self.release()
        yield
        if not self._cancelled():
            self.restore(state)

    def yield_to_waiters(self) -> None:
        """Let waiting threads use the generators first; called at the end of every step."""
        if self._observes or self._lock.has_waiters:
            self._yield_to_waiters()

    def _yield_to_waiters(self) -> None:
        stream = self._stream
        if stream is None:
            return
        if self._mode is not None:
            if self._is_installed:
                self._unpin()
            if RNG_PATCHES.is_only_user(self):
                self.begin_pass(stream)
            return
        self._contended_steps += 1
        self.uninstall()
        RNG_PATCHES.add_user(self)
        self.release()
        self._observes = self._contended_steps >= _STEPS_BEFORE_OBSERVED and not self._opaque
        self.restore(LeaseState(stream, self._observes))

    # -- installing streams ----------------------------------------------------------------------

    def install(self) -> None:
        """Undo `uninstall`."""
        if self._stream is not None and not self._is_installed:
            self._save_and_install(self._stream)

    def uninstall(self) -> None:
        """Put the generators' own state back, but keep the lock."""
        self._put_back()
        remove_listener(self)

    @contextmanager
    def used_by_event_loop(self) -> Iterator[None]:
        """Hold the lock in this thread while the event loop's thread installs the stream."""
        self.pin_until_step_end()
        self.uninstall()
        yield
        self.install()

    def _acquire_lock(self, stream: Stream, cancelled: Callable[[], bool]) -> None:
        # Callbacks may wait for each other at locks of the user. So one that shares the lock with
        # another must not queue behind a thread that wants it exclusively.
        shared = stream is GLOBAL_STREAM
        self._lock.acquire(self, cancelled, shared=shared, overtakes=self._in_callback)

    def _save_and_install(self, stream: Stream) -> None:
        self._is_installed = True  # from now on, uses that patches report are those of `install`
        self._saved = GLOBAL_STREAM if stream is GLOBAL_STREAM else SavedGlobalState(self._cuda)
        self._install(stream)

    def _install(self, stream: Stream) -> None:
        self._stream, self._is_installed = stream, True
        stream.install()
        self._was_notified, self._may_be_notified = False, RNG_PATCHES.has_users
        set_listener(self)

    def _capture(self) -> None:
        stream = self._stream
        assert stream is not None
        before, was_notified = stream.python, self._was_notified
        stream.capture()
        if self._may_be_notified and not was_notified and stream.python != before:
            self._unobservable.add(id(stream))  # by functions bound before the patches

    def _put_back(self) -> None:
        if self._is_installed and self._saved is not None:
            self._capture()
            self._saved.install()
            self._is_installed = False

    # -- observed and pinned ---------------------------------------------------------------------

    def observe(self, stream: Stream) -> None:
        """Use ``stream`` without the lock, which is acquired at each use of random numbers."""
        if self._mode is not None:
            if self._is_installed:
                self._unpin()
            self._stream = stream
            return
        self.release()
        self._stream = stream
        self._mode = RngFunctionMode(self)
        self._mode.begin()
        set_listener(self)

    def call_rng_op(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a torch operation that may use random numbers, with the lock held."""
        stream = self._stream
        if self._is_installed or self._saved_torch is not None or stream is None:
            return function(*args, **kwargs)
        self._acquire_lock(stream, _never)
        self._saved_torch = stream.install_torch()
        try:
            return function(*args, **kwargs)
        finally:
            saved, self._saved_torch = self._saved_torch, None
            if not self._is_installed:  # the operation, such as a backward pass, was not pinned
                stream.capture_torch(saved)
                self._lock.release(self)

    def pin_until_step_end(self) -> None:
        """Hold the lock from now to the end of an observed step."""
        stream = self._stream
        if stream is not None and not self._is_installed:
            if self._saved_torch is not None:
                stream.capture_torch(self._saved_torch)
            else:
                self._acquire_lock(stream, _never)
            self._save_and_install(stream)
        self._was_notified = True

    def _unpin(self) -> None:
        self._put_back()
        self._lock.release(self)

    # -- callbacks -------------------------------------------------------------------------------

    def enter_callback(self) -> LeaseState:
        """Release the lease for a callback, which uses the global state.

        If other leases may install streams meanwhile, the callback is observed. Return the state
        for `leave_callback`.
        """
        state = LeaseState(self._stream, self._observes)
        self._in_callback = True
        CALLBACKS_IN_FLIGHT.add(self)  # before the check: a lease that begins checks vice versa
        if self._mode is None and _STREAM_USERS - {id(self)}:
            CALLBACKS_IN_FLIGHT.discard(self)
            if state.stream is None:
                self.acquire(GLOBAL_STREAM)
            self.uninstall()
            RNG_PATCHES.add_user(self)
        self.release()
        if RNG_PATCHES.has_users:
            CALLBACKS_IN_FLIGHT.discard(self)
            self.observe(GLOBAL_STREAM)
        return state

    def leave_callback(self, state: LeaseState) -> None:
        """Hold the lease again as before `enter_callback`."""
        CALLBACKS_IN_FLIGHT.discard(self)
        self._in_callback = False
        self.restore(state)

    # -- the end ---------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the lease for good, also of a thread that hangs; any thread."""
        CALLBACKS_IN_FLIGHT.discard(self)
        self.release_fully()
        _STREAM_USERS.discard(id(self))

    def forget_in_child(self) -> None:
        """Hold nothing any more, in a process that was forked."""
        remove_listener(self)
        self._stream = self._saved_torch = None
        self._is_installed = False

    def notify_cancelled(self) -> None:
        """Let a waiting thread check whether it is cancelled; any thread."""
        CALLBACKS_IN_FLIGHT.notify_all()
        self._lock.notify_all()


def _never() -> bool:
    return False


_STREAM_USERS: set[int] = set()
"""Leases that install streams, by ``id``: of seeded runs, and of threads that read for them."""


@cache
def _reset_in_forked_children() -> None:
    """Release everything in each process that is forked from now on: it has no other threads."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reset)


def _reset() -> None:
    end_modes_in_child()
    _STREAM_USERS.clear()
    CALLBACKS_IN_FLIGHT.__init__()  # type: ignore[misc]
    GLOBAL_RNG_LOCK.__init__()  # type: ignore[misc]
    RNG_PATCHES.forget_users()


@contextmanager
def global_generators() -> Iterator[None]:
    """Lock the global generators, to read or change their state.

    If the thread has a lease, they hold its stream.
    """
    listener = current_listener()
    if listener is not None:
        listener.pin_until_step_end()
        yield
        return
    lease = GeneratorLease()
    lease.acquire(GLOBAL_STREAM)
    try:
        yield
    finally:
        lease.release()


@contextmanager
def outside_runs() -> Iterator[None]:
    """Run code that belongs to no run in progress, such as a last callback, as a callback."""
    lease = GeneratorLease()
    state = lease.enter_callback()
    try:
        yield
    finally:
        lease.leave_callback(state)
        lease.close()
