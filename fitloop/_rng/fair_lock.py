"""Who may have the process's random generators now: one at a time, first come, first served.

Knows neither streams nor generators; a turn is any object.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from fitloop._concurrency.control import Cancelled


class FairSharedLock:
    """Lets one turn at a time through, first come, first served. One for the whole process.

    Turns at the process's own numbers are let through together.
    """

    def __init__(self) -> None:
        self.contended = False
        """somebody waits; read without the lock, once a batch"""
        self._changed = threading.Condition(threading.Lock())
        self._line: deque[object] = deque()
        self._holders: list[object] = []
        self._shared = False
        self._when_free: list[Callable[[], None]] = []

    def acquire(
        self,
        turn: object,
        cancelled: Callable[[], bool],
        *,
        shared: bool = False,
        joins: bool = False,
    ) -> None:
        """Block until it is ``turn``'s; raises `Cancelled` when that came first.

        With ``joins`` it goes past the line to those who share already.
        """
        with self._changed:
            if self._holders or self._line:
                self._wait(turn, cancelled, shared, joins and shared)
            self._holders.append(turn)
            self._shared = shared

    def _may_go(self, turn: object, shared: bool, joins: bool) -> bool:
        if self._holders:
            return shared and self._shared and (joins or self._line[0] is turn)
        return self._line[0] is turn

    def _wait(self, turn: object, cancelled: Callable[[], bool], shared: bool, joins: bool) -> None:
        line = self._line
        line.append(turn)
        while not self._may_go(turn, shared, joins):
            self.contended = True
            if cancelled():
                line.remove(turn)
                self.contended = bool(line)
                self._changed.notify_all()
                raise Cancelled
            self._changed.wait()
        line.remove(turn)
        self.contended = bool(line)
        if line and shared:
            self._changed.notify_all()

    def release(self, turn: object) -> bool:
        """End ``turn``; false when it was not its."""
        with self._changed:
            if turn not in self._holders:
                return False
            self._holders.remove(turn)
            self._tidy()
            if self._line:
                self._changed.notify_all()
            return True

    def when_free(self, call: Callable[[], None]) -> None:
        """Call it, now or later, when the process's own states are in the generators."""
        with self._changed:
            self._when_free.append(call)
            self._tidy()

    def _tidy(self) -> None:
        while self._when_free and not self._holders:
            self._when_free.pop()()

    def notify_all(self) -> None:
        """Wake everyone in line, so that a cancelled one leaves it."""
        with self._changed:
            self._changed.notify_all()


GLOBAL_RNG_LOCK = FairSharedLock()
"""of the process"""
