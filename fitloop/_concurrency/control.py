"""The switches of one run: stop, cancel, abandon, and the waiting that obeys them.

Owns the flags that the threads of a run and its awaiting task share. Every blocking wait of a
run is made on `RunControl.changed`, so that one notification reaches it: nothing polls. Knows
no event loop, model or loader.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from fitloop._types import StopReason


class Cancelled(BaseException):
    """Raised inside the threads of a run whose awaiting task was cancelled; never seen outside."""


class Abandoned(BaseException):
    """Raised in a thread that returns from a loader after its run has ended without it."""


class RunControl:
    """What may be asked of a run from outside while it runs.

    Flags only ever go from unset to set. They are written under the condition's lock and read
    without it, once a batch.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        """notified at every change that somebody may wait for"""
        self.halted = False
        """the run ends at the next batch boundary, for whatever reason"""
        self.cancelled = False
        self.stop_reason: str | None = None
        self.failure: BaseException | None = None
        """what an observer on the event loop raised"""
        self.current_loader: str | None = None
        """description of the loader that the step thread is inside of, if it is"""
        self.abandoned = False
        """the step thread was left inside a loader"""
        self.wait_seconds = 0.0
        """seconds that the step thread has waited for a loader or an answer, all in all"""
        self.hung_loaders: list[str] = []
        """descriptions of the loaders that the run did not wait for any longer"""
        self._settled = False
        self._wakers: list[Callable[[], None]] = []

    def stop(self, reason: str = StopReason.STOPPED) -> None:
        """End the run after the batch in hand; the first reason given stays. Any thread."""
        with self.changed:
            if self.stop_reason is None:
                self.stop_reason = str(reason)
            self._halt()

    def cancel(self, failure: BaseException | None = None) -> None:
        """End the run after the batch in hand, skipping what would follow. Any thread."""
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
        """Have ``wake`` called, under the lock, when the run is stopped or cancelled.

        Returns a function that forgets it again.
        """
        with self.changed:
            self._wakers.append(wake)
            if self.halted:
                wake()

        def forget() -> None:
            with self.changed:
                if wake in self._wakers:
                    self._wakers.remove(wake)

        return forget

    def wait_for(self, ready: Callable[[], bool], *, obey_stop: bool) -> bool:
        """Block until ``ready()``; False when the run was cancelled (or stopped) first.

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
        """Wake every waiting thread of the run to look again."""
        with self.changed:
            self.changed.notify_all()

    # A cancelled run may not wait for ever on a loader that does not return. The two calls below
    # decide, under the lock, which of the step thread and its supervisor ends the run.

    def leave_loader(self, *, failed: bool = False) -> None:
        """Note that the step thread has come back from the loader.

        Raises:
            Abandoned: the run has ended without this thread, which must touch nothing more.
            Cancelled: the run was cancelled meanwhile, and the loader has not ``failed``.
        """
        with self.changed:
            self.current_loader = None
            if self.abandoned:
                raise Abandoned
            if self.cancelled and not failed:
                raise Cancelled

    def abandon_loader(self) -> bool:
        """Give up the step thread if it is inside a loader; return whether it was."""
        with self.changed:
            if self.current_loader and not self._settled:
                self.hung_loaders.append(self.current_loader)
                self.abandoned = self._settled = True
            return self.abandoned

    def claim_end(self) -> bool:
        """Claim the right to end the run; true for exactly one caller."""
        with self.changed:
            settled, self._settled = self._settled, True
            return not settled
