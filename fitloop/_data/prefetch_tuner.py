"""Measures whether reading a loader ahead of the steps is faster than reading it inline.

A hand-off between threads costs tens of microseconds. So reading ahead wins for loaders that wait,
and loses for trivial ones. No property of a loader tells which it is, so both ways are timed. Each
pass is read in one way from its beginning to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from fitloop._data.sources import END, Source
from fitloop._rng.states import RngState


class PrefetchTuner:
    """Decides between passes whether the next one is read ahead.

    The first passes are inline, and give the median time of a load and of a whole batch. If loads
    are short or a small part of a batch, inline is the decision. If the loader only waits (for its
    workers, a disk or a server), it takes nothing from the steps and ahead is the decision. For any
    other loader the next passes are read ahead and measured as well, and the shorter time of a
    whole batch wins. If the two are close, which a busy machine can turn round, later passes try
    again, and the median of the tries decides. Times are in seconds.
    """

    SAMPLES = 6
    """least number of batches measured each way"""
    MOST_SAMPLES = 64
    """batches after which no more are measured in the present way"""
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
        """whether to read the present pass ahead"""
        self.decided = False
        """whether nothing is to be measured in the present pass"""
        self._loads: list[float] = []
        self._cpu_times: list[float] = []
        self._inline: list[float] = []
        self._ahead: list[float] = []
        self._ratios: list[float] = []
        """time of a batch ahead divided by inline, for each try"""

    def begin_pass(self) -> None:
        """Evaluate what was measured before, and choose the way of the next pass."""
        least, most = self.CLEAR
        if self.decided:
            if 0 < len(self._ratios) < self.TRIES and least < self._ratios[-1] < most:
                self._measure_again()
        elif len(self._ahead) >= self.SAMPLES:
            self._ratios.append(_median_low(self._ahead) / _median_low(self._inline))
            self._decide(ahead=_median_low(self._ratios) <= 1 - self.SMALLEST_GAIN)
        elif len(self._inline) >= self.SAMPLES and not self.ahead:
            typical = _median_low(self._loads)
            share = typical / max(_median_low(self._inline), 1e-12)
            if typical < self.SHORTEST_LOAD or share < self.SMALLEST_SHARE:
                self._decide(ahead=False)
            elif _median_low(self._cpu_times) <= self.WAITING_SHARE * typical:
                self._decide(ahead=True)
            else:
                self.ahead = True

    def add(self, load: float, total: float, cpu: float) -> None:
        """Add the times of one batch: its load, all since the last batch, CPU time of the load."""
        totals = self._ahead if self.ahead else self._inline
        if len(totals) >= self.MOST_SAMPLES:
            return
        totals.append(total)
        if not self.ahead:
            self._loads.append(load)
            self._cpu_times.append(cpu)

    def _decide(self, *, ahead: bool) -> None:
        self.ahead, self.decided = ahead, True

    def _measure_again(self) -> None:
        self.ahead = self.decided = False
        for values in (self._loads, self._cpu_times, self._inline, self._ahead):
            values.clear()


class MeasuredSource:
    """Another source during one pass; passes the times of its batches to a `PrefetchTuner`."""

    def __init__(
        self,
        source: Source,
        tuner: PrefetchTuner,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self.source = source
        self._tuner = tuner
        self._clock, self._cpu_clock = clock, cpu_clock
        self._last_fetch_at: float | None = None
        """None before the first batch; its time is not used, since the loader starts in it"""

    def fetch(self) -> Any:
        """See `Source`."""
        start, cpu_start = self._clock(), self._cpu_clock()
        batch = self.source.fetch()
        end, cpu = self._clock(), self._cpu_clock() - cpu_start
        if self._last_fetch_at is not None and batch is not END:
            self._tuner.add(end - start, end - self._last_fetch_at, cpu)
        self._last_fetch_at = self._clock()
        return batch

    @property
    def reads_ahead(self) -> bool:
        """See `Source`."""
        return self.source.reads_ahead

    @property
    def rng_state_after(self) -> RngState | None:
        """See `Source`."""
        return self.source.rng_state_after

    def close(self) -> list[Any]:
        """See `Source`."""
        return self.source.close()


def _median_low(values: Sequence[float]) -> float:
    """Return the median, or the lower of two. The module `statistics` is slow to import."""
    return sorted(values)[(len(values) - 1) // 2]
