"""Inline or ahead: which way of loading is faster, found out by measuring the loader itself.

A hand-off between threads costs tens of microseconds, and a loader in pure Python holds the
interpreter lock while it works, so loading ahead wins for loaders that wait or release the lock
and loses for trivial ones. Nothing about a loader tells which it is, so both are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median_low
from typing import Any

from fitloop._data.sources import END, InlineSource, LoadContext, PrefetchSource
from fitloop._rng.streams import RngState


class PrefetchTuner:
    """Finds out, over as many passes as it takes, whether loading ahead of the steps is faster.

    Inline first: the median time of a load and of a whole batch. When loads are too short or too
    small a part to gain from, inline it stays. A loader that only waits, for a disk or a server or
    its workers, takes nothing from the steps and goes ahead. Any other is measured ahead as well:
    the median time of a whole batch then, and the faster way wins. When neither is much faster,
    which a busy machine can turn round, later passes try again, and the median of the tries
    counts. Times are in seconds.
    """

    SAMPLES = 6
    """batches measured each way"""
    SHORTEST_LOAD = 100e-6
    """about twice what a hand-off between two threads costs (measured: 38 us)"""
    SMALLEST_SHARE = 0.05
    """part of a batch's time that loading must take"""
    SMALLEST_GAIN = 0.05
    """part of a batch's time that loading ahead must save"""
    WAITING_SHARE = 0.2
    """part of a load's time that the thread_clock works, up to which the loader is taken to wait"""
    CLEAR = (0.75, 1.15)
    """a batch ahead to one inline: outside of these nothing is tried again"""
    TRIES = 3

    def __init__(self) -> None:
        self.ahead = False
        """how to load now"""
        self.decided = False
        self.uses_rng = False
        """the loader draws from the process's generators, and was kept inline for that"""
        self._loads: list[float] = []
        self._computed: list[float] = []
        self._inline: list[float] = []
        self._ahead: list[float] = []
        self._ratios: list[float] = []
        """a batch ahead to one inline, of each try"""

    def begin_pass(self) -> None:
        """Try again what was not clear."""
        least, most = self.CLEAR
        again = self.decided and not self.uses_rng and 0 < len(self._ratios) < self.TRIES
        if again and least < self._ratios[-1] < most:
            self.ahead = self.decided = False
            for values in (self._loads, self._computed, self._inline, self._ahead):
                values.clear()

    def mark_uses_rng(self) -> None:
        """Stay inline: the loader draws from generators that the steps draw from as well."""
        self.uses_rng = True
        self._decide(ahead=False)

    def add(self, load: float, whole: float, computed: float) -> None:
        """Count a batch that took ``load`` to load and ``whole`` from batch to batch.

        ``computed`` is the thread_clock's time in the load.
        """
        if self.ahead:
            self._ahead.append(whole)
            if len(self._ahead) == self.SAMPLES:
                self._ratios.append(median_low(self._ahead) / median_low(self._inline))
                self._decide(ahead=median_low(self._ratios) <= 1 - self.SMALLEST_GAIN)
            return
        self._loads.append(load)
        self._inline.append(whole)
        self._computed.append(computed)
        if len(self._loads) == self.SAMPLES:
            typical = median_low(self._loads)
            share = typical / max(median_low(self._inline), 1e-12)
            if typical < self.SHORTEST_LOAD or share < self.SMALLEST_SHARE:
                self._decide(ahead=False)
            elif median_low(self._computed) <= self.WAITING_SHARE * typical:
                self._decide(ahead=True)
            else:
                self.ahead = True

    def _decide(self, *, ahead: bool) -> None:
        self.ahead, self.decided = ahead, True


class AdaptiveSource:
    """Loads as a `PrefetchTuner` says, which it feeds with what it measures on the way."""

    def __init__(
        self,
        context: LoadContext,
        depth: int,
        tuner: PrefetchTuner,
        *,
        watch_rng: bool,
        clock: Callable[[], float] = time.perf_counter,
        thread_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._context = context
        self._depth = depth
        self._tuner = tuner
        self._watch_rng = watch_rng
        self._clock = clock
        self._thread_clock = thread_clock
        self._to_skip = 1  # the first batch of a pass pays for its start
        self._last: float | None = None
        self._inline = InlineSource(context)
        self._source: PrefetchSource | None = None
        # A loader that draws only in some epochs would be found out too late: look again at the
        # second batch of every pass. The first may draw to begin.
        self._to_check = 2 if tuner.ahead and watch_rng else 0
        if tuner.ahead and not watch_rng:
            self._go_ahead()

    def fetch(self) -> Any:
        """See `Source`."""
        if self._to_check:
            return self._checked_fetch()
        return self._fetch() if self._tuner.decided else self._measured_fetch()

    def _checked_fetch(self) -> Any:
        self._to_check -= 1
        before = None if self._to_check else self._context.rng.fingerprint()
        batch = self._inline.fetch()
        if before is not None:
            if self._context.rng.fingerprint() != before:
                self._tuner.mark_uses_rng()
            elif batch is not END:
                self._go_ahead()
        return batch

    def _fetch(self) -> Any:
        if self._source is None:
            return self._inline.fetch()
        batch = self._source.fetch()
        ended = self._source.exhausted or self._context.control.halted
        if batch is END and self._source.paused and not ended:
            self._source.close()  # its last batches are used up
            self._source = None
            return self._inline.fetch()
        return batch

    def _measured_fetch(self) -> Any:
        watched = self._watch_rng and not self._to_skip and not self._tuner.ahead
        before = self._context.rng.fingerprint() if watched else None
        began, worked = self._clock(), self._thread_clock()
        batch = self._fetch()
        ended, worked = self._clock(), self._thread_clock() - worked
        if watched and self._context.rng.fingerprint() != before:
            self._tuner.mark_uses_rng()
        elif self._to_skip or self._last is None:
            self._to_skip = max(0, self._to_skip - 1)
        elif batch is not END:
            self._tuner.add(ended - began, ended - self._last, worked)
            if self._tuner.ahead and self._source is None:
                self._go_ahead()
            elif not self._tuner.ahead and self._source is not None:
                self._source.pause()
        self._last = self._clock()
        return batch

    def _go_ahead(self) -> None:
        self._source = PrefetchSource(self._context, self._depth)
        self._to_skip = 1  # the one that the new thread begins with

    @property
    def rng_state_after(self) -> RngState | None:
        """See `Source`."""
        return None if self._source is None else self._source.rng_state_after

    @property
    def is_prefetching(self) -> bool:
        """Whether the last batches came ahead of the steps."""
        return self._source is not None

    def close(self) -> list[Any]:
        """See `Source`."""
        ahead = [] if self._source is None else self._source.close()
        return [*ahead, *self._inline.close()]
