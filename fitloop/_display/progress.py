"""Output of runs in this process: printed epochs, and one live view of all runs.

`EpochPrinter` prints lines, `ProgressView` shows bars on a terminal, and `RunDisplay` joins both,
or a notebook page, for one run. All are observers of events on the step threads.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fitloop._display.console import (
    can_draw,
    can_encode,
    has_color,
    is_interactive,
    write_output,
)
from fitloop._display.jupyter import prints_to_notebook
from fitloop._display.live_area import LIVE_AREA, Frame
from fitloop._display.status import ASCII_BARS, BarStyle, RunStatus, status_lines
from fitloop._events import (
    EarlyStopped,
    EpochEnded,
    EpochStarted,
    Event,
    RunEnded,
    RunStarted,
    WentBack,
)
from fitloop._format import (
    check_display_metrics,
    display_width,
    format_duration,
    format_metrics,
    format_number,
    printable,
)

if TYPE_CHECKING:
    from fitloop._display.notebook_view import NotebookView


class ProgressView:
    """The bars of all running trainers, in the order of their start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: list[RunStatus] = []
        self._visible: list[RunStatus] = []

    def add(self, name: str, *, named: bool = False) -> RunStatus:
        """Return the status of a new run; its label is ``name``, numbered if it is in use."""
        with self._lock:
            labels = {run.label for run in self._runs}
            numbered = (f"{name} ({number})" for number in itertools.count(2))
            candidates = itertools.chain([name], numbered)
            run = RunStatus(next(c for c in candidates if c not in labels), named=named)
            self._runs = [*self._runs, run]
            LIVE_AREA.has_several_runs = self.has_several
        return run

    def remove(self, run: RunStatus) -> None:
        """Forget a run that has ended."""
        with self._lock:
            self._runs = [other for other in self._runs if other is not run]
            LIVE_AREA.has_several_runs = self.has_several

    @property
    def has_several(self) -> bool:
        """Whether several runs print, so that each line must begin with a label."""
        return len(self._runs) > 1

    def show(self, run: RunStatus) -> None:
        """Show the bars of ``run``, if the output is a terminal that can redraw lines."""
        with self._lock:
            if is_interactive() and can_draw():
                self._visible = [r for r in self._runs if r in self._visible or r is run]
                if len(self._visible) == 1:
                    LIVE_AREA.show(self._render)

    def hide(self, run: RunStatus, *, wait: bool = False) -> None:
        """Hide the bars of ``run``; with ``wait``, return when they are gone from the terminal."""
        with self._lock:
            if run not in self._visible:
                return
            self._visible = [other for other in self._visible if other is not run]
            gone = LIVE_AREA.refresh if self._visible else LIVE_AREA.hide(self._render)
        if wait:
            gone()

    def _render(self, width: int, height: int) -> Frame:
        style = BarStyle(color=has_color())
        if not can_encode(style.done + style.half + style.to_do):
            style = ASCII_BARS
        return Frame(status_lines(self._visible, width - 1, height, style))


PROGRESS_VIEW = ProgressView()
"""the view of the process, which has one terminal"""


class EpochPrinter:
    """Prints the first epoch of a run, every ``every``-th, and the end.

    Args:
        run: status of the run. Lines begin with its label if the trainer has a name or if several
            runs print.
        every: epochs between two that are printed; 0 prints nothing.
        names: the metrics to show; None for all.
    """

    def __init__(
        self, run: RunStatus, *, every: int = 1, names: Sequence[str] | None = None
    ) -> None:
        self._run = run
        self._every = every
        self._names = names
        self._epoch = ""
        self._width = 0
        self._early_stop = ""

    @property
    def label(self) -> str:
        """The start of a line: the run's label and a space, or nothing."""
        named = self._run.named or PROGRESS_VIEW.has_several
        return f"{printable(self._run.label)} " if named else ""

    def observe(self, event: Event) -> None:
        """Print the lines of an event."""
        match event:
            case RunStarted():
                self._width = len(str(event.epochs)) * 2 + 3
            case EpochStarted():
                self._epoch = f"[{event.epoch_in_run}/{event.epochs}]"
            case EarlyStopped():
                self._early_stop = event.message
            case EpochEnded():
                self._print_epoch(event)
            case WentBack() if self._every:
                write_output(f"{self.label}went back to epoch {event.epoch_in_run}\n")
            case RunEnded():
                self._print_end(event)

    def _print_epoch(self, event: EpochEnded) -> None:
        if not self._every or (event.epoch_in_run > 1 and event.epoch_in_run % self._every):
            return
        label = self.label
        if "test" in event.metrics and len(event.metrics) == 1:
            write_output(f"{label}test  :: {format_metrics(event.metrics['test'], self._names)}\n")
            return
        head = f"{label}{self._epoch:>{self._width}} - "
        indent = " " * display_width(head)
        lines: list[str] = []
        for phase, metrics in event.metrics.items():
            values = format_metrics(metrics, self._names)
            lines.append(f"{indent if lines else head}{phase} :: {values}\n")
        stopped = "" if event.complete else " (stopped)"
        lines.append(f"{indent}epoch time: {format_duration(event.seconds)}{stopped}\n")
        write_output("".join(lines))

    def _print_end(self, event: RunEnded) -> None:
        if event.call != "fit" or not self._every or event.error is not None:
            return
        label = self.label
        lines = [f"{label}{'-' * self._width}\n"]
        if self._early_stop:
            lines.append(f"{label}early stop: {printable(self._early_stop)}\n")
        lines.append(f"{label}total time: {format_duration(event.seconds)}\n")
        if event.best_score is not None and not math.isnan(event.best_score):
            lines.append(f"{label}best score: {format_number(event.best_score)}\n")
        write_output("".join(lines))


class RunDisplay:
    """All output of one run: an observer and a context manager.

    With ``named``, the user chose the name of the trainer. With ``live``, bars are shown, or a page
    in a notebook. The other arguments are those of `EpochPrinter`.
    """

    def __init__(
        self, name: str, *, named: bool, every: int, names: Sequence[str] | None, live: bool
    ) -> None:
        self.status = PROGRESS_VIEW.add(name, named=named)
        self.status.display_metrics = names
        self.printer = EpochPrinter(self.status, every=every, names=names)
        self._names, self._every = names, every
        self._live = live and every > 0
        self._page: NotebookView | None = None
        if self._live and prints_to_notebook():
            from fitloop._display.notebook_view import NotebookView

            self._page = NotebookView(self.status, every=every, names=names)

    def __enter__(self) -> RunDisplay:
        return self

    def __exit__(self, *_error: object) -> None:
        PROGRESS_VIEW.hide(self.status)  # if the run failed before its RunEnded
        PROGRESS_VIEW.remove(self.status)
        if self._page is not None:
            self._page.close()

    def observe(self, event: Event) -> None:
        """Print and show an event."""
        self.status.observe(event)
        if isinstance(event, EpochEnded) and self._names and self._every:
            check_display_metrics(self._names, event.metrics)
            self._names = None  # once
        if self._page is not None:
            self._page.observe(event)
            return
        if isinstance(event, RunEnded):
            PROGRESS_VIEW.hide(self.status, wait=True)
        self.printer.observe(event)
        if isinstance(event, RunStarted) and self._live:
            PROGRESS_VIEW.show(self.status)
