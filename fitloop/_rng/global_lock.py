"""The lock on the global generators of Python, numpy and torch, and callbacks that run without it.

Knows neither streams nor generators: a holder of the lock is any object.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from fitloop._concurrency.control import Cancelled
from fitloop._errors import warn_user

PATIENCE = 120.0
"""seconds without a change of the lock after which a thread that waits warns"""


class FairSharedLock:
    """A lock, first come, first served. Shared holders hold it together."""

    def __init__(self) -> None:
        self.has_waiters = False
        """Whether a thread waits; read without synchronization once a batch."""
        self._changed = threading.Condition(threading.Lock())
        self._queue: deque[object] = deque()
        self._holders: list[object] = []
        self._is_shared = False
        self._holding_thread = ""
        """name of the thread that acquired the lock last"""
        self._when_free: list[Callable[[], None]] = []

    def acquire(
        self,
        holder: object,
        cancelled: Callable[[], bool],
        *,
        shared: bool = False,
        overtakes: bool = False,
    ) -> None:
        """Wait for the lock; ``cancelled`` is called at each change, and ends the wait with true.

        With ``overtakes``, a shared holder joins others at once, even if threads wait.

        A thread that waits long for another one warns: that one may wait for this thread.

        Raises:
            Cancelled: ``cancelled`` returned true first.
        """
        patience: float | None = PATIENCE
        with self._changed:
            self._queue.append(holder)
            try:
                while not self._is_free_for(holder, shared, overtakes):
                    self.has_waiters = True
                    if cancelled():
                        raise Cancelled
                    if not self._changed.wait(patience):
                        patience = None
                        self._warn_of_long_wait()
                self._holders.append(holder)
                self._is_shared = shared
                self._holding_thread = threading.current_thread().name
            finally:
                self._queue.remove(holder)
                self.has_waiters = bool(self._queue)
                if self._queue:
                    self._changed.notify_all()

    def _warn_of_long_wait(self) -> None:
        warn_user(
            f"the thread {threading.current_thread().name!r} has waited {PATIENCE:g} s for the "
            f"random generators, which a step in the thread {self._holding_thread!r} uses. If that "
            "step waits for the training of this thread, both wait for ever: let the step await "
            "the training itself, as docs/randomness.md says under 'Training in a training'",
            RuntimeWarning,
        )

    def _is_free_for(self, holder: object, shared: bool, overtakes: bool) -> bool:
        is_first = self._queue[0] is holder
        if not self._holders:
            return is_first
        return shared and self._is_shared and (overtakes or is_first)

    def release(self, holder: object) -> None:
        """Release the lock; does nothing if ``holder`` does not hold it."""
        with self._changed:
            if holder in self._holders:
                self._holders.remove(holder)
                self._call_when_free()
                if self._queue:
                    self._changed.notify_all()

    def when_free(self, call: Callable[[], None]) -> None:
        """Call a function under the lock's protection, as soon as nothing holds it."""
        with self._changed:
            self._when_free.append(call)
            self._call_when_free()

    def _call_when_free(self) -> None:
        while self._when_free and not self._holders:
            self._when_free.pop()()

    def notify_all(self) -> None:
        """Let waiting threads check whether they are cancelled; any thread."""
        with self._changed:
            self._changed.notify_all()


GLOBAL_RNG_LOCK = FairSharedLock()


class CallbacksInFlight:
    """Leases whose thread is in a callback that nothing observes.

    The callbacks of an only trainer use the global generators without a lock. A seeded trainer that
    begins meanwhile would install its stream under them, so it waits for their end first; for a
    second at most, since a callback may itself wait for the trainer.
    """

    def __init__(self, timeout: float = 1.0) -> None:
        self._timeout = timeout
        self._leases: set[int] = set()
        self._changed = threading.Condition(threading.Lock())

    def add(self, lease: object) -> None:
        """Note that a callback begins."""
        self._leases.add(id(lease))

    def discard(self, lease: object) -> None:
        """Note that the callback has ended, or is observed from now on."""
        self._leases.discard(id(lease))
        self.notify_all()

    def wait(self, cancelled: Callable[[], bool]) -> None:
        """Wait until the callbacks of this moment have ended."""
        with self._changed:
            present = self._leases.copy()
            self._changed.wait_for(
                lambda: cancelled() or present.isdisjoint(self._leases), self._timeout
            )

    def notify_all(self) -> None:
        """Let waiting threads check whether they are cancelled; any thread."""
        with self._changed:
            self._changed.notify_all()


CALLBACKS_IN_FLIGHT = CallbacksInFlight()
