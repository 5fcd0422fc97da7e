"""Time slices for trainers whose steps are small, so that they do not fight for the interpreter.

A step of a small model is mostly Python's own work, which one thread at a time can do. Two such
trainers in two threads hand the interpreter's lock to and fro within each step and are slower
than one after the other. Here each has some milliseconds for itself, then the next. Trainers with
larger steps, which release the lock, and those that wait for their loaders take no part.

Nobody waits long: a trainer that comes to a halt in its slice is passed by.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from fitloop._events import Event

SLICE_SECONDS = 0.02
"""what a trainer has for itself; a change of hands costs about 0.1 ms"""
PATIENCE_SECONDS = 0.1
"""after which a trainer goes on beside one that does not come to the end of its slice"""
SMALL_SECONDS = 0.002
"""processor time of a batch up to which it counts as small"""
BUSY_SHARE = 0.7
"""share of a slice that a trainer computes, below which it waits for something else"""
LOOK_SECONDS = 0.25
"""between two looks whether a trainer is to take part"""
FEWEST = 8
"""batches of a look"""

Clock = Callable[[], float]


class Slices:
    """Whose slice it is: one of the process, first come, first served."""

    def __init__(self, patience: float = PATIENCE_SECONDS) -> None:
        self._patience = patience
        self.runs = 0
        """that go on; read without the lock, once a batch"""
        self.changed = threading.Condition(threading.Lock())
        self.line: deque[Slice] = deque()
        self.holder: Slice | None = None

    def admit(self, who: Slice, cancelled: Callable[[], bool]) -> bool:
        """Wait for a slice; false when patience ran out, or there is no need any more."""
        until = time.monotonic() + self._patience
        with self.changed:
            self.line.append(who)
            try:
                while self.holder is not None or self.line[0] is not who:
                    left = until - time.monotonic()
                    if left <= 0 or cancelled():
                        return False
                    self.changed.wait(left)
                self.holder = who
                return True
            finally:
                self.line.remove(who)
                self.changed.notify_all()

    def dismiss(self, who: Slice) -> None:
        """End a slice."""
        with self.changed:
            if self.holder is who:
                self.holder = None
                self.changed.notify_all()


SLICES = Slices()


class Slice:
    """The part of one run in it: a batch hook and an observer, on the step thread.

    Args:
        rest: calls a function while the run has no turn at the random generators; who waits here
            must not be waited for there.
        cancelled: whether the run is to end.
    """

    def __init__(
        self,
        rest: Callable[[Callable[[], None]], None],
        cancelled: Callable[[], bool],
        *,
        slices: Slices = SLICES,
        clock: Clock = time.perf_counter,
        processor: Clock = time.thread_time,
    ) -> None:
        self._rest = rest
        self._cancelled = cancelled
        self._slices = slices
        self._clock = clock
        self._processor = processor
        self._held = False
        self._began = self._used = 0.0
        self._until = 0.0
        """when to look again"""
        self._batches = 0
        with slices.changed:
            slices.runs += 1

    def close(self) -> None:
        """Take no part any more; any thread."""
        with self._slices.changed:
            self._slices.runs -= 1
        self._slices.dismiss(self)

    def wake(self) -> None:
        """Have a waiting run look whether it is to end; any thread."""
        with self._slices.changed:
            self._slices.changed.notify_all()

    def observe(self, event: Event) -> None:
        """End the slice: what comes between two batches may take long, or wait for somebody."""
        self._end()

    def after_batch(self) -> None:
        """See whether it is another's turn."""
        if self._slices.runs < 2:
            return
        self._batches += 1
        now = self._clock()
        if now < self._until or (not self._held and self._batches < FEWEST):
            return
        used = self._processor() - self._used
        if self._held:
            computes = used >= BUSY_SHARE * (now - self._began)
            if computes and not self._slices.line:
                self._note(now, SLICE_SECONDS)
                return
            self._end()
        else:
            computes = used <= SMALL_SECONDS * self._batches
        if computes:
            self._rest(self._wait)
        now = self._clock()
        self._note(now, SLICE_SECONDS if self._held else LOOK_SECONDS)

    def _note(self, now: float, seconds: float) -> None:
        self._began, self._used, self._batches = now, self._processor(), 0
        self._until = now + seconds

    def _wait(self) -> None:
        self._held = self._slices.admit(self, self._cancelled)

    def _end(self) -> None:
        if self._held:
            self._held = False
            self._slices.dismiss(self)
