"""`Votes`: all ranks of a run stop, are cancelled or write snapshots at one batch boundary.

`SharedControl` has the flags of the run, which change when the ranks have agreed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fitloop._concurrency.control import RunControl
from fitloop._ranks.world import World
from fitloop._types import StopReason

LEAST_SECONDS, RANK_SECONDS = 0.05, 2e-4
"""between two votes, at least, and so much for each rank: a vote costs 0.4 ms where the ranks keep
all cores busy, and it lasts longer with each rank"""
_REASONS = tuple(StopReason)


class SharedControl(RunControl):
    """The flags of one run on one rank.

    ``stop`` and ``cancel`` only record a wish, which the next vote tells to all ranks: `apply` then
    sets the flags on all of them at the same batch boundary. The failure of this rank, which others
    cannot share, cancels at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wished_reason = 0
        """number of the reason of a wished stop, counted from 1; 0 for none"""
        self.wished_cancel = False
        """whether this rank was cancelled"""
        self.is_agreed = False
        """whether all ranks have agreed on the cancellation"""
        self.question_is_withdrawn = False
        """whether other ranks wish an end while this one asks a person"""
        self._wish_wakers: list[Callable[[], None]] = []

    def stop(self, reason: str = StopReason.STOPPED) -> None:
        """Wish that the run ends after a batch."""
        with self.changed:
            self.wished_reason = self.wished_reason or 1 + _REASONS.index(StopReason(reason))
            self._wake_wishes()

    def cancel(self, failure: BaseException | None = None) -> None:
        """Wish that the run is cancelled; with a ``failure``, cancel this rank at once."""
        if failure is not None:
            super().cancel(failure)
            return
        with self.changed:
            self.wished_cancel = True
            self._wake_wishes()

    @property
    def is_of_others(self) -> bool:
        """Whether other ranks of the training were cancelled, and this one ends with them."""
        return self.is_agreed and not self.wished_cancel

    def cancel_alone(self) -> None:
        """Cancel this rank at once, without the others."""
        super().cancel()

    def withdraw_question(self) -> None:
        """End the question of this rank, since others wish an end; any thread."""
        with self.changed:
            self.question_is_withdrawn = True
            self._wake_wishes()

    def apply(self, reason: int, cancel: int) -> None:
        """Set the flags that all ranks have agreed on."""
        if cancel and not self.cancelled:
            self.is_agreed = True
            with self.changed:
                self.stop_reason = str(StopReason.CANCELLED)
            super().cancel()
        elif reason and not self.halted:
            super().stop(_REASONS[reason - 1])

    def on_wish(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Register ``wake`` as `on_halt`, to be called also when a rank wishes an end."""
        remove_other = self.on_halt(wake)
        with self.changed:
            self._wish_wakers.append(wake)
            if self.wished_cancel or self.wished_reason or self.question_is_withdrawn:
                wake()

        def remove() -> None:
            remove_other()
            with self.changed:
                if wake in self._wish_wakers:
                    self._wish_wakers.remove(wake)

        return remove

    def _wake_wishes(self) -> None:
        self.changed.notify_all()
        for wake in self._wish_wakers:
            wake()


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
