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
        self._interval, self._batches = 1, 0
        self._seconds, self._began = 0.0, clock()
        """seconds that votes at boundaries have taken, since a time of the clock"""
        self._num_votes = 0
        self.wishes_snapshot = False
        """whether rank 0 wishes a snapshot"""
        self.snapshot_is_due = False
        """whether all ranks take part in a snapshot at this boundary"""

    def boundary(self) -> None:
        """Vote after a batch, if a vote is due; all ranks must be at the same batch."""
        self._batches += 1
        if self._batches < self._interval:
            return
        self._batches = 0
        began = self._clock()
        self._read()
        self._post()
        self._seconds += self._clock() - began
        self._num_votes += 1

    def agree(self) -> None:
        """Vote now, and wait for the result."""
        self._read()
        self._post()
        self._read()
        self._batches = 0

    def _post(self) -> None:
        control = self._control
        numbers = torch.tensor(
            [
                control.wished_reason,
                control.wished_cancel,
                self.wishes_snapshot,
                self._next_interval() if self._world.is_first else 0,
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

    def _next_interval(self) -> int:
        """Return the batches from one vote to the next with which votes take their share."""
        elapsed = self._clock() - self._began
        if not self._num_votes or elapsed <= 0:
            return 1
        batches = self._num_votes * self._interval
        by_batch = (elapsed - self._seconds) / batches
        interval = self._seconds / self._num_votes / max(SHARE * by_batch, 1e-9)
        return max(1, min(round(interval), MOST_BATCHES))
