"""Measures whether reading a loader ahead of the steps is faster than reading it inline.

A hand-off between threads costs tens of microseconds, and a loader in pure Python holds the
interpreter lock while it works. So reading ahead wins for loaders that wait or release the lock,
and loses for trivial ones. No property of a loader tells which it is, so both ways are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fitloop._data.sources import END, InlineSource, LoadContext, PrefetchSource
from fitloop._rng.states import RngState


class PrefetchTuner:
    """Decides, over as many passes as it needs, whether reading ahead is faster.

    First it measures inline: the median time of a load and of a whole batch. If loads are short or
    a small part of a batch, inline is the decision. If the loader only waits (for a disk, a server
    or its workers), it takes nothing from the steps and ahead is the decision. Any other loader is
    measured ahead as well, and the shorter time of a whole batch wins. If the two are close, which
    a busy machine can turn round, later passes try again, and the median of the tries decides.
    Times are in seconds.
    """

    SAMPLES = 6
    """batches measured each way"""
    SHORTEST_LOAD = 100e-6
    """about twice the cost of a hand-off between two threads (measured: 38 us)"""
    SMALLEST_SHARE = 0.05
    """part of a batch's time that loading must take"""
    SMALLEST_GAIN = 0.05
    """part of a batch's time that reading ahead must save"""
    WAITING_SHARE = 0.2
    """part of a load's time spent on the CPU, up to which the loader counts as waiting"""
    CLEAR = (0.75, 1.15)
    """time of a batch ahead divided by inline; outside this range there is no second try"""
    TRIES = 3

    def __init__(self) -> None:
        self.ahead = False
        """whether to read ahead now"""
        self.decided = False
        self.uses_rng = False
        """the loader uses the global generators, so it stays inline"""
        self._loads: list[float] = []
        self._cpu_times: list[float] = []
        self._inline: list[float] = []
        self._ahead: list[float] = []
        self._ratios: list[float] = []
        """time of a batch ahead divided by inline, for each try"""

    def begin_pass(self) -> None:
        """Start another try if the last one was close."""
        least, most = self.CLEAR
        again = self.decided and not self.uses_rng and 0 < len(self._ratios) < self.TRIES
        if again and least < self._ratios[-1] < most:
            self.ahead = self.decided = False
            for values in (self._loads, self._cpu_times, self._inline, self._ahead):
                values.clear()

    def mark_uses_rng(self) -> None:
        """Decide for inline, because the loader and the steps use the same generators."""
        self.uses_rng = True
        self._decide(ahead=False)

    def add(self, load: float, total: float, cpu: float) -> None:
        """Add the times of one batch: its load, all since the last batch, CPU time of the load."""
        if self.ahead:
            self._ahead.append(total)
            if len(self._ahead) == self.SAMPLES:
                self._ratios.append(_median_low(self._ahead) / _median_low(self._inline))
                self._decide(ahead=_median_low(self._ratios) <= 1 - self.SMALLEST_GAIN)
            return
        self._loads.append(load)
        self._inline.append(total)
        self._cpu_times.append(cpu)
        if len(self._loads) == self.SAMPLES:
            typical = _median_low(self._loads)
            share = typical / max(_median_low(self._inline), 1e-12)
            if typical < self.SHORTEST_LOAD or share < self.SMALLEST_SHARE:
                self._decide(ahead=False)
            elif _median_low(self._cpu_times) <= self.WAITING_SHARE * typical:
                self._decide(ahead=True)
            else:
                self.ahead = True

    def _decide(self, *, ahead: bool) -> None:
        self.ahead, self.decided = ahead, True


class AdaptiveSource:
    """Reads inline or ahead as a `PrefetchTuner` says, and gives it the measured times.

    With ``watch_rng``, reading a batch may use the global generators; if it does, it stays inline.
    """

    def __init__(
        self,
        context: LoadContext,
        read: Callable[[], Any],
        depth: int,
        tuner: PrefetchTuner,
        *,
        watch_rng: bool,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._context = context
        self._read: Callable[[], Any] | None = read
        self._depth = depth
        self._tuner = tuner
        self._watch_rng = watch_rng
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._skipped_samples = 1  # the first batch of a pass includes the start of the loader
        self._last_fetch_at: float | None = None
        self._inline = InlineSource(context, read)
        self._ahead: PrefetchSource | None = None
        # Some loaders use random numbers in some epochs only. So the second batch of every pass is
        # read inline and checked; the first one may use random numbers to start the loader.
        self._fetches_to_check = 2 if tuner.ahead and watch_rng else 0
        if tuner.ahead and not watch_rng:
            self._read_ahead()

    def fetch(self) -> Any:
        """Return the next batch or `END`; measure the reads until the mode is decided."""
        if self._fetches_to_check:
            return self._checked_fetch()
        return self._fetch() if self._tuner.decided else self._measured_fetch()

    def _checked_fetch(self) -> Any:
        self._fetches_to_check -= 1
        if self._fetches_to_check:
            return self._inline.fetch()
        before = self._context.rng.fingerprint()
        batch = self._inline.fetch()
        if self._context.rng.fingerprint() != before:
            self._tuner.mark_uses_rng()
        elif batch is not END:
            self._read_ahead()
        return batch

    def _fetch(self) -> Any:
        if self._ahead is None:
            return self._inline.fetch()
        batch = self._ahead.fetch()
        finished = self._ahead.exhausted or self._context.control.halted
        if batch is END and self._ahead.paused and not finished:
            self._ahead.close()  # its queue is empty
            self._ahead = None
            return self._inline.fetch()
        return batch

    def _measured_fetch(self) -> Any:
        watched = self._watch_rng and not self._skipped_samples and not self._tuner.ahead
        before = self._context.rng.fingerprint() if watched else None
        start, cpu_start = self._clock(), self._cpu_clock()
        batch = self._fetch()
        end, cpu = self._clock(), self._cpu_clock() - cpu_start
        if watched and self._context.rng.fingerprint() != before:
            self._tuner.mark_uses_rng()
        elif self._skipped_samples or self._last_fetch_at is None:
            self._skipped_samples = max(0, self._skipped_samples - 1)
        elif batch is not END:
            self._tuner.add(end - start, end - self._last_fetch_at, cpu)
            if self._tuner.ahead and self._ahead is None:
                self._read_ahead()
            elif not self._tuner.ahead and self._ahead is not None:
                self._ahead.pause()
        self._last_fetch_at = self._clock()
        return batch

    def _read_ahead(self) -> None:
        assert self._read is not None
        self._ahead = PrefetchSource(self._context, self._read, self._depth)
        self._skipped_samples = 1  # the first batch includes the start of the thread

    @property
    def rng_state_after(self) -> RngState | None:
        """See `Source`."""
        return None if self._ahead is None else self._ahead.rng_state_after

    @property
    def is_prefetching(self) -> bool:
        """Whether the last batches were read ahead of the steps."""
        return self._ahead is not None

    def close(self) -> list[Any]:
        """See `Source`."""
        self._read = None
        ahead = [] if self._ahead is None else self._ahead.close()
        return [*ahead, *self._inline.close()]


def _median_low(values: Sequence[float]) -> float:
    """Return the median, or the lower of two. The module `statistics` is slow to import."""
    return sorted(values)[(len(values) - 1) // 2]
