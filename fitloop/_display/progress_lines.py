"""Plain lines at growing intervals that show the progress of a run, where nothing can be drawn."""

from __future__ import annotations

import time
from collections.abc import Callable

from fitloop._display.console import write_output
from fitloop._display.printed import EpochPrinter
from fitloop._display.status import RunStatus
from fitloop._events import BatchProgress, Event, RunStarted
from fitloop._format import printable

FIRST_SECONDS = 10.0
"""time without a printed line of the run until the first of these lines"""
LAST_SECONDS = 600.0
"""the longest time between two lines"""
SHARE = 0.2
"""between these limits, time to the next line as a share of the time since the run began"""


class ProgressLines:
    """Prints a line of a long phase, at growing intervals: an observer.

    Of several runs each prints less often, so that all together print as much as one.

    Args:
        run: status of the run, which observes each event first.
        printer: prints the other lines of the run.
    """

    def __init__(
        self,
        run: RunStatus,
        printer: EpochPrinter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._printer, self._clock = run, printer, clock
        self._started_at = self._printed_at = 0.0

    def observe(self, event: Event) -> None:
        """Print a line if it is time for one."""
        now = self._clock()
        if isinstance(event, RunStarted):
            self._started_at = self._printed_at = now
        elif isinstance(event, BatchProgress):
            last = max(self._printed_at, self._printer.printed_at)
            interval = max(FIRST_SECONDS, min(LAST_SECONDS, SHARE * (now - self._started_at)))
            if now - last >= interval * max(1, len(self._printer.printing.runs)):
                self._printed_at = now
                write_output(f"{self._printer.lead}{printable(self._text(now))}\n")

    def _text(self, now: float) -> str:
        run = self._run
        head = f"[{run.epoch_in_run}/{run.epochs}] - " if run.call == "fit" else ""
        parts = (
            f"{head}{run.phase} {run.batch_count}",
            *run.metric_texts().values(),
            run.learning_rate_text,
            run.rate_text,
            run.time_left_text(now),
        )
        return ", ".join(filter(None, parts))
