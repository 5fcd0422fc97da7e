"""`Votes`: all ranks of a run stop, are cancelled or write snapshots at one batch boundary."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fitloop._ranks.control import SharedControl
from fitloop._ranks.world import World

LEAST_SECONDS, RANK_SECONDS = 0.01, 2e-4
"""between two votes, at least, and so much for each rank: a vote costs a rank some 50 us, and lasts
longer with each rank"""


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
        self._interval = 1
        """batches from one vote to the next"""
        self._batches, self._began = 0, clock()
        """since the last vote, and its time"""
        self.wishes_snapshot = False
        """whether rank 0 wishes a snapshot"""
        self.snapshot_is_due = False
        """whether all ranks take part in a snapshot at this boundary"""

    def boundary(self) -> None:
        """Vote after a batch, if a vote is due; all ranks must be at the same batch."""
        self._batches += 1
        if self._batches < self._interval:
            return
        by_batch = (self._clock() - self._began) / self._batches  # without the waits for votes
        needed = max(LEAST_SECONDS, RANK_SECONDS * self._world.size)
        self._vote(max(1, round(needed / max(by_batch, 1e-5))))

    def agree(self) -> None:
        """Vote now, and wait for the result."""
        self._vote(self._interval)
        self._read()

    def _vote(self, interval: int) -> None:
        """Read the last vote, and post the next one, with rank 0's wish for the interval."""
        self._read()
        control = self._control
        numbers = torch.tensor(
            [
                control.wished_reason,
                control.wished_cancel,
                self.wishes_snapshot,
                interval if self._world.is_first else 0,
            ],
            dtype=torch.int64,
            device="cpu",
        )
        self.wishes_snapshot = False
        self._posted = numbers, self._world.post(numbers)
        self._batches, self._began = 0, self._clock()

    def _read(self) -> None:
        if self._posted is None:
            return
        (numbers, work), self._posted = self._posted, None
        work.wait()
        reason, cancel, snapshot, self._interval = numbers.tolist()
        self.snapshot_is_due = self.snapshot_is_due or bool(snapshot)
        self._control.apply(reason, cancel)
