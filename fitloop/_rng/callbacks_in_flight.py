"""Threads that run callbacks and the like, unseen: what they draw must be the process's numbers.

While a trainer is the only one, nobody looks at what its callbacks draw, which costs nothing. A
seeded trainer that begins just then would have its stream in the generators meanwhile, so it waits
first for the callbacks that it met. Those that begin later know of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

PATIENCE_SECONDS = 1.0
"""after which a callback is not waited for any more: it may itself wait for the one that begins"""


class CallbacksInFlight:
    """Which threads do, by what stands for them. One for the whole process."""

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self._unseen: set[int] = set()
        self._changed = threading.Condition(threading.Lock())
        self._waiting = 0

    def begin(self, who: object) -> None:
        """Have those wait for it who begin from now on."""
        self._unseen.add(id(who))

    def end(self, who: object) -> None:
        """Go on, after `begin`; does nothing without."""
        self._unseen.discard(id(who))
        if self._waiting:
            self.notify_all()

    def wait(self, cancelled: Callable[[], bool]) -> None:
        """Wait for those there are now, no longer than the patience, nor when ``cancelled``."""
        with self._changed:
            self._waiting += 1
            met = self._unseen.copy()
            self._changed.wait_for(
                lambda: cancelled() or met.isdisjoint(self._unseen), self._patience
            )
            self._waiting -= 1

    def notify_all(self) -> None:
        """Wake those who wait, so that a cancelled one goes on."""
        with self._changed:
            self._changed.notify_all()


CALLBACKS_IN_FLIGHT = CallbacksInFlight()
"""of the process"""
