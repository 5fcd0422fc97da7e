"""`Votes`: all ranks of a run stop, are cancelled or write snapshots at one batch boundary."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fitloop._ranks.control import SharedControl
from fitloop._ranks.world import World

SHARE = 0.01
"""largest share of the time of a run that votes may take"""
MOST_BATCHES = 1000
"""from one vote to the next"""


class Votes:
    """The votes of one run on one rank; for its step thread.

    A vote is a largest value over all ranks of a few numbers. At a batch boundary the result of the
    vote before is read, which has come in the meantime, and the next one is posted. On a device the
    host may be batches ahead, so that a flag that all ranks look at would stop them at different
    batches. Rank 0 chooses how many batches lie between two votes.
    """

    def __init__(
        self, world: World, control: SharedControl, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._world, self._control, self._clock = world, control, clock
        self._posted: tuple[Tensor, Any] | None = None
        """numbers of the vote that is going on, and the work to wait for"""
        self._interval, self._wished_interval = 1, 1
        """batches from one vote to the next: now, and as this rank wishes it"""
        self._batches, self._all_batches = 0, 0
        """since the last vote, and before it"""
        self._seconds, self._began = 0.0, clock()
        """seconds that votes at boundaries have taken, since a time of the clock"""
        self._post_seconds = 0.0
        """to post the last vote"""
        self.wishes_snapshot = False
        """whether rank 0 wishes a snapshot"""
        self.snapshot_is_due = False
        """whether all ranks take part in a snapshot at this boundary"""

    def boundary(self) -> None:
        """Vote after a batch, if a vote is due; all ranks must be at the same batch."""
        self._batches += 1
        if self._batches < self._interval:
            return
        self._count()
        interval, began = self._interval, self._clock()
        self._read()
        has_read = self._clock()
        self._adapt(interval, has_read - began + self._post_seconds)
        self._post()
        end = self._clock()
        self._post_seconds = end - has_read
        self._seconds += end - began

    def agree(self) -> None:
        """Vote now, and wait for the result."""
        self._read()
        self._post()
        self._read()
        self._count()

    def _count(self) -> None:
        self._all_batches, self._batches = self._all_batches + self._batches, 0

    def _post(self) -> None:
        control = self._control
        numbers = torch.tensor(
            [
                control.wished_reason,
                control.wished_cancel,
                self.wishes_snapshot,
                self._wished_interval if self._world.is_first else 0,
            ],
            dtype=torch.int64,
            device="cpu",
        )
        self.wishes_snapshot = False
        self._posted = numbers, self._world.post(numbers)

    def _read(self) -> None:
        if self._posted is None:
            return
        (numbers, work), self._posted = self._posted, None
        work.wait()
        reason, cancel, snapshot, self._interval = numbers.tolist()
        self.snapshot_is_due = self.snapshot_is_due or bool(snapshot)
        self._control.apply(reason, cancel)

    def _adapt(self, interval: int, seconds: float) -> None:
        """Choose the interval, after a vote of ``interval`` batches that took so many seconds.

        A vote of many ranks lasts longer than a batch. It costs nothing if the interval is longer
        still, so this looks for the shortest such interval: it doubles after a vote that took more
        than its share, and tries the half while all votes have taken less than half of theirs.
        """
        elapsed = self._clock() - self._began
        by_batch = (elapsed - self._seconds - seconds) / max(1, self._all_batches)
        if seconds > SHARE * interval * by_batch:
            self._wished_interval = min(2 * interval, MOST_BATCHES)
        elif self._seconds < SHARE / 2 * elapsed:
            self._wished_interval = max(1, interval // 2)
        else:
            self._wished_interval = interval
