"""`Backlog`: the past events that a late reader of a trainer or runner needs."""

from __future__ import annotations

from dataclasses import replace

from fitloop._events import (
    BatchProgress,
    Event,
    JobEnded,
    JobStarted,
    MetricsLogged,
    PhaseEnded,
    RunStarted,
)

_LANDMARKS = (JobStarted, JobEnded, RunStarted)
"""events that are dropped last"""


class Backlog:
    """The events of the runs that go on. Of single batches it has only the last progress.

    Of a job that is over there is its `JobEnded` only. Beyond ``limit`` events the oldest of phases
    and epochs are dropped. Not thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._events: list[Event] = []
        self._progress: dict[str, BatchProgress] = {}
        """the last progress of the present phase, by name of the trainer"""
        self.dropped = 0
        """number of events that were dropped"""

    def note(self, event: Event) -> None:
        """Add an event of a run or job."""
        if isinstance(event, BatchProgress):
            self._progress[event.trainer] = event
            return
        if isinstance(event, MetricsLogged):
            return
        self._progress.pop(event.trainer, None)
        if isinstance(event, JobStarted | JobEnded):
            self.forget(event.trainer)
        elif isinstance(event, RunStarted):  # perhaps a further attempt of a job
            self.forget(event.trainer, but=JobStarted)
        elif isinstance(event, PhaseEnded) and event.batch_metrics:
            event = replace(event, batch_metrics={})  # they would take much memory
        self._events.append(event)
        if len(self._events) > self._limit:
            removable = (i for i, one in enumerate(self._events) if not isinstance(one, _LANDMARKS))
            del self._events[next(removable, 0)]
            self.dropped += 1

    def forget(self, trainer: str, *, but: type[Event] | tuple[type[Event], ...] = ()) -> None:
        """Drop the events of a trainer or job."""
        self._events = [e for e in self._events if e.trainer != trainer or isinstance(e, but)]
        self._progress.pop(trainer, None)

    def clear(self) -> None:
        """Drop all events: no run goes on."""
        self._events, self.dropped = [], 0
        self._progress.clear()

    def events(self) -> list[Event]:
        """Return the events, the newest last."""
        return [*self._events, *self._progress.values()]
