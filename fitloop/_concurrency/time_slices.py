"""Time slices for runs with small steps, so that they do not fight for the interpreter's lock.

A step of a small model is mostly Python code, which one thread at a time can run. Two such runs in
two threads pass the lock to and fro within each step, and are slower than one after the other.
With time slices one of them computes for 50 ms, then the next. Runs with larger steps, which
release the lock, and runs that wait for their loaders take no part.

A run that waits for its slice holds nothing that another run needs, and waits at most 0.2 s for an
owner that makes no progress. So the waits cannot form a deadlock.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import cache

from fitloop._concurrency.control import RunControl
from fitloop._events import BatchProgress, Event, MetricsLogged

SLICE_SECONDS = 0.05
"""Length of a slice. Changing the owner costs about 2 ms, for a cold cache."""
PATIENCE_SECONDS = 0.2
"""Time after which a slice is taken from an owner that does not end it."""
TRIAL_SECONDS = 0.01
"""Length of the part of a slice after which a run that has just joined is looked at."""
CHECK_SECONDS, MAX_CHECK_SECONDS = 0.25, 8.0
"""Time between two checks whether a run is to take part; four times as long, up to the second one,
after each slice in which the run was idle."""
SMALL_STEP_SECONDS = 0.002
"""Processor time of a batch up to which a run takes part."""
LOADER_SHARE = 0.3
"""Share of the time that a run waits for its loader, from which it takes no part."""
BUSY_SHARE = 0.25
"""Share of its slice that a run must compute to take part further on."""
MIN_BATCHES = 8
"""Batches that the first check needs."""

Clock = Callable[[], float]


class TimeSlices:
    """A fair queue for the one slice that there is."""

    def __init__(self, patience: float = PATIENCE_SECONDS, clock: Clock = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self.runs = 0
        """Number of runs in progress; read without the lock once a batch."""
        self.lock = threading.Lock()
        self.queue: deque[TimeSliceHook] = deque()
        self.owner: TimeSliceHook | None = None
        self._owned_since = 0.0

    def acquire(self, hook: TimeSliceHook, halted: Callable[[], bool]) -> None:
        """Wait for the slice; return without it when the run is to end."""
        with self.lock:
            self.queue.append(hook)
            try:
                while not (is_first := self.queue[0] is hook) or self._patience_left() > 0:
                    if halted():
                        return
                    hook.notified.wait(self._patience_left() if is_first else None)
                self.owner, self._owned_since = hook, self._clock()
            finally:
                self.queue.remove(hook)
                self._notify_first()

    def renew(self, hook: TimeSliceHook) -> bool:
        """Give the owner another slice; False if another run waits or has taken the slice."""
        with self.lock:
            if self.queue or self.owner is not hook:
                return False
            self._owned_since = self._clock()
            return True

    def release(self, hook: TimeSliceHook) -> None:
        """End the slice of ``hook``, if it is the owner."""
        with self.lock:
            if self.owner is hook:
                self.owner = None
                self._notify_first()

    def _notify_first(self) -> None:
        if self.queue:
            self.queue[0].notified.notify()

    def _patience_left(self) -> float:
        end = 0.0 if self.owner is None else self._owned_since + self._patience
        return max(0.0, end - self._clock())


TIME_SLICES = TimeSlices()


@cache
def _reset_in_forked_children() -> None:
    """Forget all runs in each process that is forked from now on: it has no other threads."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=TIME_SLICES.__init__)  # type: ignore[misc]


class TimeSliceHook:
    """The part of one run in the time slices: a batch hook and an observer, on the step thread.

    Args:
        wait: calls a function while the run holds nothing that other runs need.
        control: of the run, with the time that it has waited for its loader.
    """

    def __init__(
        self,
        wait: Callable[[Callable[[], None]], None],
        control: RunControl,
        *,
        slices: TimeSlices = TIME_SLICES,
        clock: Clock = time.perf_counter,
        thread_clock: Clock = time.thread_time,
    ) -> None:
        _reset_in_forked_children()
        self._wait, self._control, self._slices = wait, control, slices
        self._clock, self._thread_clock = clock, thread_clock
        self.notified = threading.Condition(slices.lock)
        """Notified when the run is first in the queue, or is to end."""
        self._has_slice = False
        """The run has acquired the slice; another run may have taken it since."""
        self._was_interrupted = False
        """An event ended the slice."""
        self._is_on_trial = True
        """The run has not yet shown that it computes in its slice."""
        self._check_seconds = CHECK_SECONDS
        self._start_period(0.0)
        with slices.lock:
            slices.runs += 1
        self._forget: Callable[[], None] | None = control.on_halt(self.wake)

    def close(self) -> None:
        """Take no part any more; any thread."""
        with self._slices.lock:
            self._slices.runs -= 1
        if self._forget is not None:
            self._forget()
        self._forget = None  # refers to this hook, and the hook to the run
        self._slices.release(self)

    def wake(self) -> None:
        """Let a run that waits for its slice check whether it is to end; any thread."""
        with self._slices.lock:
            self.notified.notify()

    def observe(self, event: Event) -> None:
        """End the slice at each event but the frequent ones: callbacks may take long."""
        if self._has_slice and not isinstance(event, BatchProgress | MetricsLogged):
            self._release()
            self._was_interrupted, self._period_ends = True, 0.0

    def after_batch(self) -> None:
        """Acquire, renew or release the slice when its time is over."""
        if self._slices.runs < 2:
            return
        self._batches += 1
        now = self._clock()
        if now < self._period_ends:
            return
        if self._was_interrupted:
            self._acquire()
        elif self._batches < MIN_BATCHES and not self._has_slice:
            return
        elif not self._takes_part(now):
            self._leave()
        elif self._has_slice and self._is_on_trial:
            self._is_on_trial, self._check_seconds = False, CHECK_SECONDS
            self._period_ends = self._started + SLICE_SECONDS
        elif self._has_slice and self._slices.renew(self):
            self._start_period(SLICE_SECONDS)
        else:
            self._release()
            self._acquire()

    def _takes_part(self, now: float) -> bool:
        seconds, computed = now - self._started, self._thread_clock() - self._thread_time
        waited = self._control.wait_seconds - self._wait_seconds
        if computed > SMALL_STEP_SECONDS * self._batches or waited >= LOADER_SHARE * seconds:
            return False
        # Without the slice, a run may be idle because others have the interpreter's lock.
        return not self._has_slice or computed > BUSY_SHARE * seconds

    def _start_period(self, seconds: float) -> None:
        self._started, self._thread_time = self._clock(), self._thread_clock()
        self._wait_seconds, self._batches = self._control.wait_seconds, 0
        self._period_ends = self._started + seconds

    def _acquire(self) -> None:
        self._was_interrupted = False
        self._wait(lambda: self._slices.acquire(self, lambda: self._control.halted))
        self._has_slice = True
        self._start_period(TRIAL_SECONDS if self._is_on_trial else SLICE_SECONDS)

    def _leave(self) -> None:
        """Take no part until the next check."""
        if self._has_slice and self._is_on_trial:  # its loader or step waits, so it will again
            self._check_seconds = min(4 * self._check_seconds, MAX_CHECK_SECONDS)
        self._is_on_trial = True
        self._release()
        self._start_period(self._check_seconds)

    def _release(self) -> None:
        if self._has_slice:
            self._has_slice = False
            self._slices.release(self)
