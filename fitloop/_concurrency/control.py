"""The flags that stop, cancel or abandon a run, and the waits that obey them.

The threads of a run and its awaiting task share one `RunControl`. Every blocking wait of a run uses
the condition `RunControl.changed`, so that one notification wakes all of them without polling.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fitloop._types import StopReason


class Cancelled(BaseException):
    """Raised in the threads of a cancelled run. It never leaves fitloop."""


class Abandoned(BaseException):
    """Raised in a thread that returns from a loader after its run has ended without the thread."""


class RunControl:
    """The flags of one run.

    A flag is only ever set, never cleared. Flags are written with the lock of `changed` held, and
    read once a batch without it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """the condition of all waits of the run"""
        self.halted = False
        """the run ends at the next batch boundary"""
        self.cancelled = False
        self.stop_reason: str | None = None
        self.failure: BaseException | None = None
        """the exception of an async callback"""
        self.current_loader: str | None = None
        """description of the loader that the step thread is now inside; None outside of loaders. A
        client of a worker, which loads nothing, describes the callbacks that it is inside"""
        self.abandoned = False
        """the step thread was left inside a loader"""
        self.wait_seconds = 0.0
        """total seconds that the step thread has waited for loaders and answers"""
        self.hung_loaders: list[str] = []
        """descriptions of the loaders that did not return in time"""
        self._end_claimed = False
        self._wakers: list[Callable[[], None]] = []

    @property
    def is_of_others(self) -> bool:
        """Whether other ranks of the training were cancelled, and this one ends with them."""
        return False

    def stop(self, reason: str = StopReason.STOPPED) -> None:
        """End the run after the present batch, from any thread. The first reason stays."""
        with self.changed:
            if self.stop_reason is None:
                self.stop_reason = str(reason)
            self._halt()

    def cancel(self, failure: BaseException | None = None) -> None:
        """Cancel the run after the present batch, from any thread. The first failure stays."""
        with self.changed:
            self.cancelled = True
            if self.failure is None:
                self.failure = failure
            self._halt()

    def _halt(self) -> None:
        self.halted = True
        self.changed.notify_all()
        for wake in self._wakers:
            wake()

    def on_halt(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Register ``wake``, to be called under the lock when the run is stopped or cancelled.

        Return a function that removes ``wake`` again.
        """
        with self.changed:
            self._wakers.append(wake)
            if self.halted:
                wake()

        def remove() -> None:
            with self.changed:
                if wake in self._wakers:
                    self._wakers.remove(wake)

        return remove

    def on_wish(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Register ``wake`` as `on_halt`; it is called also while ranks have not agreed yet."""
        return self.on_halt(wake)

    def cancel_alone(self) -> None:
        """Cancel the run even if other ranks have not agreed."""
        self.cancel()

    def wait_for(self, ready: Callable[[], bool], *, obey_stop: bool) -> bool:
        """Block until ``ready()``, and return True; return False if the run is cancelled before.

        With ``obey_stop``, return False also if the run is stopped before.

        ``ready`` is called under the lock of `changed` and must be quick.
        """
        began = time.perf_counter()
        with self.changed:
            try:
                while not ready():
                    if self.cancelled or (obey_stop and self.halted):
                        return False
                    self.changed.wait()
                return True
            finally:
                self.wait_seconds += time.perf_counter() - began

    def notify(self) -> None:
        """Wake every waiting thread of the run."""
        with self.changed:
            self.changed.notify_all()

    # A cancelled run must not wait forever for a loader. The next methods decide under the lock
    # which thread ends the run: the step thread, or the one that replaces it.

    def leave_loader(self, *, failed: bool = False) -> None:
        """Record that the step thread has returned from the loader.

        Raises:
            Abandoned: the run has ended without this thread, which must not touch the model.
            Cancelled: the run was cancelled, and the loader has not ``failed``.
        """
        with self.changed:
            self.current_loader = None
            if self.abandoned:
                raise Abandoned
            if self.cancelled and not failed:
                raise Cancelled

    def abandon_loader(self) -> bool:
        """Leave the step thread behind if it is inside a loader; return whether it was."""
        with self.changed:
            if self.current_loader and not self._end_claimed:
                self.hung_loaders.append(self.current_loader)
                self.abandoned = self._end_claimed = True
            return self.abandoned

    def claim_end(self) -> bool:
        """Claim the right to end the run; return True to exactly one caller."""
        with self.changed:
            settled, self._end_claimed = self._end_claimed, True
            return not settled
