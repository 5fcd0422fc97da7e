"""What a person sees of runs on the terminal: the lines of their epochs, and how far they are.

`EpochPrinter` prints, wherever the output goes; `ProgressView` keeps one picture of everything that
runs in this process. Both are fed with events on the step threads and know neither torch nor the
engine; the drawing is `_terminal`'s.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

from fitloop._display.console import can_draw, can_write, has_color, is_interactive
from fitloop._display.jupyter import prints_to_notebook
from fitloop._display.live_area import LIVE_AREA, Frame
from fitloop._display.notebook_view import NotebookView
from fitloop._display.status import ASCII_BARS, BarStyle, RunStatus, status_lines
from fitloop._events import EpochEnded, EpochStarted, Event, RunEnded, RunStarted, WentBack
from fitloop._format import check_display_metrics, format_duration, format_metrics, printable


class ProgressView:
    """All runs that are to be seen, in the order in which they began."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: list[RunStatus] = []
        self._drawn: list[RunStatus] = []

    def add(self, name: str, *, named: bool = False) -> RunStatus:
        """Return the status of a run that begins; its label tells it from the others."""
        with self._lock:
            taken = {run.label for run in self._runs}
            labels = (name if number == 1 else f"{name} ({number})" for number in range(1, 10**9))
            run = RunStatus(next(label for label in labels if label not in taken), named=named)
            self._runs = [*self._runs, run]
        return run

    def remove(self, run: RunStatus) -> None:
        """Have ``run`` no more."""
        with self._lock:
            self._runs = [other for other in self._runs if other is not run]

    @property
    def has_several(self) -> bool:
        """Whether what is printed must say whose it is."""
        return len(self._runs) > 1

    def show(self, run: RunStatus) -> None:
        """Show ``run`` on the terminal, if lines can be drawn over there."""
        with self._lock:
            if is_interactive() and can_draw():
                self._drawn = [r for r in self._runs if r in self._drawn or r is run]
                if len(self._drawn) == 1:
                    LIVE_AREA.show(self._paint)

    def hide(self, run: RunStatus, *, wait: bool = False) -> None:
        """Show ``run`` no more; with ``wait`` it is gone from the terminal when this returns."""
        with self._lock:
            if run not in self._drawn:
                return
            self._drawn = [other for other in self._drawn if other is not run]
            gone = LIVE_AREA.refresh if self._drawn else LIVE_AREA.hide(self._paint)
        if wait:
            gone()

    def _paint(self, width: int, height: int) -> Frame:
        look = BarStyle(color=has_color())
        if not can_write(look.done + look.half + look.to_do):
            look = ASCII_BARS
        return Frame(status_lines(self._drawn, width - 1, height, look))


PROGRESS_VIEW = ProgressView()
"""of the process, which has one terminal"""


class EpochPrinter:
    """Prints a run as it goes: the first epoch, every ``every``-th, and the end.

    Args:
        run: whose they are; its label begins the lines of a trainer that was given a name,
            and of any while several run.
        every: epochs between two that are printed; 0 prints nothing at all.
        names: the metrics to show; None for all.
        stream: where to; the ``sys.stdout`` of the moment by default.
    """

    def __init__(
        self,
        run: RunStatus,
        *,
        every: int = 1,
        names: Sequence[str] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._run = run
        self._every = every
        self._names = names
        self._stream = stream
        self._epoch = ""
        self._width = 0

    @property
    def label(self) -> str:
        """What to put before a line now: the run's label and a space, or nothing."""
        return (
            f"{printable(self._run.label)} " if self._run.named or PROGRESS_VIEW.has_several else ""
        )

    def observe(self, event: Event) -> None:
        """Print what the event is worth."""
        match event:
            case RunStarted():
                self._width = len(str(event.epochs)) * 2 + 3
            case EpochStarted():
                self._epoch = f"[{event.epoch_in_run}/{event.epochs}]"
            case EpochEnded():
                self._print_epoch(event)
            case WentBack():
                if self._every:
                    self._write(f"{self.label}went back to epoch {event.epoch_in_run}\n")
            case RunEnded():
                self._print_end(event)

    def _print_epoch(self, event: EpochEnded) -> None:
        if not self._every or (event.epoch_in_run > 1 and event.epoch_in_run % self._every):
            return
        check_display_metrics(self._names, event.metrics)
        label = self.label
        if "test" in event.metrics and len(event.metrics) == 1:
            shown = format_metrics(event.metrics["test"], self._names)
            self._write(f"{label}test  :: {shown}\n")
            return
        head = f"{label}{self._epoch:>{self._width}} - "
        indent = " " * len(head)
        lines: list[str] = []
        for phase, metrics in event.metrics.items():
            shown = format_metrics(metrics, self._names)
            lines.append(f"{indent if lines else head}{phase} :: {shown}\n")
        cut = "" if event.complete else " (stopped)"
        lines.append(f"{indent}epoch time: {format_duration(event.seconds)}{cut}\n")
        self._write("".join(lines))

    def _print_end(self, event: RunEnded) -> None:
        if event.call != "fit" or not self._every or event.error is not None:
            return
        label = self.label
        lines = [f"{label}{'-' * self._width}\n"]
        lines.append(f"{label}total time: {format_duration(event.seconds)}\n")
        if event.best_score is not None and not math.isnan(event.best_score):
            lines.append(f"{label}best score: {event.best_score:.4f}\n")
        self._write("".join(lines))

    def _write(self, text: str) -> None:
        out = self._stream if self._stream is not None else sys.stdout
        out.write(text)  # in one piece, so that nothing comes between
        out.flush()


class RunDisplay:
    """Both of them for one run: an observer. As a context manager it leaves nothing behind."""

    def __init__(
        self, name: str, *, named: bool, every: int, names: Sequence[str] | None, live: bool
    ) -> None:
        self.status = PROGRESS_VIEW.add(name, named=named)
        self.status.names = names
        self.printer = EpochPrinter(self.status, every=every, names=names)
        self._live = live and every > 0
        self._page: NotebookView | None = None
        if self._live and prints_to_notebook():
            self._page = NotebookView(self.status, every=every, names=names)

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(self, *_error: object) -> None:
        PROGRESS_VIEW.hide(self.status)  # of a run that failed before it could tell its end
        PROGRESS_VIEW.remove(self.status)
        if self._page is not None:
            self._page.close()

    def observe(self, event: Event) -> None:
        """Print and show what the event is worth."""
        self.status.observe(event)
        if self._page is not None:
            self._page.observe(event)
            return
        if isinstance(event, RunEnded):
            PROGRESS_VIEW.hide(self.status, wait=True)
        self.printer.observe(event)
        if isinstance(event, RunStarted) and self._live:
            PROGRESS_VIEW.show(self.status)
