"""Output of runs in this process: one live view of all runs.

`ProgressView` shows bars on a terminal, and `RunDisplay` joins them, or a notebook page, with the
printed lines of one run. Both are observers of events on the step threads.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fitloop._display.console import can_draw, can_encode, has_color, is_interactive
from fitloop._display.jupyter import prints_to_notebook
from fitloop._display.live_area import LIVE_AREA, Frame
from fitloop._display.printed import EpochPrinter, PrintingRuns, PrintStyle
from fitloop._display.progress_lines import ProgressLines
from fitloop._display.status import RunStatus
from fitloop._display.status_lines import ASCII_BARS, BarStyle, status_lines
from fitloop._events import EpochEnded, Event, RunEnded, RunStarted
from fitloop._format import check_display_metrics

if TYPE_CHECKING:
    from fitloop._display.notebook_view import NotebookView


class ProgressView:
    """The bars of all running trainers, in the order of their start."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._visible: list[RunStatus] = []
        self.printing = PrintingRuns()

    def add(self, name: str, *, named: bool = False) -> RunStatus:
        """Return the status of a new run; its label is ``name``, numbered if it is in use."""
        with self._lock:
            labels = {run.label for run in self.printing.runs}
            numbered = (f"{name} ({number})" for number in itertools.count(2))
            candidates = itertools.chain([name], numbered)
            run = RunStatus(next(c for c in candidates if c not in labels), named=named)
            self._set_runs([*self.printing.runs, run])
        return run

    def remove(self, run: RunStatus) -> None:
        """Forget a run that has ended."""
        with self._lock:
            self._set_runs([other for other in self.printing.runs if other is not run])

    def _set_runs(self, runs: list[RunStatus]) -> None:
        self.printing.runs = runs
        LIVE_AREA.has_several_runs = self.has_several

    @property
    def has_several(self) -> bool:
        """Whether several runs print, so that each line must begin with a label."""
        return len(self.printing.runs) > 1

    def show(self, run: RunStatus) -> bool:
        """Show the bars of ``run`` if the output is a terminal that can redraw lines.

        Returns whether they are shown.
        """
        if not (is_interactive() and can_draw()):
            return False
        with self._lock:
            self._visible = [r for r in self.printing.runs if r in self._visible or r is run]
            if len(self._visible) == 1:
                LIVE_AREA.show(self._render)
        return True

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


class RunDisplay:
    """All output of one run: an observer and a context manager.

    With ``named``, the user chose the name of the trainer. With ``live``, bars are shown, or a page
    in a notebook. The other arguments are those of `EpochPrinter`.
    """

    def __init__(
        self,
        name: str,
        *,
        named: bool,
        every: int,
        names: Sequence[str] | None,
        live: bool,
        style: PrintStyle = "block",
    ) -> None:
        self.status = PROGRESS_VIEW.add(name, named=named)
        self.status.display_metrics = names
        self.printer = EpochPrinter(
            self.status, PROGRESS_VIEW.printing, every=every, style=style, color=live
        )
        self._unchecked_names = names if every else None
        self._live = live and every > 0
        self._lines = ProgressLines(self.status, self.printer)
        self._is_drawn = False
        self._page: NotebookView | None = None
        if self._live and prints_to_notebook():
            from fitloop._display.notebook_view import NotebookView

            self._page = NotebookView(self.status, every=every)

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
        if isinstance(event, EpochEnded) and self._unchecked_names:
            check_display_metrics(self._unchecked_names, event.metrics)
            self._unchecked_names = None
        if self._page is not None:
            self._page.observe(event)
            return
        if isinstance(event, RunEnded):
            PROGRESS_VIEW.hide(self.status, wait=True)
        self.printer.observe(event)
        if isinstance(event, RunStarted) and self._live:
            self._is_drawn = PROGRESS_VIEW.show(self.status)
        if self._live and not self._is_drawn:
            self._lines.observe(event)
