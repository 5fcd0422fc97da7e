"""Measures whether reading a loader ahead of the steps is faster than reading it inline.

A hand-off between threads costs tens of microseconds, and what the reading takes from the steps
depends on both. No property of a loader tells which way is faster, so both are timed. Each pass is
read in one way from its beginning to its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class PrefetchTuner:
    """Decides between passes whether the next one is read ahead.

    The first passes are read inline, the next ones ahead. Then the way with the shorter median time
    of a batch stays. Only a clear gain decides for reading ahead, since a busy machine can make
    either way look faster.
    """

    SAMPLES = 6
    """least number of batches measured each way"""
    MOST_SAMPLES = 64
    """batches after which no more are measured in one way"""
    SMALLEST_GAIN = 0.1
    """part of a batch's time that reading ahead must save"""

    def __init__(self) -> None:
        self.ahead = False
        """whether to read the present pass ahead"""
        self.decided = False
        """whether nothing is to be measured in the present pass"""
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        """times of batches that were read inline, and ahead"""

    def begin_pass(self) -> None:
        """Evaluate what was measured before, and choose the way of the next pass."""
        inline, ahead = self._seconds[False], self._seconds[True]
        if not self.decided and len(ahead) >= self.SAMPLES:
            self.ahead = _median(ahead) <= (1 - self.SMALLEST_GAIN) * _median(inline)
            self.decided = True
        elif len(inline) >= self.SAMPLES and not self.decided:
            self.ahead = True

    def add(self, seconds: float) -> None:
        """Add the time between two batches of the present pass."""
        if len(self._seconds[self.ahead]) < self.MOST_SAMPLES:
            self._seconds[self.ahead].append(seconds)

    def timed(
        self,
        finish: Callable[[Any], Any] | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Callable[[Any], Any]:
        """Return the `LoadContext.finish_transfer` of a pass; it adds the times of its batches."""
        before: float | None = None  # the loader starts in the first batch: its time is not used

        def timed_finish(batch: Any) -> Any:
            nonlocal before
            now = clock()
            if before is not None:
                self.add(now - before)
            before = now
            return batch if finish is None else finish(batch)

        return timed_finish


def _median(values: list[float]) -> float:
    """Return the median, or the lower of two. The module `statistics` is slow to import."""
    return sorted(values)[(len(values) - 1) // 2]
