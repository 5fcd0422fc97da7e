"""Time slices for trainers whose steps are small, so that they do not fight for the interpreter.

A step of a small model is mostly Python's own work, which one thread at a time can do. Two such
trainers in two threads hand the interpreter's lock to and fro within each step and are slower
than one after the other. Here each has some milliseconds for itself, then the next. Trainers with
larger steps, which release the lock, and those that wait for their loaders take no part.

Nobody waits long: from a trainer that comes to a halt in its slice it is taken.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from fitloop._concurrency.control import RunControl
from fitloop._events import BatchProgress, Event
from fitloop._system import core_wait

SLICE_SECONDS = 0.05
"""what a trainer has for itself; a change of hands costs 2 ms of a cache that is cold"""
FIRST_SECONDS = 0.01
"""of the first slice, which shows whether a trainer computes when nobody is in its way"""
PATIENCE_SECONDS = 0.2
"""after which a slice is taken from a trainer that does not come to its end"""
SMALL_SECONDS = 0.002
"""processor time of a batch up to which it counts as small"""
WAITING_SHARE = 0.3
"""share of its time that a trainer waits for its loader, from which it takes no part"""
IDLE_SHARE = 0.5
"""share of its time that a trainer does not compute, from which it takes no part either"""
FREE_SHARE = 0.15
"""if it is for so large a share that nobody can have kept it from computing"""
LOOK_SECONDS = 0.25
"""between two looks whether a trainer is to take part, twice as long after each that says no"""
LONGEST_LOOK_SECONDS = 2.0
FEWEST = 8
"""batches of a look"""

Clock = Callable[[], float]


def kept_waiting() -> float:
    """Return seconds so far in which others may have kept this thread from computing.

    What other threads have computed, since they may have had the interpreter's lock, and the time
    in which other processes had the cores.
    """
    return time.process_time() - time.thread_time() + core_wait()


class TimeSlices:
    """Whose slice it is: one of the process, first come, first served."""

    def __init__(self, patience: float = PATIENCE_SECONDS, clock: Clock = time.monotonic) -> None:
        self._patience = patience
        self._clock = clock
        self.runs = 0
        """that go on; read without the lock, once a batch"""
        self.lock = threading.Lock()
        self.line: deque[TimeSliceHook] = deque()
        self.holder: TimeSliceHook | None = None
        self._since = 0.0
        """when the holder got it"""

    def admit(self, who: TimeSliceHook, cancelled: Callable[[], bool]) -> None:
        """Wait for a slice; without one when there is no need any more."""
        with self.lock:
            self.line.append(who)
            try:
                while not (first := self.line[0] is who) or self._is_taken():
                    if cancelled():
                        return
                    who.called.wait(self._left() if first else None)
                self.holder, self._since = who, self._clock()
            finally:
                self.line.remove(who)
                self._call()

    def renew(self, who: TimeSliceHook) -> bool:
        """Give the holder another slice; false when somebody waits, or it is not the holder."""
        with self.lock:
            if self.line or self.holder is not who:
                return False
            self._since = self._clock()
            return True

    def dismiss(self, who: TimeSliceHook) -> None:
        """End a slice; that of another is left alone."""
        with self.lock:
            if self.holder is who:
                self.holder = None
                self._call()

    def _call(self) -> None:
        if self.line:  # one of them; the others would wake up only to sleep on
            self.line[0].called.notify()

    def _is_taken(self) -> bool:
        return self.holder is not None and self._left() > 0

    def _left(self) -> float:
        """Return the seconds for which the holder is still waited for."""
        return max(0.0, self._since + self._patience - self._clock())


TIME_SLICES = TimeSlices()


def _nothing() -> None: ...


class TimeSliceHook:
    """The part of one run in it: a batch hook and an observer, on the step thread.

    Args:
        rest: calls a function while the run has no turn at the random generators; who waits here
            must not be waited for there.
        control: of the run: whether it is to end, and how long it has waited for its loader.
    """

    def __init__(
        self,
        rest: Callable[[Callable[[], None]], None],
        control: RunControl,
        *,
        slices: TimeSlices = TIME_SLICES,
        clock: Clock = time.perf_counter,
        processor: Clock = time.thread_time,
        kept: Clock = kept_waiting,
    ) -> None:
        self._rest = rest
        self._control = control
        self._slices = slices
        self.called = threading.Condition(slices.lock)
        """notified when it is its turn, or it is to look again"""
        self._clock = clock
        self._processor = processor
        self._kept = kept
        self._held = False
        """it has had a slice, which another may have taken from it"""
        self._interrupted = False
        """it had one, and an event ended it"""
        self._began, self._used, self._idle = clock(), processor(), control.wait_seconds
        self._barred = kept()
        """what the clocks said at the last look"""
        self._until = 0.0
        """when to look again"""
        self._pause = LOOK_SECONDS
        self._batches = 0
        with slices.lock:
            slices.runs += 1
        self._forget = control.on_halt(self.wake)

    def close(self) -> None:
        """Take no part any more; any thread."""
        with self._slices.lock:
            self._slices.runs -= 1
        self._forget()
        self._forget = _nothing  # it refers to this part, and this part to the run
        self._slices.dismiss(self)

    def wake(self) -> None:
        """Have a waiting run look whether it is to end; any thread."""
        with self._slices.lock:
            self.called.notify()

    def observe(self, event: Event) -> None:
        """End the slice: what comes between two phases may take long, or wait for somebody."""
        if self._held and not isinstance(event, BatchProgress):
            self._end()
            self._interrupted, self._until = True, 0.0

    def after_batch(self) -> None:
        """See whether it is another's turn."""
        if self._slices.runs < 2:
            return
        self._batches += 1
        now = self._clock()
        if now < self._until:
            return
        if self._held:
            self._go_on(now)
        elif self._interrupted:
            self._take()
        elif self._batches >= FEWEST:
            small = self._processor() - self._used <= SMALL_SECONDS * self._batches
            if small and not self._waits(now) and not self._idles(now):
                self._take(FIRST_SECONDS)
            else:
                self._stay_out()

    def _go_on(self, now: float) -> None:
        """At the end of a slice: keep it, hand it on, or take no part for a while."""
        if self._idles(now) or self._waits(now):  # and nobody was in its way
            self._end()
            self._pause = LONGEST_LOOK_SECONDS
            self._stay_out()
            return
        self._pause = LOOK_SECONDS
        if self._slices.renew(self):
            self._note(SLICE_SECONDS)
        else:
            self._end()
            self._take()

    def _idles(self, now: float) -> bool:
        whole, computed = now - self._began, self._processor() - self._used
        if computed >= (1 - IDLE_SHARE) * whole:
            return False
        # Not to compute is not to wait: of those who fight, each would seem to wait.
        return whole - computed - (self._kept() - self._barred) >= FREE_SHARE * whole

    def _waits(self, now: float) -> bool:
        return self._control.wait_seconds - self._idle >= WAITING_SHARE * (now - self._began)

    def _stay_out(self) -> None:
        self._note(self._pause)
        self._pause = min(2 * self._pause, LONGEST_LOOK_SECONDS)

    def _take(self, seconds: float = SLICE_SECONDS) -> None:
        self._interrupted = False
        self._rest(self._wait)
        self._note(seconds)

    def _note(self, seconds: float) -> None:
        self._began, self._used, self._idle = (
            self._clock(),
            self._processor(),
            self._control.wait_seconds,
        )
        self._barred = self._kept()
        self._batches = 0
        self._until = self._began + seconds

    def _wait(self) -> None:
        self._slices.admit(self, lambda: self._control.halted)
        self._held = True

    def _end(self) -> None:
        if self._held:
            self._held = False
            self._slices.dismiss(self)
