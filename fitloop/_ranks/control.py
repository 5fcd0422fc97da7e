"""`SharedControl`: the flags of a run on several ranks, which change only when all agree."""

from __future__ import annotations

from collections.abc import Callable

from fitloop._concurrency.control import RunControl
from fitloop._types import StopReason

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
